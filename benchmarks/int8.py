"""INT8 against FP32: what it changes on real films, and how fast ONNX Runtime and OpenVINO run both, and FP16.

    python benchmarks/int8.py accuracy [--bundle B] [--data M.csv] [--json FILE]
    python benchmarks/int8.py speed [--bundle B] [--data M.csv] [--network shipped|resnet50] [--left 0.2] [--json FILE]

`accuracy`: the trunk in 8-bit integers with none, some and half of its convolutions left in float, the worst first as
`magsd export --precision int8` orders them; over films of patients that took part in neither calibration nor choice.
Weights with 7 bits (what is written) and 8 bits (which saturates on x86 without VNNI), and OpenVINO on the same file.

`speed`: each engine in a process of its own, which waits while another one runs; they take turns of a few images.
The ratio is of the processor time of a turn to that of ONNX Runtime in FP32 in the same round, because the machine
may be busy with other work; wall time beside it. Median and quartiles over the rounds. ResNet50 has random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd.data import read_manifest
from magsd_export.int8 import Calibrated, calibrate, quantize, write_int8
from magsd_export.int8_bundle import ALONE, divide
from magsd_export.int8_choice import Effect, Reference, rank
from magsd_export.precision import onnx_network, write_half
from magsd_export.sources import RealImages
from magsd_runtime.bundle import INPUT_NAME, OUTPUT_NAMES, Bundle, load_bundle
from magsd_runtime.errors import MagsdError
from magsd_runtime.shipped import choose_bundle
from scores import default_data_root
from timing import describe, machine, save

ENGINES = ("ort-fp32", "ort-fp16", "ort-int8", "openvino-fp32", "openvino-bf16", "openvino-int8")
BASELINE = ENGINES[0]
LEFT = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # shares of the convolutions that stay in float
IMAGES = 4  # a turn
Run = Callable[[NDArray[np.float32]], dict[str, NDArray[np.floating]]]


def films_of(bundle: Bundle, data: Path, most: int) -> dict[str, list[NDArray[np.float32]]]:
    """Network inputs of each part, at most ``most`` of one."""
    parts = divide(read_manifest(data, lenient=True).records)
    return {
        name: [image for _, image in RealImages(records[:most], bundle.preprocessing, {})]
        for name, records in parts.items()
    }


def openvino_network(path: Path, threads: int, precision: str) -> Run:
    """``path`` on OpenVINO's CPU plugin. ``precision``: f32, or bf16, which is its own choice where the CPU has it."""
    import openvino  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1}
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    request = compiled.create_infer_request()

    def run(images: NDArray[np.float32]) -> dict[str, NDArray[np.floating]]:
        found = request.infer({INPUT_NAME: images})
        return {name: np.array(found[name]) for name in OUTPUT_NAMES}

    return run


def open_engine(engine: str, folder: Path, threads: int) -> Run:
    """An engine of :data:`ENGINES` on the files in ``folder``."""
    library, _, precision = engine.partition("-")
    path = folder / (f"{precision}.onnx" if precision in ("int8", "fp16") else "fp32.onnx")
    if library == "openvino":
        return openvino_network(path, threads, "bf16" if precision == "bf16" else "f32")
    import onnx

    return onnx_network(onnx.load(path), threads=threads)


def work(engine: str, folder: Path, threads: int) -> int:
    """A process of `speed`: for each line on stdin, one turn; prints its wall and processor seconds."""
    images = np.load(folder / "images.npy")
    run = open_engine(engine, folder, threads)
    for image in images:
        run(image[np.newaxis])
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        for image in images:
            run(image[np.newaxis])
        print(json.dumps([time.perf_counter() - wall, time.process_time() - processor]), flush=True)
    return 0


def speed(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Seconds of every turn of every engine, wall and processor, in rounds."""
    command = [sys.executable, __file__, "work", "--folder", str(folder), "--threads", str(threads), "--engine"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    workers = {
        engine: subprocess.Popen(
            [*command, engine], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for engine in ENGINES
    }
    turns: dict[str, list[list[float]]] = {engine: [] for engine in ENGINES}
    try:
        for engine, worker in workers.items():
            if _line(worker, engine) != "ready":
                raise MagsdError(f"{engine} did not start")
        for _ in range(rounds):
            for engine, worker in workers.items():
                assert worker.stdin is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
                turns[engine].append(json.loads(_line(worker, engine)))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return turns


def _line(worker: subprocess.Popen[str], engine: str) -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline().strip()
    if not line:
        raise MagsdError(f"{engine} ended: is its library installed (pip install openvino)?")
    return line


def ratios(turns: dict[str, list[list[float]]], engine: str, clock: int) -> tuple[float, float, float]:
    """Median and quartiles of how many times faster ``engine`` was than the baseline in the same round."""
    found = [base[clock] / turn[clock] for base, turn in zip(turns[BASELINE], turns[engine])]
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return middle, low, high


def speed_table(turns: dict[str, list[list[float]]], threads: int) -> str:
    lines = [f"{threads} thread(s)     ms an image   faster by (processor time)   faster by (wall time)"]
    for engine, taken in turns.items():
        milliseconds = 1e3 * statistics.median(turn[1] for turn in taken) / IMAGES
        cells = [f"{engine:<16}{milliseconds:12.1f}"]
        for clock in (1, 0):
            middle, low, high = ratios(turns, engine, clock)
            cells.append(f"{middle:10.2f} ({low:.2f} to {high:.2f})")
        lines.append("   ".join(cells))
    return "\n".join(lines)


def ordered(bundle: Bundle, films: dict[str, list[NDArray[np.float32]]]) -> tuple[Calibrated, list[str]]:
    """The calibrated network of ``bundle``, and its layers, the one whose quantization costs most first."""
    import onnx

    calibrated = calibrate(bundle.model_path, films["calibration"])
    reference = Reference(onnx_network(onnx.load(bundle.model_path)), films["choice"][:ALONE], bundle.temperature)
    ranked = rank(
        calibrated.layers,
        lambda layer: reference.effect(onnx_network(quantize(calibrated, set(calibrated.layers) - {layer}))),
    )
    return calibrated, [layer for layer, _ in ranked]


def accuracy(bundle: Bundle, films: dict[str, list[NDArray[np.float32]]]) -> dict[str, Any]:
    """Effects on the films of the check, by bits of the weights and share of the layers left in float."""
    import onnx

    calibrated, layers = ordered(bundle, films)
    reference = Reference(onnx_network(onnx.load(bundle.model_path)), films["check"], bundle.temperature)
    rows: list[dict[str, Any]] = []

    def add(what: str, left: int, effect: Effect) -> None:
        rows.append({"what": what, "left_in_float": left, **effect.to_dict()})
        print(f"{what:<24} {left:>3} of {len(layers)} in float: {effect.format()}", flush=True)

    for bits in (7, 8):
        for share in LEFT:
            left = round(share * len(layers))
            network = onnx_network(quantize(calibrated, layers[:left], reduce_range=bits == 7))
            add(f"ORT, {bits}-bit weights", left, reference.effect(network))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        left = round(0.2 * len(layers))
        write_int8(quantize(calibrated, layers[:left]), path)
        add("OpenVINO, 7-bit weights", left, reference.effect(openvino_network(path, 1, "f32")))
    add("OpenVINO, bf16", len(layers), reference.effect(openvino_network(bundle.model_path, 1, "bf16")))
    return {"rows": rows, "order": calibrated.titles(layers), "worst_first": layers}


def prepare(
    network: str, bundle: Bundle, films: dict[str, list[NDArray[np.float32]]], folder: Path, left: float
) -> None:
    """Write what `speed` runs: networks in fp32, fp16 and int8 with a share ``left`` in float, and images.npy."""
    np.save(folder / "images.npy", np.stack(films["check"][:IMAGES]))
    source = folder / "fp32.onnx"
    if network == "resnet50":
        import torch

        from magsd.models import MANet
        from magsd_export.to_onnx import export_onnx

        torch.manual_seed(0)
        model = MANet("resnet50", num_classes=len(bundle.classes)).eval()
        export_onnx(model, bundle.preprocessing, source, {"magsd.model": "random weights"})
    else:
        source.write_bytes(bundle.model_path.read_bytes())
    write_half(source, folder / "fp16.onnx")
    if left:  # of random weights no layer is worse than another: only the box's network is ordered
        calibrated, layers = ordered(bundle, films)
        write_int8(quantize(calibrated, layers[: round(left * len(layers))]), folder / "int8.onnx")
        return
    write_int8(quantize(calibrate(source, films["calibration"][:24])), folder / "int8.onnx")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", choices=("accuracy", "speed", "work"))
    parser.add_argument("--bundle", metavar="DIR", help="default: the one in the box")
    parser.add_argument("--data", type=Path, default=default_data_root() / "dataset_b.csv", metavar="M.csv")
    parser.add_argument("--films", type=int, default=200, metavar="N", help="at most so many of each part")
    parser.add_argument("--network", choices=("shipped", "resnet50"), default="shipped")
    parser.add_argument("--left", type=float, default=0.0, metavar="SHARE", help="speed: of the layers, left in float")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.task == "work":
        return work(options.engine, options.folder, options.threads[0])
    if options.left and options.network != "shipped":
        parser.error("--left goes with --network shipped")
    facts = machine("onnxruntime", "openvino")
    print(describe(facts))
    try:
        bundle = load_bundle(choose_bundle(options.bundle))
        films = films_of(bundle, options.data, options.films if options.task == "accuracy" else 24)
        results: dict[str, Any] = {"machine": facts, "films": {name: len(part) for name, part in films.items()}}
        if options.task == "accuracy":
            results["accuracy"] = accuracy(bundle, films)
        else:
            with TemporaryDirectory() as name:
                prepare(options.network, bundle, films, Path(name), options.left)
                for threads in options.threads:
                    turns = speed(Path(name), threads, options.rounds)
                    results[f"{options.network}, {threads} threads"] = turns
                    print(speed_table(turns, threads), flush=True)
    except MagsdError as error:
        print(f"int8: {error}", file=sys.stderr)
        return error.exit_code
    save(options.json, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
