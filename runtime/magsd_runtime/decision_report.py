"""What two sides of ``magsd verify --compare`` were found to differ by: for programs, for people, and pass or fail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .decision_parity import Allowed, Mean, Totals
from .errors import RESEARCH_USE

DECISIONS_SCHEMA = "magsd.decisions/1"


@dataclass(frozen=True)
class HostileInput:
    """One synthetic network input.

    ``finite``: whether all outputs are, of each side; no where the network failed. ``share``: the largest difference in
    units of its tolerance, 0 where there is none, None where an output is not finite. ``judged``: whether it counts.
    """

    name: str
    finite: tuple[bool, bool]
    label_equal: bool
    share: float | None
    judged: bool

    @property
    def passed(self) -> bool:
        if not self.judged:
            return True
        return self.finite == (True, True) and (self.share is None or self.share <= 1)


@dataclass(frozen=True)
class DecisionReport:
    """Two sides over films, over files made to break the pipeline, and over inputs made to break a network.

    ``sides``: of each ``side``, ``backend``, ``device`` and ``precision``. ``rules_sha256``: the rules of acceptance
    that both went by. ``source``: where the films are from, in words.
    """

    bundle: str
    model_sha256: str
    rules_sha256: str
    sides: tuple[dict[str, str], dict[str, str]]
    allowed: Allowed
    source: str
    films: Totals
    files: Totals
    inputs: tuple[HostileInput, ...]

    @property
    def failures(self) -> list[str]:
        """What is outside the limits, a line each."""
        found = self.films.failures(self.allowed)
        found += [f"hostile files: {line}" for line in self.files.failures(self.allowed)]
        for made in self.inputs:
            if not made.passed:
                what = (
                    "the network failed, or is not finite"
                    if made.finite != (True, True)
                    else f"differs {made.share:.3g} x what is allowed"
                )
                found.append(f"hostile input {made.name}: {what}")
        if not self.films.labelled:
            found.append(f"none of {self.films.films} films was judged by either side: nothing was compared")
        return found

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        outputs = self.allowed.outputs
        limits = {
            **vars(self.allowed),
            "outputs": None if outputs is None else {n: t._asdict() for n, t in outputs.items()},
        }
        return {
            "schema": DECISIONS_SCHEMA,
            "bundle": self.bundle,
            "model_sha256": self.model_sha256,
            "rules_sha256": self.rules_sha256,
            "first": self.sides[0],
            "second": self.sides[1],
            "passed": self.passed,
            "failures": self.failures,
            "allowed": limits,
            "source": self.source,
            "films": self.films.to_dict(),
            "hostile_files": self.files.to_dict(),
            "hostile_inputs": [
                {
                    "name": made.name,
                    "finite": list(made.finite),
                    "label_equal": made.label_equal,
                    "share_of_tolerance": made.share if made.share is not None and math.isfinite(made.share) else None,
                    "judged": made.judged,
                    "passed": made.passed,
                }
                for made in self.inputs
            ],
            "research_use_only": True,
        }

    def format(self) -> str:
        """The report for people, several lines."""
        films, allowed = self.films, self.allowed
        lines = [f"bundle              {self.bundle}"]
        for name, side in zip(("first", "second"), self.sides):
            lines.append(f"{name:<20}{side['side']}: {side['backend']} ({side['device']}, {side['precision']})")
        lines += [
            f"films               {films.films} of {self.source}, {films.judged} judged by both",
            f"labels              {films.labels:.4f} equal ({films.flips} of {films.labelled} differ, "
            f"{films.ties} ties), {allowed.labels:g} needed",
            f"operating point     {films.decisions:.4f} on the same side ({films.crossings} of {films.decided} cross), "
            f"{allowed.decisions:g} needed"
            if films.decided
            else "operating point     none: the bundle has none, or no film was judged",
            f"status              {films.same_statuses:.4f} equal ({films.statuses} differ), "
            f"{allowed.statuses:g} needed",
            f"probability         {_pair(films.probability.worst, films.probability.mean)}, "
            f"{allowed.probability:g} allowed",
            f"heat, rank corr.    mean {_number(films.correlation.mean)}, lowest {_number(films.correlation.worst)}, "
            + _needed(films.correlation, allowed.correlation, allowed.means_from),
            f"findings, overlap   mean {_number(films.boxes.mean)}, lowest {_number(films.boxes.worst)}, "
            + _needed(films.boxes, allowed.boxes, allowed.means_from),
            "output              worst difference        mean   of tolerance   at",
        ]
        for name, worst in films.outputs.items():
            share = films.shares[name].worst
            of = "-" if share is None or allowed.outputs is None else f"{share:.1%}"
            lines.append(
                f"  {name:<18}{_number(worst.worst):>16}{_number(films.means[name].mean):>12}{of:>15}   {worst.at}"
            )
        agree = self.files.films - self.files.statuses
        lines.append(f"hostile files       {agree} of {self.files.films} judged alike")
        judged = [made for made in self.inputs if made.judged]
        shown = f"hostile inputs      {sum(made.passed for made in judged)} of {len(judged)} within what is allowed"
        beyond = [made for made in self.inputs if not made.judged]
        if beyond:
            shown += (
                f"; of {len(beyond)} beyond what the pipeline can give, {sum(all(m.finite) for m in beyond)} finite"
            )
        lines.append(shown)
        lines += [f"  {line}" for line in films.named]
        failures = self.failures
        lines += [f"FAILED: {line}" for line in failures] or ["PASSED"]
        # Films are named as in the manifest, and a name may hold anything
        return "\n".join(line if line.isprintable() else ascii(line) for line in [*lines, RESEARCH_USE])


def _needed(values: Mean, least: float, means_from: int) -> str:
    return f"mean {least:g} needed" + ("" if values.count >= means_from else f" from {means_from} films on")


def _pair(worst: float | None, mean: float | None) -> str:
    return f"largest difference {_number(worst)}, mean {_number(mean)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.4f}"
