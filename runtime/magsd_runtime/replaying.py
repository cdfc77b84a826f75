"""Repeat a logged prediction, and say what differs and what may be the reason."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .audit import LONGEST_LINE, BrokenChainError, read_record, walk
from .errors import ArtefactError, UsageError

if TYPE_CHECKING:
    from .pipeline import Pipeline

# What stands in a record: (place in it, name for people)
_CIRCUMSTANCES = (
    (("model", "sha256"), "model"),
    (("preprocessing_sha256",), "preprocessing"),
    (("calibration_sha256",), "calibration"),
    (("bundle_sha256",), "bundle.json"),
    (("rules_sha256",), "rules"),
    (("backend", "name"), "backend"),
    (("backend", "device"), "device"),
    (("backend", "precision"), "precision"),
    (("backend", "threads"), "CPU threads"),
    (("machine", "model"), "processor"),
    (("machine", "architecture"), "architecture"),
    (("machine", "instruction_sets"), "instruction sets"),
)


@dataclass(frozen=True)
class Difference:
    """One thing that was ``then`` and is ``now`` another."""

    what: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.what}: {_short(self.then)} then, {_short(self.now)} now"


@dataclass(frozen=True)
class Replay:
    """``same``: the result's hash is the record's. ``result``: lines on what differs in it. ``circumstances``:
    what differs in model, settings, versions, backend and machine, whether it changed the result or not."""

    seq: int
    same: bool
    result: tuple[str, ...]
    circumstances: tuple[Difference, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": "magsd.replay/1",
            "record": self.seq,
            "same": self.same,
            "result": list(self.result),
            "circumstances": [{"what": d.what, "then": d.then, "now": d.now} for d in self.circumstances],
        }

    def format(self) -> str:
        """Several lines for people."""
        lines = [f"record {self.seq}: " + ("the same result, bit for bit" if self.same else "another result")]
        lines += [f"  {line}" for line in self.result]
        if self.circumstances:
            lines.append("what is not as it was" + (", and did not matter:" if self.same else ", and may be why:"))
            lines += [f"  {difference}" for difference in self.circumstances]
        elif not self.same:
            lines.append(
                "model, settings, versions, backend and processor are as they were: nothing recorded explains it"
            )
        return "\n".join(lines)


def find_record(where: str, input_sha256: str) -> tuple[dict[str, Any], str | None]:
    """The record that ``where`` names, ``LOG#NUMBER`` or ``LOG``: then the last one of the input with that hash.

    Also a line on what is wrong with the log as a whole, None when nothing is. ``LOG`` may be an excerpt.

    Raises
    ------
    UsageError
        If there is no such file or record, or the record is not about this input.
    ArtefactError
        If the record named was edited.
    """
    path, number = _split(where)
    try:
        with open(path, "rb") as file:
            trouble = _trouble(file)
            file.seek(0)
            # With a number the record itself, intact or not; else the last one of this input that is
            found = [r for r in _records(file, strict=number) if number in (None, r["seq"])]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not found:
        raise UsageError(f"{path}: holds no record {number}" if number else f"{path}: holds no record")
    found = [record for record in found if record["kind"] == "prediction"]
    if not found:
        raise UsageError(f"{where}: is no record of a prediction")
    ours = [record for record in found if record["input"]["sha256"] == input_sha256]
    if not ours:
        raise UsageError(
            f"{where}: is the record of another input (sha256 {found[-1]['input']['sha256']}, "
            f"--input has {input_sha256})"
            if number
            else f"{path}: holds no record of this input (sha256 {input_sha256})"
        )
    return ours[-1], trouble


def replay(record: Mapping[str, Any], path: str | os.PathLike[str], pipeline: Pipeline, threads: int | None) -> Replay:
    """Judge the file at ``path`` again and compare with ``record``; ``threads``: what the backend was opened with."""
    from .audit_record import bundle_facts, machine_facts, result_of, result_sha256, versions

    prediction = pipeline.predict(path, with_heat=False).prediction
    digest, now = result_sha256(prediction), result_of(prediction)
    same = digest == record["result_sha256"]
    facts = {
        **bundle_facts(pipeline.bundle),
        "rules_sha256": pipeline.rules.sha256(),
        **machine_facts(pipeline, threads),
        "versions": versions(prediction),
    }
    lines = () if same else tuple(compare_results(record["result"], now))
    if not same and not lines:
        lines = ("facts of the image (size, format, header) were read otherwise; the rest is the same",)
    return Replay(record["seq"], same, lines, tuple(_differences(record, facts)))


def compare_results(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two results, a line each, with the size of the difference."""
    for name in ("status", "reasons", "label"):
        if then[name] != now[name]:
            yield f"{name}: {_short(then[name])} then, {_short(now[name])} now"
    before, after = then["probabilities"], now["probabilities"]
    if before is not None and after is not None and before != after:
        if set(before) != set(after):
            yield f"classes: {', '.join(before)} then, {', '.join(after)} now"
        else:
            worst = max(before, key=lambda name: abs(before[name] - after[name]))
            yield (
                f"probabilities: differ by up to {abs(before[worst] - after[worst]):.3g} "
                f"({worst}: {before[worst]:.6f} then, {after[worst]:.6f} now)"
            )
    if then["decision"] != now["decision"]:
        yield from _decisions(then["decision"], now["decision"])
    if then.get("prediction_set") != now.get("prediction_set"):  # a record older than they are has none
        yield f"prediction set: {_short(then.get('prediction_set'))} then, {_short(now.get('prediction_set'))} now"
    yield from _findings(then["findings"], now["findings"])
    if then["acceptance"] != now["acceptance"]:
        yield f"acceptance: {_short(then['acceptance'])} then, {_short(now['acceptance'])} now"


def _decisions(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> Iterator[str]:
    if then is None or now is None:
        yield f"decision: {_short(then)} then, {_short(now)} now"
        return
    for name in ("positive", "positive_class", "operating_point", "threshold"):
        if then[name] != now[name]:
            yield f"decision, {name}: {then[name]} then, {now[name]} now"


def _findings(then: list[Any], now: list[Any]) -> Iterator[str]:
    if len(then) != len(now):
        yield f"findings: {len(then)} then, {len(now)} now"
    elif then != now:
        edges = [abs(a - b) for one, other in zip(then, now) for a, b in zip(one["box"], other["box"])]
        scores = [abs(one["score"] - other["score"]) for one, other in zip(then, now)]
        yield f"findings: edges differ by up to {max(edges):g} pixels, scores by up to {max(scores):.3g}"


def _differences(record: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[Difference]:
    found: dict[str, Difference] = {}
    for place, what in _CIRCUMSTANCES:
        then, now = _at(record, place), _at(facts, place)
        if then != now:
            found[what] = Difference(what, then, now)
    if {"model", "preprocessing", "calibration"} & set(found):
        found.pop("bundle.json", None)  # follows from them
    yield from found.values()
    then, now = record["versions"], facts["versions"]
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            yield Difference(name, then.get(name), now.get(name))


def _at(holder: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        holder = holder.get(name) if isinstance(holder, Mapping) else None
    return holder


def _split(where: str) -> tuple[Path, int | None]:
    path, mark, number = where.rpartition("#")
    if mark and number.isdecimal() and not os.path.exists(where):
        return Path(path), int(number)
    return Path(where), None


def _trouble(file: Any) -> str | None:
    try:
        for _ in walk(file):
            pass
    except BrokenChainError as error:
        return str(error)
    return None


def _records(file: Any, *, strict: int | None) -> Iterator[dict[str, Any]]:
    """Records that are intact by themselves; a damaged one raises where its number is asked for."""
    damage = None
    seen = False
    while line := file.readline(LONGEST_LINE):
        try:
            record = read_record(line)
        except ArtefactError as error:
            damage = damage or error
            continue
        seen = seen or record["seq"] == strict
        yield record
    if strict is not None and not seen and damage is not None:
        raise ArtefactError(f"no intact record {strict}: a record of the log {damage}")


def _short(value: Any) -> str:
    """Hashes by their first digits, none as a word."""
    if value is None or value == []:
        return "none"
    if isinstance(value, str):
        return value[:12] if len(value) == 64 else value
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(item)}" for name, item in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)
