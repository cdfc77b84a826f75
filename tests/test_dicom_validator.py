"""DICOM results judged by other people's tools: ``dciodvfy`` of dicom3tools, and DCMTK, which reads and shows them.

    apt-get install dicom3tools dcmtk

A test whose tool is not installed is skipped, or fails where MAGSD_NEEDS_DCIODVFY=1, as .ci/run sets it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import dicom_film
from magsd_runtime import shipped
from magsd_runtime.bundle import Bundle
from magsd_runtime.dicom_results import writing
from magsd_runtime.pipeline import Pipeline, Result
from magsd_runtime.prediction import Decision, Reason

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")

IODS = {
    "secondary-capture": "SCImage",
    "structured-report": "Comprehensive3DSR",
    "presentation-state": "GrayscaleSoftcopyPresentationState",
    "parametric-map": "ParametricMap",
}

# dciodvfy of Debian 12 (June 2022) asks for plane position and orientation of the patient and the plane position on a
# slide, all at once, in shared and in per-frame groups. Table A.75-2 of PS3.3 (2019a and later) asks for the first two
# in a frame of reference of the patient and for the third in one of a slide; a projection has neither.
_MISSING = "Error - </{group}[1]/{name}> - Missing attribute for Type 1 Required - Module=<{module}>"
FALSE_ERRORS = {
    "parametric-map": {
        _MISSING.format(group=group, name=name, module=module)
        for group in ("SharedFunctionalGroupsSequence(5200,9229)", "PerFrameFunctionalGroupsSequence(5200,9230)")
        for name, module in (
            ("PlanePositionSequence(0020,9113)", "PlanePositionMacro"),
            ("PlaneOrientationSequence(0020,9116)", "PlaneOrientationMacro"),
            ("PlanePositionSlideSequence(0048,021a)", "PlanePositionSlideMacro"),
        )
    }
}
FALSE_WARNINGS = (
    # a private coding scheme, which begins with 99 for that reason (PS3.3, 8.2)
    r".*Sequence\(.*/CodingSchemeDesignator\(0008,0102\)\[1\]> - Unrecognized defined term = <99MAGSD>",
    # a defined term may be extended; this one is what parametric maps of other makers have as value 4 as well
    r".*/(ImageType\(0008,0008\)|FrameType\(0008,9007\))\[4\]> - Unrecognized defined term = <QUANTITY>",
    # the film has none, and a result invents none
    r"Warning - </(PatientID|StudyDate|StudyTime|StudyID)\(.*\)> - Missing attribute or value that would be needed "
    r"to build DICOMDIR",
    # a name of one component, as de-identified films have: the film's own, repeated
    r"Warning - </PatientName\(0010,0010\)\[1\]> - Value dubious for this VR \[PN\] = <.*> - Retired Person Name form",
)


def tool(name: str) -> str:
    """The path of another people's tool."""
    path = shutil.which(name)
    if path is None:
        missing = f"{name} is not installed: apt-get install dicom3tools dcmtk"
        if os.environ.get("MAGSD_NEEDS_DCIODVFY") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    return path


def run(name: str, *arguments: Any) -> str:
    """What it printed; fails unless it ends with 0."""
    command = [tool(name), *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, timeout=60)
    assert process.returncode == 0, process.stderr
    return process.stdout.decode()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return dicom_film.bundle(tmp_path_factory.mktemp("bundle") / "b")


def lookup_table(first: int, bits: int) -> Any:
    item = pydicom.Dataset()
    item.LUTDescriptor = [4096, first, bits]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = np.linspace(0, 2**bits - 1, 4096).astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    item.ModalityLUTType = "US"
    return item


def doubtful(bundle: Bundle) -> Result:
    """All that a prediction can have."""
    decision = Decision("pneumonia", 0.87, "default", 0.5, True)
    reasons = (Reason("unlike_training", "unlike the training films"), Reason("unusual_view", "oblique"))
    return dicom_film.result(bundle, status="review", reasons=reasons, decision=decision)


def rejected(bundle: Bundle) -> Result:
    return dicom_film.not_judged(bundle, "rejected", Reason("no_lungs", "no lungs were found in the image"))


def without_regions(bundle: Bundle) -> Result:
    return dicom_film.result(bundle, findings=())


def voi() -> Any:
    item = lookup_table(0, 16)
    del item.ModalityLUTType
    return item


NOTHING: dict[str, Any] = dict.fromkeys((
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName", "Manufacturer", "SeriesNumber", "InstanceNumber", "BodyPartExamined",
    "ImagerPixelSpacing", "PatientOrientation", "BurnedInAnnotation", "WindowCenter", "WindowWidth", "RescaleType",
    "RescaleSlope", "RescaleIntercept", "PresentationLUTShape", "LossyImageCompression", "SpecificCharacterSet",
))  # fmt: skip
Make = Callable[[Bundle], Result]
CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "dx": (doubtful, {}),
    "cr": (doubtful, {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1", "Modality": "CR", "ImagerPixelSpacing": None,
        "PixelSpacing": [0.168, 0.168], "PatientOrientation": None, "BurnedInAnnotation": None,
        "PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE",
    }),
    "sc": (doubtful, {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Modality": "OT", "BodyPartExamined": None,
        "LossyImageCompression": "01", "PixelSpacing": [1, 1],
    }),
    "lossy": (doubtful, {
        "LossyImageCompression": "01", "LossyImageCompressionRatio": "12.5",
        "LossyImageCompressionMethod": "ISO_15444_1", "BurnedInAnnotation": "YES",
    }),
    "tables": (doubtful, {
        "ModalityLUTSequence": lambda: [lookup_table(0, 16)], "VOILUTSequence": lambda: [voi()],
        "RescaleSlope": None, "RescaleIntercept": None, "RescaleType": None, "WindowCenter": None, "WindowWidth": None,
    }),
    "sigmoid and two windows": (doubtful, {
        "VOILUTFunction": "SIGMOID", "WindowCenter": [2000, 100], "WindowWidth": [3000, 50],
    }),
    "pixels that are not square": (doubtful, {"ImagerPixelSpacing": None, "PixelAspectRatio": [2, 1]}),
    "kanji": (doubtful, {
        "SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう",
        "TimezoneOffsetFromUTC": "+0900",
    }),
    "nothing": (doubtful, NOTHING),
    "rejected": (rejected, {}),
    "no regions": (without_regions, {}),
    "colour": (doubtful, {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(CASES))
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bundle: Bundle
) -> dict[str, Path]:
    """The film's path and its results', by kind."""
    make, attributes = CASES[request.param]
    folder = tmp_path_factory.mktemp("film")
    path = dicom_film.save(folder, **{name: v() if callable(v) else v for name, v in attributes.items()})
    results = writing.write_results(folder / "out", path, make(bundle), bundle, when=dicom_film.WHEN)
    expected = set(IODS)
    if request.param == "rejected":
        expected = {"secondary-capture"}
    elif request.param in ("no regions", "colour"):
        expected -= {"presentation-state"}
    assert set(results) == expected
    return {"film": path, **results}


def complaints(path: Path, kind: str) -> list[str]:
    """What dciodvfy has against an object, less what is known to be false."""
    # With -new each line names the place; it complains by its exit code too, of the same things
    process = subprocess.run([tool("dciodvfy"), "-new", str(path)], capture_output=True, timeout=60)
    lines = (process.stdout + process.stderr).decode("utf-8", "replace").splitlines()
    assert IODS[kind] in lines, f"dciodvfy took it for something else: {lines[:3]}"
    known = FALSE_ERRORS.get(kind, set())
    others = [line for line in lines if line not in known and line != IODS[kind]]
    return [line for line in others if not any(re.fullmatch(pattern, line) for pattern in FALSE_WARNINGS)]


def test_dciodvfy_has_nothing_to_say(written: dict[str, Path]) -> None:
    found = {kind: complaints(path, kind) for kind, path in written.items() if kind != "film"}
    assert found == {kind: [] for kind in found}


def test_dciodvfy_would_say_it(written: dict[str, Path], tmp_path: Path) -> None:
    """An object that is wrong on purpose: a tool that finds nothing in anything would prove nothing."""
    dataset = pydicom.dcmread(written["secondary-capture"])
    del dataset.ConversionType
    dataset.PatientSex = "Z"
    dataset.save_as(tmp_path / "wrong.dcm")
    found = "\n".join(complaints(tmp_path / "wrong.dcm", "secondary-capture"))
    assert "ConversionType" in found
    assert "PatientSex" in found


def test_pydicom_reads_every_value_strictly(written: dict[str, Path]) -> None:
    """Its own validation, which else only warns, raises."""
    from pydicom.config import RAISE, settings

    before = settings.reading_validation_mode
    settings.reading_validation_mode = RAISE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for kind, path in written.items():
                if kind != "film":
                    assert sum(1 for _ in dicom_film.items(pydicom.dcmread(path))) > 40
    finally:
        settings.reading_validation_mode = before


@pytest.mark.data
@pytest.mark.parametrize("name", ["1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm", "Fake_MONOHR1.dcm"])
def test_dciodvfy_has_nothing_to_say_of_the_results_of_real_films(cxr: Path, tmp_path: Path, name: str) -> None:
    path = cxr / "originals" / name
    with Pipeline.open(shipped.choose_bundle(None), "cpu", threads=1) as pipeline:
        written = writing.write_results(tmp_path, path, pipeline.predict(path), pipeline.bundle)
    assert "secondary-capture" in written
    found = {kind: complaints(result, kind) for kind, result in written.items()}
    assert found == {kind: [] for kind in found}


# --- DCMTK -----------------------------------------------------------------------------------------


def test_dsrdump_reads_the_report(written: dict[str, Path]) -> None:
    if "structured-report" not in written:
        return
    dump = run("dsrdump", "+Pl", written["structured-report"])
    for words in ("UNVERIFIED", "PRELIMINARY", '"87.6543" (%,UCUM,"Percent")', '(233604007,SCT,"Pneumonia")'):
        assert words in dump, words
    report = pydicom.dcmread(written["structured-report"])
    shapes = sum(element.keyword == "GraphicType" for element in dicom_film.items(report))
    assert dump.count("=(POLYLINE,") == shapes
    assert ("(POLYLINE,16/51,65/51,65/100,16/100,16/51)" in dump) == (shapes > 0)


def test_dcmpschk_passes_the_presentation_state(written: dict[str, Path]) -> None:
    name = pydicom.dcmread(written["film"]).get("PatientName")
    # 3.6.7 knows no name in UTF-8 that has ideographs, and takes an empty one for an error; it is of type 2
    if "presentation-state" not in written or not name or name.ideographic:
        return
    process = subprocess.run([tool("dcmpschk"), str(written["presentation-state"])], capture_output=True, timeout=60)
    said = (process.stdout + process.stderr).decode()
    assert "Test passed." in said
    assert not [line for line in said.splitlines() if line.startswith(("E:", "F:"))]


def test_dcmtk_shows_the_film_through_the_presentation_state_as_its_window_says(
    written: dict[str, Path], tmp_path: Path
) -> None:
    film = pydicom.dcmread(written["film"])
    linear = film.get("WindowCenter") == 2048 and film.get("VOILUTFunction") in (None, "LINEAR")
    if "presentation-state" not in written or not linear or "PixelAspectRatio" in film:
        return
    run("dcmp2pgm", "-p", written["presentation-state"], written["film"], tmp_path / "shown.pgm")
    shown = cv2.imread(str(tmp_path / "shown.pgm"), cv2.IMREAD_GRAYSCALE)
    assert shown is not None
    # PS3.3, C.11.2.1.2.1, for the film's window of 4096 around 2048
    expected = np.clip((film.pixel_array - 2047.5) / 4095 + 0.5, 0, 1) * 255
    if film.PhotometricInterpretation == "MONOCHROME1":
        expected = 255 - expected
    assert np.abs(shown - expected).max() < 2


def test_dcmtk_decodes_overlay_and_map(written: dict[str, Path], tmp_path: Path) -> None:
    run("dcm2pnm", written["secondary-capture"], tmp_path / "overlay.ppm")
    picture = cv2.imread(str(tmp_path / "overlay.ppm"))
    assert picture is not None
    np.testing.assert_array_equal(picture[..., ::-1], pydicom.dcmread(written["secondary-capture"]).pixel_array)
    if "parametric-map" in written:
        run("dcmdrle", written["parametric-map"], tmp_path / "map.dcm")
        heat = dicom_film.heat()
        stored = np.frombuffer(pydicom.dcmread(tmp_path / "map.dcm").PixelData, "<u2")[: heat.size]
        np.testing.assert_allclose(stored.reshape(heat.shape) / 255, heat, atol=0.5 / 255 + 1e-6)


# --- the tools themselves --------------------------------------------------------------------------


def test_a_missing_tool_is_a_skip_here_and_a_failure_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("MAGSD_NEEDS_DCIODVFY", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install dicom3tools"):
        tool("dciodvfy")
    monkeypatch.setenv("MAGSD_NEEDS_DCIODVFY", "1")
    with pytest.raises(pytest.fail.Exception, match="dciodvfy is not installed"):
        tool("dciodvfy")
