"""One function a collection: from its folder to rows. Labels: covid19, viral_pneumonia, bacterial_pneumonia,
pneumonia (of other or unknown cause) and healthy; whatever is none of these is left out, and counted.

A patient is ``collection:identifier`` of the collection that a film was first published in, where that is known:
films of one person are then one patient, whichever of several collections they were taken from.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from magsd_runtime.errors import DataError, ImageError

from .rows import Box, Collected, Row, find_images, list_images, read_table, same_content

FRONTAL = frozenset({"pa", "ap", "ap supine", "ap erect", "ap semi erect", "aps"})
_VIRAL = frozenset({"viral", "sars", "mers", "mers-cov", "influenza", "h1n1", "varicella", "herpes"})
_BACTERIAL = frozenset({
    "bacterial", "streptococcus", "klebsiella", "legionella", "e.coli", "mycoplasma", "chlamydophila", "nocardia",
    "staphylococcus", "mrsa",
})  # fmt: skip
_OTHER_PNEUMONIA = frozenset({
    "pneumonia", "ards", "lipoid", "pneumocystis", "fungal", "aspergillosis", "aspiration",
})  # fmt: skip
_NO_LABEL = frozenset({"", "todo", "unknown", "tuberculosis"})
_BY_FINDING = ("cohen", "figure1", "actualmed")
_DOUBT = frozenset({"no", "not", "negative", "suspected", "probable", "possible", "inconclusive", "excluded"})
NIH_SIDE = 1024  # pixels: the box list is of images of this side
NIH_LABELS = frozenset({
    "No Finding", "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis",
    "Hernia", "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
})  # fmt: skip
RSNA_CLASSES = frozenset({"Normal", "Lung Opacity", "No Lung Opacity / Not Normal"})
RSNA_MAPPINGS = "pneumonia-challenge-dataset-mappings_2018.json"


def label_of(finding: str) -> str | None:
    """The label of a finding of the cohen collection, as a path (``Pneumonia/Viral/COVID-19``) or in the words of its
    earlier versions (``COVID-19, ARDS``; ``Mycoplasma Bacterial Pneumonia``); None for what is neither pneumonia nor
    healthy, and for what is not certain."""
    if finding.strip().lower() == "no finding":
        return "healthy"
    words = set(re.split(r"[/,\s]+", finding.lower()))
    if words & _DOUBT:
        return None
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
            patient = _of("cohen", line["patientid"])
            _add(found, images.get(line["filename"]), label_of(line["finding"]), line, "cohen", patient)
    return found.once()


def figure1(folder: Path) -> Collected:
    """Figure1-COVID-chestxray-dataset: an image is called by its ``patientid``, with a letter if one of several.

    Its table is no UTF-8. A view is given for some films only, and lateral ones are named as such.
    """
    columns = ("patientid", "finding", "view", "modality")
    table = read_table(folder / "metadata.csv", columns, encoding="iso-8859-1")
    images = {Path(name).stem: path for name, path in find_images(folder / "images").items()}
    found = Collected()
    for line in table:
        if line["modality"].lower() != "x-ray" or (line["view"] and line["view"].lower() not in FRONTAL):
            found.left_out["no frontal X-ray"] += 1
        else:
            patient = _of("figure1", re.sub(r"(?<=\d)[a-z]$", "", line["patientid"]))
            _add(found, images.get(line["patientid"]), label_of(line["finding"]), line, "figure1", patient)
    return found.once()


def actualmed(folder: Path) -> Collected:
    """Actualmed-COVID-chestxray-dataset: ``metadata.csv`` with ``imagename``; "No finding" is of COVID-19 alone."""
    table = read_table(folder / "metadata.csv", ("patientid", "finding", "view", "modality", "imagename"))
    images, found = find_images(folder / "images"), Collected()
    for line in table:
        if line["modality"].lower() != "x-ray" or line["view"].lower() not in FRONTAL:
            found.left_out["no frontal X-ray"] += 1
        else:
            patient = _of("actualmed", line["patientid"])
            _add(found, images.get(line["imagename"]), label_of(line["finding"]), line, "actualmed", patient)
    found.notes.append('"No finding" means that COVID-19 was excluded there: such films may show something else')
    return found.once()


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
    not_called_so = 0
    for line in table:
        name, labels = line["image index"], set(line["finding labels"].split("|"))
        if unknown := sorted(labels - NIH_LABELS):
            raise DataError(f"{tables[-1]}: {name}: label {unknown[0]!r} is none of the collection's 15")
        label = "pneumonia" if "Pneumonia" in labels else "healthy" if labels == {"No Finding"} else None
        mine = tuple(boxes.get(name, ()))
        if mine and label != "pneumonia":
            mine, not_called_so = (), not_called_so + 1
        if boxed and not mine:
            continue
        path = images.get(name)
        if mine and path is not None:
            mine = _scaled(mine, path)
        facts = {
            "finding": line["finding labels"], "view": line.get("view position", ""),
            "age": line.get("patient age", ""), "sex": line.get("patient gender", line.get("patient sex", "")),
        }  # fmt: skip
        identity = line["patient id"]
        _add(found, path, label, facts, "nih", _of("nih", identity.zfill(8) if identity else ""), mine)
    if not_called_so:
        found.notes.append(f"{not_called_so} films have a box of pneumonia and not its label: the boxes are left out")
    return found.once()


def _nih_boxes(path: Path, *, needed: bool) -> dict[str, list[Box]]:
    """The boxes of pneumonia. The header names four columns in one: ``Bbox [x,y,w,h],,,``."""
    boxes: dict[str, list[Box]] = {}
    if not path.exists() and not needed:
        return boxes
    read_table(path, ("image index", "finding label"))
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, cells in enumerate(csv.reader(file), 1):
            if number > 1 and len(cells) > 1 and cells[1].strip() == "Pneumonia":
                boxes.setdefault(cells[0].strip(), []).append(_box(f"{path}: line {number}", cells[2:6]))
    return boxes


def _box(place: str, texts: list[str]) -> Box:
    """(x, y, w, h) of four texts."""
    try:
        x, y, w, h = (float(text) for text in texts)
    except ValueError as error:
        raise DataError(f"{place}: {', '.join(texts) or 'nothing'} is no box of four numbers") from error
    if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
        raise DataError(f"{place}: box {x:g}, {y:g}, {w:g}, {h:g} has no area")
    return x, y, w, h


def _scaled(boxes: tuple[Box, ...], path: Path) -> tuple[Box, ...]:
    from magsd_runtime.images import read_radiograph

    try:
        film = read_radiograph(path)
    except ImageError:  # magsd train names it
        return boxes
    across, down = film.width / NIH_SIDE, film.height / NIH_SIDE
    return tuple((x * across, y * down, w * across, h * down) for x, y, w, h in boxes)


_PERSON = re.compile(r"person(\d+)_(bacteria|virus)_\d+", re.IGNORECASE | re.ASCII)
_NORMAL = re.compile(r"(?:NORMAL2-)?(IM-\d+)-\d+(?:-\d+)?", re.IGNORECASE | re.ASCII)
_MENDELEY = re.compile(r"(BACTERIA|VIRUS|NORMAL)-(\d+)-\d+", re.IGNORECASE | re.ASCII)
_HEALTHY_FOLDER = {"normal": True, "pneumonia": False}
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
    """The pediatric pneumonia collection (chest_xray): what a film shows, and whose it is, is in its name.

    Of copies of one file, as the archive in circulation has them (``chest_xray/chest_xray``), the first counts.
    """
    found, seen = Collected(), dict[str, list[Path]]()
    for path in list_images(folder):
        known = kermany_name(path.stem)
        label, patient = known or (None, "")
        mine = seen.setdefault(path.name, [])
        if any(same_content(path, other) for other in mine):
            found.left_out["the same file again"] += 1
        elif known is None:
            found.left_out["a name of another form"] += 1
        elif _HEALTHY_FOLDER.get(path.parent.name.lower(), label == "healthy") != (label == "healthy"):
            found.left_out["its name contradicts its folder"] += 1
        else:
            mine.append(path)
            _add(found, path, label, {"finding": path.stem}, "kermany", _of("kermany", patient))
    found.notes.append("its own split into train, val and test is ignored: one person may be on both sides of it")
    return found.once()


def rsna(folder: Path, *, boxed: bool = False) -> Collected:
    """RSNA Pneumonia Detection Challenge: ``stage_2_train_labels.csv``, ``stage_2_detailed_class_info.csv``, DICOM.

    Where the challenge's list of names (:data:`RSNA_MAPPINGS`) lies beside them, patients are those of ``nih``.
    """
    labels = read_table(folder / "stage_2_train_labels.csv", ("patientid", "x", "y", "width", "height", "target"))
    details = read_table(folder / "stage_2_detailed_class_info.csv", ("patientid", "class"))
    kinds = {line["patientid"]: line["class"] for line in details}
    if unknown := sorted(set(kinds.values()) - RSNA_CLASSES):
        raise DataError(f"{folder}: stage_2_detailed_class_info.csv: class {unknown[0]!r} is none of the challenge's 3")
    boxes: dict[str, list[Box]] = {}
    for line in labels:
        mine = boxes.setdefault(line["patientid"], [])
        if line["target"] == "1":
            place = f"{folder}: stage_2_train_labels.csv: {line['patientid']}"
            mine.append(_box(place, [line[name] for name in ("x", "y", "width", "height")]))
        elif line["target"] != "0":
            raise DataError(f"{folder}: {line['patientid']} has {line['target']!r} in Target, expected 0 or 1")
    images = {Path(name).stem: path for name, path in find_images(folder / "stage_2_train_images").items()}
    whose, found = _rsna_patients(folder / RSNA_MAPPINGS), Collected()
    for identity, mine in boxes.items():
        if boxed and not mine:
            continue
        kind = kinds.get(identity, "")
        label = "pneumonia" if mine else "healthy" if kind == "Normal" else None
        patient = whose.get(identity) or _of("rsna", identity)
        _add(found, images.get(identity), label, {"finding": kind}, "rsna", patient, tuple(mine))
    own = sum(row.patient.startswith("rsna:") for row in found.rows)
    if own:
        found.notes.append(
            f"{own} images count as a patient of their own: the challenge's tables do not say which are of one "
            f"patient; its {RSNA_MAPPINGS} in the same folder does"
        )
    found.notes.append("its films are of the NIH collection: do not put both into one data set")
    return found.once()


def _rsna_patients(path: Path) -> dict[str, str]:
    """Patient of ``nih`` by the challenge's identifier; empty if the list is not there."""
    if not path.exists():
        return {}
    try:
        listed: Any = json.loads(path.read_text(encoding="utf-8"))
        return {each["subset_img_id"]: _of("nih", each["img_id"].split("_")[0]) for each in listed}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is not the challenge's list of names ({type(error).__name__}: {error})") from error


def v7(folder: Path, *, cohen: Path | None = None) -> Collected:
    """V7's covid-19 collection: Darwin JSON anywhere below, tags for classes, images by name.

    Its films are of two others: those called as in the pediatric collection, and those of ``cohen``, the folder whose
    ``metadata.csv`` says which of them are of one patient. ``source`` is ``v7-kermany`` or ``v7-cohen``.
    """
    files = sorted(path for path in folder.rglob("*.json") if not any(
        part.startswith(".") for part in path.relative_to(folder).parts))  # fmt: skip
    if not files:
        raise DataError(f"{folder}: holds no annotation (Darwin JSON): pull the collection with its annotations")
    # masks of lungs, published beside the annotations, are called like films
    images, found = find_images(folder, but=("annotations", "masks", "thumbnails")), Collected()
    whose: dict[str, str] = {}
    if cohen is not None:
        table = read_table(cohen / "metadata.csv", ("patientid", "filename"))
        whose = {line["filename"]: _of("cohen", line["patientid"]) for line in table}
    records = [_darwin(file) for file in files]
    names = {name for name, _, _ in records}
    for name, original, tags in records:
        views = {tag.removeprefix("view/").replace("_", " ") for tag in tags if tag.startswith("view/")}
        if "ct" in tags or any("lateral" in tag for tag in tags) or views - FRONTAL:
            found.left_out["no frontal X-ray"] += 1
            continue
        # an image kept under its first name; not one that is called so by another annotation
        path = images.get(name) or (images.get(original) if original not in names else None)
        known = kermany_name(Path(original).stem)
        origin = "cohen" if known is None else "kermany"
        patient = whose.get(original) or _of("v7", Path(original).stem) if known is None else _of(origin, known[1])
        facts = {"finding": ", ".join(tags), "view": ", ".join(sorted(views)).upper()}
        _add(found, path, _tagged(tags), facts, f"v7-{origin}", patient)
    found = found.once()
    own = sum(row.patient.startswith("v7:") for row in found.rows)
    if own:
        found.notes.append(
            f"{own} images count as a patient of their own: their names do not say whose they are"
            + ("" if cohen else "; --cohen FOLDER, the collection most of them are of, does")
        )
    found.notes.append("its films are of the cohen and pediatric collections: do not put them into one data set")
    return found


def _tagged(tags: list[str]) -> str | None:
    """The label of V7's tags, in lower case; None for none, and for tags that contradict each other."""
    if any(tag.startswith("covid") for tag in tags):
        return "covid19"  # such films are tagged as viral pneumonia as well
    healthy = [tag for tag in tags if "healthy" in tag or "no pneumonia" in tag]
    causes = {word for tag in tags if "pneumonia" in tag and tag not in healthy for word in tag.split()}
    if healthy or not causes:
        return "healthy" if healthy and not causes else None
    viral, bacterial = "viral" in causes, "bacterial" in causes
    if viral != bacterial:
        return "viral_pneumonia" if viral else "bacterial_pneumonia"
    return "pneumonia"


def _darwin(path: Path) -> tuple[str, str, list[str]]:
    """File name, original file name and tags in lower case, of Darwin JSON 1.0 and 2.0."""
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        image = record.get("image") or record["item"]
        name = str(image.get("filename") or image["name"])
        slots = image.get("slots") or [{}]
        original = image.get("original_filename") or (slots[0].get("source_files") or [{}])[0].get("file_name") or name
        tags = [str(each["name"]).strip().lower() for each in record["annotations"] if "tag" in each]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: is no Darwin annotation ({type(error).__name__}: {error})") from error
    return name, str(original), tags


COLLECTIONS: dict[str, Callable[..., Collected]] = {
    "cohen": cohen, "figure1": figure1, "actualmed": actualmed, "nih": nih, "kermany": kermany, "rsna": rsna, "v7": v7,
}  # fmt: skip
WITH_BOXES = ("nih", "rsna")


def _of(collection: str, identifier: str) -> str:
    """A patient's identifier; empty where the collection gives none."""
    return f"{collection}:{identifier}" if identifier else ""


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
    finding = facts.get("finding", "")
    if label is None and source in _BY_FINDING and finding.lower() not in _NO_LABEL:
        found.left_out["a finding that is not known here"] += 1
        found.unknown[finding] += 1
    elif label is None:
        found.left_out["neither pneumonia nor healthy, or not said"] += 1
    elif path is None:
        found.left_out["the image is not there"] += 1
    elif not patient:
        found.left_out["no patient"] += 1
    else:
        view, age, sex = (facts.get(name, "") for name in ("view", "age", "sex"))
        found.rows.append(Row(path, label, patient, source, boxes, view, age, sex, finding))
