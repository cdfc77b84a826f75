"""A device proves itself: the bundle's golden inputs go through the whole pipeline again.

golden/NAME.png        synthetic 8-bit images
golden/expected.json   {NAME: {"preprocessed_sha256", "label"}}
golden/expected.npz    arrays "NAME/logits", "NAME/attention", "NAME/evidence", "NAME/embedding",
                       without the batch axis, or with one of size 1
golden/expected.int8.npz  the same of model.int8.onnx, where there is one: integers must come out alike everywhere
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import Backend
from .bundle import OUTPUT_NAMES, Bundle
from .errors import RESEARCH_USE, BundleError, ImageError
from .images import read_radiograph
from .parity import FP16_TOLERANCES, INT8_TOLERANCES, Tolerance
from .preprocessing import preprocess

# Of each output, in units of the larger of 1 and its largest expected value. Float32 sums in another
# order (other CPU, other library version) differ by some 1e-5 of that; half precision by more than 1e-3.
TOLERANCE = 1e-3
EXPECTED_OF = {"int8": "expected.int8.npz"}  # by precision; of the others, the float32 network's
_LOOSER = {"fp16": FP16_TOLERANCES, "int8": INT8_TOLERANCES}
_REMEDY = "copy or export the bundle again"


@dataclass(frozen=True)
class GoldenCheck:
    """One golden input on this machine.

    ``differences``: largest absolute difference of each output; infinity where one is not finite.
    ``limits``: the largest difference allowed.
    """

    name: str
    preprocessing_equal: bool
    label: str
    expected_label: str
    differences: dict[str, float]
    limits: dict[str, float]

    @property
    def passed(self) -> bool:
        within = all(self.differences[name] <= self.limits[name] for name in self.limits)
        return within and self.preprocessing_equal and self.label == self.expected_label


@dataclass(frozen=True)
class VerificationReport:
    """What a bundle computes here, against what it computed where it was made."""

    bundle: str
    model_sha256: str
    backend: dict[str, str]
    checks: tuple[GoldenCheck, ...]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def labels_equal(self) -> bool:
        return all(check.label == check.expected_label for check in self.checks)

    @property
    def preprocessing_equal(self) -> bool:
        return all(check.preprocessing_equal for check in self.checks)

    @property
    def worst(self) -> dict[str, float]:
        """Largest absolute difference of each output over all golden inputs."""
        return {name: max(check.differences[name] for check in self.checks) for name in OUTPUT_NAMES}

    @property
    def limits(self) -> dict[str, float]:
        """The strictest limit of each output over all golden inputs."""
        return {name: min(check.limits[name] for check in self.checks) for name in OUTPUT_NAMES}

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": "magsd.verification/1",
            "bundle": self.bundle,
            "model_sha256": self.model_sha256,
            "backend": self.backend,
            "passed": self.passed,
            "labels_equal": self.labels_equal,
            "preprocessing_equal": self.preprocessing_equal,
            "worst_differences": _finite(self.worst),
            "limits": self.limits,
            "inputs": [
                {
                    "name": check.name,
                    "passed": check.passed,
                    "preprocessing_equal": check.preprocessing_equal,
                    "label": check.label,
                    "expected_label": check.expected_label,
                    "differences": _finite(check.differences),
                    "limits": check.limits,
                }
                for check in self.checks
            ],
            "research_use_only": True,
        }

    def format(self) -> str:
        """The report for people, several lines."""
        count = len(self.checks)
        lines = [
            f"bundle         {self.bundle}",
            f"backend        {self.backend['name']} ({self.backend['device']}, {self.backend['precision']})",
            f"golden inputs  {count}: {', '.join(check.name for check in self.checks)}",
            f"preprocessing  {'bit-equal' if self.preprocessing_equal else 'DIFFERENT'}"
            + ("" if self.preprocessing_equal else f" ({self._names('preprocessing_equal')})"),
            f"labels         {'equal' if self.labels_equal else 'DIFFERENT'}",
            "output         largest difference  allowed",
        ]
        worst, limits = self.worst, self.limits
        over = {name for check in self.checks for name in OUTPUT_NAMES if _over(check, name)}
        for name in OUTPUT_NAMES:
            mark = "  TOO LARGE" if name in over else ""
            lines.append(f"  {name:<13}{worst[name]:>18.3g}  {limits[name]:<7.3g}{mark}")
        lines.append("PASSED" if self.passed else "FAILED: do not use this bundle on this machine")
        lines.append(RESEARCH_USE)
        return "\n".join(lines)

    def _names(self, attribute: str) -> str:
        return ", ".join(check.name for check in self.checks if not getattr(check, attribute))


def preprocessed_sha256(image: NDArray[np.float32]) -> str:
    """Hash of the network's input: float32 (1, S, S), as its little-endian bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(image, "<f4").tobytes()).hexdigest()


def golden_input(bundle: Bundle, name: str) -> NDArray[np.float32]:
    """The golden image ``name`` as the network gets it: float32 (1, S, S).

    Raises
    ------
    BundleError
        If it is missing or unreadable.
    """
    try:
        radiograph = read_radiograph(bundle.path / "golden" / f"{name}.png")
    except ImageError as error:
        raise BundleError(f"{error}: {_REMEDY}") from error
    return preprocess(radiograph.pixels, bundle.preprocessing)


def verify_bundle(bundle: Bundle, backend: Backend) -> VerificationReport:
    """Run every golden input of ``bundle`` through reading, preprocessing and ``backend``, and compare.

    Raises
    ------
    BundleError
        If golden inputs or expected values are missing or unreadable.
    """
    expected, arrays = read_expected(bundle, backend.precision)
    checks = []
    for name, facts in expected.items():
        image = golden_input(bundle, name)
        outputs = backend.run(image[np.newaxis])
        differences, limits = {}, {}
        for output in OUTPUT_NAMES:
            reference = arrays[f"{name}/{output}"]
            if reference.shape not in (outputs[output].shape, outputs[output].shape[1:]):
                raise BundleError(
                    f"{bundle.path / 'golden'}: the expected {name}/{output} has shape "
                    f"{reference.shape}, the network gives {outputs[output].shape[1:]}: {_REMEDY}"
                )
            differences[output], limits[output] = _compare(
                outputs[output], reference, _LOOSER.get(backend.precision, {}).get(output)
            )
        checks.append(
            GoldenCheck(
                name=name,
                preprocessing_equal=preprocessed_sha256(image) == facts["preprocessed_sha256"],
                label=bundle.classes[int(outputs["logits"][0].argmax())],
                expected_label=facts["label"],
                differences=differences,
                limits=limits,
            )
        )
    return VerificationReport(
        bundle=str(bundle.path),
        model_sha256=bundle.model_sha256,
        backend={"name": backend.name, "device": backend.device, "precision": backend.precision},
        checks=tuple(checks),
    )


def _compare(
    values: NDArray[np.floating], reference: NDArray[np.floating], looser: Tolerance | None
) -> tuple[float, float]:
    """Largest absolute difference, and the largest allowed; ``looser``: the output's tolerance, if not float32."""
    wanted = reference.astype(np.float64).ravel()
    difference = np.abs(values.astype(np.float64).ravel() - wanted)
    # A value that is not a number must not pass a comparison
    worst = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    scale = float(np.abs(wanted).max())
    return worst, TOLERANCE * max(1.0, scale) if looser is None else looser.absolute + looser.relative * scale


def _over(check: GoldenCheck, name: str) -> bool:
    return not check.differences[name] <= check.limits[name]


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def read_expected(
    bundle: Bundle, precision: str = "fp32"
) -> tuple[dict[str, dict[str, str]], dict[str, NDArray[np.floating]]]:
    """The golden inputs' facts and expected outputs; in INT8 its own, labels included.

    Raises
    ------
    BundleError
        If they are missing or unreadable.
    """
    values = EXPECTED_OF.get(precision, "expected.npz")
    folder = bundle.path / "golden"
    try:
        expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        content = (folder / values).read_bytes()
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise BundleError(
            f"{error.filename}: is missing, the bundle has no golden inputs to verify it with: {_REMEDY}"
        ) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{folder}: the expected values cannot be read ({error}): {_REMEDY}") from error
    if not isinstance(expected, dict) or not expected:
        raise BundleError(f"{folder / 'expected.json'}: names no golden input: {_REMEDY}")
    for name, facts in expected.items():
        wanted = [f"{name}/{output}" for output in OUTPUT_NAMES]
        if not isinstance(facts, dict) or not {"preprocessed_sha256", "label"} <= set(facts):
            raise BundleError(f"{folder / 'expected.json'}: {name} has no preprocessed_sha256 and label: {_REMEDY}")
        for key in wanted:
            if key not in arrays or arrays[key].size == 0 or not np.isfinite(arrays[key]).all():
                raise BundleError(f"{folder / values}: {key} is missing or not finite: {_REMEDY}")
        if precision in EXPECTED_OF:
            expected[name] = {**facts, "label": _label(bundle, arrays[f"{name}/logits"], folder / values)}
    return expected, arrays


def _label(bundle: Bundle, logits: NDArray[np.floating], path: Path) -> str:
    if logits.size != len(bundle.classes):
        raise BundleError(f"{path}: holds {logits.size} logits for {len(bundle.classes)} classes: {_REMEDY}")
    return bundle.classes[int(logits.argmax())]
