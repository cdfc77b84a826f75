"""``magsd verify --compare``: two networks from the file of a film to its boxes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

import tiny_bundle
from engine_trial import bundle, gpu, halved, needs_rtx
from magsd.cli import main
from magsd_runtime.backends import CheckedBackend, open_backend
from magsd_runtime.bundle import Bundle
from magsd_runtime.deciding import (
    Side,
    compare_sides,
    golden_films,
    hostile_files,
    manifest_films,
    open_side,
)
from magsd_runtime.decision_parity import (
    ALLOWED,
    compare_film,
)
from magsd_runtime.decision_report import DecisionReport
from magsd_runtime.doctor import examine, format_report
from magsd_runtime.engines.building import Profile
from magsd_runtime.engines.making import make_engine
from magsd_runtime.engines.passport import read_passports
from magsd_runtime.errors import DataError, MagsdError, UsageError
from magsd_runtime.parity import BEYOND_RANGE, hostile_inputs
from magsd_runtime.site_rules import SiteRules, read_rules

__all__ = ["bundle", "gpu", "halved"]  # fixtures

Outputs = dict[str, np.ndarray]


class Tampered:
    """The bundle's own network, whose outputs ``change`` alters."""

    name, device, reason = "cpu", "cpu", "a test"

    def __init__(self, bundle: Bundle, change: Callable[[Outputs], Outputs], precision: str = "fp32") -> None:
        self.inner, self.change, self.precision = open_backend(bundle, "cpu", threads=1), change, precision

    def run(self, images: np.ndarray) -> Outputs:
        return self.change({name: values.copy() for name, values in self.inner.run(images).items()})

    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A manifest of six pictures and a file that is none; one picture is named twice, as with two boxes."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:200, 0:180]
    lines = ["path,label,patient"]
    for number in range(6):
        centre = rng.uniform(40, 140, 2)
        blob = 120 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / 800)
        picture = np.clip(60 + blob + rng.normal(0, 12, x.shape), 0, 255).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"{number}.png"), picture)
        lines.append(f"{number}.png,normal,p{number}")
    (tmp_path / "torn.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    lines += ["torn.png,normal,p9", "0.png,normal,p0"]
    (tmp_path / "films.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "films.csv"


def compared(bundle: Bundle, films: Path, change: Callable[[Outputs], Outputs], precision: str = "fp32") -> Any:
    with open_side("fp32", bundle, threads=1) as (first, _):
        other = cast(CheckedBackend, Tampered(bundle, change, precision))
        second = Side("cuda", bundle, other)
        return compare_sides(bundle, first, second, manifest_films(films), source="films.csv")


# --- two sides -----------------------------------------------------------------------------------


def test_the_same_network_twice_agrees_to_the_bit(bundle: Bundle, films: Path) -> None:
    report = compared(bundle, films, lambda outputs: outputs)
    assert report.passed, report.failures
    assert report.films.films == 7  # each picture once
    assert 3 <= report.films.judged < 7  # the torn file is refused by both, and a picture that is too little of a film
    assert report.films.probability.worst == 0
    assert report.films.correlation.worst == pytest.approx(1.0)
    assert report.films.boxes.worst == 1.0
    assert report.files.statuses == 0
    assert [made.name for made in report.inputs] == list(hostile_inputs(224))
    assert all(made.judged for made in report.inputs)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["passed"] is True


def shifted(outputs: Outputs) -> Outputs:
    outputs["logits"] += np.array([0, 0.02, 0], np.float32)
    return outputs


def jumped(outputs: Outputs) -> Outputs:
    outputs["logits"] *= 0.5
    return outputs


def turned(outputs: Outputs) -> Outputs:
    outputs["attention"] = outputs["attention"][..., ::-1].copy()
    return outputs


def swapped(outputs: Outputs) -> Outputs:
    outputs["logits"] = outputs["logits"][:, ::-1].copy()
    return outputs


def broken(outputs: Outputs) -> Outputs:
    outputs["logits"][:] = np.nan
    return outputs


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (shifted, ("logits differs by up to",)),
        (jumped, ("a probability differs by", "logits differs by up to")),
        (turned, ("the heat maps' rank correlation is", "the findings' overlap is", "attention differs by")),
        (swapped, ("labels agree on", "logits differs by")),
        (
            broken,
            (
                "statuses agree on",
                "labels agree on",
                "logits differs by up to inf",
                "hostile input noise: the network failed, or is not finite",
            ),
        ),
    ],
)
def test_a_network_that_differs_is_found_out(
    bundle: Bundle, films: Path, change: Callable[[Outputs], Outputs], expected: tuple[str, ...]
) -> None:
    report = compared(bundle, films, change)
    assert not report.passed
    for beginning in expected:
        assert any(line.startswith(beginning) for line in report.failures), (beginning, report.failures)
    assert "FAILED: " in report.format()
    assert "PASSED" not in report.format()
    json.dumps(report.to_dict(), allow_nan=False)


def test_what_is_allowed_in_half_precision_is_not_in_float32(bundle: Bundle, films: Path) -> None:
    assert not compared(bundle, films, shifted).passed
    report = compared(bundle, films, shifted, "fp16")
    assert report.passed, report.failures
    assert {made.name for made in report.inputs if not made.judged} == set(BEYOND_RANGE)


def test_a_crash_of_one_side_is_a_film_that_differs(bundle: Bundle, films: Path) -> None:
    def crash(outputs: Outputs) -> Outputs:
        if outputs["logits"][0, 0] != quiet:
            raise RuntimeError("as if the device was lost")
        return outputs

    quiet = 0.0
    with open_side("fp32", bundle, threads=1) as (first, _):
        second = Side("cuda", bundle, cast(CheckedBackend, Tampered(bundle, crash)))
        film = compare_film("x", first.see(films.parent / "0.png"), second.see(films.parent / "0.png"), first_allowed())
    assert film.status[1] == "error (fault)"
    assert not film.same_status
    assert not film.same_label
    assert film.outputs["logits"][0] == math.inf


def first_allowed() -> Any:
    return ALLOWED["fp32"]


def test_hostile_files_are_written_and_readable(tmp_path: Path) -> None:
    written = list(hostile_files(tmp_path))
    assert len({name for name, _ in written}) == len(written) == 10
    for _, path in written:
        assert np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)).shape == (256, 256)


def test_films_of_a_manifest_and_of_the_bundle(bundle: Bundle, films: Path, tmp_path: Path) -> None:
    named = manifest_films(films)
    assert [name for name, _ in named] == [*(f"{number}.png" for number in range(6)), "torn.png"]
    assert all(path == films.parent / name for name, path in named)
    assert {name for name, _ in golden_films(bundle)} == {f"golden {name}" for name in tiny_bundle.GOLDEN}
    (tmp_path / "bad.csv").write_text("path,label,patient\n,normal,p\n")
    with pytest.raises(DataError, match="line 2"):
        manifest_films(tmp_path / "bad.csv")
    (tmp_path / "empty.csv").write_text("path,label,patient\n")
    with pytest.raises(DataError, match="names no image"):
        manifest_films(tmp_path / "empty.csv")


def test_a_network_that_fails_on_a_hostile_input_is_reported(bundle: Bundle) -> None:
    def crash(outputs: Outputs) -> Outputs:
        raise MagsdError("the device was lost")

    with open_side("fp32", bundle, threads=1) as (first, _):
        second = Side("cuda", bundle, cast(CheckedBackend, Tampered(bundle, crash)))
        report = compare_sides(bundle, first, second, golden_films(bundle), source="golden inputs")
    assert {made.finite for made in report.inputs} == {(True, False)}
    assert "hostile input noise: the network failed, or is not finite" in report.failures
    json.dumps(report.to_dict(), allow_nan=False)


def test_no_name_of_a_film_breaks_the_report(bundle: Bundle, films: Path) -> None:
    with open_side("fp32", bundle, threads=1) as (first, _):
        second = Side("cuda", bundle, cast(CheckedBackend, Tampered(bundle, swapped)))
        named = [("bell\x07\x1b[2J.png", films.parent / "0.png")]
        shown = compare_sides(bundle, first, second, named, source="a list").format()
    assert "\x1b" not in shown
    assert "\\x1b[2J.png: label" in shown


def keys_of(record: Any, inside: str = "") -> set[str]:
    found = set()
    for key, value in record.items():
        found.add(inside + key)
        if isinstance(value, dict) and set(value) != {"logits", "attention", "evidence", "embedding"}:
            found |= keys_of(value, f"{inside}{key}.")
    return found


def test_every_field_of_the_record_is_documented(bundle: Bundle, films: Path) -> None:
    record = compared(bundle, films, swapped).to_dict()
    text = (Path(__file__).parents[1] / "docs" / "verify.md").read_text(encoding="utf-8")
    table = text[text.index("| field of the record |") :].split("\n\n")[0]
    documented = set(re.findall(r"`([a-z0-9_.]+)`", "\n".join(line.split("|")[1] for line in table.splitlines()[2:])))
    parts = ("probability_difference", "heat_rank_correlation", "finding_overlap")
    found = {key for key in keys_of(record) if not key.startswith("hostile_files.")}
    found -= {f"films.{part}.{key}" for part in parts for key in ("mean", "worst", "at")}
    found = {key for key in found if not key.startswith(("first.", "second."))}
    assert documented == found
    assert set(record["hostile_files"]) == set(record["films"])
    assert set(record["films"]["outputs"]["logits"]) == {
        "worst_difference",
        "at",
        "mean_difference",
        "share_of_tolerance",
    }


# --- the command ---------------------------------------------------------------------------------


def test_magsd_verify_compare(bundle: Bundle, films: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", str(bundle.path), "--compare", "fp32,fp16", "--threads", "1"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "films               2 of golden inputs, " in shown
    assert shown.splitlines()[-2:] == ["PASSED", "Research use only. Not for clinical use."]
    assert main([*arguments, "--data", str(films), "--limit", "3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["schema"] == "magsd.decisions/1"
    assert record["films"]["films"] == 3
    assert record["second"] == {"side": "fp16", "backend": "cpu-fp16", "device": "cpu", "precision": "fp16"}
    assert 0 < record["films"]["probability_difference"]["worst"] < 0.05  # half precision does round
    assert record["films"]["outputs"]["logits"]["share_of_tolerance"] <= 1


def test_a_comparison_of_nothing_is_no_proof(bundle: Bundle, films: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (films.parent / "torn.csv").write_text("path,label,patient\ntorn.png,normal,p\n")
    arguments = ["verify", str(bundle.path), "--compare", "fp32,fp16", "--threads", "1"]
    assert main([*arguments, "--data", str(films.parent / "torn.csv")]) == 5
    shown = capsys.readouterr().out
    assert "FAILED: none of 1 films was judged by either side: nothing was compared" in shown
    assert "operating point     none" in shown


def test_both_sides_go_by_the_rules_of_the_site(
    bundle: Bundle, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "site.json"
    rules.write_text(
        '{"schema": "magsd.rules/1", "pixels": {"severity": {"tiny": "rejected"}, "limits": {"tiny_side": 300}}}'
    )
    arguments = ["verify", str(bundle.path), "--compare", "fp32,fp16", "--threads", "1", "--data", str(films), "--json"]
    assert main(arguments) == 0
    free = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--rules", str(rules)]) == 5  # all are 180 x 200: none is judged
    bound = json.loads(capsys.readouterr().out)
    assert free["rules_sha256"] == SiteRules().sha256() != bound["rules_sha256"] == read_rules(rules).sha256()
    assert free["films"]["judged_by_both"] > 0 == bound["films"]["judged_by_one_or_both"]


def test_half_precision_rounded_as_on_a_gpu(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    """A CPU rounds the weights only; the reference evaluator rounds what every layer gives, as a GPU does."""
    assert main(["verify", str(bundle.path), "--threads", "1", "--json", "--compare", "fp32,fp16-rounded"]) == 0
    side = json.loads(capsys.readouterr().out)["second"]
    assert side == {"side": "fp16-rounded", "backend": "fp16-rounded", "device": "cpu", "precision": "fp16"}
    image = hostile_inputs(bundle.preprocessing.size)["noise"]
    wanted: Any = ReferenceEvaluator(str(bundle.path / "model.fp16.onnx")).run(
        ["embedding"], {"image": image[np.newaxis]}
    )
    off = {}
    for name in ("fp16", "fp16-rounded"):
        with open_side(name, bundle, threads=1) as (opened, _):
            outputs = opened.run(image)
        assert outputs is not None
        off[name] = float(np.abs(outputs["embedding"] - np.asarray(wanted[0])[0]).max())
    assert off["fp16-rounded"] < off["fp16"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--compare", "fp32"], 2, "expected two, such as fp32,engine"),
        (["--compare", "fp32,fp32"], 2, "expected two"),
        (["--compare", "fp32,bf16"], 2, "names 'bf16': expected two of torch, fp32"),
        (["--compare", "fp32,torch"], 2, "--compare torch needs --run"),
        (["--compare", "fp32,fp16", "--run", "x"], 2, "--run goes with --compare torch"),
        (["--compare", "fp32,fp16", "--backend", "cpu"], 2, "--backend goes without --compare"),
        (["--compare", "fp32,fp16", "--limit", "3"], 2, "--limit goes with --data"),
        (["--rules", "x.json"], 2, "--rules goes with --compare"),
        (["--data", "x.csv"], 2, "--data goes with --compare"),
        (["--compare", "fp32,int8"], 6, "has no network in int8"),
        (["--compare", "fp32,engine"], 6, "has no engine: magsd engine"),
        (["--compare", "fp32,fp16", "--data", "none.csv"], 2, "none.csv: cannot be read"),
    ],
)
def test_wrong_use_is_one_line(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(["verify", str(bundle.path), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


@needs_rtx
def test_an_engine_that_fails_is_no_longer_chosen(
    bundle: Bundle, gpu: Any, films: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_engine(bundle, profile=Profile(1, 2, 4))
    arguments = ["verify", str(bundle.path), "--compare", "fp32,engine", "--data", str(films)]
    assert main(arguments) == 0
    (passport,), _ = read_passports(bundle.path / "engines")
    assert passport.proven
    assert passport.parity["decisions"]["status"] == "passed"
    assert passport.parity["decisions"]["films"] == 7
    with open_backend(bundle, "auto") as backend:
        assert backend.name == "tensorrt"

    right = gpu.engine.function
    gpu.engine.function = lambda images: swapped(dict(right(images)))
    assert main(arguments) == 5
    gpu.engine.function = right
    (passport,), broken_passports = read_passports(bundle.path / "engines")
    assert broken_passports == ()
    assert not passport.proven
    assert passport.parity["decisions"]["failures"]
    with open_backend(bundle, "auto") as backend:
        assert backend.name == "cpu"
    monkeypatch.setenv("MAGSD_BUNDLE", str(bundle.path))
    assert "found it outside its limits, auto does not choose it" in format_report(examine())
    # A pass on fewer films does not take that back: it is built again, or not used
    assert main(["verify", str(bundle.path), "--compare", "fp32,engine"]) == 0
    (passport,), _ = read_passports(bundle.path / "engines")
    assert not passport.proven
    capsys.readouterr()


def test_a_report_without_a_film_does_not_pass(bundle: Bundle) -> None:
    with open_side("fp32", bundle, threads=1) as (first, _), open_side("fp16", bundle, threads=1) as (second, _):
        report: DecisionReport = compare_sides(bundle, first, second, [], source="nothing")
    assert not report.passed
    assert "none of 0 films was judged by either side: nothing was compared" in report.failures
    with pytest.raises(UsageError), open_side("nothing", bundle):
        pass
