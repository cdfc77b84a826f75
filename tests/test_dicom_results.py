"""What magsd infer --dicom-out writes, read with pydicom alone."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dicom_film
from magsd_runtime.bundle import LOCALIZATION_MAPS, Bundle
from magsd_runtime.dicom_results import concepts, presentation_state, writing
from magsd_runtime.dicom_results.identifiers import FORMAT, Origin, derive_uid
from magsd_runtime.dicom_results.source import now, read_source
from magsd_runtime.errors import MagsdError, UsageError
from magsd_runtime.overlay import draw_overlay
from magsd_runtime.prediction import Box, Decision, Reason

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")

ALL = {"secondary-capture", "structured-report", "presentation-state", "parametric-map"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return dicom_film.bundle(tmp_path_factory.mktemp("bundle") / "b")


def write(folder: Path, bundle: Bundle, result: Any = None, **film: Any) -> dict[str, Any]:
    """Write the results of a made-up film into ``folder``/out and read them back."""
    path = dicom_film.save(folder, **film)
    done = dicom_film.result(bundle) if result is None else result
    written = writing.write_results(folder / "out", path, done, bundle, when=dicom_film.WHEN)
    return {kind: pydicom.dcmread(file) for kind, file in written.items()}


def groups(report: Any) -> list[dict[str, list[Any]]]:
    """The measurement groups of a TID 1500 report: content items by the meaning of their concept."""
    (measurements,) = [item for item in report.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "126010"]
    found = []
    for group in measurements.ContentSequence:
        assert group.ConceptNameCodeSequence[0].CodeValue == "125007"
        by_name: dict[str, list[Any]] = {}
        for item in group.ContentSequence:
            by_name.setdefault(item.ConceptNameCodeSequence[0].CodeMeaning, []).append(item)
        found.append(by_name)
    return found


def concept(item: Any) -> tuple[str, str]:
    code = item.ConceptCodeSequence[0]
    return code.CodingSchemeDesignator, code.CodeValue


def value(item: Any) -> float:
    return float(item.MeasuredValueSequence[0].NumericValue)


# --- identifiers -----------------------------------------------------------------------------------


def reference_uid(value: object) -> str:
    """RFC 9562, 5.5, and PS3.5, B.2, by hand."""
    text = json.dumps({"format": FORMAT, "of": value}, sort_keys=True, separators=(",", ":"))
    namespace = uuid.UUID("1e4e670d-1b03-442b-b8a9-5e480852ff6a").bytes
    digest = bytearray(hashlib.sha1(namespace + text.encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x50
    digest[8] = digest[8] & 0x3F | 0x80
    return f"2.25.{int.from_bytes(digest, 'big')}"


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)))
def test_a_uid_is_a_name_based_uuid_below_2_25(value: object) -> None:
    uid = derive_uid(value)
    assert uid == reference_uid(value)
    assert re.fullmatch(r"2\.25\.[1-9][0-9]*", uid)
    assert len(uid) <= 64


def test_uids_are_those_of_the_first_release() -> None:
    """Changed values would pile up beside the old results in every archive: change FORMAT on purpose only."""
    origin = Origin("1.2.3", "a" * 64, "b" * 64, "c" * 64, "{}")
    assert origin.uid("instance", "parametric-map") == "2.25.130792721799027580442580520921381206664"


@pytest.mark.parametrize("field", ["source_uid", "pixels_sha256", "model_sha256", "preprocessing_sha256", "parameters"])
def test_every_part_of_the_origin_gives_another_uid(field: str) -> None:
    origin = Origin("1.2.3", "a", "b", "c", "{}")
    assert replace(origin, **{field: "other"}).uid("x") != origin.uid("x")
    assert origin.uid("x", "y") != origin.uid("xy")


# --- what all have in common -------------------------------------------------------------------------


def test_a_rerun_writes_the_same_bytes_to_the_same_files(tmp_path: Path, bundle: Bundle) -> None:
    write(tmp_path, bundle)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write(tmp_path, bundle)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    assert len(first) == 4


def test_other_settings_pixels_and_films_give_other_uids(tmp_path: Path, bundle: Bundle) -> None:
    ours = {str(dataset.SOPInstanceUID) for dataset in write(tmp_path, bundle).values()}
    result = dicom_film.result(bundle)
    assert result.radiograph is not None
    brighter = replace(result.radiograph, pixels=result.radiograph.pixels + np.uint8(1))
    half = replace(result.prediction, backend={**result.prediction.backend, "precision": "fp16"})
    others = [
        write(tmp_path, replace(bundle, localization={"map": "attention", "threshold": 0.6})),
        write(tmp_path, replace(bundle, model_sha256="0" * 64)),
        write(tmp_path, replace(bundle, manifest={**bundle.manifest, "calibration": {"temperature": 2.0}})),
        write(tmp_path, bundle, replace(result, radiograph=brighter)),
        write(tmp_path, bundle, replace(result, prediction=half)),
        write(tmp_path, bundle, SOPInstanceUID="1.2.3.4.5.6.8"),
    ]
    uids = [str(dataset.SOPInstanceUID) for datasets in others for dataset in datasets.values()]
    assert max(Counter([*ours, *uids]).values()) == 1


def test_results_belong_to_the_films_patient_and_study_and_have_series_of_their_own(
    tmp_path: Path, bundle: Bundle
) -> None:
    results = write(tmp_path, bundle)
    film = dicom_film.film()
    assert set(results) == ALL
    for kind, dataset in results.items():
        for keyword in (
            "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName",
            "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge",
        ):  # fmt: skip
            assert dataset.get(keyword) == film.get(keyword), keyword
        assert "research use only" in dataset.SeriesDescription.lower()
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
        assert (tmp_path / "out" / f"{kind}-{dataset.SOPInstanceUID}.dcm").is_file()
        assert dataset.DeviceSerialNumber == bundle.model_sha256
        assert dataset.InstanceCreationDate == "20260203"
        assert dataset.InstanceCreationTime == "040506"
    series = {str(dataset.SeriesInstanceUID) for dataset in results.values()}
    assert len(series) == 4
    assert str(film.SeriesInstanceUID) not in series


def test_no_uid_is_left_to_chance(tmp_path: Path, bundle: Bundle) -> None:
    given_ones = {dicom_film.film().get(name) for name in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")}
    for dataset in write(tmp_path, bundle).values():
        for element in dicom_film.items(dataset):
            if element.VR == "UI" and element.value not in given_ones and element.keyword != "TransferSyntaxUID":
                assert element.value.startswith(("2.25.", "1.2.840.10008.")), element.keyword


def test_names_in_any_script_survive(tmp_path: Path, bundle: Bundle) -> None:
    name = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    results = write(tmp_path, bundle, SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName=name)
    for dataset in results.values():
        assert dataset.SpecificCharacterSet == "ISO_IR 192"
        assert str(dataset.PatientName) == name
        assert dataset.PatientName.ideographic == "山田^太郎"


def test_what_the_film_lacks_is_empty_and_what_is_no_value_is_left_out(tmp_path: Path, bundle: Bundle) -> None:
    results = write(
        tmp_path,
        bundle,
        PatientName=None,
        PatientSex=None,
        StudyID=None,
        AccessionNumber=None,
        PatientAge="62",
        PatientWeight="71.5",
    )
    for dataset in results.values():
        for keyword in ("PatientName", "PatientSex", "StudyID", "AccessionNumber"):
            assert keyword in dataset
            assert dataset.get(keyword) in (None, "")
        assert "PatientAge" not in dataset
        assert dataset.PatientWeight == 71.5


def test_times_are_in_the_films_zone(tmp_path: Path, bundle: Bundle) -> None:
    source = read_source(dicom_film.save(tmp_path, TimezoneOffsetFromUTC="-0330"))
    assert now(source).utcoffset() == timedelta(hours=-3, minutes=-30)
    assert all(
        d.TimezoneOffsetFromUTC == "-0330" for d in write(tmp_path, bundle, TimezoneOffsetFromUTC="-0330").values()
    )
    plain = now(read_source(dicom_film.save(tmp_path)))
    assert plain.tzinfo is None
    assert abs(plain - datetime.now()) < timedelta(seconds=5)


# --- secondary capture ---------------------------------------------------------------------------------


def test_the_secondary_capture_is_the_overlay_which_names_no_file(tmp_path: Path, bundle: Bundle) -> None:
    result = dicom_film.result(bundle)
    dataset = write(tmp_path, bundle, result)["secondary-capture"]
    assert result.radiograph is not None
    overlay = draw_overlay(result.radiograph, result.heat, result.prediction)
    np.testing.assert_array_equal(dataset.pixel_array, overlay)
    np.testing.assert_array_equal(
        overlay, draw_overlay(result.radiograph, result.heat, replace(result.prediction, path=""))
    )
    assert dataset.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
    assert dataset.PhotometricInterpretation == "RGB"
    assert dataset.ConversionType == "WSD"
    assert list(dataset.ImageType)[:2] == ["DERIVED", "SECONDARY"]
    assert dataset["PatientOrientation"].is_empty  # of film and panel together there is none
    assert dataset.SourceImageSequence[0].ReferencedSOPInstanceUID == "1.2.3.4.5.6.7"


@pytest.mark.parametrize(("flag", "expected"), [("YES", "YES"), ("NO", "NO"), (None, None), ("MAYBE", None)])
def test_burned_in_annotation_is_the_films(
    tmp_path: Path, bundle: Bundle, flag: str | None, expected: str | None
) -> None:
    assert write(tmp_path, bundle, BurnedInAnnotation=flag)["secondary-capture"].get("BurnedInAnnotation") == expected


def test_what_was_lossy_once_stays_so(tmp_path: Path, bundle: Bundle) -> None:
    for kind in ("secondary-capture", "parametric-map"):
        assert write(tmp_path, bundle)[kind].LossyImageCompression == "00"
        declared = write(
            tmp_path, bundle, LossyImageCompression="01", LossyImageCompressionRatio="12.5",
            LossyImageCompressionMethod="ISO_15444_1",
        )[kind]  # fmt: skip
        assert declared.LossyImageCompression == "01"
        assert float(declared.LossyImageCompressionRatio) == 12.5
        assert declared.LossyImageCompressionMethod == "ISO_15444_1"


def test_a_jpeg_is_lossy_whatever_its_header_says(tmp_path: Path, bundle: Bundle) -> None:
    film = dicom_film.film(LossyImageCompression=None)
    film.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.50"
    film.BitsAllocated = film.BitsStored = 8
    film.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8" + bytes(1000)])
    path = tmp_path / "film.dcm"
    film.save_as(path, enforce_file_format=True)
    written = writing.write_results(tmp_path / "out", path, dicom_film.result(bundle), bundle)
    dataset = pydicom.dcmread(written["secondary-capture"])
    assert dataset.LossyImageCompression == "01"
    assert dataset.LossyImageCompressionMethod == "ISO_10918_1"
    ratio = dicom_film.ROWS * dicom_film.COLUMNS / path.stat().st_size
    assert float(dataset.LossyImageCompressionRatio) == pytest.approx(ratio, abs=0.01)


# --- structured report -----------------------------------------------------------------------------------


def test_the_report_says_label_probabilities_and_that_nobody_verified_it(tmp_path: Path, bundle: Bundle) -> None:
    report = write(tmp_path, bundle)["structured-report"]
    assert report.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.34"
    assert report.VerificationFlag == "UNVERIFIED"
    assert report.PreliminaryFlag == "PRELIMINARY"
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    image, *regions = groups(report)
    assert len(regions) == 2
    assert concept(image["Finding"][0]) == ("SCT", "233604007")
    certainty = image["Certainty of Finding"][0]
    assert certainty.ConceptNameCodeSequence[0].CodeValue == "111012"
    assert value(certainty) == pytest.approx(87.6543)
    assert certainty.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue == "%"
    assert value(image["Probability of covid-19"][0]) == pytest.approx(10)
    assert sum(value(image[f"Probability of {name}"][0]) for name in bundle.classes) == pytest.approx(100, abs=1e-3)
    assert concept(image["Intended use"][0]) == ("99MAGSD", "research-use")
    assert concept(image["Status of the result"][0]) == ("99MAGSD", "status-ok")
    parameters = [item.TextValue for item in image["Algorithm Parameters"]]
    assert f"model sha256 {bundle.model_sha256}" in parameters
    assert image["Algorithm Name"][0].TextValue == bundle.name
    reference = report.CurrentRequestedProcedureEvidenceSequence[0]
    assert reference.StudyInstanceUID == "1.2.3.4.5"
    instance = reference.ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert instance.ReferencedSOPInstanceUID == "1.2.3.4.5.6.7"


def test_a_region_of_the_report_is_its_box_and_no_finding(tmp_path: Path, bundle: Bundle) -> None:
    result = dicom_film.result(bundle)
    _, *regions = groups(write(tmp_path, bundle, result)["structured-report"])
    for region, finding in zip(regions, result.prediction.findings, strict=True):
        assert concept(region["Finding"][0]) == ("99MAGSD", "attended-region")
        shape = region["Image Region"][0]
        points = np.array(shape.GraphicData).reshape(-1, 2)
        assert shape.GraphicType == "POLYLINE"
        assert points[0].tolist() == points[-1].tolist()
        assert [*points.min(axis=0), *points.max(axis=0)] == finding.box.to_list()
        assert shape.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "1.2.3.4.5.6.7"
        assert value(region["Peak attention in the region"][0]) == finding.score
        assert value(region["Share of the image"][0]) == pytest.approx(100 * finding.area_fraction)


def test_the_report_of_a_doubtful_film_says_why_and_which_decision(tmp_path: Path, bundle: Bundle) -> None:
    message = "the film is unlike those that the model was trained on, which goes on for more than 64 characters"
    result = dicom_film.result(
        bundle,
        status="review",
        reasons=(Reason("unlike_training", message),),
        decision=Decision("pneumonia", 0.87, "default", 0.5, True),
    )
    image = groups(write(tmp_path, bundle, result)["structured-report"])[0]
    assert concept(image["Status of the result"][0]) == ("99MAGSD", "status-review")
    assert concept(image["Decision at the operating point"][0]) == ("99MAGSD", "positive")
    reason = image["Reason for review"][0].ConceptCodeSequence[0].CodeMeaning
    assert reason == message[:61].rstrip() + "..."


@given(st.text(min_size=1, max_size=100))
def test_any_class_name_becomes_a_legal_code(name: str) -> None:
    for code in (concepts.class_code(name), concepts.class_probability_code(name), concepts.reason_code(name, name)):
        assert 0 < len(code.value) <= 16
        assert len(code.meaning) <= 64
        assert "\\" not in code.meaning
        assert code.meaning.isprintable()


def test_public_codes_are_those_of_the_standards_dictionary() -> None:
    """pydicom's dictionary is made from PS3.16; the five SNOMED CT concepts that it lacks are listed here."""
    from pydicom.sr import _concepts_dict

    known: dict[tuple[str, str], set[str]] = {}
    for scheme, by_keyword in _concepts_dict.concepts.items():
        for by_value in by_keyword.values():
            for number, (meaning, _) in by_value.items():
                known.setdefault((scheme, number), set()).add(meaning.lower())
    elsewhere = {"399208008", "233604007", "75570004", "53084003", "840539006"}
    constants = [item for item in vars(concepts).values() if isinstance(item, tuple) and len(item) == 3]
    for number, scheme, meaning in [*constants, *concepts._CLASSES.values()]:
        if number not in elsewhere:
            assert meaning.lower() in known[scheme, number]
    assert len(constants) > 7


def test_private_codes_are_marked_and_declared(tmp_path: Path, bundle: Bundle) -> None:
    for kind in ("structured-report", "parametric-map"):
        dataset = write(tmp_path, bundle)[kind]
        schemes = {e.value for e in dicom_film.items(dataset) if e.keyword == "CodingSchemeDesignator"}
        assert schemes <= {"DCM", "SCT", "UCUM", "RFC5646", "99MAGSD"}
        declared = [item.CodingSchemeDesignator for item in dataset.CodingSchemeIdentificationSequence]
        assert declared == ["99MAGSD"]


# --- presentation state ------------------------------------------------------------------------------------


def test_boxes_and_outlines_of_the_presentation_state_lie_where_the_regions_are(tmp_path: Path, bundle: Bundle) -> None:
    result = dicom_film.result(bundle)
    results = write(tmp_path, bundle, result)
    state = results["presentation-state"]
    (annotation,) = state.GraphicAnnotationSequence
    assert annotation.ReferencedImageSequence[0].ReferencedSOPInstanceUID == "1.2.3.4.5.6.7"
    by_region: dict[str, list[np.ndarray]] = {}
    for item in annotation.GraphicObjectSequence:
        assert (item.GraphicAnnotationUnits, item.GraphicType) == ("PIXEL", "POLYLINE")
        points = np.array(item.GraphicData).reshape(-1, 2)
        assert len(points) == item.NumberOfGraphicPoints
        assert points[0].tolist() == points[-1].tolist()
        by_region.setdefault(item.TrackingUID, []).append(points)
    report = groups(results["structured-report"])[1:]
    assert list(by_region) == [group["Tracking Unique Identifier"][0].UID for group in report]
    for (box, outline), finding in zip(by_region.values(), result.prediction.findings, strict=True):
        assert [*box.min(axis=0), *box.max(axis=0)] == finding.box.to_list()
        # The outline, filled by another rule than the one that made it, covers the hot pixels of its box
        x, y = np.meshgrid(np.arange(dicom_film.COLUMNS) + 0.5, np.arange(dicom_film.ROWS) + 0.5)
        filled = even_odd(outline, x, y)
        inside = (x > box[:, 0].min()) & (x < box[:, 0].max()) & (y > box[:, 1].min()) & (y < box[:, 1].max())
        hot = (dicom_film.heat() > 0.5) & inside
        overlap = (filled & hot).sum() / (filled | hot).sum()
        assert overlap > 0.85
    texts = [item.UnformattedTextValue for item in annotation.TextObjectSequence]
    assert texts[:2] == ["1", "2"]
    assert "pneumonia 87.7 %" in texts[2]
    assert "Research use only" in texts[2]


def even_odd(polygon: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie in a closed polygon, by the number of edges that a ray to the right crosses."""
    crossed = np.zeros(x.shape, int)
    for (x0, y0), (x1, y1) in pairwise(polygon):
        if y0 != y1:
            crosses = (y >= min(y0, y1)) & (y < max(y0, y1))
            crossed += crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return crossed % 2 == 1


@given(st.integers(0, 2**32 - 1))
def test_outlines_stay_in_their_box_and_are_short(seed: int) -> None:
    rng = np.random.default_rng(seed)
    noise = cv2.resize(rng.random((40, 40), np.float32), (200, 180), interpolation=cv2.INTER_CUBIC)
    box = Box(20, 30, 151, 140)
    for outline in presentation_state.region_outlines(noise > 0.5, box):
        assert len(outline) <= 501
        assert outline[:, 0].min() >= box.x0
        assert outline[:, 0].max() <= box.x1
        assert outline[:, 1].min() >= box.y0
        assert outline[:, 1].max() <= box.y1


def test_the_presentation_state_shows_the_films_own_greys(tmp_path: Path, bundle: Bundle) -> None:
    state = write(
        tmp_path, bundle, PhotometricInterpretation="MONOCHROME1", RescaleSlope="2", RescaleIntercept="-10",
        WindowCenter=["3000", "1"], WindowWidth=["5000", "2"], VOILUTFunction="SIGMOID",
    )["presentation-state"]  # fmt: skip
    assert (state.RescaleSlope, state.RescaleIntercept, state.RescaleType) == (2, -10, "US")
    (window,) = state.SoftcopyVOILUTSequence
    assert (window.WindowCenter, window.WindowWidth, window.VOILUTFunction) == (3000, 5000, "SIGMOID")
    assert state.PresentationLUTShape == "INVERSE"
    plain = write(tmp_path, bundle, WindowCenter=None, WindowWidth=None, RescaleSlope=None)["presentation-state"]
    assert "SoftcopyVOILUTSequence" not in plain
    assert "RescaleIntercept" not in plain
    assert plain.PresentationLUTShape == "IDENTITY"


def test_the_presentation_state_repeats_a_lookup_table_instead_of_the_window(tmp_path: Path, bundle: Bundle) -> None:
    """Without VRs in the file, only the film's Pixel Representation tells that the table begins at -2."""
    table = pydicom.Dataset()
    table.add_new(0x00283002, "SS", [4, -2, 16])
    table.add_new(0x00283006, "OW", np.array([0, 9, 99, 999], np.uint16).tobytes())
    film = dicom_film.film(PixelRepresentation=1, VOILUTSequence=[table])
    film.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2"
    path = tmp_path / "implicit.dcm"
    film.save_as(path, enforce_file_format=True)
    written = writing.write_results(tmp_path, path, dicom_film.result(bundle), bundle)
    (item,) = pydicom.dcmread(written["presentation-state"]).SoftcopyVOILUTSequence
    assert "WindowCenter" not in item
    assert item.VOILUTSequence[0]["LUTDescriptor"].VR == "SS"
    assert list(item.VOILUTSequence[0].LUTDescriptor) == [4, -2, 16]


def test_an_outline_runs_through_the_centres_of_the_outermost_pixels() -> None:
    heat = np.zeros((40, 60), np.float32)
    heat[10:20, 20:40] = 0.51
    heat[30:35, 50:55] = 0.9  # outside of the box
    (outline,) = presentation_state.region_outlines(heat > 0.5, Box(15, 5, 45, 25))
    assert sorted(map(tuple, outline[:-1])) == [(20.5, 10.5), (20.5, 19.5), (39.5, 10.5), (39.5, 19.5)]
    assert outline[0].tolist() == outline[-1].tolist()
    assert presentation_state.region_outlines(heat > 0.51, Box(15, 5, 45, 25)) == []


@pytest.mark.parametrize(
    ("film", "keyword", "expected"),
    [
        ({"PixelSpacing": [0.3, 0.1]}, "PresentationPixelSpacing", [0.3, 0.1]),
        ({}, "PresentationPixelSpacing", [0.2, 0.2]),
        ({"ImagerPixelSpacing": None}, "PresentationPixelAspectRatio", [1, 1]),
        ({"ImagerPixelSpacing": None, "PixelAspectRatio": [3, 2]}, "PresentationPixelAspectRatio", [3, 2]),
        ({"PixelSpacing": [0, 0]}, "PresentationPixelAspectRatio", [1, 1]),
    ],
)
def test_displayed_pixels_have_the_films_shape(
    tmp_path: Path, bundle: Bundle, film: dict[str, Any], keyword: str, expected: list[float]
) -> None:
    (area,) = write(tmp_path, bundle, **film)["presentation-state"].DisplayedAreaSelectionSequence
    assert list(area[keyword].value) == expected
    assert ("PresentationPixelSpacing" in area) != ("PresentationPixelAspectRatio" in area)
    assert list(area.DisplayedAreaBottomRightHandCorner) == [dicom_film.COLUMNS, dicom_film.ROWS]


def test_a_colour_film_and_one_without_regions_get_no_presentation_state(tmp_path: Path, bundle: Bundle) -> None:
    colour = write(tmp_path, bundle, PhotometricInterpretation="RGB", SamplesPerPixel=3)
    assert set(colour) == ALL - {"presentation-state"}
    assert set(write(tmp_path, bundle, dicom_film.result(bundle, findings=()))) == ALL - {"presentation-state"}


# --- parametric map --------------------------------------------------------------------------------------------


def test_the_parametric_map_gives_the_heat_back_pixel_by_pixel(tmp_path: Path, bundle: Bundle) -> None:
    dataset = write(tmp_path, bundle, PixelSpacing=[0.3, 0.1])["parametric-map"]
    shared, frame = dataset.SharedFunctionalGroupsSequence[0], dataset.PerFrameFunctionalGroupsSequence[0]
    mapping = shared.RealWorldValueMappingSequence[0]
    stored = dataset.pixel_array
    assert stored.shape == (dicom_film.ROWS, dicom_film.COLUMNS)
    assert (mapping.RealWorldValueFirstValueMapped, mapping.RealWorldValueLastValueMapped) == (0, 255)
    heat = stored * mapping.RealWorldValueSlope + mapping.RealWorldValueIntercept
    np.testing.assert_allclose(heat, dicom_film.heat(), rtol=0, atol=0.5 / 255 + 1e-6)
    source = frame.DerivationImageSequence[0].SourceImageSequence[0]
    assert source.ReferencedSOPInstanceUID == "1.2.3.4.5.6.7"
    assert source.SpatialLocationsPreserved == "YES"
    assert list(shared.PixelMeasuresSequence[0].PixelSpacing) == [0.3, 0.1]
    assert dataset.ContentQualification == "RESEARCH"
    assert dataset.FrameOfReferenceUID.startswith("2.25.")


@pytest.mark.parametrize("name", LOCALIZATION_MAPS)
def test_the_map_says_which_map_it_is(tmp_path: Path, bundle: Bundle, name: str) -> None:
    dataset = write(tmp_path, replace(bundle, localization={"map": name, "threshold": 0.5}))["parametric-map"]
    assert dataset.PerFrameFunctionalGroupsSequence[0].FrameContentSequence[0].FrameLabel == name
    mapping = dataset.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    assert mapping.LUTExplanation.startswith(f"{name}:")
    assert concept(mapping.QuantityDefinitionSequence[0]) == ("99MAGSD", name.split("-")[0])


def test_the_map_takes_the_films_frame_of_reference_and_no_spacing_of_the_detector(
    tmp_path: Path, bundle: Bundle
) -> None:
    dataset = write(tmp_path, bundle, FrameOfReferenceUID="1.9.8")["parametric-map"]
    assert dataset.FrameOfReferenceUID == "1.9.8"
    assert "PixelSpacing" not in dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]


# --- what is not written, and what goes wrong -------------------------------------------------------------------


def test_a_rejected_film_gets_the_overlay_alone_and_what_was_there_goes(tmp_path: Path, bundle: Bundle) -> None:
    assert set(write(tmp_path, bundle)) == ALL
    rejected = dicom_film.not_judged(bundle, "rejected", Reason("no_lungs", "no lungs"))
    assert set(write(tmp_path, bundle, rejected)) == {"secondary-capture"}
    assert [path.name.split("-2.25")[0] for path in (tmp_path / "out").iterdir()] == ["secondary-capture"]


def test_an_error_gets_nothing(tmp_path: Path, bundle: Bundle) -> None:
    assert write(tmp_path, bundle, dicom_film.not_judged(bundle, "error", Reason("fault", "x"))) == {}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("film", "words"),
    [
        ({"StudyInstanceUID": None}, "no valid StudyInstanceUID"),
        ({"SeriesInstanceUID": ""}, "no valid SeriesInstanceUID"),
        ({"StudyInstanceUID": "1.2." + "9" * 70}, "no valid StudyInstanceUID"),
        ({"Rows": 149}, "130 x 149 pixels, 130 x 150 were judged"),
        ({"Columns": None}, "no Rows and Columns"),
    ],
)
def test_a_header_that_does_not_do_is_refused(tmp_path: Path, bundle: Bundle, film: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        write(tmp_path, bundle, **film)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(500), bytes(128) + b"DICM", b"\x08\0\x05\0CS"])
def test_a_file_that_is_not_dicom_is_refused(tmp_path: Path, bundle: Bundle, content: bytes) -> None:
    path = tmp_path / "x.dcm"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="DICOM"):
        writing.write_results(tmp_path, path, dicom_film.result(bundle), bundle)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dicom_film.save(tmp_path)
    save_as = pydicom.Dataset.save_as
    count = iter(range(10))

    def fail_third(dataset: Any, *arguments: Any, **options: Any) -> None:
        if next(count) == 2:
            raise OSError(28, "No space left on device")
        save_as(dataset, *arguments, **options)

    monkeypatch.setattr(pydicom.Dataset, "save_as", fail_third)
    result = writing.add_results(tmp_path / "out", path, dicom_film.result(bundle), bundle)
    assert list((tmp_path / "out").iterdir()) == []
    (reason,) = result.prediction.reasons
    assert reason.code == "no_dicom_results"
    assert "No space left on device" in reason.message
    assert result.prediction.label == "pneumonia"


@contextmanager
def silence(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Fail if anything is logged, warned of or printed."""
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield
    captured = capfd.readouterr()
    assert [captured.out, captured.err, caplog.text, *(str(warning.message) for warning in warned)] == ["", "", ""]


def test_nothing_personal_is_logged_or_put_in_names_and_messages(
    tmp_path: Path,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Values that pydicom and highdicom warn of, with the value in the text."""
    odd = {"PatientSex": "4711X", "PatientName": "Müller, Jürgen (4711)", "PatientID": "PID-4711" * 12}
    odd |= {
        "SpecificCharacterSet": "ISO_IR 4711",
        "StudyDate": "4711",
        "PatientBirthDate": "19610203-4711",
        "AccessionNumber": "ACC77" * 9,
    }
    path = dicom_film.save(tmp_path, **odd)
    with silence(caplog, capfd):
        written = writing.write_results(tmp_path / "out", path, dicom_film.result(bundle), bundle)
    assert set(written) == ALL
    assert not any("4711" in file.name for file in written.values())

    def fail(case: Any) -> None:
        raise ValueError(f"bad name {case.source.header.PatientName}")

    monkeypatch.setattr("magsd_runtime.dicom_results.structured_report.structured_report", fail)
    with pytest.raises(MagsdError, match="structured-report could not be made") as caught:
        writing.write_results(tmp_path / "out", path, dicom_film.result(bundle), bundle)
    assert "4711" not in str(caught.value)
    with silence(caplog, capfd):
        done = writing.add_results(tmp_path / "out", path, dicom_film.result(bundle), bundle)
    assert [reason.code for reason in done.prediction.reasons] == ["dicom_failed"]
