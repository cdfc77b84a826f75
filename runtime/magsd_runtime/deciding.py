"""Run any two networks of a bundle over films, through the whole pipeline, and over inputs made to break one of them.

side           network                               runs on
torch          the checkpoint it was exported from   PyTorch (needs --run, and the training part of magsd)
fp32           model.onnx                            ONNX Runtime, CPU
fp16           model.fp16.onnx                       ONNX Runtime, CPU, which rounds its weights and nothing else
fp16-rounded   the same, each result rounded         ONNX Runtime, CPU (needs the training part of magsd)
int8           model.int8.onnx                       ONNX Runtime, CPU
cuda           model.onnx                            ONNX Runtime, CUDA
engine         a plan in engines/                    TensorRT
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from .backends import Backend, CheckedBackend, open_backend
from .bundle import Bundle
from .decision_parity import Allowed, Outputs, Seen, Totals, allowed_between, compare_film, output_difference
from .decision_report import DecisionReport, HostileInput
from .errors import DataError, MagsdError, UsageError, require
from .localization import localization_map
from .manifest_csv import read_lines
from .parity import BEYOND_RANGE, hostile_inputs
from .pipeline import Pipeline
from .site_rules import SiteRules

if TYPE_CHECKING:
    from .engines.passport import Passport

SIDES = ("torch", "fp32", "fp16", "fp16-rounded", "int8", "cuda", "engine")
_BACKENDS = {"fp32": "cpu", "fp16": "cpu-fp16", "int8": "cpu-int8", "cuda": "cuda"}

Films = Iterable[tuple[str, Path]]


def compare_sides(
    bundle: Bundle, first: Side, second: Side, films: Films, *, source: str, step: Callable[[], object] = lambda: None
) -> DecisionReport:
    """Judge each of ``films`` (name and file) by both sides, one film at a time, then the hostile ones.

    A file that cannot be read is a film like others: both sides must say so.
    """
    allowed = allowed_between(first.precision, second.precision)
    totals, files = Totals(), Totals()

    def judge(name: str, path: Path, into: Totals) -> None:
        into.add(compare_film(name, first.see(path), second.see(path), allowed))

    for name, path in films:
        judge(name, path, totals)
        step()
    with TemporaryDirectory(prefix="magsd-verify-") as folder:
        for name, path in hostile_files(Path(folder)):
            judge(name, path, files)
    return DecisionReport(
        bundle=str(bundle.path),
        model_sha256=bundle.model_sha256,
        rules_sha256=first.rules_sha256,
        sides=(first.facts, second.facts),
        allowed=allowed,
        source=source,
        films=totals,
        files=files,
        inputs=tuple(_hostile_inputs(bundle, first, second, allowed)),
    )


class Side:
    """One network behind the pipeline, which remembers what the network gave for the last film."""

    def __init__(self, name: str, bundle: Bundle, backend: CheckedBackend, rules: SiteRules | None = None) -> None:
        self.name, self.precision = name, backend.precision
        self._recording = _Recording(backend)
        self._bundle = bundle
        self._pipeline = Pipeline(bundle, cast(CheckedBackend, self._recording), rules=rules)
        self.rules_sha256 = self._pipeline.rules.sha256()
        self.facts = {
            "side": name, "backend": backend.name, "device": backend.device, "precision": backend.precision,
        }  # fmt: skip

    def see(self, path: Path) -> Seen:
        """Judge one file."""
        self._recording.take()
        prediction = self._pipeline.predict(path, with_heat=False).prediction
        batch = self._recording.take()
        if batch is None:
            return Seen(prediction)
        outputs = {name: values[0] for name, values in batch.items()}
        heat = None
        if prediction.label is not None:
            best = self._bundle.classes.index(prediction.label)
            shown = self._bundle.localization["map"]
            heat = localization_map(shown, outputs["attention"], outputs["evidence"], best)
        return Seen(prediction, outputs, heat)

    def run(self, image: NDArray[np.float32]) -> Outputs | None:
        """The outputs of one network input float32 (1, S, S), without the batch axis; None where the network fails."""
        try:
            return {name: values[0] for name, values in self._recording.run(image[np.newaxis]).items()}
        except MagsdError:
            return None


class _Recording:
    """A backend that keeps its last outputs."""

    def __init__(self, inner: CheckedBackend) -> None:
        self._inner = inner
        self.name, self.device, self.precision = inner.name, inner.device, inner.precision
        self.reason = inner.reason
        self._last: Outputs | None = None

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        outputs = self._inner.run(images)
        self._last = {name: values.copy() for name, values in outputs.items()}
        return outputs

    def take(self) -> Outputs | None:
        """The outputs of the last batch since this was last asked; None if there was none."""
        last, self._last = self._last, None
        return last

    def close(self) -> None:
        self._inner.close()


@contextmanager
def open_side(
    name: str, bundle: Bundle, *, run: Path | None = None, threads: int | None = None, rules: SiteRules | None = None
) -> Iterator[tuple[Side, Passport | None]]:
    """Open one of :data:`SIDES`; of an engine also its passport. ``run``: for torch, see ``find_checkpoint``.
    ``rules``: as of ``Pipeline``.

    Raises
    ------
    UsageError
        If there is no side of that name, or torch without ``run``.
    MagsdError
        As ``open_backend`` does, and if the checkpoint does not belong to the bundle.
    """
    passport = None
    if name not in SIDES:
        raise UsageError(f"--compare names {name!r}: expected two of {', '.join(SIDES)}")
    if name == "torch":
        if run is None:
            raise UsageError("--compare torch needs --run: the run, its fold or the checkpoint of the bundle")
        part = require("magsd_export.comparing_sides", feature="comparing with PyTorch", extra="train")
        backend = CheckedBackend(cast(Backend, part.open_torch(bundle, run, threads)), bundle, f"{name} was asked for")
    elif name == "fp16-rounded":
        part = require("magsd_export.comparing_sides", feature="rounding as a GPU does", extra="train")
        backend = CheckedBackend(cast(Backend, part.open_rounded(bundle, threads)), bundle, f"{name} was asked for")
    elif name == "engine":
        passport, backend = _open_engine(bundle)
    elif name == "fp16":
        from .backends.onnx_runtime import OnnxRuntimeBackend

        backend = CheckedBackend(OnnxRuntimeBackend(bundle, "cpu-fp16", threads=threads), bundle, "fp16 was asked for")
    else:
        backend = open_backend(bundle, _BACKENDS[name], threads=threads)
    with backend:
        yield Side(name, bundle, backend, rules), passport


def _open_engine(bundle: Bundle) -> tuple[Passport | None, CheckedBackend]:
    """The bundle's engine for this machine, proven or not: this is what proves it."""
    from .backends.tensorrt_engine import engines_here, open_by_name, open_engine

    fit, _ = engines_here(bundle)
    if not fit:
        return None, CheckedBackend(open_by_name(bundle), bundle, "an engine was asked for")  # raises the reason
    return fit[0], CheckedBackend(open_engine(bundle, fit[0]), bundle, "an engine was asked for")


def golden_films(bundle: Bundle) -> list[tuple[str, Path]]:
    """The bundle's golden inputs."""
    return [(f"golden {path.stem}", path) for path in sorted((bundle.path / "golden").glob("*.png"))]


def manifest_films(manifest: Path) -> list[tuple[str, Path]]:
    """The images of a manifest CSV, each once, as written there and as a path.

    Raises
    ------
    DataError
        If it is no manifest, a line of it cannot be used, or it is empty.
    """
    found: dict[str, Path] = {}
    for line in read_lines(manifest):
        if isinstance(line, str):
            raise DataError(f"{manifest}: {line}")
        found[line.path] = Path(os.path.join(manifest.parent, line.path))
    if not found:
        raise DataError(f"{manifest}: names no image")
    return list(found.items())


def hostile_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Pictures that are no films, written to ``folder`` one after the other, 256 x 256 pixels."""
    import cv2

    rng = np.random.default_rng(4)
    y, x = np.mgrid[0:256, 0:256]
    noise = rng.integers(0, 256, (256, 256))
    point = np.zeros((256, 256))
    point[128, 128] = 255
    pictures = {
        "blank": np.zeros((256, 256)),
        "constant": np.full((256, 256), 127),
        "saturated": np.full((256, 256), 255),
        "almost constant": 127 + (noise > 254),
        "almost saturated": 255 - 3 * (noise > 200),
        "one white pixel": point,
        "noise": noise,
        "saturated noise": np.where(noise > 127, 255, 0),
        "checkerboard": np.where((x // 8 + y // 8) % 2 == 0, 255, 0),
        "gradient": (x + y) // 2,
    }
    for name, picture in pictures.items():
        path = folder / f"{name.replace(' ', '-')}.png"
        if not cv2.imwrite(str(path), picture.astype(np.uint8)):
            raise MagsdError(f"{path}: cannot be written: is the disk full?")
        yield name, path


def _hostile_inputs(bundle: Bundle, first: Side, second: Side, allowed: Allowed) -> Iterator[HostileInput]:
    """Network inputs that no film gives. Scaling an input by 1000 scales the first layer's sums as scaling its weights
    would; what float16 makes of that is reported and not judged, for no z-score of an image is ever so large."""
    exact = first.precision == second.precision == "fp32"
    for name, image in hostile_inputs(bundle.preprocessing.size).items():
        one, other = first.run(image), second.run(image)
        judged = exact or name not in BEYOND_RANGE
        finite = (_finite(one), _finite(other))
        share, same = None, False
        if one is not None and other is not None and all(finite):
            share = max(output_difference(key, one[key], other[key], allowed)[2] for key in one)
            same = bool(one["logits"].argmax() == other["logits"].argmax())
        yield HostileInput(name, finite, same, share, judged)


def _finite(outputs: Outputs | None) -> bool:
    return outputs is not None and all(bool(np.isfinite(values).all()) for values in outputs.values())
