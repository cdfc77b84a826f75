"""Parity: a network before and after export, or on another engine, must give the same four outputs and label.

Compared over radiographs, and over inputs that no radiograph gives but some film one day might: blank,
constant, half black, noise, one white pixel, the finest pattern, and scales far from a z-score's. Every
image runs through the exported network in batches of 1, 2 and 5, and is compared with the original
network alone, so that a batch that mixes its images is found out.

An output passes where, for each image by itself,

    largest |exported - original|  <=  absolute + relative * largest |original|

over all values of that output. The scale is the image's largest value, not each value's own: a value near
zero is the remainder of large sums that cancelled, and carries their rounding.

Not a formality: noise of 1e-6 found that the exporter had dropped the 1e-12 under attention pooling's root
(see ``magsd_export.to_onnx``), which no radiograph would have shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .bundle import OUTPUT_NAMES
from .errors import MagsdError, VerificationError

Outputs = dict[str, NDArray[np.floating]]
Network = Callable[[NDArray[np.float32]], Outputs]
"""float32 (N, 1, S, S) -> the four outputs by name, each with the batch first."""

BATCH_SIZES = (1, 2, 5)


class Tolerance(NamedTuple):
    """Allowed difference of one output, see the module's first lines."""

    absolute: float
    relative: float


# Float32 in another order of summation differs by 1e-6 to 1e-5 of the scale on the networks measured
# (benchmarks/export_parity.py); half precision, or one wrong layer, by 1e-3 and more.
TOLERANCES = {
    "logits": Tolerance(1e-4, 1e-4),
    "attention": Tolerance(1e-5, 1e-4),
    "evidence": Tolerance(1e-4, 1e-4),
    "embedding": Tolerance(1e-5, 1e-4),
}
# Float16 keeps 11 bits, and some 50 to 100 roundings one after the other cost 1e-3 to 4e-2 of an output's scale on
# radiographs (docs/engines.md). A logit sums the evidence of all maps, of both signs: its error stays when the sum is
# small. 0.1 in a logit is 2.5 percentage points of a probability at most. A float16 pooling is off by all of its scale.
FP16_TOLERANCES = {
    "logits": Tolerance(1e-1, 3e-2),
    "attention": Tolerance(1e-3, 5e-2),
    "evidence": Tolerance(5e-2, 3e-2),
    "embedding": Tolerance(1e-3, 5e-2),
}
# Of an INT8 network against the same file elsewhere, not against float32. Integers are exact, but a float between them
# that lies on the border of two steps may fall either way, and a step is 1/255 of a tensor's range: the same file
# without integer kernels gave logits off by 0.26 and maps by 7 % of their largest value (docs/int8.md).
INT8_TOLERANCES = {
    "logits": Tolerance(3e-1, 1e-1),
    "attention": Tolerance(1e-3, 1.5e-1),
    "evidence": Tolerance(3e-1, 1e-1),
    "embedding": Tolerance(1e-3, 1e-1),
}
TOLERANCES_OF = {"fp32": TOLERANCES, "fp16": FP16_TOLERANCES}
# Hostile inputs that the pipeline never gives a network: images of one grey value are refused, and no z-score over
# an image of S x S pixels exceeds S. Float16 rounds such an image alike at every place, so its errors add up.
BEYOND_RANGE = ("blank", "constant", "constant-negative", "noise-x1000", "noise-x0.000001", "halves-x1000")


@dataclass(frozen=True)
class Difference:
    """The worst difference of one output. ``relative``: to the image's largest value of that output.

    ``share`` is the largest fraction of its tolerance that an image used; ``at`` is that image, and
    ``allowed`` what that image allowed. 1 or less passes. Infinite where a value is not finite.
    """

    absolute: float = 0.0
    relative: float = 0.0
    share: float = -1.0
    allowed: float = 0.0
    found: float = 0.0
    at: str = ""


@dataclass(frozen=True)
class ParityReport:
    """What was compared and how it differed; ``facts`` say where the real images came from.

    ``probability``: the largest difference of a softmax probability (temperature 1), and the input.
    ``correlation``: the lowest correlation of two mean attention maps over their places, and the input; maps
    that are the same at every place have none.
    """

    differences: dict[str, Difference]
    tolerances: dict[str, Tolerance]
    hostile: tuple[str, ...]
    real_images: int
    flips: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    reference: str = "PyTorch, float32, CPU"
    probability: tuple[float, str] = (0.0, "")
    correlation: tuple[float, str] = (1.0, "")

    @property
    def labels_equal(self) -> bool:
        return not self.flips

    @property
    def passed(self) -> bool:
        return self.labels_equal and all(0 <= difference.share <= 1 for difference in self.differences.values())

    def raise_if_failed(self) -> None:
        """Raise :class:`VerificationError` that names output, difference, tolerance and input."""
        for name, difference in self.differences.items():
            if difference.share <= 1:
                continue
            if not np.isfinite(difference.found):
                raise VerificationError(
                    f"parity failed: {name} is not finite for input {difference.at}: the checkpoint or "
                    "its export is not usable"
                )
            raise VerificationError(
                f"parity failed: {name} differs by {difference.found:.3g} from {self._short} for input "
                f"{difference.at}, "
                f"allowed {difference.allowed:.3g} (relative tolerance {self.tolerances[name].relative:g})"
            )
        if self.flips:
            raise VerificationError(
                f"parity failed: the label differs from {self._short} for {len(self.flips)} inputs, "
                f"first {self.flips[0]}"
            )

    @property
    def _short(self) -> str:
        return self.reference.partition(",")[0]

    def to_dict(self) -> dict[str, Any]:
        """For ``bundle.json``: only finite numbers, infinities as null."""
        return {
            "reference": self.reference,
            "passed": self.passed,
            "labels_equal": self.labels_equal,
            "label_flips": list(self.flips),
            "ties_within_tolerance": list(self.ties),
            "worst_differences": {
                name: {
                    "absolute": _finite(difference.absolute),
                    "relative": _finite(difference.relative),
                    "share_of_tolerance": _finite(difference.share),
                    "input": difference.at,
                }
                for name, difference in self.differences.items()
            },
            "largest_probability_difference": {
                "absolute": _finite(self.probability[0]),
                "input": self.probability[1],
            },
            "lowest_map_correlation": {"value": _finite(self.correlation[0]), "input": self.correlation[1]},
            "tolerances": {name: tolerance._asdict() for name, tolerance in self.tolerances.items()},
            "tolerance_rule": "absolute + relative * largest |reference| of the image's output",
            "inputs": {"real": {"images": self.real_images, **self.facts}, "synthetic": list(self.hostile)},
            "batch_sizes": list(BATCH_SIZES),
        }

    def format(self) -> str:
        """The table for people: one line an output."""
        lines = ["output       largest difference    relative   of tolerance   at"]
        for name, difference in self.differences.items():
            mark = "" if difference.share <= 1 else "   TOO LARGE"
            lines.append(
                f"{name:<11} {difference.absolute:>19.2e} {difference.relative:>11.2e} "
                f"{difference.share:>13.1%}   {difference.at}{mark}"
            )
        flips = f"{len(self.flips)} DIFFER" if self.flips else "equal"
        ties = f" ({len(self.ties)} ties within tolerance)" if self.ties else ""
        lines.append(
            f"labels {flips}{ties} over {self.real_images} real and {len(self.hostile)} synthetic images, "
            f"batches of {', '.join(map(str, BATCH_SIZES))}"
        )
        lines.append(
            f"largest difference of a probability {self.probability[0]:.2e}, "
            f"lowest correlation of a mean attention map {self.correlation[0]:.6f}"
        )
        return "\n".join(lines)


def hostile_inputs(size: int) -> dict[str, NDArray[np.float32]]:
    """Synthetic network inputs by name, each float32 (1, S, S), as a z-score gives them and beyond."""
    rng = np.random.default_rng(20)
    noise = rng.uniform(-np.sqrt(3), np.sqrt(3), (size, size))  # variance 1, as after the z-score
    y, x = np.mgrid[0:size, 0:size]
    left_dark = np.where(x < size // 2, -1.0, 1.0)
    impulse = np.zeros((size, size))
    impulse[size // 2, size // 2] = 1.0
    images = {
        "blank": np.zeros((size, size)),
        "constant": np.ones((size, size)),
        "constant-negative": np.full((size, size), -3.0),
        "halves": left_dark,
        "halves-top": left_dark.T,
        "gradient": (x + y) / (size - 1.0) - 1.0,
        "noise": noise,
        "normal-noise": rng.standard_normal((size, size)),
        "impulse": (impulse - impulse.mean()) / impulse.std(),
        "checkerboard": np.where((x + y) % 2 == 0, 1.0, -1.0),
        "stripes": np.where(x % 2 == 0, 1.0, -1.0),
        "noise-x1000": noise * 1e3,
        "noise-x0.000001": noise * 1e-6,
        "halves-x1000": left_dark * 1e3,
    }
    return {name: image[np.newaxis].astype(np.float32) for name, image in images.items()}


def compare(
    reference: Network,
    exported: Network,
    *,
    size: int,
    real: Iterable[tuple[str, NDArray[np.float32]]] = (),
    hostile: dict[str, NDArray[np.float32]] | None = None,
    tolerances: dict[str, Tolerance] = TOLERANCES,
    facts: dict[str, Any] | None = None,
) -> ParityReport:
    """Run both networks over hostile and ``real`` images and report how they differ; raises nothing for it.

    ``real``: names and images float32 (1, S, S), read one after the other, so that any number fits in
    memory. They run in batches of 1, 2, 5, 1, 2, 5, ...; the hostile ones in each of these sizes.

    Raises
    ------
    MagsdError
        If one network gives other shapes than the other.
    """
    hostile = hostile_inputs(size) if hostile is None else hostile
    comparison = _Comparison(reference, exported, tolerances)
    expected = {name: _alone(reference, image) for name, image in hostile.items()}
    for batch_size in BATCH_SIZES:
        for names in _batches(hostile, [batch_size]):
            comparison.judge(names, [hostile[name] for name in names], [expected[name] for name in names])
    count = 0
    for batch in _batches(real, BATCH_SIZES):
        names, images = [name for name, _ in batch], [image for _, image in batch]
        comparison.judge(names, images, [_alone(reference, image) for image in images])
        count += len(batch)
    return ParityReport(
        differences=comparison.worst,
        tolerances=dict(tolerances),
        hostile=tuple(hostile),
        real_images=count,
        flips=tuple(comparison.flips),
        ties=tuple(comparison.ties),
        facts=dict(facts or {}),
        probability=comparison.probability,
        correlation=comparison.correlation,
    )


class _Comparison:
    """What was found so far; names in the order they were met, each once."""

    def __init__(self, reference: Network, exported: Network, tolerances: dict[str, Tolerance]) -> None:
        self.reference, self.exported, self.tolerances = reference, exported, tolerances
        self.worst = {name: Difference() for name in OUTPUT_NAMES}
        self.flips: dict[str, None] = {}
        self.ties: dict[str, None] = {}
        self.probability, self.correlation = (0.0, ""), (1.0, "")

    def judge(self, names: Sequence[str], images: list[NDArray[np.float32]], expected: list[Outputs]) -> None:
        """One batch through the exported network, image by image against ``expected``."""
        outputs = self.exported(np.stack(images))
        where = "" if len(names) == 1 else f" in a batch of {len(names)}"
        for index, name in enumerate(names):
            found = {output: _image(outputs, output, index, len(names)) for output in OUTPUT_NAMES}
            differences = {
                output: _difference(found[output], expected[index][output], self.tolerances[output], output)
                for output in OUTPUT_NAMES
            }
            for output, difference in differences.items():
                self.worst[output] = _worse(self.worst[output], difference, f"{name}{where}")
            self._judge_label(found["logits"], expected[index]["logits"], differences["logits"].allowed, name)
            self._judge_decision(found, expected[index], f"{name}{where}")

    def _judge_decision(self, found: Outputs, expected: Outputs, at: str) -> None:
        """What a reader of the result would see of the difference; decides nothing."""
        if not all(np.isfinite(outputs[name]).all() for outputs in (found, expected) for name in OUTPUT_NAMES):
            return
        difference = float(np.abs(_softmax(found["logits"]) - _softmax(expected["logits"])).max())
        if difference > self.probability[0]:
            self.probability = (difference, at)
        maps = [outputs["attention"].astype(np.float64).mean(0).ravel() for outputs in (found, expected)]
        if all(values.std() > 1e-6 * np.abs(values).max() for values in maps):
            correlation = float(np.corrcoef(*maps)[0, 1])
            if correlation < self.correlation[0]:
                self.correlation = (correlation, at)

    def _judge_label(
        self, found: NDArray[np.floating], expected: NDArray[np.floating], allowed: float, name: str
    ) -> None:
        if not (np.isfinite(found).all() and np.isfinite(expected).all()):
            return  # reported as a difference
        label, wanted = int(found.argmax()), int(expected.argmax())
        if label == wanted:
            return
        # both logits may be off by what is allowed, so a margin below twice that decides nothing
        margin = float(expected[wanted]) - float(expected[label])
        (self.ties if margin <= 2 * allowed else self.flips)[name] = None


def _softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - float(logits.max()))
    return powers / powers.sum()


def _alone(network: Network, image: NDArray[np.float32]) -> Outputs:
    """The outputs of one image float32 (1, S, S), without the batch axis."""
    outputs = network(image[np.newaxis])
    return {name: _image(outputs, name, 0, 1) for name in OUTPUT_NAMES}


def _image(outputs: Outputs, name: str, index: int, count: int) -> NDArray[np.floating]:
    if name not in outputs or len(outputs[name]) != count:
        found = outputs[name].shape if name in outputs else "missing"
        raise MagsdError(f"parity cannot be judged: {name} is {found} for a batch of {count}")
    return outputs[name][index]


def _difference(
    found: NDArray[np.floating], expected: NDArray[np.floating], tolerance: Tolerance, output: str
) -> Difference:
    if found.shape != expected.shape:
        raise MagsdError(f"parity cannot be judged: {output} is {found.shape}, the reference gives {expected.shape}")
    wanted = expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.abs(found.astype(np.float64) - wanted)
    if not np.isfinite(difference).all():
        return Difference(np.inf, np.inf, np.inf, 0.0, np.inf)
    absolute, scale = float(difference.max()), float(np.abs(wanted).max())
    allowed = tolerance.absolute + tolerance.relative * scale
    relative = absolute / scale if scale > 0 else (np.inf if absolute > 0 else 0.0)
    return Difference(absolute, relative, absolute / allowed, allowed, absolute)


def _worse(worst: Difference, other: Difference, at: str) -> Difference:
    leading, where = (other, at) if other.share > worst.share else (worst, worst.at)
    return Difference(
        max(worst.absolute, other.absolute),
        max(worst.relative, other.relative),
        leading.share,
        leading.allowed,
        leading.found,
        where,
    )


def _batches(items: Iterable[Any], sizes: Sequence[int]) -> Iterator[list[Any]]:
    """Lists of ``sizes`` items in turn, over and over; the last may be shorter."""
    batch: list[Any] = []
    turn = 0
    for item in items:
        batch.append(item)
        if len(batch) == sizes[turn % len(sizes)]:
            yield batch
            batch, turn = [], turn + 1
    if batch:
        yield batch


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
