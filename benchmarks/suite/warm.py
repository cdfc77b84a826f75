"""From the file to the prediction at batch 1, against the sum of the bare library calls on the same file.

The bare calls are what nobody can do without: decode, resize, CLAHE, z-score and the network, and where the bundle's
preprocessing crops to the lungs, the resize and the network that find them. Nothing is checked, judged or explained.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from magsd_runtime.bundle import Bundle, load_bundle
from magsd_runtime.images import read_radiograph
from magsd_runtime.lungs import LUNG_SIZE, network_bytes
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.preprocessing import Region, frame
from session_options import options_of
from timing import measure

from .context import Context
from .figures import ratio, spread
from .films import Format
from .report import Bars, Goal, Report, Table

LIMIT = 1.15
FILES: tuple[tuple[int, Format], ...] = (
    (512, "png"), (1024, "png"), (2048, "png"), (4096, "png"), (1024, "jpg"), (2048, "jpg"), (2048, "png16"),
    (2048, "dcm"),
)  # fmt: skip
QUICK_FILES: tuple[tuple[int, Format], ...] = ((256, "png"), (256, "dcm"))
SECONDS = 8.0
"""Each file is measured for at least so long."""


class Bare:
    """The library calls of one bundle, with nothing around them."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        import onnxruntime as ort

        self._spec = bundle.preprocessing
        self._session: Any = ort.InferenceSession(
            str(bundle.model_path), options_of("as magsd", threads), providers=["CPUExecutionProvider"]
        )
        self._lungs: Any = None
        if self._spec.crop == "lungs":
            self._lungs = cv2.dnn.readNetFromONNX(np.frombuffer(network_bytes(self._spec.lungs_sha256), np.uint8))

    def lungs(self, pixels: NDArray[np.uint8]) -> None:
        if self._lungs is not None:
            square = np.asarray(cv2.resize(pixels, (LUNG_SIZE, LUNG_SIZE), interpolation=cv2.INTER_AREA), np.uint8)
            self._lungs.setInput(zscore(square)[np.newaxis, np.newaxis])
            self._lungs.forward()

    def resize(self, pixels: NDArray[np.uint8], region: Region) -> NDArray[np.uint8]:
        size = (self._spec.size, self._spec.size)
        part = pixels[region.y0 : region.y1, region.x0 : region.x1]
        return np.asarray(cv2.resize(part, size, interpolation=cv2.INTER_AREA), np.uint8)

    def clahe(self, square: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not self._spec.clahe_clip:
            return square
        grid = (self._spec.clahe_grid, self._spec.clahe_grid)
        return np.asarray(cv2.createCLAHE(self._spec.clahe_clip, grid).apply(square), np.uint8)

    def network(self, image: NDArray[np.float32]) -> None:
        self._session.run(None, {"image": image})

    def all(self, decode: Callable[[], NDArray[np.uint8]], region: Region) -> None:
        pixels = decode()
        self.lungs(pixels)
        self.network(zscore(self.clahe(self.resize(pixels, region)))[np.newaxis, np.newaxis])


def zscore(square: NDArray[np.uint8]) -> NDArray[np.float32]:
    mean, deviation = cv2.meanStdDev(square)
    return np.asarray((square - np.float32(mean[0, 0])) / np.float32(max(deviation[0, 0], 1e-6)), np.float32)


def decoders(path: Path) -> dict[str, Callable[[], NDArray[np.uint8]]]:
    """By library: the bare call from the file to uint8 (H, W)."""
    if path.suffix == ".dcm":
        from pydicom import dcmread

        return {"pydicom": lambda: np.asarray(dcmread(path).pixel_array >> 4, np.uint8)}
    if path.stem.endswith("-16"):
        return {
            "OpenCV": lambda: np.asarray(np.right_shift(_read(path, cv2.IMREAD_UNCHANGED), 8), np.uint8),
            "Pillow": lambda: np.asarray(np.asarray(Image.open(path)) >> 8, np.uint8),
        }
    return {
        "OpenCV": lambda: np.asarray(_read(path, cv2.IMREAD_GRAYSCALE), np.uint8),
        "Pillow": lambda: np.asarray(Image.open(path), np.uint8),
    }


def _read(path: Path, flag: int) -> NDArray[Any]:
    found = cv2.imread(str(path), flag)
    assert found is not None
    return found


def run_part(context: Context) -> Report:
    files = [context.film(*what) for what in (QUICK_FILES if context.quick else FILES)]
    clock = time.process_time if context.processor_time else time.perf_counter
    cv2.setNumThreads(context.used_threads)
    rows, data, goals, drawn = [], {}, [], []
    for name, path in context.bundles.items():
        bundle = load_bundle(path)
        bare = Bare(bundle, context.used_threads)
        with Pipeline.open(path, "cpu", threads=context.used_threads) as pipeline:
            for film in files:
                context.say(f"warm: {name}, {film.name}")
                found = one(pipeline, bare, bundle, film, context, clock)
                rows.append((name, film.name, *found["row"]))
                data[f"{name}, {film.name}"] = found["data"]
                drawn.append((f"{film.name}, {name}", *found["times"]))
                goals.append(Goal(f"{name}, {film.name}: over the bare calls", LIMIT, "x", found["times"][0]))
    columns = ("bundle", "file", "status", "magsd ms", "bare ms", "decoded by", "ratio", "middle half",
               "decode", "lungs", "resize", "CLAHE", "network")  # fmt: skip
    table = Table("Bare: the calls in one go, with the faster decoder. The last columns: each of them alone, ms.",
                  columns, tuple(rows))  # fmt: skip
    laps = list(dict.fromkeys(lap for entry in data.values() for lap in entry["magsd_steps_ms"]))
    steps = Table(
        "magsd's own steps, ms, as each prediction says; medians.", ("bundle, file", *laps),
        tuple((name, *(entry["magsd_steps_ms"].get(lap) for lap in laps)) for name, entry in data.items()),
    )  # fmt: skip
    return Report((table, steps), tuple(goals), (Bars("magsd over the bare calls", "x", tuple(drawn)),), data=data)


def one(
    pipeline: Pipeline, bare: Bare, bundle: Bundle, film: Path, context: Context, clock: Callable[[], float]
) -> dict[str, Any]:
    """One file: the row of the table after bundle and file, the record, and median and upper quartile of the ratio."""
    pixels = read_radiograph(film).pixels
    region = frame(pixels, bundle.preprocessing).region
    decode, square = decoders(film), bare.resize(pixels, region)
    network_input = zscore(bare.clahe(square))[np.newaxis, np.newaxis]
    laps: list[dict[str, float]] = []

    def predict() -> None:
        laps.append(dict(pipeline.predict(film, with_heat=False).prediction.timings_ms))

    status = pipeline.predict(film, with_heat=False).prediction.status
    calls: dict[str, Callable[[], object]] = {"magsd": predict}
    calls |= {f"bare, {library}": lambda call=call: bare.all(call, region) for library, call in decode.items()}
    calls |= {f"decode, {library}": call for library, call in decode.items()}
    calls |= {
        "lungs": lambda: bare.lungs(pixels),
        "resize": lambda: bare.resize(pixels, region),
        "CLAHE": lambda: bare.clahe(square),
        "network": lambda: bare.network(network_input),
    }
    timings = measure(
        calls, repeats=context.repeats, seconds=0 if context.quick else SECONDS, warmup=context.warmup, clock=clock
    )
    library = min(decode, key=lambda name: timings[f"bare, {name}"].median)
    times = ratio(timings["magsd"].seconds, timings[f"bare, {library}"].seconds)
    steps = [1e3 * timings[step].median for step in (f"decode, {library}", "lungs", "resize", "CLAHE", "network")]
    taken = [1e3 * timings[way].median for way in ("magsd", f"bare, {library}")]
    by_step = {lap: median([one[lap] for one in laps if lap in one]) for lap in laps[-1]}
    return {
        "row": (status, *taken, library, f"{times.median:.2f}", f"{times.low:.2f} to {times.high:.2f}", *steps),
        "times": (times.median, times.high),
        "data": {
            "status": status, "ratio": times.to_dict(), "decoder": library, "magsd_steps_ms": by_step,
            "ms": {call: spread([1e3 * value for value in found.seconds]).to_dict() for call, found in timings.items()},
        },
    }  # fmt: skip
