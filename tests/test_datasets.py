"""`magsd data`: collections of the form in which they are published, in small, against what was typed in by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collection_trees import facts, image, lines
from magsd.cli import main
from magsd.data import read_manifest
from magsd.datasets import collections
from magsd.datasets.collections import cohen, kermany_name, label_of

COHEN = """patientid,offset,sex,age,finding,survival,view,modality,date,location,folder,filename,doi,url,license
2,0,M,65,Pneumonia/Viral/COVID-19,Y,PA,X-ray,2020,"Hospital, Town",images,a.jpg,,,CC BY
2,3,M,65,"COVID-19, ARDS",Y,AP Supine,X-ray,2020,,images,b.png,,,
4,0,F,50,Pneumonia/Bacterial/Streptococcus,,L,X-ray,,,images,lateral.jpg,,,
5,0,F,52,Pneumonia/Bacterial/Streptococcus,,AP,X-ray,,,images,c.jpg,,,
6,0,,,Pneumonia/Fungal/Pneumocystis,,PA,X-ray,,,images,d.jpg,,,
7,0,,,No Finding,,PA,X-ray,,,images,e.jpg,,,
8,0,,,Tuberculosis,,PA,X-ray,,,images,f.jpg,,,
9,0,,,SARS,,PA,CT,,,volumes,g.nii.gz,,,
10,0,,,SARS,,AP Erect,X-ray,,,images,gone.jpg,,,
11,0,,,SARS,,AP Erect,X-ray,,,images,h.jpg,,,
"""


@pytest.fixture
def cohen_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "covid-chestxray-dataset"
    for number, name in enumerate(("a.jpg", "b.png", "lateral.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg", "h.jpg")):
        image(folder / "images" / name, number)
    (folder / "metadata.csv").write_text(COHEN, encoding="utf-8")
    return folder


def test_cohen(cohen_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lists" / "cohen.csv"
    assert main(["data", "cohen", str(cohen_folder), "--out", str(out)]) == 0
    place = "../covid-chestxray-dataset/images/"
    assert facts(out, "path", "label", "patient", "source", "view", "age", "sex") == [
        (place + "a.jpg", "covid19", "cohen:2", "cohen", "PA", "65", "M"),
        (place + "b.png", "covid19", "cohen:2", "cohen", "AP Supine", "65", "M"),
        (place + "c.jpg", "bacterial_pneumonia", "cohen:5", "cohen", "AP", "52", "F"),
        (place + "d.jpg", "pneumonia", "cohen:6", "cohen", "PA", "", ""),
        (place + "e.jpg", "healthy", "cohen:7", "cohen", "PA", "", ""),
        (place + "h.jpg", "viral_pneumonia", "cohen:11", "cohen", "AP Erect", "", ""),
    ]
    captured = capsys.readouterr()
    assert "covid19                   2 images       1 patients" in captured.out
    assert "2 no frontal X-ray" in captured.err
    assert "1 the image is not there" in captured.err
    assert "1 neither pneumonia nor healthy" in captured.err
    manifest = read_manifest(out)
    assert len(manifest.records) == 6
    assert all(record.path.is_file() for record in manifest.records)


@pytest.mark.parametrize(
    ("finding", "label"),
    [
        ("COVID-19", "covid19"), ("Pneumonia/Viral/COVID-19", "covid19"), ("COVID-19, ARDS", "covid19"),
        ("Pneumonia/Viral/Influenza/H1N1", "viral_pneumonia"), ("Pneumonia/Viral/MERS-CoV", "viral_pneumonia"),
        ("Pneumonia/Bacterial/Staphylococcus/MRSA", "bacterial_pneumonia"), ("Klebsiella", "bacterial_pneumonia"),
        ("Mycoplasma Bacterial Pneumonia", "bacterial_pneumonia"),
        ("Pneumonia/Lipoid", "pneumonia"), ("Pneumonia", "pneumonia"), ("ARDS", "pneumonia"),
        ("Influenza, Streptococcus", "pneumonia"), ("No Finding", "healthy"), ("no finding", "healthy"),
        ("No Finding, Tuberculosis", None), ("todo", None), ("Unknown", None), ("Tuberculosis", None), ("", None),
    ],
)  # fmt: skip
def test_labels_of_findings(finding: str, label: str | None) -> None:
    assert label_of(finding) == label


def test_labels_of_the_real_findings(cxr: Path) -> None:
    """How the data here were labelled, by hand and independently."""
    for name, coarse in (("dataset_b.csv", True), ("dataset_c.csv", False)):
        rows = [line for line in lines(cxr / name) if line["source"] == "cohen"]
        assert len(rows) > 400
        for line in rows:
            label = label_of(line["finding"])
            if coarse and label in ("viral_pneumonia", "bacterial_pneumonia"):
                label = "pneumonia"
            assert label == line["label"], line["finding"]
    for line in lines(cxr / "dataset_c.csv"):
        if line["source"] == "kermany":
            known = kermany_name(Path(line["path"]).stem)
            assert known is not None, line["path"]
            assert known[0] == line["label"]
            assert f"kermany:{known[1]}" == line["patient"]


def test_figure1(tmp_path: Path) -> None:
    folder = tmp_path / "figure1"
    (folder / "images").mkdir(parents=True)
    (folder / "metadata.csv").write_text(
        "patientid,offset,sex,age,finding,survival,view,modality,notes\n"
        "COVID-00003a,8,M,28,COVID-19,,AP erect,X-ray,one\n"
        "COVID-00003b,8,M,28,COVID-19,,AP erect,X-ray,two\n"
        "COVID-00004,2,M,42,COVID-19,,Lateral,X-ray,\n"
        "COVID-00005,,,,,,,X-ray,\n"
        "COVID-00006,,F,61,Pneumonia,,,X-ray,\n",
        encoding="utf-8",
    )
    for number, name in enumerate(("COVID-00003a.jpg", "COVID-00003b.png", "COVID-00004.jpg", "COVID-00006.jpg")):
        image(folder / "images" / name, number)
    assert main(["data", "figure1", str(folder), "--out", str(folder / "m.csv")]) == 0
    assert facts(folder / "m.csv", "path", "label", "patient") == [
        ("images/COVID-00003a.jpg", "covid19", "figure1:COVID-00003"),
        ("images/COVID-00003b.png", "covid19", "figure1:COVID-00003"),
        ("images/COVID-00006.jpg", "pneumonia", "figure1:COVID-00006"),
    ]


def test_actualmed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "actualmed"
    (folder / "images").mkdir(parents=True)
    (folder / "metadata.csv").write_text(
        "patientid,offset,sex,age,finding,survival,temperature,pO2 saturation,view,modality,imagename,notes\n"
        'ANON196,,,,,,,,PA,X-ray,CR.1.2.png,"Inconclusive, date taken"\n'
        "ANON56,,,,No finding,,,,PA,X-ray,CR.1.3.png,\n"
        "ANON91,,,,COVID-19,,,,AP,X-ray,CR.1.4.png,\n",
        encoding="utf-8",
    )
    for number in (2, 3, 4):
        image(folder / "images" / f"CR.1.{number}.png", number)
    assert main(["data", "actualmed", str(folder), "--out", str(folder / "m.csv")]) == 0
    assert facts(folder / "m.csv", "path", "label", "patient") == [
        ("images/CR.1.3.png", "healthy", "actualmed:ANON56"), ("images/CR.1.4.png", "covid19", "actualmed:ANON91"),
    ]  # fmt: skip
    assert "COVID-19 was excluded" in capsys.readouterr().err


@pytest.fixture
def nih_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "CXR8"
    (folder / "images_001").mkdir(parents=True)
    (folder / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
        "00000001_000.png,No Finding,0,1,58,M,PA,2682,2749,0.143,0.143,\n"
        "00000001_001.png,Pneumonia|Edema,1,1,58,M,PA,2894,2729,0.143,0.143,\n"
        "00000002_000.png,Cardiomegaly,0,2,81,F,PA,2500,2048,0.171,0.171,\n"
        "00000003_000.png,Pneumonia,0,3,81,F,AP,2500,2048,0.171,0.171,\n",
        encoding="utf-8",
    )
    (folder / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "00000001_001.png,Edema,1,2,3,4,,,\n"
        "00000001_001.png,Pneumonia,225.08474576271186,547.0192106967513,86.77966101694915,79.18644067796609,,,\n"
        "00000001_001.png,Pneumonia,600,100,50,60,,,\n",
        encoding="utf-8",
    )
    image(folder / "images_001" / "images" / "00000001_000.png", 1, 1024)
    image(folder / "images_001" / "images" / "00000001_001.png", 2, 1024)
    image(folder / "images_002" / "images" / "00000002_000.png", 3)
    image(folder / "images_002" / "images" / "00000003_000.png", 4)
    return folder


def test_nih_with_its_boxes(nih_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "nih.csv"
    assert main(["data", "nih", str(nih_folder), "--out", str(out)]) == 0
    at = "CXR8/images_00"
    assert facts(out, "path", "label", "patient", "x", "w", "view", "sex") == [
        (f"{at}1/images/00000001_000.png", "healthy", "nih:00000001", "", "", "PA", "M"),
        (f"{at}1/images/00000001_001.png", "pneumonia", "nih:00000001", "225.085", "86.7797", "PA", "M"),
        (f"{at}1/images/00000001_001.png", "pneumonia", "nih:00000001", "600", "50", "PA", "M"),
        (f"{at}2/images/00000003_000.png", "pneumonia", "nih:00000003", "", "", "AP", "F"),
    ]
    (record,) = [record for record in read_manifest(out).records if record.boxes]
    assert record.boxes == ((225.085, 547.019, 86.7797, 79.1864), (600.0, 100.0, 50.0, 60.0))
    assert main(["data", "nih", str(nih_folder), "--boxed", "--out", str(tmp_path / "boxed.csv")]) == 0
    assert len(lines(tmp_path / "boxed.csv")) == 2


def test_boxes_of_a_smaller_copy_are_scaled(nih_folder: Path, tmp_path: Path) -> None:
    image(nih_folder / "images_001" / "images" / "00000001_001.png", 2, 256)
    assert main(["data", "nih", str(nih_folder), "--boxed", "--out", str(tmp_path / "m.csv")]) == 0
    assert facts(tmp_path / "m.csv", "x", "y", "w", "h")[1] == ("150", "25", "12.5", "15")


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("person1_bacteria_1", ("bacterial_pneumonia", "person1")),
        ("person1000_virus_1681", ("viral_pneumonia", "person1000")),
        ("IM-0115-0001", ("healthy", "IM-0115")),
        ("NORMAL2-IM-0503-0001-0002", ("healthy", "IM-0503")),
        ("BACTERIA-1008087-0001", ("bacterial_pneumonia", "1008087")),
        ("VIRUS-1980593-0001", ("viral_pneumonia", "1980593")),
        ("NORMAL-1003233-0001", ("healthy", "1003233")),
        ("person1_fungus_1", None), ("scan", None), ("", None),
    ],
)  # fmt: skip
def test_names_of_the_pediatric_collection(stem: str, expected: Any) -> None:
    assert kermany_name(stem) == expected


@given(st.integers(0, 10**6), st.sampled_from(["bacteria", "virus"]), st.integers(0, 10**6))
def test_a_person_is_one_patient_whatever_the_number_of_the_film(person: int, cause: str, film: int) -> None:
    known = kermany_name(f"person{person}_{cause}_{film}")
    assert known is not None
    assert known[1] == f"person{person}"


@given(st.text(max_size=40))
def test_no_name_breaks_the_parser(stem: str) -> None:
    known = kermany_name(stem)
    assert known is None or known[0] in ("healthy", "viral_pneumonia", "bacterial_pneumonia")


def test_kermany(tmp_path: Path) -> None:
    folder = tmp_path / "chest_xray"
    image(folder / "train/PNEUMONIA/person1_bacteria_1.jpeg", 1)
    image(folder / "test/PNEUMONIA/person1_virus_7.jpeg", 2)
    image(folder / "train/NORMAL/IM-0115-0001.jpeg", 3)
    image(folder / "train/NORMAL/other.jpeg", 4)
    assert main(["data", "kermany", str(folder), "--out", str(tmp_path / "k.csv")]) == 0
    assert sorted(facts(tmp_path / "k.csv", "label", "patient")) == [
        ("bacterial_pneumonia", "kermany:person1"), ("healthy", "kermany:IM-0115"),
        ("viral_pneumonia", "kermany:person1"),
    ]  # fmt: skip


def test_rsna(tmp_path: Path) -> None:
    folder = tmp_path / "rsna"
    for number, name in enumerate(("aa", "bb", "cc")):
        # what is in the files is not looked at here
        shutil.copy(image(tmp_path / "film.png", number), (folder / "stage_2_train_images").mkdir(
            parents=True, exist_ok=True) or folder / "stage_2_train_images" / f"{name}.dcm")  # fmt: skip
    (folder / "stage_2_train_labels.csv").write_text(
        "patientId,x,y,width,height,Target\naa,,,,,0\nbb,264.0,152.0,213.0,379.0,1\nbb,562.0,152.0,256.0,453.0,1\ncc,,,,,0\n"
    )
    (folder / "stage_2_detailed_class_info.csv").write_text(
        "patientId,class\naa,Normal\nbb,Lung Opacity\nbb,Lung Opacity\ncc,No Lung Opacity / Not Normal\n"
    )
    assert main(["data", "rsna", str(folder), "--out", str(folder / "m.csv")]) == 0
    assert facts(folder / "m.csv", "path", "label", "patient", "x", "h") == [
        ("stage_2_train_images/aa.dcm", "healthy", "rsna:aa", "", ""),
        ("stage_2_train_images/bb.dcm", "pneumonia", "rsna:bb", "264", "379"),
        ("stage_2_train_images/bb.dcm", "pneumonia", "rsna:bb", "562", "453"),
    ]


def test_v7_in_both_forms_of_its_annotations(tmp_path: Path) -> None:
    folder = tmp_path / "v7"
    lung = {"name": "Lung", "polygon": {"path": [{"x": 1, "y": 2}, {"x": 3, "y": 4}, {"x": 5, "y": 1}]}}

    def tags(*names: str) -> list[dict[str, Any]]:
        return [lung, *({"name": name, "tag": {}} for name in names)]

    old = {
        "image": {"filename": "1.png", "original_filename": "person3_virus_16.jpeg"},
        "annotations": tags("Viral Pneumonia"),
    }
    new = {
        "version": "2.0", "annotations": tags("COVID-19", "Viral Pneumonia"),
        "item": {"name": "2.jpg", "slots": [{"source_files": [{"file_name": "case-7.jpg"}]}]},
    }  # fmt: skip
    side = {"image": {"filename": "3.png"}, "annotations": tags("Lateral", "COVID-19")}
    none = {"image": {"filename": "4.png"}, "annotations": tags("Ignore")}
    fine = {"image": {"filename": "5.png"}, "annotations": tags("No Pneumonia (healthy)")}
    for number, record in enumerate((old, new, side, none, fine), 1):
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / "annotations" / f"{number}.json").write_text(json.dumps(record))
    for number, name in enumerate(("1.png", "2.jpg", "3.png", "4.png", "5.png")):
        image(folder / "images" / name, number)
    assert main(["data", "v7", str(folder), "--out", str(folder / "m.csv")]) == 0
    assert facts(folder / "m.csv", "path", "label", "patient") == [
        ("images/1.png", "viral_pneumonia", "kermany:person3"), ("images/2.jpg", "covid19", "v7:case-7"),
        ("images/5.png", "healthy", "v7:5"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "metadata.csv").unlink(), "no such file"),
        (lambda folder: (folder / "metadata.csv").write_text("a,b\n1,2\n"), "has no column 'patientid'"),
        (lambda folder: (folder / "metadata.csv").write_bytes(b"\xff\xfe\x00"), "cannot be read as UTF-8"),
        (lambda folder: (folder / "metadata.csv").write_text(COHEN.splitlines()[0] + "\n"), "gives no image"),
        (lambda folder: shutil.rmtree(folder / "images"), "no such folder"),
        (lambda folder: [path.unlink() for path in (folder / "images").iterdir()], "holds no PNG"),
    ],
)
def test_what_is_not_there_is_one_line(
    cohen_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, said: str
) -> None:
    change(cohen_folder)
    assert main(["data", "cohen", str(cohen_folder), "--out", str(tmp_path / "m.csv")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "m.csv").exists()


def test_nothing_is_replaced_unasked(cohen_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.csv"
    out.write_text("mine")
    assert main(["data", "cohen", str(cohen_folder), "--out", str(out)]) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(["data", "cohen", str(cohen_folder), "--out", str(out), "--force"]) == 0
    assert main(["data", "cohen", str(cohen_folder), "--out", str(tmp_path / "m.txt")]) == 2


@pytest.mark.parametrize(
    "broken", ["{", "[]", "{}", '{"image": {}, "annotations": []}', '{"item": 3, "annotations": 1}']
)
def test_a_broken_annotation_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str) -> None:
    image(tmp_path / "1.png")
    (tmp_path / "1.json").write_text(broken)
    assert main(["data", "v7", str(tmp_path), "--out", str(tmp_path / "m.csv")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "1.json: is no Darwin annotation" in error


def test_the_help_names_every_collection() -> None:
    from magsd.data_commands import _COLLECTIONS

    assert set(_COLLECTIONS) == set(collections.COLLECTIONS)
    assert cohen is collections.COLLECTIONS["cohen"]
