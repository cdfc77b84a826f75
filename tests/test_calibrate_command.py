"""magsd calibrate, from a site's images and manifest to a new bundle, and what leaves the old one as it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import tiny_bundle
from magsd.cli import main
from magsd.data import read_manifest
from magsd_runtime import bundle_writing
from magsd_runtime.bundle import load_bundle
from magsd_runtime.calibration import fit_temperature, probabilities
from magsd_runtime.errors import BundleError, DataError, UsageError
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.site_calibration import calibrate_site, read_site

ROOT = Path(__file__).resolve().parents[1]
COVID, NORMAL, PNEUMONIA = tiny_bundle.CLASSES
TRUE_TEMPERATURE = 3.0


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a model card, as magsd export writes one."""
    folder = tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "tiny")
    (folder / "MODEL_CARD.md").write_text("# tiny\n\n## Calibration\n\nNone.\n\n## Limits\n\nMany.\n")
    content = json.loads((folder / "bundle.json").read_text())
    tiny_bundle.write_manifest(
        folder, tiny_bundle.CLASSES, load_bundle(folder).preprocessing, 1.0, content["localization"]
    )
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def films(
    original: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[str, str, str]], np.ndarray]:
    """A folder of 200 small films, their rows (path, label, patient), and the bundle's logits (200, 3).

    Labels are drawn from the bundle's own probabilities at ``TRUE_TEMPERATURE``. Each patient has two films.
    """
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(1)
    rows, logits = [], []
    with Pipeline.open(original, "cpu", threads=1) as pipeline:
        while len(rows) < 200:
            number = len(rows)
            coarse = cv2.resize(rng.normal(0, 1, (5, 5)), (128, 128), interpolation=cv2.INTER_CUBIC)
            pixels = np.clip(128 + 60 * coarse + rng.normal(0, 8, (128, 128)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / f"{number:03d}.png"), pixels)
            result = pipeline.predict(folder / f"{number:03d}.png", with_heat=False)
            if result.prediction.status != "ok":  # clouds may look like a chest upside down
                continue
            assert result.logits is not None
            logits.append(result.logits)
            label = rng.choice(3, p=probabilities(result.logits[np.newaxis], TRUE_TEMPERATURE)[0])
            rows.append((f"{number:03d}.png", tiny_bundle.CLASSES[label], f"patient-{number // 2}"))
    return folder, rows, np.array(logits)


def write(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    path.write_text("path,label,patient\n" + "".join(",".join(row) + "\n" for row in rows))
    return path


@pytest.fixture
def site(films: tuple[Path, list[tuple[str, str, str]], np.ndarray]) -> Path:
    folder, rows, _ = films
    return write(folder / "site.csv", rows)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_site_gets_a_calibrated_bundle_and_the_old_one_stays(
    bundle: Path, site: Path, films: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content_of(bundle)
    arguments = ["calibrate", str(bundle), "--data", str(site), "--positive", PNEUMONIA, "--note", "ward 3", "--json"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    record = json.loads(captured.out)
    assert content_of(bundle) == before
    out = bundle.with_name("bundle-calibrated")
    assert record["bundle"] == str(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle-calibrated"]

    new = load_bundle(out)
    assert (
        new.calibration.to_dict()
        == record["calibration"]
        == json.loads((out / "bundle.json").read_text())["calibration"]
    )
    _, rows, logits = films
    labels = np.array([tiny_bundle.CLASSES.index(label) for _, label, _ in rows])
    assert new.temperature == pytest.approx(fit_temperature(logits, labels).temperature, rel=1e-6)
    low, high = new.calibration.temperature_ci95 or (0, 0)
    assert low < TRUE_TEMPERATURE < high
    assert new.calibration.source == "cases given to magsd calibrate: ward 3"
    assert new.calibration.model_sha256 == new.model_sha256 == load_bundle(bundle).model_sha256
    assert new.calibration.data is not None
    assert (new.calibration.data.images, new.calibration.data.patients) == (200, 100)
    assert new.calibration.data.digest == read_manifest(site).digest()
    assert new.calibration.default == "sensitivity_90"
    for name, content in content_of(out).items():
        if name not in ("bundle.json", "MODEL_CARD.md"):
            assert content == before[name]
        assert b"patient-" not in content
        assert str(site.parent).encode() not in content
    card = (out / "MODEL_CARD.md").read_text()
    assert f"Temperature {new.temperature:.3f}, fitted on 200 images of 100 patients" in card
    assert card.endswith("\n## Limits\n\nMany.\n")

    assert main(["verify", str(out)]) == 0
    capsys.readouterr()
    film = site.parent / rows[0][0]
    assert main(["infer", str(film), "--bundle", str(out), "--json"]) == 0
    prediction = json.loads(capsys.readouterr().out)
    expected = probabilities(logits[:1], new.temperature)[0]
    assert list(prediction["probabilities"].values()) == pytest.approx(expected, rel=1e-6)
    point = new.calibration.operating_points[0]
    assert prediction["decision"] == {
        "positive_class": PNEUMONIA, "probability": prediction["probabilities"][PNEUMONIA],
        "operating_point": "sensitivity_90", "threshold": point.threshold,
        "positive": prediction["probabilities"][PNEUMONIA] >= point.threshold,
    }  # fmt: skip
    assert main(["infer", str(film), "--bundle", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decision"] is None


def test_decisions_on_the_site_reach_the_sensitivity_that_the_bundle_states(
    bundle: Path, site: Path, films: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = bundle.with_name("new")
    assert main(["calibrate", str(bundle), "--data", str(site), "--positive", COVID, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    folder, rows, _ = films
    assert main(["infer", str(folder), "--bundle", str(out), "--json"]) == 0
    found = {
        Path(line["path"]).name: line["decision"] for line in map(json.loads, capsys.readouterr().out.splitlines())
    }
    point = load_bundle(out).calibration.operating_points[0]
    own = [found[name]["positive"] for name, label, _ in rows if label == COVID]
    others = [found[name]["positive"] for name, label, _ in rows if label != COVID]
    assert np.mean(own) == pytest.approx(point.sensitivity)
    assert point.sensitivity >= 0.9
    assert 1 - np.mean(others) == pytest.approx(point.specificity)
    assert f"{point.threshold:.4f}" in text
    assert text.splitlines()[-1] == "Research use only. Not for clinical use."

    assert main(["infer", str(folder / "000.png"), "--bundle", str(out)]) == 0
    _, how, *_, header, row = capsys.readouterr().out.splitlines()
    assert how.startswith(f"positive: {COVID} {point.threshold:.3f} or more, which found 9")
    word = "positive" if found["000.png"]["positive"] else "negative"
    assert row[header.index(COVID) :].startswith(word)


def test_the_positive_class_of_a_calibrated_bundle_stays(bundle: Path, site: Path) -> None:
    first, second = bundle.with_name("first"), bundle.with_name("second")
    assert main(["calibrate", str(bundle), "--data", str(site), "--positive", COVID, "--out", str(first)]) == 0
    arguments = ["calibrate", str(first), "--data", str(site), "--out", str(second), "--sensitivity", "0.8"]
    assert main(arguments) == 0
    calibration = load_bundle(second).calibration
    assert (calibration.positive_class, calibration.default) == (COVID, "sensitivity_80")
    assert calibration.before is not None
    assert calibration.before.temperature == load_bundle(first).temperature == pytest.approx(calibration.temperature)


def test_dry_run_and_no_positive_class(bundle: Path, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(bundle), "--data", str(site), "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "nothing written (--dry-run)" in captured.out
    assert "threshold" not in captured.out
    assert "no class was named by --positive (covid-19, normal, pneumonia)" in captured.err
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_images_that_cannot_be_judged_are_named_and_take_no_part(
    bundle: Path, films: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows, _ = films
    cv2.imwrite(str(folder / "flat.png"), np.full((80, 80), 9, np.uint8))
    odd = [("flat.png", NORMAL, "x1"), ("gone.png", COVID, "x2"), ("000.png", "influenza", "x3")]
    data = write(folder / "odd.csv", [row for row in rows if row[0] != "000.png"] + odd)
    assert main(["calibrate", str(bundle), "--data", str(data), "--json"]) == 3
    (folder / "flat.png").unlink()
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert [(one["path"], one["status"]) for one in record["refused"]] == [
        ("flat.png", "rejected"),
        ("gone.png", "error"),
    ]
    assert record["unknown_labels"] == {"influenza": 1}
    assert record["images"] == record["calibration"]["data"]["images"] == 199
    for text in (
        "magsd calibrate: flat.png: rejected: the image has one grey value only",
        "magsd calibrate: gone.png: error: ",
        "2 images could not be judged and took no part",
        "1 image took no part, since the model does not have their class: influenza 1",
    ):
        assert text in captured.err
    assert load_bundle(record["bundle"]).calibration.fitted


def test_refusals_are_one_line_and_write_nothing(
    bundle: Path, site: Path, films: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows, _ = films
    few = write(folder / "few.csv", [row for row in rows if row[1] != COVID] + [r for r in rows if r[1] == COVID][:9])
    absent = write(folder / "absent.csv", [row for row in rows if row[1] != NORMAL])
    twice = write(folder / "twice.csv", [*rows, (rows[0][0], "other", "x")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, code, message in (
        (["--data", str(few)], 2, "20 patients of every class of the model are needed, and covid-19 has "),
        (["--data", str(absent)], 2, "normal has none"),
        (["--data", str(twice)], 2, "000.png has another label or patient in line 2"),
        (["--data", str(folder)], 2, "is a folder, which knows no patients"),
        (["--data", str(folder / "no.csv")], 2, "no.csv: cannot be read"),
        (["--data", str(site), "--positive", "flu"], 2, "--positive is 'flu'"),
        (["--data", str(site), "--sensitivity", "1"], 2, "--sensitivity is 1"),
        (["--data", str(site), "--out", str(tmp_path / "full")], 2, "exists: add --force"),
        (["--data", str(site), "--out", str(tmp_path / "full"), "--force"], 2, "is no bundle"),
        (["--data", str(site), "--out", str(bundle)], 2, "exists: add --force"),
    ):
        assert main(["calibrate", str(bundle), *arguments]) == code, arguments
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1, captured.err
        assert message in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "full"]


def test_the_training_manifest_is_no_site(bundle: Path, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle / "bundle.json"
    content = json.loads(path.read_text())
    content["training"] = {"data": {"digest": read_manifest(site).digest()}}
    path.write_text(json.dumps(content))
    assert main(["calibrate", str(bundle), "--data", str(site)]) == 2
    assert "the model was trained on this very manifest" in capsys.readouterr().err


def test_a_bundle_with_the_calibration_of_another_model_is_refused_everywhere(
    bundle: Path, site: Path, films: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = bundle.with_name("new")
    assert main(["calibrate", str(bundle), "--data", str(site), "--out", str(out)]) == 0
    path = out / "bundle.json"
    content = json.loads(path.read_text())
    content["calibration"]["model_sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"that of model 000000000000\.\.\..*export the bundle again"):
        load_bundle(out)
    capsys.readouterr()
    for arguments in (
        ["infer", str(films[0] / "000.png"), "--bundle", str(out)],
        ["verify", str(out)],
        ["calibrate", str(out), "--data", str(site)],
    ):
        assert main(arguments) == 4
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1


# Reading the site's manifest.


def test_the_digest_is_that_of_training(tmp_path: Path) -> None:
    """With boxes on several lines, sources, masks, another order and odd names; no image is opened."""
    data = tmp_path / "m.csv"
    data.write_text(
        "label,path,patient,source,x,y,w,h,mask\n"
        'b,sub/../z.png,p1,,1,2,3,4,\na,"ä, ö.png",p2,north,,,,,m/1.png\n'
        "b,z.png,p1,south,9,9.5,3,4,\na,./a.png,p3,,,,,,\n"
    )
    site = read_site(data)
    assert site.digest == read_manifest(data).digest()
    assert [(image.name, image.label, image.patient) for image in site.images] == [
        ("sub/../z.png", "b", "p1"), ("ä, ö.png", "a", "p2"), ("./a.png", "a", "p3"),
    ]  # fmt: skip
    lines = data.read_text().splitlines()
    (tmp_path / "n.csv").write_text("\n".join([lines[0], lines[2], lines[4], lines[1], lines[3]]) + "\n")
    assert read_site(tmp_path / "n.csv").digest == site.digest
    data.write_text(data.read_text().replace("p3", "p4"))
    assert read_site(data).digest != site.digest


def test_lines_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    data = tmp_path / "m.csv"
    data.write_text("path,label,patient\n" + "a.png,,p\n" * 5)
    with pytest.raises(DataError, match=r"line 2: no label; .* and 2 more$"):
        read_site(data)
    data.write_text("path,label,patient\n")
    with pytest.raises(DataError, match="no line of data"):
        read_site(data)


# Writing.


def calibrated(bundle: Path, site: Path, out: Path, **keywords: Any) -> None:
    with Pipeline.open(bundle, "cpu", threads=1) as pipeline:
        calibrate_site(pipeline, read_site(site), out, **keywords)


def test_in_place_only_when_its_folder_is_named(bundle: Path, site: Path) -> None:
    before = content_of(bundle)
    calibrated(bundle, site, bundle, force=True)
    after = content_of(bundle)
    assert load_bundle(bundle).calibration.fitted
    assert {name for name in before if before[name] != after[name]} == {"bundle.json", "MODEL_CARD.md"}
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("breaks", ["copyfile", "write_json", "load_bundle", "rename"])
def test_a_write_that_fails_leaves_the_old_bundle(
    bundle: Path, site: Path, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    before = content_of(bundle)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    holder: Any = {"copyfile": shutil, "rename": os}.get(breaks, bundle_writing)
    with Pipeline.open(bundle, "cpu", threads=1) as pipeline, monkeypatch.context() as patch:
        patch.setattr(holder, breaks, full)
        with pytest.raises(UsageError, match="cannot be copied there"):
            calibrate_site(pipeline, read_site(site), bundle, force=True)
    assert content_of(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_bundle_altered_while_it_is_open_is_not_copied(bundle: Path, site: Path, tmp_path: Path) -> None:
    with Pipeline.open(bundle, "cpu", threads=1) as pipeline:
        (bundle / "golden" / "noise.png").write_bytes(b"other")
        with pytest.raises(BundleError, match=r"noise\.png: has 5 bytes"):
            calibrate_site(pipeline, read_site(site), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_kill_leaves_the_old_bundle_and_the_next_try_works(bundle: Path, site: Path, tmp_path: Path) -> None:
    """Killed while the copy is half done: no bundle of that name, the old one whole, and nothing in the way."""
    before = content_of(bundle)
    program = (
        "import shutil, sys, time\n"
        "from magsd.cli import main\n"
        "copy = shutil.copyfile\n"
        "def slow(source, target):\n"
        "    copy(source, target)\n"
        "    print('copied', flush=True)\n"
        "    time.sleep(60)\n"
        "shutil.copyfile = slow\n"
        "main(sys.argv[1:])\n"
    )
    paths = os.pathsep.join(map(str, [ROOT, ROOT / "export", ROOT / "runtime"]))
    arguments = ["calibrate", str(bundle), "--data", str(site), "--out", str(bundle), "--force"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"copied\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    assert content_of(bundle) == before
    started = time.monotonic()
    assert main(arguments) == 0
    assert time.monotonic() - started < 60
    assert load_bundle(bundle).calibration.fitted


def test_the_coverage_of_a_site(bundle: Path, site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["calibrate", str(bundle), "--data", str(site), "--out", str(tmp_path / "new"), "--json"]
    assert main([*arguments, "--coverage", "0.8"]) == 0
    sets = json.loads(capsys.readouterr().out)["calibration"]["prediction_sets"]
    assert sets["coverage"] == 0.8
    assert set(sets["minimum_probability"]) == set(tiny_bundle.CLASSES)
    found = load_bundle(tmp_path / "new").calibration.sets
    assert found is not None
    assert found.to_dict() == sets
    # what the old calibration was unsure of takes part, and is no flag of the image
    again = ["calibrate", str(tmp_path / "new"), "--data", str(site), "--dry-run", "--json"]
    assert main([*again, "--coverage", "0.95"]) == 0
    assert json.loads(capsys.readouterr().out)["review"] == 0
    for wrong in ("1", "0.4", "nan"):
        assert main([*again, "--coverage", wrong]) == 2
        assert capsys.readouterr().err.startswith(f"magsd calibrate: --coverage is {float(wrong):g}: expected 0.5")
    assert main([*again, "--coverage", "0.999"]) == 0
    assert "no prediction sets at coverage 0.999: 999 patients of every class" in capsys.readouterr().err
