"""A bundle gets its network in 8-bit integers, if the films say that it may."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd.data import Manifest, Record, read_manifest
from magsd_runtime.backends import open_backend
from magsd_runtime.bundle import MANIFEST_NAME, MODEL_NAMES, OUTPUT_NAMES, Bundle, load_bundle
from magsd_runtime.bundle_writing import check_out, copy_bundle, list_files, publishing
from magsd_runtime.errors import DataError, UsageError, VerificationError
from magsd_runtime.files import replacing, sha256_file, write_json
from magsd_runtime.images import read_radiograph
from magsd_runtime.parity import Network
from magsd_runtime.preprocessing import preprocess
from magsd_runtime.verification import EXPECTED_OF, VerificationReport, read_expected, verify_bundle

from .bundling import prove
from .int8 import Calibrated, calibrate, quantize, write_int8
from .int8_choice import LEAST_CORRELATION, Choice, Effect, Reference, choose, rank
from .precision import onnx_network
from .sources import RealImages, spread

MAX_DROP = 0.01
PARTS = {"calibration": 1, "choice": 1, "check": 2}  # of four patients in turn
LEAST = {"calibration": 24, "choice": 24, "check": 48}  # films
MOST = {"calibration": 128, "choice": 96, "check": 256}
MARGIN = 0.7  # of --max-drop, on the films of the choice: the first choice that holds there holds partly by luck
ALONE = 24  # films of the choice on which each layer alone is judged


@dataclass(frozen=True)
class Films:
    """Network inputs of one part, each float32 (1, S, S), and how many patients they are of."""

    images: tuple[NDArray[np.float32], ...]
    patients: int

    def to_dict(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(np.ascontiguousarray(image, "<f4").tobytes())
        return {"films": len(self.images), "patients": self.patients, "inputs_sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Quantized:
    """The new bundle, what stayed in float, and what the films of the check showed."""

    bundle: Bundle
    left: tuple[str, ...]
    layers: int
    effect: Effect
    verification: VerificationReport

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle.path),
            "model": {"name": self.bundle.name, "version": self.bundle.version, "sha256": self.bundle.model_sha256},
            **self.bundle.manifest["precisions"]["int8"],
            "research_use_only": True,
        }

    def format(self) -> str:
        facts = self.bundle.manifest["files"][MODEL_NAMES["int8"]]
        return "\n".join(
            [
                f"{MODEL_NAMES['int8']} {facts['size'] / 1e6:.1f} MB, {self.layers - len(self.left)} of {self.layers} "
                "convolutions of the trunk in integers; against float32, on films that played no part in it:",
                self.effect.format(),
                f"left in float: {', '.join(self.left) or 'none'}",
            ]
        )


def quantize_bundle(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    manifest: Manifest,
    *,
    max_drop: float = MAX_DROP,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Quantized:
    """Copy the bundle at ``path`` to ``out`` (itself, with ``force``) with ``model.int8.onnx`` added.

    The films of ``manifest`` are divided by patient: one part calibrates, one chooses the layers that stay in float,
    and what is promised is measured on the third (:data:`PARTS`). All else in the bundle stays as it is.

    Raises
    ------
    BundleError
        If there is no sound bundle at ``path``.
    UsageError, DataError
        If an argument cannot be used, ``out`` exists, or there are too few films (:data:`LEAST`).
    VerificationError
        If the bounds cannot be met; the line has the figures, and there is no new bundle.
    """
    bundle, out = load_bundle(path), Path(out)
    if not 0 < max_drop < 1:
        raise UsageError(f"--max-drop is {max_drop:g}: expected a number between 0 and 1, such as {MAX_DROP:g}")
    check_out(out, force)
    report("reading     the films")
    films = {name: _read(name, records, bundle) for name, records in divide(manifest.records).items()}
    with open_backend(bundle, "cpu") as backend:
        calibrated, choice = _choose(bundle, backend.run, films, max_drop, report)
        if not choice.found:
            raise VerificationError(
                f"INT8 does not keep to --max-drop {max_drop:g} with half of the layers in float: the best of "
                f"{choice.tried} choices had {choice.effect.format()}; nothing was written"
            )
        report(f"checking    on {len(films['check'].images)} other films")
        quantized = quantize(calibrated, choice.leave)
        reference = Reference(backend.run, films["check"].images, bundle.temperature)
    effect = reference.effect(onnx_network(quantized))
    if not effect.within(max_drop):
        raise VerificationError(
            f"INT8 does not keep to --max-drop {max_drop:g} on films that it was not chosen on: {effect.format()}; "
            "nothing was written"
        )
    with publishing(out, force) as folder:
        copy_bundle(bundle, folder)
        write_int8(quantized, folder / MODEL_NAMES["int8"])
        _write_golden(bundle, folder, onnx_network(quantized))
        entry = {
            "file": MODEL_NAMES["int8"],
            "sha256": sha256_file(folder / MODEL_NAMES["int8"]),
            "model_sha256": bundle.model_sha256,
            "float32": "inputs, outputs, all after the last feature map, and the layers left in float",
            "layers": {"trunk": len(calibrated.layers), "left_in_float": calibrated.titles(choice.leave)},
            "weights_bits": 7,
            "films": {"digest": manifest.digest(), **{name: part.to_dict() for name, part in films.items()}},
            "bounds": {"max_drop": max_drop, "least_correlation": LEAST_CORRELATION},
            "verification": {"reference": "ONNX, float32, CPU", "passed": True, **effect.to_dict()},
        }
        described = {**(bundle.manifest.get("precisions") or {}), "int8": entry}
        write_json(folder / MANIFEST_NAME, {**bundle.manifest, "precisions": described, "files": list_files(folder)})
        report("verifying   the bundle with the runtime")
        prove(folder)
        verification = _prove_int8(folder)
    left = tuple(calibrated.titles(choice.leave))
    return Quantized(load_bundle(out), left, len(calibrated.layers), effect, verification)


def divide(records: Sequence[Record]) -> dict[str, tuple[Record, ...]]:
    """The films of each part: patients in an order that depends on their names alone, dealt one, one and two."""
    patients = sorted({record.patient for record in records}, key=_key)
    deal = [name for name, share in PARTS.items() for _ in range(share)]
    part_of = {patient: deal[index % len(deal)] for index, patient in enumerate(patients)}
    return {
        name: spread(tuple(record for record in records if part_of[record.patient] == name), MOST[name])
        for name in PARTS
    }


def manifest_of(data: Path | None, own: tuple[str, Any] | None) -> Manifest:
    """The films to quantize on: those of ``data``, else of the run (its manifest's path and digest), if still there.

    Raises
    ------
    UsageError
        If neither is there; only real films calibrate.
    DataError
        If ``data`` cannot be read.
    """
    remedy = "--calibration-data M.csv names real films (noise or drawings would not do)"
    if data is not None:
        return read_manifest(data, lenient=True)
    if own is None:
        raise UsageError(f"--precision int8 calibrates on films, and a bundle holds none: {remedy}")
    try:
        manifest = read_manifest(Path(own[0]), lenient=True)
    except DataError as error:
        raise UsageError(f"--precision int8 calibrates on films, and the run's are not there: {remedy}") from error
    if manifest.digest() != own[1]:
        raise UsageError(f"--precision int8 calibrates on films, and the run's manifest has changed: {remedy}")
    return manifest


def _key(patient: str) -> bytes:
    return hashlib.sha256(patient.encode("utf-8", "surrogateescape")).digest()


def _read(name: str, records: tuple[Record, ...], bundle: Bundle) -> Films:
    real = RealImages(records, bundle.preprocessing, {})
    images = tuple(image for _, image in real)
    if len(images) < LEAST[name]:
        needed = sum(LEAST.values())
        raise DataError(
            f"--calibration-data: {len(images)} usable films for the {name}, at least {LEAST[name]} are needed: "
            f"give {needed} films or more, of as many patients as possible"
        )
    return Films(images, len({record.patient for record in records}))


def _choose(
    bundle: Bundle, reference: Network, films: dict[str, Films], max_drop: float, report: Callable[[str], None]
) -> tuple[Calibrated, Choice]:
    report(f"calibrating on {len(films['calibration'].images)} films")
    calibrated = calibrate(bundle.model_path, films["calibration"].images)
    images = films["choice"].images
    alone = Reference(reference, images[:ALONE], bundle.temperature)
    together = Reference(reference, images, bundle.temperature)
    layers = calibrated.layers
    report(f"measuring   {len(layers)} layers, one at a time, on {min(ALONE, len(images))} films")
    ranked = rank(
        layers,
        lambda layer: alone.effect(onnx_network(quantize(calibrated, set(layers) - {layer}))),
    )
    report(f"choosing    the layers that stay in float, on {len(images)} films")
    choice = choose(
        [layer for layer, _ in ranked],
        lambda leave: together.effect(onnx_network(quantize(calibrated, leave))),
        max_drop=MARGIN * max_drop,
    )
    return calibrated, choice


def _write_golden(bundle: Bundle, folder: Path, network: Network) -> None:
    """What the quantized network gives for the golden inputs here: what a device must give, too."""
    arrays: dict[str, Any] = {}
    for name in read_expected(bundle)[0]:
        pixels = read_radiograph(bundle.path / "golden" / f"{name}.png").pixels
        outputs = network(preprocess(pixels, bundle.preprocessing)[np.newaxis])
        arrays.update({f"{name}/{output}": outputs[output][0] for output in OUTPUT_NAMES})
    with replacing(folder / "golden" / EXPECTED_OF["int8"]) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _prove_int8(folder: Path) -> VerificationReport:
    bundle = load_bundle(folder)
    with open_backend(bundle, "cpu-int8") as backend:
        report = verify_bundle(bundle, backend)
    if not report.passed:
        raise VerificationError("the new bundle fails its own golden inputs in INT8: nothing was written")
    return report
