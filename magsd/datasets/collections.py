"""One function a collection: from its folder to rows. Labels: covid19, viral_pneumonia, bacterial_pneumonia,
pneumonia (of other or unknown cause) and healthy; whatever is none of these is left out, and counted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from magsd_runtime.errors import DataError, ImageError

from .rows import Box, Collected, Row, find_images, read_table

FRONTAL = frozenset({"pa", "ap", "ap supine", "ap erect", "aps"})
_VIRAL = frozenset({"viral", "sars", "mers", "mers-cov", "influenza", "h1n1", "varicella", "herpes"})
_BACTERIAL = frozenset({
    "bacterial", "streptococcus", "klebsiella", "legionella", "e.coli", "mycoplasma", "chlamydophila", "nocardia",
    "staphylococcus", "mrsa",
})  # fmt: skip
_OTHER_PNEUMONIA = frozenset({"pneumonia", "ards", "lipoid", "pneumocystis", "fungal", "aspiration"})
NIH_SIDE = 1024  # pixels: the box list is of images of this side


def label_of(finding: str) -> str | None:
    """The label of a finding of the cohen collection, as a path (``Pneumonia/Viral/COVID-19``) or in the words of its
    earlier versions (``COVID-19, ARDS``; ``Mycoplasma Bacterial Pneumonia``); None for what is neither pneumonia nor
    healthy."""
    if finding.strip().lower() == "no finding":
        return "healthy"
    words = set(re.split(r"[/,\s]+", finding.lower()))
    if "covid-19" in words:
        return "covid19"
    viral, bacterial = bool(words & _VIRAL), bool(words & _BACTERIAL)
    if viral != bacterial:
        return "viral_pneumonia" if viral else "bacterial_pneumonia"
    return "pneumonia" if viral or words & _OTHER_PNEUMONIA else None


def cohen(folder: Path) -> Collected:
    """covid-chestxray-dataset: ``metadata.csv`` and ``images/``; frontal X-rays.

    Raises DataError, as all of these, if the table or the images are not there.
    """
    table = read_table(folder / "metadata.csv", ("patientid", "finding", "view", "modality", "filename"))
    images, found = find_images(folder / "images"), Collected()
    for line in table:
        if line["modality"].lower() != "x-ray" or line["view"].lower() not in FRONTAL:
            found.left_out["no frontal X-ray"] += 1
        else:
            _add(found, images.get(line["filename"]), label_of(line["finding"]), line, "cohen", line["patientid"])
    return found


def figure1(folder: Path) -> Collected:
    """Figure1-COVID-chestxray-dataset: an image is called by its ``patientid``, with a letter if one of several."""
    table = read_table(folder / "metadata.csv", ("patientid", "finding", "view", "modality"))
    images = {Path(name).stem: path for name, path in find_images(folder / "images").items()}
    found = Collected()
    for line in table:
        if line["modality"].lower() != "x-ray" or (line["view"] and line["view"].lower() not in FRONTAL):
            found.left_out["no frontal X-ray"] += 1
        else:
            patient = re.sub(r"(?<=\d)[a-z]$", "", line["patientid"])
            _add(found, images.get(line["patientid"]), label_of(line["finding"]), line, "figure1", patient)
    return found


def actualmed(folder: Path) -> Collected:
    """Actualmed-COVID-chestxray-dataset: ``metadata.csv`` with ``imagename``; "No finding" is of COVID-19 alone."""
    table = read_table(folder / "metadata.csv", ("patientid", "finding", "view", "modality", "imagename"))
    images, found = find_images(folder / "images"), Collected()
    for line in table:
        if line["modality"].lower() != "x-ray" or line["view"].lower() not in FRONTAL:
            found.left_out["no frontal X-ray"] += 1
        else:
            _add(found, images.get(line["imagename"]), label_of(line["finding"]), line, "actualmed", line["patientid"])
    found.notes.append('"No finding" means that COVID-19 was excluded there: such films may show something else')
    return found


def nih(folder: Path, *, boxed: bool = False) -> Collected:
    """NIH ChestX-ray8/14: ``Data_Entry_2017*.csv``, images anywhere below, ``BBox_List_2017.csv`` where it is.

    ``boxed``: only pneumonia with a box. Boxes are of the files as published, 1024 x 1024; of copies of another size
    they are scaled along.
    """
    tables = sorted(folder.glob("Data_Entry_2017*.csv"))
    if not tables:
        raise DataError(f"{folder}: holds no Data_Entry_2017.csv, the collection's table of labels")
    table = read_table(tables[-1], ("image index", "finding labels", "patient id"))
    boxes, images, found = _nih_boxes(folder / "BBox_List_2017.csv", needed=boxed), find_images(folder), Collected()
    for line in table:
        name, labels = line["image index"], set(line["finding labels"].split("|"))
        label = "pneumonia" if "Pneumonia" in labels else "healthy" if labels == {"No Finding"} else None
        mine = tuple(boxes.get(name, ())) if label == "pneumonia" else ()
        if boxed and not mine:
            continue
        path = images.get(name)
        if mine and path is not None:
            mine = _scaled(mine, path)
        facts = {
            "finding": line["finding labels"], "view": line.get("view position", ""),
            "age": line.get("patient age", ""), "sex": line.get("patient gender", line.get("patient sex", "")),
        }  # fmt: skip
        patient = line["patient id"].zfill(8)
        _add(found, path, label, facts, "nih", patient, mine)
    return found


def _nih_boxes(path: Path, *, needed: bool) -> dict[str, list[Box]]:
    """The boxes of pneumonia. The header names four columns in one: ``Bbox [x,y,w,h],,,``."""
    boxes: dict[str, list[Box]] = {}
    if not path.exists() and not needed:
        return boxes
    read_table(path, ("image index", "finding label"))
    for number, text in enumerate(path.read_text(encoding="utf-8-sig").splitlines()[1:], 2):
        cells = [cell.strip() for cell in text.split(",")]
        if len(cells) < 6 or cells[1] != "Pneumonia":
            continue
        try:
            x, y, w, h = (float(cell) for cell in cells[2:6])
        except ValueError as error:
            raise DataError(f"{path}: line {number}: {text!r} has no box of four numbers") from error
        boxes.setdefault(cells[0], []).append((x, y, w, h))
    return boxes


def _scaled(boxes: tuple[Box, ...], path: Path) -> tuple[Box, ...]:
    from magsd_runtime.images import read_radiograph

    try:
        film = read_radiograph(path)
    except ImageError:  # magsd train names it
        return boxes
    across, down = film.width / NIH_SIDE, film.height / NIH_SIDE
    return tuple((x * across, y * down, w * across, h * down) for x, y, w, h in boxes)


_PERSON = re.compile(r"person(\d+)_(bacteria|virus)_\d+", re.IGNORECASE)
_NORMAL = re.compile(r"(?:NORMAL2-)?(IM-\d+)-\d+(?:-\d+)?", re.IGNORECASE)
_MENDELEY = re.compile(r"(BACTERIA|VIRUS|NORMAL)-(\d+)-\d+", re.IGNORECASE)
_CAUSES = {
    "bacteria": "bacterial_pneumonia", "virus": "viral_pneumonia", "normal": "healthy",
}  # fmt: skip


def kermany_name(stem: str) -> tuple[str, str] | None:
    """(label, patient) of a file name of the pediatric collection; None for one of another form."""
    if match := _PERSON.fullmatch(stem):
        return _CAUSES[match[2].lower()], f"person{match[1]}"
    if match := _MENDELEY.fullmatch(stem):
        return _CAUSES[match[1].lower()], match[2]
    if match := _NORMAL.fullmatch(stem):
        return "healthy", match[1].upper()
    return None


def kermany(folder: Path) -> Collected:
    """The pediatric pneumonia collection (chest_xray): what a film shows, and whose it is, is in its name."""
    found = Collected()
    for name, path in find_images(folder).items():
        known = kermany_name(Path(name).stem)
        label, patient = known or (None, "")
        _add(found, path, label, {"finding": "" if known is None else Path(name).stem}, "kermany", patient)
    found.notes.append("its own split into train, val and test is ignored: one person may be on both sides of it")
    return found


def rsna(folder: Path, *, boxed: bool = False) -> Collected:
    """RSNA Pneumonia Detection Challenge: ``stage_2_train_labels.csv``, ``stage_2_detailed_class_info.csv``, DICOM."""
    labels = read_table(folder / "stage_2_train_labels.csv", ("patientid", "x", "y", "width", "height", "target"))
    details = read_table(folder / "stage_2_detailed_class_info.csv", ("patientid", "class"))
    kinds = {line["patientid"]: line["class"] for line in details}
    boxes: dict[str, list[Box]] = {}
    for line in labels:
        mine = boxes.setdefault(line["patientid"], [])
        if line["target"] == "1":
            try:
                mine.append((float(line["x"]), float(line["y"]), float(line["width"]), float(line["height"])))
            except ValueError as error:
                raise DataError(
                    f"{folder}: {line['patientid']} is 1 in Target and has no box of four numbers"
                ) from error
    images = {Path(name).stem: path for name, path in find_images(folder / "stage_2_train_images").items()}
    found = Collected()
    for identity, mine in boxes.items():
        if boxed and not mine:
            continue
        kind = kinds.get(identity, "")
        label = "pneumonia" if mine else "healthy" if kind == "Normal" else None
        _add(found, images.get(identity), label, {"finding": kind}, "rsna", identity, tuple(mine))
    found.notes.append("each image counts as a patient: the challenge does not say which are of one patient")
    found.notes.append("its films are of the NIH collection: do not put both into one data set")
    return found


_TAGS = (  # of V7's annotations, the first that fits
    ("covid", "covid19"), ("viral", "viral_pneumonia"), ("bacterial", "bacterial_pneumonia"),
    ("no pneumonia", "healthy"), ("healthy", "healthy"),
)  # fmt: skip


def v7(folder: Path) -> Collected:
    """V7's covid-19 collection: ``annotations/*.json`` (Darwin) anywhere below, tags for classes, images by name."""
    files = sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))
    if not files:
        raise DataError(f"{folder}: holds no annotation (Darwin JSON): export the collection with annotations")
    images, found = find_images(folder), Collected()
    own = 0
    for file in files:
        name, original, tags = _darwin(file)
        if any("lateral" in tag or "axial" in tag for tag in tags):
            found.left_out["no frontal X-ray"] += 1
            continue
        label = next((label for word, label in _TAGS if any(word in tag for tag in tags)), None)
        known = kermany_name(Path(original).stem)
        own += known is None
        patient = Path(original).stem if known is None else known[1]
        _add(found, images.get(name) or images.get(original), label, {"finding": ", ".join(tags)}, "v7", patient)
    found.notes.append(f"{own} images count as a patient of their own: their names do not say whose they are")
    found.notes.append("its films are of the cohen and pediatric collections: do not put them into one data set")
    return found


def _darwin(path: Path) -> tuple[str, str, list[str]]:
    """File name, original file name and tags in lower case, of Darwin JSON 1.0 and 2.0."""
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        image = record.get("image") or record["item"]
        name = str(image.get("filename") or image["name"])
        slots = image.get("slots") or [{}]
        original = image.get("original_filename") or (slots[0].get("source_files") or [{}])[0].get("file_name") or name
        tags = [str(each["name"]).lower() for each in record["annotations"] if "tag" in each]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: is no Darwin annotation ({type(error).__name__}: {error})") from error
    return name, str(original), tags


COLLECTIONS: dict[str, Callable[..., Collected]] = {
    "cohen": cohen, "figure1": figure1, "actualmed": actualmed, "nih": nih, "kermany": kermany, "rsna": rsna, "v7": v7,
}  # fmt: skip
WITH_BOXES = ("nih", "rsna")


def _add(
    found: Collected,
    path: Path | None,
    label: str | None,
    facts: dict[str, str],
    source: str,
    patient: str,
    boxes: tuple[Box, ...] = (),
) -> None:
    """One row, or the reason why there is none."""
    if label is None:
        found.left_out["neither pneumonia nor healthy, or not said"] += 1
    elif path is None:
        found.left_out["the image is not there"] += 1
    elif not patient:
        found.left_out["no patient"] += 1
    else:
        kept = {name: facts.get(name, "") for name in ("view", "age", "sex", "finding")}
        found.rows.append(Row(path, label, f"{source}:{patient}", source, boxes, **kept))
