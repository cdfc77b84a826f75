"""`magsd data` on collections in the details of their published form.

Names of columns, tags and files are those of the published tables and of programs that read them (docs/datasets.md).
"""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collection_trees import build, facts, image, refused
from dicom_film import COLUMNS as FILM_WIDTH
from dicom_film import ROWS as FILM_HEIGHT
from dicom_film import save as save_film
from magsd.data import check_manifest, read_manifest
from magsd.datasets.collections import kermany_name
from magsd.ground_truth import read_truth
from magsd_runtime.preprocessing import PreprocessingSpec

# --- tables --------------------------------------------------------------------------------------


def test_figure1_is_no_utf_8_and_names_few_views(tmp_path: Path) -> None:
    folder = tmp_path / "figure1"
    text = (
        "patientid,offset,sex,age,finding,survival,temperature,pO2 saturation,view,modality,"
        "artifacts/distortion,notes\n"
        "COVID-00001,13,M,33,COVID-19,,,58,AP erect,X-ray,,one\n"
        "COVID-00007,,,73,,,38+,,,X-ray,,fever 38\u00b0\n"
        "COVID-00028,,,,No finding,,,,,X-ray,,\n"
        "COVID-00031,,,,Pneumonia,,,,,X-ray,,\n"
        "COVID-00039a,10,F,77,COVID-19,,,80,AP erect,X-ray,,\n"
        "COVID-00039b,10,F,77,COVID-19,,,80,AP erect,X-ray,,\n"
    )
    for number, name in enumerate(("01.png", "07.jpg", "28.jpg", "31.jpg", "39a.jpg", "39b.jpg")):
        image(folder / "images" / f"COVID-000{name}", number)
    (folder / "metadata.csv").write_bytes(text.encode("iso-8859-1"))
    assert facts(build(tmp_path, "figure1", folder), "path", "label", "patient", "view") == [
        ("../figure1/images/COVID-00001.png", "covid19", "figure1:COVID-00001", "AP erect"),
        ("../figure1/images/COVID-00028.jpg", "healthy", "figure1:COVID-00028", ""),
        ("../figure1/images/COVID-00031.jpg", "pneumonia", "figure1:COVID-00031", ""),
        ("../figure1/images/COVID-00039a.jpg", "covid19", "figure1:COVID-00039", "AP erect"),
        ("../figure1/images/COVID-00039b.jpg", "covid19", "figure1:COVID-00039", "AP erect"),
    ]


@pytest.fixture
def cohen_folder(tmp_path: Path) -> Path:
    """Films of every view; of two patients who share a number but for a letter, as the collection has them."""
    folder = tmp_path / "covid-chestxray-dataset"
    table = ["patientid,sex,age,finding,view,modality,folder,filename"]
    for number, view in enumerate(("PA", "AP", "AP Supine", "AP Erect", "AP semi erect", "L", "Axial", "Coronal", "")):
        table.append(f"{number // 2},M,50,Pneumonia/Viral/COVID-19,{view},X-ray,images,{number}.png")
        image(folder / "images" / f"{number}.png", number)
    for letter in "ab":
        table.append(f"311{letter},,,Pneumonia/Viral/COVID-19,PA,X-ray,images,311{letter}.png")
        image(folder / "images" / f"311{letter}.png", 20 + ord(letter))
    (folder / "metadata.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
    return folder


def test_every_frontal_view_and_no_other(cohen_folder: Path, tmp_path: Path) -> None:
    assert sorted(facts(build(tmp_path, "cohen", cohen_folder), "view", "patient")) == [
        ("AP", "cohen:0"), ("AP Erect", "cohen:1"), ("AP Supine", "cohen:1"), ("AP semi erect", "cohen:2"),
        ("PA", "cohen:0"), ("PA", "cohen:311a"), ("PA", "cohen:311b"),
    ]  # fmt: skip


def test_findings_nobody_knows_are_named_and_lines_that_end_early_are_none(
    cohen_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = cohen_folder / "metadata.csv"
    table.write_text(
        table.read_text()
        + "90,F,9,Hantavirus,PA,X-ray,images,0.png\n91,F,9,Hantavirus,PA,X-ray,images,1.png\n"
        + "92,F,9,COVID-19 suspected,PA,X-ray,images,2.png\n93,F,9,todo,PA,X-ray,images,3.png\n94,F\n",
        encoding="utf-8",
    )
    build(tmp_path, "cohen", cohen_folder)
    said = capsys.readouterr().err
    assert "findings that are not known here: 'Hantavirus' (2), 'COVID-19 suspected' (1)" in said
    assert "3 a finding that is not known here" in said
    assert "1 neither pneumonia nor healthy, or not said" in said
    assert "5 no frontal X-ray" in said  # four views, and the line that ends before its view


def test_an_image_named_twice_is_one_or_none(
    cohen_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = cohen_folder / "metadata.csv"
    again = table.read_text().splitlines()[1]
    other = "77,M,50,No Finding,PA,X-ray,images,1.png"
    table.write_text(table.read_text() + f"{again}\n{other}\n", encoding="utf-8")
    out = build(tmp_path, "cohen", cohen_folder)
    assert len(facts(out, "path")) == 6
    assert all("/1.png" not in path for (path,) in facts(out, "path"))
    said = capsys.readouterr().err
    assert "2 named twice, with two labels or patients" in said
    assert "1 named twice\n" in said
    assert len(read_manifest(out).records) == 6


def test_a_table_saved_with_semicolons_is_told_so(
    cohen_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = cohen_folder / "metadata.csv"
    table.write_text(table.read_text().replace(",", ";"), encoding="utf-8")
    assert "saved with semicolons" in refused(capsys, tmp_path, "cohen", str(cohen_folder))


# --- NIH and RSNA --------------------------------------------------------------------------------


def nih_tree(folder: Path, labels: dict[str, str], boxes: str = "") -> Path:
    table = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position\n"
    for number, (name, finding) in enumerate(labels.items()):
        image(folder / "images" / name, number, 128)
        table += f"{name},{finding},0,{int(name.split('_')[0])},60,F,PA\n"
    (folder / "Data_Entry_2017_v2020.csv").write_text(table)
    (folder / "BBox_List_2017.csv").write_text("Image Index,Finding Label,Bbox [x,y,w,h],,,\n" + boxes)
    return folder


def test_boxes_of_films_that_are_not_called_pneumonia_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nih_tree(
        tmp_path / "nih", {"00000007_000.png": "Pneumonia|Mass", "00000008_000.png": "No Finding"},
        "00000007_000.png,Pneumonia,256,512,128,64,,,\n00000008_000.png,Pneumonia,1,2,3,4\n"
        "00000007_000.png,Mass,9,9,9,9,,,\n",
    )  # fmt: skip
    out = build(tmp_path, "nih", folder)
    assert facts(out, "label", "patient", "x", "y", "w", "h", "sex") == [
        ("pneumonia", "nih:00000007", "32", "64", "16", "8", "F"), ("healthy", "nih:00000008", "", "", "", "", "F"),
    ]  # fmt: skip
    assert "1 films have a box of pneumonia and not its label" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "boxes", "said"),
    [
        ({"00000007_000.png": "Pneumonie"}, "", "label 'Pneumonie' is none of the collection's 15"),
        ({"00000007_000.png": "Pneumonia"}, "00000007_000.png,Pneumonia,1,2,3\n", "is no box of four numbers"),
        ({"00000007_000.png": "Pneumonia"}, "00000007_000.png,Pneumonia,1,2,x,4\n", "is no box of four numbers"),
        ({"00000007_000.png": "Pneumonia"}, "00000007_000.png,Pneumonia,1,2,0,4\n", "has no area"),
        ({"00000007_000.png": "Pneumonia"}, "00000007_000.png,Pneumonia,nan,2,3,4\n", "has no area"),
    ],
)
def test_what_cannot_be_in_the_nih_tables_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: dict[str, str], boxes: str, said: str
) -> None:
    assert said in refused(capsys, tmp_path, "nih", str(nih_tree(tmp_path / "nih", labels, boxes)))


def test_two_sizes_of_one_collection_in_one_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which of the two the boxes would be scaled to nobody could say."""
    folder = nih_tree(tmp_path / "nih", {"00000007_000.png": "Pneumonia"})
    image(folder / "images-224" / "00000007_000.png", 5)
    assert "are different images of one name" in refused(capsys, tmp_path, "nih", str(folder))
    shutil.copy(folder / "images" / "00000007_000.png", folder / "images-224" / "00000007_000.png")
    assert len(facts(build(tmp_path, "nih", folder), "path")) == 1


def test_images_in_linked_folders_are_found_once(tmp_path: Path) -> None:
    folder = nih_tree(tmp_path / "nih", {"00000007_000.png": "Pneumonia", "00000008_000.png": "No Finding"})
    (tmp_path / "large_disk").mkdir()
    (folder / "images" / "00000008_000.png").rename(tmp_path / "large_disk" / "00000008_000.png")
    (folder / "images_002").symlink_to(tmp_path / "large_disk", target_is_directory=True)
    (folder / "images_002" / "round").symlink_to(folder, target_is_directory=True)
    assert facts(build(tmp_path, "nih", folder), "path") == [
        ("../large_disk/00000008_000.png",), ("../nih/images/00000007_000.png",),
    ]  # fmt: skip


def test_boxes_of_real_films_are_scaled_as_they_were_by_hand(cxr: Path, tmp_path: Path) -> None:
    """localization.csv has the published box and the one in the stored file, made without this code."""
    with open(cxr / "localization.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    folder = tmp_path / "nih"
    (folder / "images").mkdir(parents=True)
    labels, boxes = ["Image Index,Finding Labels,Patient ID"], ["Image Index,Finding Label,Bbox [x,y,w,h],,,"]
    for row in rows:
        name = Path(row["path"]).name
        (folder / "images" / name).symlink_to(cxr / row["path"])
        labels.append(f"{name},Pneumonia|Edema,{int(row['patient'].removeprefix('nih:'))}")
        boxes.append(f"{name},Pneumonia," + ",".join(row[f"orig_{side}"] for side in "xywh") + ",,,")
    (folder / "Data_Entry_2017.csv").write_text("\n".join(labels) + "\n")
    (folder / "BBox_List_2017.csv").write_text("\n".join(boxes) + "\n")
    records = read_manifest(build(tmp_path, "nih", folder, "--boxed")).records
    made = {record.path.name: record for record in records}
    assert len(rows) == len(made) > 20
    for row in rows:
        record = made[Path(row["path"]).name]
        assert record.patient == row["patient"]
        np.testing.assert_allclose(record.boxes, [[float(row[side]) for side in "xywh"]], atol=0.006)


def rsna_tree(folder: Path) -> Path:
    (folder / "stage_2_train_images").mkdir(parents=True)
    for number, name in enumerate(("aa", "bb", "cc")):
        path = save_film(folder, PatientID=name, SOPInstanceUID=f"1.2.{number}")
        path.rename(folder / "stage_2_train_images" / f"{name}.dcm")
    (folder / "stage_2_train_labels.csv").write_text(
        "patientId,x,y,width,height,Target\naa,,,,,0\nbb,10.0,20.0,30.0,40.0,1\nbb,60.0,20.0,30.0,50.0,1\ncc,,,,,0\n"
    )
    (folder / "stage_2_detailed_class_info.csv").write_text(
        "patientId,class\naa,Normal\nbb,Lung Opacity\nbb,Lung Opacity\ncc,Normal\n"
    )
    return folder


def test_boxes_of_rsna_are_pixels_of_the_dicom_image(tmp_path: Path) -> None:
    out = build(tmp_path, "rsna", rsna_tree(tmp_path / "rsna"))
    manifest = read_manifest(out)
    report = check_manifest(manifest, n_folds=None)
    codes = {issue.code for issue in (*report.errors, *report.warnings)}
    assert not codes & {"box-outside", "box-partly-outside", "unreadable", "missing"}
    (record,) = [record for record in manifest.records if record.boxes]
    truth = read_truth(record, PreprocessingSpec(size=64))
    expected = np.zeros((FILM_HEIGHT, FILM_WIDTH), bool)
    expected[20:60, 10:40] = expected[20:70, 60:90] = True
    np.testing.assert_array_equal(truth.mask, expected)


def test_the_list_of_names_makes_nih_patients_of_rsna_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rsna_tree(tmp_path / "rsna")
    out = build(tmp_path, "rsna", folder)
    assert [patient for (patient,) in facts(out, "patient")] == ["rsna:aa", "rsna:bb", "rsna:bb", "rsna:cc"]
    assert "3 images count as a patient of their own" in capsys.readouterr().err
    names = folder / "pneumonia-challenge-dataset-mappings_2018.json"
    listed = [
        {"subset_img_id": "aa", "img_id": "00000013_005.png", "StudyInstanceUID": "1", "SOPInstanceUID": "2"},
        {"subset_img_id": "bb", "img_id": "00000013_006.png"},
    ]
    names.write_text(json.dumps(listed))
    out = build(tmp_path, "rsna", folder)
    assert [patient for (patient,) in facts(out, "patient")] == ["nih:00000013"] * 3 + ["rsna:cc"]
    assert "1 images count as a patient of their own" in capsys.readouterr().err
    names.write_text('[{"img_id": 3}]')
    assert "is not the challenge's list of names" in refused(capsys, tmp_path, "rsna", str(folder))


@pytest.mark.parametrize(
    ("table", "old", "new", "said"),
    [
        ("labels", "cc,,,,,0", "cc,,,,,2", "'2' in Target, expected 0 or 1"),
        ("labels", "bb,10.0,20.0,30.0,40.0,1", "bb,,,,,1", "is no box of four numbers"),
        ("labels", "30.0,40.0", "-30.0,40.0", "has no area"),
        ("labels", "width", "breadth", "has no column 'width'"),
        ("class", "cc,Normal", "cc,Healthy", "class 'Healthy' is none of the challenge's 3"),
    ],
)
def test_what_cannot_be_in_the_rsna_tables_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str, old: str, new: str, said: str
) -> None:
    folder = rsna_tree(tmp_path / "rsna")
    path = folder / {"labels": "stage_2_train_labels.csv", "class": "stage_2_detailed_class_info.csv"}[table]
    path.write_text(path.read_text().replace(old, new))
    assert said in refused(capsys, tmp_path, "rsna", str(folder))


# --- file names ----------------------------------------------------------------------------------


def test_the_pediatric_archive_with_its_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "chest_xray"
    image(folder / "train/PNEUMONIA/person1_bacteria_1.jpeg", 1)
    image(folder / "train/NORMAL/IM-0115-0001.jpeg", 2)
    image(folder / "val/NORMAL/NORMAL2-IM-1427-0001.jpeg", 3)
    image(folder / "train/NORMAL/person2_virus_9.jpeg", 4)  # in the wrong folder
    image(folder / "train/PNEUMONIA/IM-0001-0001.jpeg", 5)
    image(folder / "train/NORMAL/readme_picture.png", 6)
    image(folder / "test/PNEUMONIA/person1_bacteria_1.jpeg", 7)  # another film of this name
    for path in sorted(folder.rglob("*.jpeg")):
        copy = folder / "chest_xray" / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    image(folder / "__MACOSX" / "._person1_bacteria_1.jpeg", 8)
    assert Counter(facts(build(tmp_path, "kermany", folder), "label", "patient")) == {
        ("bacterial_pneumonia", "kermany:person1"): 2, ("healthy", "kermany:IM-0115"): 1,
        ("healthy", "kermany:IM-1427"): 1,
    }  # fmt: skip
    said = capsys.readouterr().err
    assert "4 the same file again" in said
    assert "4 its name contradicts its folder" in said
    assert "1 a name of another form" in said


@given(st.integers(0, 10**5), st.integers(0, 10**4), st.integers(0, 10**4), st.booleans(), st.booleans())
def test_names_of_healthy_children(number: int, film: int, third: int, second: bool, long: bool) -> None:
    name = f"{'NORMAL2-' if second else ''}IM-{number:04}-{film:04}" + (f"-{third:04}" if long else "")
    assert kermany_name(name) == ("healthy", f"IM-{number:04}")
    assert kermany_name(name + "-x") is None
    assert kermany_name("x" + name) is None


# --- V7 ------------------------------------------------------------------------------------------


class V7:
    """A tree as `darwin dataset pull` leaves it: images/, releases/NAME/annotations/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def film(
        self, original: str, *tags: str, name: str = "", release: str = "all-images", image_too: bool = True
    ) -> None:
        self.count += 1
        name = name or f"{self.count:04}.png"
        lung = {"name": "Lung", "polygon": {"path": [{"x": 1, "y": 2}, {"x": 3, "y": 4}, {"x": 5, "y": 1}]}}
        record = {
            "dataset": "COVID-19 Chest X-Ray Dataset",
            "image": {"filename": name, "original_filename": original, "width": 64, "height": 64},
            "annotations": [lung, *({"name": tag, "tag": {}} for tag in tags)],
        }
        path = self.folder / "releases" / release / "annotations" / f"{self.count}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
        if image_too:
            image(self.folder / "images" / name, self.count)


@pytest.fixture
def v7(tmp_path: Path) -> V7:
    return V7(tmp_path / "covid-19-chest-x-ray-dataset")


def test_v7_labels_views_and_what_is_no_frontal_film(
    v7: V7, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    v7.film("a.jpg", "COVID-19", "Viral Pneumonia", "View/AP_Supine", "Intubated/No")
    v7.film("b.jpg", "Viral Pneumonia", "View/PA")
    v7.film("c.jpg", "Fungal Pneumonia", "View/AP")
    v7.film("person3_bacteria_16.jpeg", "Bacterial Pneumonia")
    v7.film("IM-0115-0001.jpeg", "No Pneumonia (healthy)")
    v7.film("d.jpg", "Viral Pneumonia", "Bacterial Pneumonia")
    v7.film("e.jpg", "No Pneumonia (healthy)", "Viral Pneumonia")
    v7.film("f.jpg", "Intubated/No")
    v7.film("g.jpg", "CT", "COVID-19", "View/Axial")
    v7.film("h.jpg", "COVID-19", "View/Coronal")
    v7.film("i.jpg", "COVID-19", "View/Lateral")
    v7.film("j.jpg", "CT", "COVID-19")
    assert facts(build(tmp_path, "v7", v7.folder), "label", "source", "view") == [
        ("covid19", "v7-cohen", "AP SUPINE"), ("viral_pneumonia", "v7-cohen", "PA"), ("pneumonia", "v7-cohen", "AP"),
        ("bacterial_pneumonia", "v7-kermany", ""), ("healthy", "v7-kermany", ""), ("pneumonia", "v7-cohen", ""),
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert "4 no frontal X-ray" in said
    assert "2 neither pneumonia nor healthy, or not said" in said


def test_v7_masks_of_lungs_are_not_taken_for_films(v7: V7, tmp_path: Path) -> None:
    v7.film("a.jpg", "COVID-19", name="1676192.png")
    v7.film("b.jpg", "COVID-19", name="1676193.png", image_too=False)
    for name in ("1676192.png", "1676193.png"):
        image(v7.folder / "annotations" / "all-images-semantic-masks" / name, 9)
    metadata = v7.folder / "releases/all-images/annotations/.v7/metadata.json"
    metadata.parent.mkdir()
    metadata.write_text('{"version": "1.0", "classes": []}')
    assert facts(build(tmp_path, "v7", v7.folder), "path") == [
        ("../covid-19-chest-x-ray-dataset/images/1676192.png",)
    ]  # fmt: skip


def test_v7_in_two_releases_is_each_film_once(v7: V7, tmp_path: Path) -> None:
    v7.film("a.jpg", "COVID-19", name="1.png")
    v7.film("a.jpg", "COVID-19", name="1.png", release="covid-only", image_too=False)
    assert len(read_manifest(build(tmp_path, "v7", v7.folder)).records) == 1


def test_v7_an_absent_image_is_not_another_one_of_its_first_name(v7: V7, tmp_path: Path) -> None:
    v7.film("2.png", "COVID-19", name="1.png", image_too=False)
    v7.film("x.png", "No Pneumonia (healthy)", name="2.png")
    v7.film("kept.png", "Viral Pneumonia", name="3.png", image_too=False)
    image(v7.folder / "images" / "kept.png", 7)
    assert facts(build(tmp_path, "v7", v7.folder), "path", "label") == [
        ("../covid-19-chest-x-ray-dataset/images/2.png", "healthy"),
        ("../covid-19-chest-x-ray-dataset/images/kept.png", "viral_pneumonia"),
    ]


def test_v7_patients_are_those_of_the_collections_its_films_are_of(
    v7: V7, cohen_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0.png and 1.png of the cohen collection are of one patient: without its table they could cross folds."""
    for original in ("0.png", "1.png", "2.png"):
        v7.film(original, "COVID-19")
    for original in ("person7_virus_1.jpeg", "person7_bacteria_2.jpeg", "elsewhere.png"):
        v7.film(original, "Viral Pneumonia")
    alone = build(tmp_path, "v7", v7.folder)
    assert [patient for (patient,) in facts(alone, "patient")] == [
        "v7:0", "v7:1", "v7:2", "kermany:person7", "kermany:person7", "v7:elsewhere",
    ]  # fmt: skip
    assert "4 images count as a patient of their own" in capsys.readouterr().err
    known = build(tmp_path, "v7", v7.folder, "--cohen", str(cohen_folder))
    assert [patient for (patient,) in facts(known, "patient")] == [
        "cohen:0", "cohen:0", "cohen:1", "kermany:person7", "kermany:person7", "v7:elsewhere",
    ]  # fmt: skip
    assert "1 images count as a patient of their own" in capsys.readouterr().err
    assert "no such file" in refused(capsys, tmp_path, "v7", str(v7.folder), "--cohen", str(tmp_path))


def test_the_cohen_collection_of_real_films_is_labelled_as_by_hand(cxr: Path, tmp_path: Path) -> None:
    """Its table put together again out of the facts that were kept of it; labels and patients were given by hand."""
    with open(cxr / "dataset_c.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "cohen"]
    folder = tmp_path / "covid-chestxray-dataset"
    (folder / "images").mkdir(parents=True)
    table = ["patientid,sex,age,finding,view,modality,folder,filename"]
    for row in rows:
        name = Path(row["path"]).name
        (folder / "images" / name).symlink_to(cxr / row["path"])
        patient = row["patient"].removeprefix("cohen:")
        table.append(f'{patient},{row["sex"]},{row["age"]},"{row["finding"]}",{row["view"]},X-ray,images,{name}')
    (folder / "metadata.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
    made = facts(build(tmp_path, "cohen", folder), "label", "patient", "view", "age", "sex", "finding")
    assert sorted(made) == sorted(
        tuple(row[name] for name in ("label", "patient", "view", "age", "sex", "finding")) for row in rows
    )
    assert len(made) == 497
