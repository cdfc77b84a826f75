"""One file of rules for a site: what it may say, and what infer, watch, audit and replay make of it."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_bundle
from drawn_film import drawn_film
from magsd.cli import main
from magsd_runtime.acceptance import Judgement, unlike_training
from magsd_runtime.dicom.rules import DEFAULT_SEVERITIES as HEADER_CODES
from magsd_runtime.dicom.rules import Rules
from magsd_runtime.errors import UsageError
from magsd_runtime.images import Radiograph
from magsd_runtime.lungs import PACKAGED_LUNGS, packaged_sha256
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.pixel_rules import DEFAULT_SEVERITIES as PIXEL_CODES
from magsd_runtime.pixel_rules import PixelLimits, PixelRules
from magsd_runtime.preprocessing import Framing, PreprocessingSpec, Region
from magsd_runtime.site_rules import RULES_SCHEMA, SiteRules, read_rules

SCHEMA = {"schema": RULES_SCHEMA}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def film(tmp_path: Path) -> Path:
    cv2.imwrite(str(tmp_path / "film.png"), drawn_film())
    return tmp_path / "film.png"


def write(path: Path, record: Any) -> Path:
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path


def codes(prediction: Any) -> list[str]:
    return [reason.code for reason in prediction.reasons]


# ---------------------------------------------------------------- the file


def test_a_file_with_every_part(tmp_path: Path) -> None:
    record = {
        **SCHEMA,
        "header": {"minimum_age": 5, "severity": {"derived_image": "ok"}},
        "pixels": {"severity": {"tiny": "rejected"}, "limits": {"tiny_side": 300}},
        "model": {"unlike_training": "rejected", "no_lungs": "review"},
    }
    rules = read_rules(write(tmp_path / "rules.json", record))
    assert rules.header == Rules(5, {**HEADER_CODES, "derived_image": "ok"})
    assert rules.pixels == PixelRules({**PIXEL_CODES, "tiny": "rejected"}, PixelLimits(tiny_side=300))
    assert (rules.unlike_training, rules.no_lungs) == ("rejected", "review")
    whole = rules.to_dict()
    assert SiteRules.from_dict(whole) == rules
    assert set(whole["header"]["severity"]) == set(HEADER_CODES)
    assert set(whole["pixels"]["severity"]) == set(PIXEL_CODES)


def test_what_is_left_out_keeps_its_default(tmp_path: Path) -> None:
    rules = read_rules(write(tmp_path / "rules.json", "\ufeff" + json.dumps(SCHEMA)))  # an editor's byte order mark
    assert rules == SiteRules()
    assert rules.sha256() == SiteRules().sha256()


def test_the_hash_is_of_the_rules_not_of_the_file() -> None:
    turned = dict(reversed(SiteRules().to_dict().items()))
    assert SiteRules.from_dict(turned).sha256() == SiteRules().sha256()
    said = SiteRules.from_dict({**SCHEMA, "header": {"minimum_age": 18}})  # whole numbers are numbers
    assert said.sha256() == SiteRules().sha256()
    others = [
        {"header": {"minimum_age": 17}},
        {"header": {"severity": {"too_young": "ok"}}},
        {"pixels": {"limits": {"tiny_side": 121}}},
        {"pixels": {"severity": {"tiny": "ok"}}},
        {"model": {"no_lungs": "review"}},
    ]
    hashes = {SiteRules.from_dict({**SCHEMA, **other}).sha256() for other in others}
    assert len(hashes | {SiteRules().sha256()}) == 6


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([], "expected an object"),
        ({}, "schema is None, expected 'magsd.rules/1'"),
        ({"schema": "magsd.rules/2"}, "schema is 'magsd.rules/2'"),
        ({**SCHEMA, "pixel": {}}, "'pixel' is no part, expected header, pixels"),
        ({**SCHEMA, "pixels": {"severity": {"crooked": "ok"}}}, "'crooked' is no code"),
        ({**SCHEMA, "pixels": 3}, "pixels: expected an object"),
        ({**SCHEMA, "header": {"severity": {"too_old": "ok"}}}, "'too_old' is no code"),
        ({**SCHEMA, "model": []}, "model is no object"),
        ({**SCHEMA, "model": {"upside_down": "ok"}}, "'upside_down' is no code, expected one of unlike_training"),
        ({**SCHEMA, "model": {"unlike_training": "ok"}}, "expected by_score, review or rejected"),
        ({**SCHEMA, "model": {"no_lungs": "ok"}}, "no_lungs is 'ok', expected review or rejected"),
        ({**SCHEMA, "model": {"no_contrast": "ok"}}, "always rejected"),
        ({**SCHEMA, "model": {"no_lungs": ["review"]}}, "expected review or rejected"),
        ("{", "is no JSON"),
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"schema": "magsd.rules/1", "schema": "magsd.rules/1"}', "'schema' stands there twice"),
        ('{"schema": "magsd.rules/1", "pixels": {"limits": {"tiny_side": Infinity}}}', "tiny_side is inf"),
        (" " * (1 << 20) + " {}", "larger than 1 MiB"),
    ],
)
def test_a_file_that_is_wrong_is_one_line_and_exit_code_2(
    record: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rules.json", record)
    with pytest.raises(UsageError) as caught:
        read_rules(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert main(["infer", "film.png", "--rules", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.json", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            read_rules(path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(UsageError, match="is no JSON"):
        read_rules(tmp_path / "binary.json")


words = st.sampled_from(["schema", "header", "pixels", "model", "severity", "limits", "tiny", "tiny_side", "no_lungs"])
values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | st.sampled_from(["ok", "review"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["header", "pixels", "model"]) | st.text(max_size=3), values, max_size=4))
def test_any_content_is_rules_or_a_usage_error_of_one_line(record: dict[str, Any]) -> None:
    try:
        rules = SiteRules.from_dict({**record, **SCHEMA})
    except UsageError as error:
        one_line = "\n" not in str(error)
    else:
        one_line = True
        assert SiteRules.from_dict(json.loads(json.dumps(rules.to_dict(), allow_nan=False))) == rules
    assert one_line


# ---------------------------------------------------------------- what they do


def test_the_pipeline_goes_by_them(bundle: Path, film: Path) -> None:
    with Pipeline.open(bundle, "cpu", threads=1) as pipeline:
        fine = pipeline.predict(film).prediction
        assert (fine.status, fine.reasons, fine.rules_sha256) == ("ok", (), SiteRules().sha256())
        assert list(fine.timings_ms)[:3] == ["decode", "preprocess", "rules"]
        strict = SiteRules(pixels=PixelRules(limits=PixelLimits(tiny_side=300)))
        flagged = Pipeline(pipeline.bundle, pipeline.backend, rules=strict).predict(film).prediction
        assert (flagged.status, codes(flagged), flagged.label) == ("review", ["tiny"], fine.label)
        assert flagged.rules_sha256 == strict.sha256() != fine.rules_sha256
        cv2.imwrite(str(film), drawn_film()[::-1])
        refused = pipeline.predict(film)
        assert (refused.prediction.status, codes(refused.prediction)) == ("rejected", ["upside_down"])
        assert refused.prediction.label is None
        assert refused.radiograph is not None
        off = SiteRules(pixels=PixelRules(dict.fromkeys(PIXEL_CODES, "ok")))
        assert Pipeline(pipeline.bundle, pipeline.backend, rules=off).predict(film).prediction.status == "ok"


def test_no_lungs_can_be_for_review(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "noise.png"), np.random.default_rng(0).integers(0, 256, (200, 200)).astype(np.uint8))
    spec = PreprocessingSpec(crop="lungs", crop_margin=0.06, lungs_sha256=packaged_sha256())
    folder = tiny_bundle.build(tmp_path / "b", spec=spec)
    shutil.copy(PACKAGED_LUNGS, folder / "lungs.onnx")
    where = {"map": "attention", "threshold": 0.5}
    tiny_bundle.write_manifest(folder, tiny_bundle.CLASSES, spec, 1.0, where)
    with Pipeline.open(folder, "cpu", threads=1) as pipeline:
        refused = pipeline.predict(tmp_path / "noise.png").prediction
        assert (refused.status, codes(refused)) == ("rejected", ["no_lungs"])
        lenient = Pipeline(pipeline.bundle, pipeline.backend, rules=SiteRules(no_lungs="review"))
        flagged = lenient.predict(tmp_path / "noise.png").prediction
        assert (flagged.status, codes(flagged)) == ("review", ["no_lungs"])
        assert flagged.label is not None


def test_no_contrast_is_rejected_whatever_the_rules_say() -> None:
    flat = np.full((100, 100), 7, np.uint8)
    off = SiteRules(pixels=PixelRules(dict.fromkeys(PIXEL_CODES, "ok")), no_lungs="review")
    found, _ = off.judge_film(Radiograph(flat, {}), Framing(100, 100, Region(0, 0, 100, 100)), flat)
    assert (found.status, [reason.code for reason in found.reasons]) == ("rejected", ["no_contrast"])


@pytest.mark.parametrize(
    ("rule", "measured", "explained", "expected"),
    [
        ("by_score", "ok", False, ("ok", 0)),
        ("by_score", "review", False, ("review", 1)),
        ("by_score", "rejected", False, ("rejected", 1)),
        ("by_score", "review", True, ("review", 0)),  # "upside down" says it better
        ("by_score", "rejected", True, ("rejected", 1)),
        ("review", "rejected", False, ("review", 1)),
        ("review", "ok", False, ("ok", 0)),
        ("rejected", "review", False, ("rejected", 1)),
        ("rejected", "review", True, ("rejected", 1)),
    ],
)
def test_unlike_training(rule: str, measured: Any, explained: bool, expected: tuple[str, int]) -> None:
    reasons = () if measured == "ok" else (unlike_training(measured),)
    found = SiteRules(unlike_training=rule).judge_likeness(
        Judgement(measured, {"image": 3.0}, reasons), explained=explained
    )
    assert (found.status, len(found.reasons)) == expected
    assert found.scores == {"image": 3.0}
    for reason in found.reasons:  # the words go with the severity
        assert ("not judged" in reason.message) == (found.status == "rejected")


# ---------------------------------------------------------------- the command line


def test_print_rules_is_a_file_to_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("infer", "watch", "replay", "calibrate"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--print-rules"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert json.loads(printed) == SiteRules().to_dict()
    assert read_rules(write(tmp_path / "site.json", printed)) == SiteRules()
    mine = write(tmp_path / "mine.json", {**SCHEMA, "model": {"no_lungs": "review"}})
    with pytest.raises(SystemExit):
        main(["infer", "--rules", str(mine), "--print-rules"])
    assert json.loads(capsys.readouterr().out)["model"] == {"unlike_training": "by_score", "no_lungs": "review"}


def test_infer_audit_and_replay(bundle: Path, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = write(tmp_path / "mine.json", {**SCHEMA, "pixels": {"limits": {"tiny_side": 300}}})
    log = tmp_path / "log"
    arguments = ["infer", str(film), "--bundle", str(bundle), "--json", "--rules", str(mine), "--audit", str(log)]
    assert main(arguments) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [reason["code"] for reason in shown["reasons"]] == ["tiny"]
    record = json.loads(log.read_text())
    assert record["rules_sha256"] == shown["rules_sha256"] == read_rules(mine).sha256()
    again = ["replay", str(log), "--input", str(film), "--bundle", str(bundle), "--json"]
    assert main([*again, "--rules", str(mine)]) == 0
    assert json.loads(capsys.readouterr().out)["circumstances"] == []
    assert main(again) == 5
    replayed = json.loads(capsys.readouterr().out)
    assert [one["what"] for one in replayed["circumstances"]] == ["rules"]
    assert any(line.startswith("reasons: ") for line in replayed["result"])


def test_watch_goes_by_them(bundle: Path, film: Path, tmp_path: Path) -> None:
    assert threading.current_thread() is threading.main_thread()  # watch sets signal handlers
    (tmp_path / "in").mkdir()
    film.rename(tmp_path / "in/film.png")
    mine = write(tmp_path / "mine.json", {**SCHEMA, "pixels": {"limits": {"tiny_side": 300}}})
    arguments = ["watch", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--bundle", str(bundle), "--once"]
    assert main([*arguments, "--settle", "0", "--poll", "0", "--rules", str(mine)]) == 0
    (written,) = (tmp_path / "out").glob("results/*/prediction.json")
    assert [reason["code"] for reason in json.loads(written.read_text())["reasons"]] == ["tiny"]
