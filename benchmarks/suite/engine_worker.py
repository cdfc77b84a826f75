"""One engine with one network, in a process of its own; does what a line on stdin asks for.

python engine_worker.py ENGINE BUNDLE THREADS [--quick]

it prints    {"ready": true, "open_seconds": s, "version": "..."}, or {"error": "..."} and ends
{"batch": 8, "calls": 5}  ->  {"seconds": [..], "processor": [..]}    one more call comes first, uncounted
{"memory": true}          ->  {"peak_bytes": n}
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from magsd_runtime.benchmarking.worker import peak_memory

Run = Callable[[Any], object]


def onnx_runtime(bundle: Path, threads: int, quick: bool) -> tuple[Run, str]:
    """As magsd opens it."""
    from magsd_runtime.backends import open_backend
    from magsd_runtime.bundle import load_bundle

    return open_backend(load_bundle(bundle), "cpu", threads=threads).run, metadata.version("onnxruntime")


def torch_eager(bundle: Path, threads: int, quick: bool) -> tuple[Run, str]:
    return _torch(bundle, threads), metadata.version("torch")


def torch_channels_last(bundle: Path, threads: int, quick: bool) -> tuple[Run, str]:
    return _torch(bundle, threads, channels_last=True), metadata.version("torch")


def torch_compile(bundle: Path, threads: int, quick: bool) -> tuple[Run, str]:
    """With the default backend, which needs a C++ compiler; a quick run traces and compiles nothing."""
    return _torch(bundle, threads, compiled="aot_eager" if quick else "inductor"), metadata.version("torch")


def openvino(bundle: Path, threads: int, quick: bool) -> tuple[Run, str]:
    import openvino as ov  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]

    # float32, as all others: on some processors its default is bfloat16
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    core = ov.Core()
    request = core.compile_model(core.read_model(str(bundle / "model.onnx")), "CPU", settings).create_infer_request()
    return lambda images: request.infer({"image": images}), ov.__version__.partition("-")[0]


ENGINES: dict[str, tuple[str, Callable[[Path, int, bool], tuple[Run, str]]]] = {
    "ONNX Runtime": ("onnxruntime", onnx_runtime),
    "torch, eager": ("torch", torch_eager),
    "torch, eager, channels last": ("torch", torch_channels_last),
    "torch.compile": ("torch", torch_compile),
    "OpenVINO": ("openvino", openvino),
}
"""By name: the module that must be there, and how to open it."""


def _torch(bundle: Path, threads: int, *, channels_last: bool = False, compiled: str = "") -> Run:
    import torch
    from through_torch import network

    torch.set_num_threads(threads)
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    model = network(manifest["model"]["architecture"], len(manifest["classes"]))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    if compiled:
        model = torch.compile(model, backend=compiled)

    def run(images: Any) -> object:
        with torch.inference_mode():
            return model(torch.from_numpy(images).contiguous(memory_format=layout))

    return run


def main(arguments: list[str]) -> int:
    engine, bundle, threads = arguments[0], Path(arguments[1]), int(arguments[2])
    size = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["preprocessing"]["size"]
    began = time.perf_counter()
    try:
        run, version = ENGINES[engine][1](bundle, threads, "--quick" in arguments)
        run(np.zeros((1, 1, size, size), np.float32))
    except Exception as error:  # whatever it is, it is why this engine is not measured
        say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        return 1
    say({"ready": True, "open_seconds": time.perf_counter() - began, "version": version})
    images: dict[int, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.get("memory"):
            say({"peak_bytes": peak_memory()})
            continue
        batch = asked["batch"]
        if batch not in images:
            images[batch] = np.random.default_rng(0).normal(size=(batch, 1, size, size)).astype(np.float32)
        wall, processor = [], []
        run(images[batch])  # the caches are another process's by now
        for _ in range(asked["calls"]):
            began, used = time.perf_counter(), time.process_time()
            run(images[batch])
            wall.append(time.perf_counter() - began)
            processor.append(time.process_time() - used)
        say({"seconds": wall, "processor": processor})
    return 0


def say(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
