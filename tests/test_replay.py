"""infer --audit and replay: what is logged of a prediction, and whether it can be repeated."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

import tiny_bundle
from magsd.cli import main
from magsd_runtime import audit, audit_record, replaying
from magsd_runtime.audit import append
from magsd_runtime.backends import tensorrt_engine
from magsd_runtime.bundle import Bundle
from magsd_runtime.errors import EngineMismatchError
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.prediction import Prediction
from test_audit import ENVIRONMENT, ROOT, check_by_hand, new_log

NAME = "MÜLLER^ANNA_1950-03-07.png"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def film(tmp_path: Path, radiograph_pixels: np.ndarray) -> Path:
    path = tmp_path / "films" / NAME
    path.parent.mkdir()
    path.write_bytes(cv2.imencode(".png", radiograph_pixels)[1].tobytes())
    return path


# --- infer --audit -------------------------------------------------------------------------------


def test_infer_logs_what_it_did_and_nothing_of_the_patient(
    bundle: Path, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    broken = film.with_name("broken-MÜLLER.png")
    broken.write_bytes(film.read_bytes()[:400])
    arguments = [str(film), str(broken), str(film.with_name("gone.png"))]
    assert main(["infer", *arguments, "--bundle", str(bundle), "--audit", str(log), "--json"]) == 3
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    records = check_by_hand(log.read_bytes())
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert [record["kind"] for record in records] == ["prediction"] * 3
    first = records[0]
    assert first["input"] == {"sha256": hashlib.sha256(film.read_bytes()).hexdigest(), "bytes": film.stat().st_size}
    assert first["model"]["sha256"] == hashlib.sha256((bundle / "model.onnx").read_bytes()).hexdigest()
    assert first["preprocessing_sha256"] == manifest["preprocessing_sha256"]
    assert first["rules_sha256"] == shown[0]["rules_sha256"]
    assert first["calibration_sha256"] == audit.sha256_of(manifest["calibration"])
    assert first["bundle_sha256"] == audit.sha256_of(manifest)
    assert {"magsd", "python", "numpy", "opencv", "onnxruntime", "pillow"} <= set(first["versions"])
    assert first["versions"]["opencv"] == cv2.__version__
    assert first["backend"].items() >= {"name": "cpu", "device": "cpu", "precision": "fp32"}.items()
    assert first["started"] <= first["time"]
    assert first["result"]["probabilities"] == shown[0]["probabilities"]
    assert first["result"]["findings"] == shown[0]["findings"]
    # independently: the prediction without what names a file or a time, and the rest in a canonical form
    left_out = ("schema", "path", "model", "preprocessing_sha256", "rules_sha256", "backend", "timings_ms", "files",
                "research_use_only")  # fmt: skip
    form = {name: value for name, value in shown[0].items() if name not in left_out}
    del form["image"]["extension_mismatch"]
    form["reasons"] = [reason["code"] for reason in form["reasons"]]
    text = json.dumps(form, sort_keys=True, separators=(",", ":"))
    assert first["result_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert [record["result"]["reasons"] for record in records] == [[], ["unreadable"], ["unreadable"]]
    assert records[1]["input"]["sha256"] == hashlib.sha256(broken.read_bytes()).hexdigest()
    assert records[2]["input"] == {"sha256": None, "bytes": None}
    text = log.read_text()
    for secret in ("MÜLLER", "LLER", "ANNA", "1950", "broken", "gone", "films", str(tmp_path), "image"):
        assert secret not in text, secret


def test_an_input_that_changes_while_it_is_judged_has_no_hash(
    bundle: Path, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Pipeline.predict

    def slow(self: Pipeline, path: Any, **options: Any) -> Any:
        film.write_bytes(film.read_bytes() + b"more")
        return judge(self, path, **options)

    with Pipeline.open(bundle) as pipeline:
        audited = audit_record.AuditedPipeline(pipeline, tmp_path / "log")
        monkeypatch.setattr(Pipeline, "predict", slow)
        audited.predict(film)
    record = json.loads((tmp_path / "log").read_text())
    assert record["input"] == {"sha256": None, "bytes": None, "changed": True}


def test_nothing_is_judged_when_it_cannot_be_logged(
    bundle: Path, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["infer", str(film), "--bundle", str(bundle), "--json", "--audit"]
    assert main([*arguments, str(tmp_path / "missing" / "log")]) == 2
    log = tmp_path / "log"
    log.write_bytes(new_log(log, 2)[:-9])
    assert main([*arguments, str(log)]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "audit repair" in captured.err
    assert "Traceback" not in captured.err


# --- replay --------------------------------------------------------------------------------------


@pytest.fixture
def logged(bundle: Path, film: Path, tmp_path: Path) -> Path:
    """A log of two films, the second one flat."""
    cv2.imwrite(str(tmp_path / "flat.png"), np.full((80, 80), 9, np.uint8))
    log = tmp_path / "log"
    main(["infer", str(film), str(tmp_path / "flat.png"), "--bundle", str(bundle), "--audit", str(log), "--json"])
    return log


def test_a_replay_gives_the_same_result(
    bundle: Path, film: Path, logged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = film.rename(tmp_path / "another name.jpg")
    capsys.readouterr()
    for record, path in ((str(logged), moved), (f"{logged}#1", moved), (f"{logged}#2", tmp_path / "flat.png")):
        assert main(["replay", record, "--input", str(path), "--bundle", str(bundle), "--json"]) == 0
        done = json.loads(capsys.readouterr().out)
        assert (done["same"], done["result"], done["circumstances"]) == (True, [], [])
    excerpt = tmp_path / "excerpt"
    excerpt.write_bytes(logged.read_bytes().splitlines(keepends=True)[1])
    arguments = ["--input", str(tmp_path / "flat.png"), "--bundle", str(bundle)]
    assert main(["audit", "replay", str(excerpt), *arguments]) == 0
    captured = capsys.readouterr()
    assert "bit for bit" in captured.out
    assert "excerpt" in captured.err


def test_another_model_is_named_with_what_it_changed(
    film: Path, logged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_bundle.build(tmp_path / "other", seed=3, temperature=2.0)
    capsys.readouterr()
    assert main(["replay", str(logged), "--input", str(film), "--bundle", str(other), "--json"]) == 5
    done = json.loads(capsys.readouterr().out)
    assert {difference["what"] for difference in done["circumstances"]} == {"model", "calibration"}
    with Pipeline.open(other) as pipeline:
        now = pipeline.predict(film).prediction.probabilities
    then = json.loads(logged.read_text().splitlines()[0])["result"]["probabilities"]
    assert now is not None
    worst = max(abs(now[name] - then[name]) for name in now)
    assert any(f"differ by up to {worst:.3g} " in line for line in done["result"])
    assert main(["replay", str(logged), "--input", str(film), "--bundle", str(other)]) == 5
    assert "model: " in capsys.readouterr().out


def test_a_changed_threshold_of_the_maps_is_found_in_bundle_json(
    film: Path, logged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_bundle.build(tmp_path / "other", localization={"map": "attention", "threshold": 0.9})
    capsys.readouterr()
    assert main(["replay", str(logged), "--input", str(film), "--bundle", str(other), "--json"]) == 5
    done = json.loads(capsys.readouterr().out)
    assert [difference["what"] for difference in done["circumstances"]] == ["bundle.json"]
    assert [line.partition(":")[0] for line in done["result"]] == ["findings"]


@pytest.mark.parametrize("backend", ["cuda", "tensorrt"])
def test_other_versions_and_machines_are_named_when_the_result_is_the_same(
    bundle: Path,
    film: Path,
    logged: Path,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def another_gpu(_: Bundle) -> None:
        raise EngineMismatchError("built for another GPU")

    monkeypatch.setattr(tensorrt_engine, "open_by_name", another_gpu)
    record = json.loads(logged.read_text().splitlines()[0])
    facts = {name: value for name, value in record.items() if name not in audit._RESERVED}
    facts["versions"] = {**facts["versions"], "numpy": "1.26.0"}
    facts["machine"] = {**facts["machine"], "model": "another"}
    facts["backend"] = {**facts["backend"], "name": backend, "device": "cuda:0"}
    append(logged, "prediction", facts)
    capsys.readouterr()
    assert main(["replay", str(logged), "--input", str(film), "--bundle", str(bundle), "--json"]) == 0
    captured = capsys.readouterr()
    done = json.loads(captured.out)
    assert done["record"] == 3  # the last one of this input
    changed = {difference["what"]: difference["then"] for difference in done["circumstances"]}
    assert changed == {"numpy": "1.26.0", "processor": "another", "backend": backend, "device": "cuda:0"}
    assert "not on the record's backend" in captured.err


def test_facts_of_the_image_count_though_the_log_does_not_hold_them(bundle: Path, film: Path, logged: Path) -> None:
    record = {**json.loads(logged.read_text().splitlines()[0]), "result_sha256": "0" * 64}
    with Pipeline.open(bundle, threads=record["backend"]["threads"]) as pipeline:
        done = replaying.replay(record, film, pipeline, record["backend"]["threads"])
    assert not done.same
    assert "facts of the image" in done.result[0]
    assert "nothing recorded explains it" in done.format()


def test_what_cannot_be_replayed(
    bundle: Path, film: Path, logged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def code(record: str, path: Path) -> int:
        return main(["replay", record, "--input", str(path), "--bundle", str(bundle)])

    stranger = tmp_path / "stranger.png"
    stranger.write_bytes(b"x")
    assert code(str(logged), stranger) == 2
    assert code(f"{logged}#1", tmp_path / "flat.png") == 2
    assert "another input" in capsys.readouterr().err
    assert code(f"{logged}#9", film) == 2
    assert code(str(tmp_path / "none"), film) == 2
    assert code(str(logged), tmp_path / "none") == 2
    append(logged, "test", {})
    assert code(f"{logged}#3", film) == 2
    logged.write_bytes(logged.read_bytes().replace(b'"seq":1', b'"seq":5'))
    assert code(f"{logged}#1", film) == 4
    assert "was edited" in capsys.readouterr().err
    assert code(f"{logged}#2", tmp_path / "flat.png") == 0  # intact by itself; the rest is told
    assert "record 1 was edited" in capsys.readouterr().err


def test_sizes_of_differences() -> None:
    empty: dict[str, Any] = dict.fromkeys(("probabilities", "decision", "acceptance", "label"))
    then = {**empty, "status": "ok", "reasons": [], "findings": [{"box": [0, 0, 9, 9], "score": 0.5}]}
    now = {**then, "findings": [{"box": [0, 2, 9, 9], "score": 0.75}]}
    assert list(replaying.compare_results(then, now)) == [
        "findings: edges differ by up to 2 pixels, scores by up to 0.25"
    ]
    point = {"positive": True, "positive_class": "a", "operating_point": "p", "threshold": 0.5, "probability": 0.6}
    then, now = {**then, "decision": point}, {**then, "decision": {**point, "positive": False}}
    assert list(replaying.compare_results(then, now)) == ["decision, positive: True then, False now"]
    now = {**then, "status": "rejected", "reasons": ["no_lungs"], "decision": None}
    lines = list(replaying.compare_results(then, now))
    assert lines[:2] == ["status: ok then, rejected now", "reasons: none then, no_lungs now"]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom magsd.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'numpy', 'cv2', 'PIL', 'onnxruntime', 'torch'} & set(sys.modules)\n"
    )
    path = os.pathsep.join(map(str, [ROOT, ROOT / "runtime"]))
    for verb in (["audit"], ["audit", "verify"], ["replay"]):
        subprocess.run([sys.executable, "-c", code, *verb, "--help"], env={**ENVIRONMENT, "PYTHONPATH": path},
                       check=True, stdout=subprocess.DEVNULL)  # fmt: skip


def test_versions_of_what_took_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", SimpleNamespace(__version__="3.1.4"))
    by_format = {
        name: audit_record.versions(Prediction("x", "rejected", image={"format": name} if name else {}))
        for name in ("PNG", "DICOM", "")
    }
    assert "pydicom" not in by_format["PNG"]
    assert by_format["DICOM"]["pydicom"] == by_format[""]["pydicom"] == "3.1.4"
    assert by_format["PNG"]["numpy"] == np.__version__
