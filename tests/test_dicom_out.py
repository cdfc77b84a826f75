"""magsd infer --dicom-out, as a command."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import dicom_film
import tiny_bundle
from magsd.cli import main
from magsd_runtime import images, inferring_commands, pipeline
from magsd_runtime.images import Radiograph

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")

KINDS = {"secondary_capture", "structured_report", "presentation_state", "parametric_map"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def reads_dicom(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of the made-up film alone, so that these tests are about writing."""

    def read(path: Any) -> Radiograph:
        if Path(path).suffix != ".dcm":
            return images.read_radiograph(path)
        pixels = (pydicom.dcmread(path).pixel_array >> 4).astype(np.uint8)
        return Radiograph(pixels, {"format": "DICOM", "width": pixels.shape[1], "height": pixels.shape[0]})

    monkeypatch.setattr(pipeline, "read_radiograph", read)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.usefixtures("reads_dicom")
def test_a_film_gets_its_results_and_the_record_names_them(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film, out, records = dicom_film.save(tmp_path), tmp_path / "dicom", tmp_path / "out"
    arguments = [str(film), "--bundle", str(bundle), "--json", "--dicom-out", str(out), "--out", str(records)]
    assert inferring_commands.infer(arguments) == 0
    captured = capsys.readouterr()
    (record,) = lines(captured.out)
    assert record["status"] == "ok"
    assert record["reasons"] == []
    assert set(record["files"]) == KINDS | {"overlay", "json"}
    for kind in KINDS:
        dataset = pydicom.dcmread(record["files"][kind])
        assert dataset.StudyInstanceUID == "1.2.3.4.5"
        assert dataset.PatientID == "PID-4711"
    assert sorted(record["files"][kind] for kind in KINDS) == sorted(map(str, out.iterdir()))
    assert captured.err == ""
    names = sorted(path.name for path in out.iterdir())
    assert inferring_commands.infer(arguments) == 0
    assert sorted(path.name for path in out.iterdir()) == names
    with_paths = "".join(path.name for path in out.iterdir())
    assert "Muller" not in with_paths
    # What is not DICOM says nothing about the patient but the path that the caller gave
    for path in records.iterdir():
        for secret in ("4711", "1961", "ACC77", "Jürgen"):
            assert secret.encode() not in path.read_bytes().replace(str(film).encode(), b"").replace(
                film.stem.encode(), b""
            )


@pytest.mark.usefixtures("reads_dicom")
def test_an_image_that_is_not_dicom_keeps_its_prediction_and_the_command_says_so(
    tmp_path: Path, bundle: Path, radiograph_pixels: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, film = tmp_path / "film.png", dicom_film.save(tmp_path)
    cv2.imwrite(str(picture), radiograph_pixels)
    out = tmp_path / "dicom"
    arguments = [str(picture), str(film), "--bundle", str(bundle), "--dicom-out", str(out)]
    assert inferring_commands.infer([*arguments, "--json"]) == 2
    captured = capsys.readouterr()
    png, dcm = lines(captured.out)
    assert png["label"] is not None
    assert png["files"] == {}
    assert [reason["code"] for reason in png["reasons"]] == ["no_dicom_results"]
    assert "not a DICOM file" in png["reasons"][0]["message"]
    assert set(dcm["files"]) == KINDS
    assert captured.err.splitlines()[-1] == (
        "magsd infer: --dicom-out: nothing written for 1 of 2 images, see their reasons; the predictions stand"
    )
    assert len(list(out.iterdir())) == 4
    assert inferring_commands.infer(arguments) == 2
    assert "not a DICOM file" in capsys.readouterr().out


@pytest.mark.usefixtures("reads_dicom")
def test_a_fault_of_ours_is_exit_code_1_and_the_prediction_stands(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(case: Any) -> None:
        raise KeyError(case.source.header.PatientName)

    monkeypatch.setattr("magsd_runtime.dicom_results.parametric_map.parametric_map", fail)
    film = dicom_film.save(tmp_path)
    arguments = [str(film), "--bundle", str(bundle), "--json", "--dicom-out", str(tmp_path / "dicom")]
    assert inferring_commands.infer(arguments) == 1
    (record,) = lines(capsys.readouterr().out)
    assert record["label"] is not None
    assert record["reasons"][0]["code"] == "dicom_failed"
    assert "parametric-map could not be made (KeyError" in record["reasons"][0]["message"]
    assert list((tmp_path / "dicom").iterdir()) == []


def test_without_the_libraries_nothing_starts(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    film = dicom_film.save(tmp_path)
    assert main(["infer", str(film), "--bundle", str(bundle), "--dicom-out", str(tmp_path / "dicom")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--dicom-out needs highdicom, which is not installed: pip install 'magsd[dicom]'" in captured.err
    assert not (tmp_path / "dicom").exists()


def test_a_folder_that_cannot_be_made_is_wrong_usage(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = dicom_film.save(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["infer", str(film), "--bundle", str(bundle), "--dicom-out", str(tmp_path / "file" / "x")]) == 2
    assert "--dicom-out" in capsys.readouterr().err


@pytest.mark.data
@pytest.mark.parametrize("name", ["1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm", "Fake_MONOHR1.dcm"])
def test_real_films_end_to_end(
    cxr: Path, tmp_path: Path, bundle: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    film = tmp_path / "a.dcm"
    shutil.copy(cxr / "originals" / name, film)
    status = inferring_commands.infer(
        [str(film), "--bundle", str(bundle), "--json", "--dicom-out", str(tmp_path / "dicom")]
    )
    captured = capfd.readouterr()
    (record,) = lines(captured.out)
    if any("DICOM is not read by this version" in reason["message"] for reason in record["reasons"]):
        pytest.skip("this version does not read DICOM")
    assert status == (3 if record["status"] == "rejected" else 0), record["reasons"]
    source = pydicom.dcmread(film)
    expected = {"secondary_capture"} if record["label"] is None else KINDS
    assert {kind for kind in record["files"] if kind in KINDS} == expected
    for kind in expected:
        dataset = pydicom.dcmread(record["files"][kind])
        assert dataset.StudyInstanceUID == source.StudyInstanceUID
        assert dataset.PatientName == source.PatientName
    assert str(source.PatientID) not in captured.out + captured.err
    shape = pydicom.dcmread(record["files"]["secondary_capture"]).pixel_array.shape
    assert shape[0] > 700
    if "parametric_map" in expected:
        assert pydicom.dcmread(record["files"]["parametric_map"]).pixel_array.shape == (source.Rows, source.Columns)
