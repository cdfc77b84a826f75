"""Nothing but the DICOM results, and the input in quarantine, says who the patient is: every artefact is searched."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import dicom_film
import tiny_bundle
from identified_film import ANNA, BERT, CHARSETS, Person, film, save, traces, traces_in_folder
from magsd.cli import main
from magsd_runtime.naming import OutputNames
from magsd_runtime.pipeline import Pipeline

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")

FILE_NAME = f"{ANNA.word}MUELLER^ANNA_{ANNA.date}.dcm"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(autouse=True)
def loud(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a library would warn of or log goes to stderr, so that what holds it back is ours."""
    monkeypatch.setattr(sys, "warnoptions", ["always"])
    monkeypatch.delenv("MAGSD_TRACEBACK", raising=False)
    handler = logging.StreamHandler(_Stderr())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    pydicom.config.logger.setLevel(logging.DEBUG)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, *_: print(f"{category.__name__}: {message}", file=sys.stderr)
        yield
    root.removeHandler(handler)
    root.setLevel(level)


class _Stderr:
    """The stderr of the moment, which pytest exchanges."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def spoilt(folder: Path, person: Person = ANNA) -> dict[str, Path]:
    """Films that cannot be read or are refused, by what is wrong with them."""
    folder.mkdir()
    good = film(person)
    whole = save(folder / "whole", good).read_bytes()
    (folder / "whole").unlink()
    pixels = whole.rindex(b"\xe0\x7f\x10\x00")
    name = whole.index(f"{person.word}Ż".encode())
    cases: dict[str, bytes | Any] = {
        "cut in the header": whole[: len(whole) // 3],
        "cut in the pixels": whole[: pixels + 999],
        "cut in the meta": whole[:170],
        "cut in the preamble": whole[:100],
        "no pixels": whole[:pixels],
        "a length too large": whole[: name - 2] + b"\xff\xff" + whole[name:],
        "bytes that are no UTF-8": whole.replace("Żółć".encode(), b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8"),
        "only a name": f"{person.word} no film at all".encode() * 9,
        "unknown transfer syntax": whole.replace(b"1.2.840.10008.1.2.1\0", f"{person.root[:19]}\0".encode()[:20], 1),
        "unknown class": film(person, SOPClassUID=f"{person.root}.8"),
        "several frames": film(person, NumberOfFrames=3),
        "no slope": film(person, RescaleSlope="0"),
        "a slope that is none": film(person, RescaleSlope="1", WindowWidth="0.5"),
        "lateral": film(person, ViewPosition="LL"),
        "a hand": film(person, BodyPartExamined="HAND"),
        "one grey": film(person, PixelData=bytes(2 * dicom_film.ROWS * dicom_film.COLUMNS)),
        "no UIDs": film(person, StudyInstanceUID=None),
        "a UID that is none": film(person, StudyInstanceUID=f"{person.word}.not.a.uid"),
        "other values that are none": film(
            person, PatientBirthDate=f"{person.word}", StudyDate=f"{person.word}", PatientSex=f"{person.word}SEXLONG",
            ViewPosition=f"{person.word} lower, too long", ImageType=[f"{person.word}ä"], BurnedInAnnotation="QZXJä",
        ),
    }  # fmt: skip
    written = {}
    for number, (what, content) in enumerate(cases.items()):
        path = folder / f"{person.word}^{person.date}_{number}.dcm"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save(path, content)
        written[what] = path
    return written


def without_paths(text: str, folder: Path) -> str:
    """What a command printed, less the paths that its caller gave."""
    for path in sorted(folder.rglob("*"), key=lambda path: -len(str(path))):
        text = text.replace(json.dumps(str(path)), "PATH").replace(str(path), "PATH")
    return text


# --- the search finds what is there ---------------------------------------------------------------


def test_the_film_holds_what_is_looked_for_and_the_search_finds_it(tmp_path: Path) -> None:
    for charset, (_, name) in CHARSETS.items():
        path = save(tmp_path / "a.dcm", film(ANNA, charset))
        found = " ".join(traces(ANNA, "", path.read_bytes()))
        for what in ("the word", "a UID", "a date (19470311)", "a time", "a number", "the name"):
            assert what in found, (charset, what)
        dataset = pydicom.dcmread(path)
        assert str(dataset.PatientName) == ANNA.word + name
        identified = sum(ANNA.word in str(element.value) for element in dicom_film.items(dataset))
        assert identified > 1500
        for keyword in (
            "PatientID", "OtherPatientIDs", "PatientBirthName", "PatientAddress", "PatientTelephoneNumbers",
            "PatientMotherBirthName", "MilitaryRank", "EthnicGroup", "Occupation", "AdditionalPatientHistory",
            "PatientComments", "ImageComments", "AccessionNumber", "StudyID", "ReferringPhysicianName",
            "ReferringPhysicianAddress", "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "OperatorsName",
            "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName",
            "DeviceSerialNumber", "DetectorID", "PlateID", "CassetteID", "ProtocolName", "StudyDescription",
            "SeriesDescription", "DerivationDescription", "AcquisitionComments", "PerformedProcedureStepID",
            "ScheduledPerformingPhysicianName", "CountryOfResidence", "RegionOfResidence", "AdmissionID",
            "CurrentPatientLocation", "ResponsiblePerson", "MedicalAlerts", "Allergies", "ClinicalTrialSubjectID",
            "RequestingPhysician", "IssuerOfPatientID", "InsurancePlanIdentification", "TextComments",
            "ContentCreatorName",
        ):  # fmt: skip
            assert ANNA.word in str(dataset[keyword].value), keyword
        for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "DeviceUID"):
            assert dataset[keyword].value.startswith(ANNA.root), keyword


def test_the_search_looks_into_what_is_packed(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", note=np.frombuffer(ANNA.word.encode() * 3, np.uint8))
    assert traces_in_folder(ANNA, tmp_path)
    done, picture = cv2.imencode(".png", np.zeros((9, 9), np.uint8))
    assert done
    with pytest.raises(AssertionError, match="zTXt chunk may hold anything"):
        traces(ANNA, "", picture.tobytes()[:8] + bytes(4) + b"zTXt" + bytes(4))
    for text in (json.dumps({"a": "山田"}), "Müßig", "1947-03-11", "m%C3%BC%C3%9Fig", ANNA.root.encode().hex()):
        assert traces(ANNA, "", text.encode("utf-8")), text
    for before in ("", "a", "ab"):
        text = base64.b64encode(f"{before}{ANNA.word}00100020, and so on".encode())
        assert traces(ANNA, "", text), before
    sha = hashlib.sha256(str(ANNA.value("LO", 0x00100020)).encode()).hexdigest()
    assert traces(ANNA, "", sha.encode())
    assert not traces(ANNA, "", b"sha256:" + b"ab" * 32)


# --- magsd infer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("charset", sorted(CHARSETS))
def test_infer_keeps_nothing_of_the_patient(
    charset: str, tmp_path: Path, bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    inbox, kept = tmp_path / "in", tmp_path / "kept"
    inbox.mkdir()
    path = save(inbox / FILE_NAME, film(ANNA, charset))
    log = kept / "log.jsonl"
    arguments = ["--bundle", str(bundle), "--out", str(kept / "out"), "--dicom-out", str(kept / "dicom")]
    kept.mkdir()
    assert main(["infer", str(path), *arguments, "--audit", str(log), "--json"]) == 0
    printed = capfd.readouterr()
    assert traces(ANNA, "stdout", without_paths(printed.out, inbox).encode()) == []
    assert printed.err == ""
    record = json.loads(printed.out)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["path"] == str(path)
    assert record["label"] is not None
    assert record["image"]["dicom"]["age_years"] == 55
    assert Path(record["files"]["overlay"]).name == f"{digest[:16]}_overlay.jpg"
    stored = json.loads((kept / "out" / f"{digest[:16]}.json").read_text())
    assert stored == {**record, "path": f"sha256:{digest}"}
    assert len(list((kept / "dicom").iterdir())) >= 3
    assert traces_in_folder(ANNA, kept, but=("dicom/*",)) == []
    # The DICOM results do hold it, on purpose: nobody looked in vain
    assert all(traces(ANNA, "", result.read_bytes()) for result in (kept / "dicom").iterdir())
    for command in (["audit", "verify", str(log)], ["replay", str(log), "--input", str(path), "--bundle", str(bundle)]):
        assert main(command) == 0
        printed = capfd.readouterr()
        assert traces(ANNA, command[0], without_paths(printed.out + printed.err, inbox).encode()) == []


def test_what_infer_says_of_spoilt_films_quotes_nothing(
    tmp_path: Path, bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    films = spoilt(tmp_path / "in")
    arguments = ["--bundle", str(bundle), "--out", str(kept / "out"), "--dicom-out", str(kept / "dicom")]
    arguments += ["--audit", str(kept / "log")]
    main(["infer", *map(str, films.values()), *arguments, "--json"])
    printed = capfd.readouterr()
    assert traces(ANNA, "stderr", without_paths(printed.err, tmp_path / "in").encode()) == []
    assert traces(ANNA, "stdout", without_paths(printed.out, tmp_path / "in").encode()) == []
    statuses = {what: json.loads(line)["status"] for what, line in zip(films, printed.out.splitlines())}
    assert statuses["no UIDs"] in ("ok", "review")
    assert statuses["lateral"] == statuses["a hand"] == "rejected"
    assert list(statuses.values()).count("error") >= 10
    assert len(list((kept / "out").glob("*.json"))) == len(films)
    assert traces_in_folder(ANNA, kept, but=("dicom/*",)) == []


def test_a_table_for_people_quotes_nothing_but_the_path(
    tmp_path: Path, bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "a.dcm", film(ANNA))
    for number, spoilt_film in enumerate(spoilt(tmp_path / "in").values()):
        shutil.copy(spoilt_film, tmp_path / f"{number}.dcm")
    shutil.rmtree(tmp_path / "in")
    main(["infer", str(path), str(tmp_path), "--bundle", str(bundle)])
    printed = capfd.readouterr()
    assert traces(ANNA, "the table", (printed.out + printed.err).encode()) == []


def test_two_patients_with_one_picture_leave_the_same_behind(
    tmp_path: Path, bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No search is complete; but what does not depend on the patient cannot tell who it was."""
    left = []
    for person in (ANNA, BERT):
        path = save(tmp_path / f"{person.word}.dcm", film(person))
        out = tmp_path / person.word
        assert main(["infer", str(path), "--bundle", str(bundle), "--out", str(out), "--json"]) == 0
        record = json.loads(capfd.readouterr().out)
        stored = json.loads(Path(record["files"]["json"]).read_text())
        for changing in ("timings_ms", "files", "path"):
            del stored[changing]
        left.append((stored, Path(record["files"]["overlay"]).read_bytes()))
    assert left[0] == left[1]


def test_a_fault_with_the_patient_in_its_message_is_told_by_its_type(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError(f"PatientName {ANNA.word} of {FILE_NAME}")

    path = save(tmp_path / "a.dcm", film(ANNA))
    kept = tmp_path / "kept"
    for place in ("pipeline.standardize", "overlay.save_overlay"):
        with monkeypatch.context() as patch:
            patch.setattr(f"magsd_runtime.{place}", fail)
            assert main(["infer", str(path), "--bundle", str(bundle), "--out", str(kept), "--json"]) == 1
        printed = capfd.readouterr()
        assert "ValueError" in printed.out + printed.err
        assert traces(ANNA, place, (printed.out + printed.err).encode()) == []
        assert traces_in_folder(ANNA, kept) == []


def test_from_python_nothing_is_said_either(tmp_path: Path, bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    films = [save(tmp_path / "a.dcm", film(ANNA, charset)) for charset in CHARSETS]
    films += spoilt(tmp_path / "in").values()
    with Pipeline.open(bundle, "cpu", threads=1) as pipeline:
        for path in films:
            pipeline.predict(path)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_names_of_outputs(tmp_path: Path) -> None:
    save(tmp_path / FILE_NAME, film(ANNA))
    shutil.copy(tmp_path / FILE_NAME, tmp_path / "disguised.png")
    shutil.copy(tmp_path / FILE_NAME, tmp_path / "1.2.3.4")
    cv2.imwrite(str(tmp_path / "ward 7.png"), np.zeros((70, 70), np.uint8))
    digest = hashlib.sha256((tmp_path / FILE_NAME).read_bytes()).hexdigest()
    paths = [tmp_path / name for name in (FILE_NAME, "disguised.png", "1.2.3.4", "ward 7.png", f"{ANNA.word}.dcm")]
    names = OutputNames(paths)
    assert [name.stem for name in names] == [digest[:16], digest[:16], digest[:16], "ward 7", "input-5"]
    assert [name.shown for name in names] == [f"sha256:{digest}"] * 3 + [None, "input-5"]
    kept = OutputNames(paths, keep_names=True)
    assert [name.stem for name in kept] == [Path(FILE_NAME).stem, "disguised", "1.2.3", "ward 7", ANNA.word]
    assert {name.shown for name in kept} == {None}


# --- magsd watch ----------------------------------------------------------------------------------


def test_watch_keeps_nothing_of_the_patient(tmp_path: Path, bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    inbox, kept = tmp_path / "in", tmp_path / "kept"
    films = spoilt(inbox)
    kept.mkdir()
    for charset in CHARSETS:
        save(inbox / f"{charset} {FILE_NAME}", film(ANNA, charset, SOPInstanceUID=f"{ANNA.root}.{len(charset)}"))
    cv2.imwrite(str(inbox / f"{ANNA.word}^ANNA.png"), np.random.default_rng(1).integers(0, 255, (90, 80), np.uint8))
    times = ["--settle", "0", "--patience", "0", "--poll", "0.01", "--once"]
    arguments = [str(inbox), "--out", str(kept / "out"), "--bundle", str(bundle), "--audit", str(kept / "log")]
    assert main(["watch", *arguments, *times, "--dicom-out", str(kept / "dicom")]) == 3
    printed = capfd.readouterr()
    assert traces(ANNA, "stdout and stderr", (printed.out + printed.err).encode()) == []
    out = kept / "out"
    assert len(list((out / "results").iterdir())) >= 7
    assert len(list((out / "quarantine").iterdir())) >= 8
    assert len(films) == 19
    assert traces_in_folder(ANNA, kept, but=("input", "input.dcm", "dicom/*.dcm")) == []
    assert len(list((kept / "dicom").iterdir())) >= 7
    ledger = (out / "state/ledger.jsonl").read_text()
    # A UID is kept as its hash, with which one who has the film finds its line, and no other
    assert hashlib.sha256(f"{ANNA.root}.5".encode()).hexdigest() in ledger


# --- what works on manifests ----------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def manifest(folder: Path, count: int, pipeline: Pipeline) -> Path:
    """A table of DICOM films of patients who are known by pseudonyms; the network is right about most of them."""
    rng = np.random.default_rng(3)
    rows: list[dict[str, str]] = []
    scores: list[Any] = []
    for number in range(count):
        noise = rng.integers(0, 4096, (dicom_film.ROWS, dicom_film.COLUMNS)).astype("<u2")
        smooth = cv2.GaussianBlur(noise.astype(np.float32), (0, 0), 3 + number % 5)
        smooth = cv2.normalize(smooth, np.empty_like(smooth), 0, 1, cv2.NORM_MINMAX)
        pixels = (dicom_film.stored_pixels() * (0.5 + 0.5 * smooth)).astype("<u2")
        dataset = dicom_film.film(
            **{word: ANNA.value(vr, 0x00100010 + number) for word, vr in (
                ("PatientName", "PN"), ("PatientID", "LO"), ("AccessionNumber", "SH"), ("StudyID", "SH"),
                ("InstitutionName", "LO"), ("PatientBirthDate", "DA"), ("StudyTime", "TM"), ("StationName", "SH"),
                ("StudyInstanceUID", "UI"), ("SeriesInstanceUID", "UI"), ("SOPInstanceUID", "UI"),
            )}, StudyDate=ANNA.date, PatientAge="055Y",
        )  # fmt: skip
        dataset.PixelData = pixels.tobytes()
        path = save(folder / f"film-{number}.dcm", dataset)
        rows.append({"path": path.name, "label": "", "patient": f"p{number}"})
        scores.append(pipeline.predict(path, with_heat=False).logits)
    # A third for each class, those that the network gives the most to; every seventh label is wrong
    left = set(range(count))
    for place, label in enumerate(tiny_bundle.CLASSES):
        best = sorted(left, key=lambda number: -softmax(scores[number])[place])[: count // 3]
        left -= set(best)
        for number in best:
            wrong = tiny_bundle.CLASSES[(place + 1) % 3]
            rows[number]["label"] = wrong if number % 7 == 0 else label
    with open(folder / "m.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "patient"])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "m.csv"


def test_calibrate_and_evaluate_keep_nothing_of_the_header(
    tmp_path: Path, bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "kept").mkdir()
    with Pipeline.open(bundle, "cpu", threads=1) as pipeline:
        table = manifest(tmp_path / "in", 96, pipeline)
    calibrated, report = tmp_path / "kept" / "bundle", tmp_path / "kept" / "report"
    arguments = ["--data", str(table), "--positive", "pneumonia", "--out", str(calibrated), "--threads", "1"]
    code = main(["calibrate", str(bundle), *arguments])
    printed = capfd.readouterr()
    assert code in (0, 3), printed.err
    assert (calibrated / "bundle.json").is_file()
    assert main(["evaluate", str(bundle), "--data", str(table), "--out", str(report)]) == 0
    after = capfd.readouterr()
    for text in (*printed, *after):
        assert traces(ANNA, "what was printed", text.encode()) == []
    assert (report / "metrics.json").is_file()
    assert traces_in_folder(ANNA, tmp_path / "kept") == []
