"""Which layers stay in float: measured, layer by layer, then the worst left out until the bounds hold.

Each convolution is quantized alone, everything else in float32, and what that does to the probabilities and to the
mean attention map is measured on films that nothing was calibrated on. Errors of several layers add up, help or
cancel each other, so the single effects only give the order: how many layers must stay in float is found by trying.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.errors import MagsdError
from magsd_runtime.parity import Network

LEAST_CORRELATION = 0.97  # mean over films, of the mean attention map
MOST_FLOAT = 0.5  # share of the layers: beyond, little of the speed is left (docs/int8.md)
STEPS = 25  # at most so many choices are tried


@dataclass(frozen=True)
class Effect:
    """What quantization did to ``films`` films, against float32; probabilities at the bundle's temperature.

    ``label_agreement``: share of the films, 0 to 1. ``probability_mean``, ``probability_largest``: over the films, of
    the largest difference of a class's probability. ``correlation_mean``, ``correlation_lowest``: of the mean
    attention maps over their places; maps that are the same at every place have none, and are not counted.
    """

    films: int
    label_agreement: float
    probability_mean: float
    probability_largest: float
    correlation_mean: float
    correlation_lowest: float

    @property
    def score(self) -> float:
        """By what layers are ordered: the mean difference of a probability, and what the maps lack of correlation 1."""
        return self.probability_mean + (1 - self.correlation_mean)

    def within(self, max_drop: float) -> bool:
        """Whether labels and probabilities (on average) lost no more than ``max_drop``, and heat maps hold."""
        return (
            1 - self.label_agreement <= max_drop + 1e-12
            and self.probability_mean <= max_drop
            and self.correlation_mean >= LEAST_CORRELATION
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def format(self) -> str:
        """One line."""
        return (
            f"labels equal {self.label_agreement:.3f} of {self.films} films, probability off by "
            f"{self.probability_mean:.3f} on average and {self.probability_largest:.3f} at most, heat map correlation "
            f"{self.correlation_mean:.4f}, lowest {self.correlation_lowest:.3f}"
        )


@dataclass(frozen=True)
class Choice:
    """The layers left in float, worst first, and what the rest did on the films of the choice."""

    leave: tuple[str, ...]
    effect: Effect
    tried: int
    found: bool


class Reference:
    """Probabilities and mean attention maps of the float32 network over ``films``, each float32 (1, S, S)."""

    def __init__(self, network: Network, films: Sequence[NDArray[np.float32]], temperature: float) -> None:
        self._films, self._temperature = films, temperature
        self._probabilities, self._maps = self._run(network)

    def effect(self, network: Network) -> Effect:
        """What ``network`` does differently.

        Raises
        ------
        MagsdError
            If it gives a value that is not finite.
        """
        probabilities, maps = self._run(network)
        differences = np.abs(probabilities - self._probabilities).max(1)
        correlations = [
            float(np.corrcoef(one, other)[0, 1]) for one, other in zip(maps, self._maps) if _varies(other)
            and _varies(one)
        ]  # fmt: skip
        lost = sum(_varies(other) and not _varies(one) for one, other in zip(maps, self._maps))
        correlations += [0.0] * lost  # a map that became the same everywhere shows nothing of what was there
        return Effect(
            films=len(self._films),
            label_agreement=float((probabilities.argmax(1) == self._probabilities.argmax(1)).mean()),
            probability_mean=float(differences.mean()),
            probability_largest=float(differences.max()),
            correlation_mean=float(np.mean(correlations)) if correlations else 1.0,
            correlation_lowest=min(correlations, default=1.0),
        )

    def _run(self, network: Network) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        outputs = [network(image[np.newaxis]) for image in self._films]
        logits = np.concatenate([output["logits"] for output in outputs]).astype(np.float64) / self._temperature
        maps = np.stack([output["attention"][0].astype(np.float64).mean(0).ravel() for output in outputs])
        if not (np.isfinite(logits).all() and np.isfinite(maps).all()):
            raise MagsdError("the network gave infinities or no numbers for a film")
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True), maps


def rank(layers: Iterable[str], judge_alone: Callable[[str], Effect]) -> tuple[tuple[str, Effect], ...]:
    """Each layer with the effect of it alone being quantized, the largest effect first."""
    effects = [(layer, judge_alone(layer)) for layer in layers]
    return tuple(sorted(effects, key=lambda pair: -pair[1].score))


def choose(ranked: Sequence[str], judge: Callable[[Sequence[str]], Effect], *, max_drop: float) -> Choice:
    """The fewest of the ``ranked`` layers, worst first, without which the bounds hold on the films of the choice.

    ``judge``: layers left in float -> effect of all others being quantized. If not even with :data:`MOST_FLOAT` of
    them in float the bounds hold, ``found`` is false and the best that was tried is given, by its score.
    """
    most = int(len(ranked) * MOST_FLOAT)
    step = max(1, -(-most // STEPS))
    best: Choice | None = None
    for tried, count in enumerate(range(0, most + 1, step), start=1):
        effect = judge(ranked[:count])
        choice = Choice(tuple(ranked[:count]), effect, tried, effect.within(max_drop))
        if choice.found:
            return choice
        if best is None or effect.score < best.effect.score:
            best = choice
    assert best is not None
    return best


def _varies(values: NDArray[np.float64]) -> bool:
    return float(values.std()) > 1e-6 * float(np.abs(values).max())
