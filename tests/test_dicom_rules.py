"""Facts of a header, and what they say against judging the film: each rule on both of its sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny_bundle
from dicom_film import NAME, film, save
from magsd_runtime.acceptance import Judgement, combined, worst
from magsd_runtime.dicom.parsing import quiet
from magsd_runtime.dicom.rules import DEFAULT_SEVERITIES, Rules, judge
from magsd_runtime.dicom.tags import age_years, facts
from magsd_runtime.errors import UsageError
from magsd_runtime.images import read_radiograph
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.prediction import Reason
from magsd_runtime.site_rules import SiteRules

pytest.importorskip("pydicom")

SC = "1.2.840.10008.5.1.4.1.1.7"
FOR_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.1.1"


def facts_of(**attributes: Any) -> dict[str, Any]:
    with quiet():
        return facts(film(**attributes))


def codes_of(rules: Rules | None = None, **attributes: Any) -> list[str]:
    return [reason.code for reason in judge(facts_of(**attributes), rules).reasons]


def code_item(scheme: str, value: str) -> Any:
    from pydicom import Dataset

    item = Dataset()
    item.CodingSchemeDesignator, item.CodeValue, item.CodeMeaning = scheme, value, "said"
    return [item]


# ---------------------------------------------------------------- facts


def test_the_facts() -> None:
    found = facts_of(
        ImageType=["DERIVED", "PRIMARY"], ViewPosition="PA", BurnedInAnnotation="NO", ManufacturerModelName="X 1",
        ViewCodeSequence=code_item("SCT", "272479007"), AnatomicRegionSequence=code_item("SCT", "816094009"),
        ImageLaterality="U", LossyImageCompression="01",
    )  # fmt: skip
    assert found == {
        "sop_class": "DX",
        "modality": "DX",
        "presentation_intent": "FOR PRESENTATION",
        "image_type": ["DERIVED", "PRIMARY"],
        "view_position": "PA",
        "view_codes": ["SCT:272479007"],
        "patient_orientation": ["L", "F"],
        "laterality": "U",
        "body_part": "CHEST",
        "region_codes": ["SCT:816094009"],
        "age_years": 63,
        "sex": "M",
        "burned_in_annotation": "NO",
        "lossy": True,
        "photometric_interpretation": "MONOCHROME2",
        "presentation_lut_shape": "IDENTITY",
        "manufacturer": "Maker",
        "device": "X 1",
        "pixel_spacing_mm": [0.2, 0.2],
        "spacing_at": "detector",
    }


def test_an_empty_header_has_no_facts_and_raises_nothing() -> None:
    from pydicom import Dataset

    found = facts(Dataset())
    assert all(value in (None, []) for value in found.values())
    assert judge(found).status == "review"  # what kind of image it is, nobody says


@pytest.mark.parametrize(
    ("age", "born", "expected"),
    [
        ("063Y", None, 63),
        ("9Y", None, 9),
        ("018M", None, 1.5),
        ("030M", None, 2),
        ("004W", None, 0.08),
        ("010D", None, 0.03),
        ("000Y", None, 0),
        ("095Y", None, 90),
        (None, "19610203", 63),
        (None, "19610103", 63),
        (None, "19610102", 64),
        (None, "20230102", 2),
        (None, "20260102", None),  # born after the examination
        (None, "19010101", None),
        (None, "", None),
        ("63", "", None),
        ("999Y", None, None),
        (NAME, "", None),
    ],
)
def test_age(age: str | None, born: str | None, expected: float | None) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = film(PatientAge=age, PatientBirthDate=born, StudyDate="20250102")
    with quiet():
        assert age_years(dataset) == expected


# ---------------------------------------------------------------- rules, both sides

FINE: list[dict[str, Any]] = [
    {},
    {"Modality": "CR"},
    {"Modality": "RG", "SOPClassUID": SC, "PresentationIntentType": None},
    {"BodyPartExamined": None},
    {"BodyPartExamined": "PORT CHEST"},
    {"BodyPartExamined": "THORAX"},
    {"ViewPosition": "AP"},
    {"ViewPosition": "PA", "PatientOrientation": ["A", "F"]},
    {"ViewPosition": None},
    {"ViewCodeSequence": code_item("SCT", "399348003")},
    {"PatientAge": "018Y"},
    {"PatientAge": None, "PatientBirthDate": ""},
    {"BurnedInAnnotation": None},
    {"ImageType": ["DERIVED", "PRIMARY"]},
    {"ImageType": ["ORIGINAL", "PRIMARY", ""]},
    {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": None},
]
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("own_result", {"Manufacturer": "magsd"}),
    ("wrong_modality", {"Modality": "CT"}),
    ("wrong_modality", {"Modality": "MG"}),
    ("unusual_modality", {"Modality": "OT"}),
    ("unusual_modality", {"Modality": None}),
    ("unusual_modality", {"Modality": "RF"}),
    ("not_chest", {"BodyPartExamined": "HAND"}),
    ("not_chest", {"BodyPartExamined": "LSPINE"}),
    ("unclear_body_part", {"BodyPartExamined": "ABDOMEN"}),
    ("unclear_body_part", {"BodyPartExamined": "CHESTABDOMEN"}),
    ("unclear_body_part", {"BodyPartExamined": "PROGRAM 7"}),
    ("lateral_view", {"ViewPosition": "LL"}),
    ("lateral_view", {"ViewPosition": "LATERAL"}),
    ("lateral_view", {"ViewCodeSequence": code_item("SCT", "399067008")}),
    ("lateral_view", {"ViewCodeSequence": code_item("SRT", "R-10236")}),
    ("unusual_view", {"ViewPosition": "LLD"}),
    ("unusual_view", {"ViewPosition": "RAO"}),
    ("unusual_view", {"PatientOrientation": ["A", "F"]}),
    ("too_young", {"PatientAge": "017Y"}),
    ("too_young", {"PatientAge": "003D"}),
    ("too_young", {"PatientAge": None, "PatientBirthDate": "20240101"}),
    ("burned_in_annotation", {"BurnedInAnnotation": "YES"}),
    ("derived_image", {"ImageType": ["DERIVED", "SECONDARY"]}),
    ("for_processing", {"SOPClassUID": FOR_PROCESSING}),
    ("for_processing", {"PresentationIntentType": "FOR PROCESSING"}),
    ("contradictory_polarity", {"PresentationLUTShape": "INVERSE"}),
    ("contradictory_polarity", {"PhotometricInterpretation": "MONOCHROME1"}),
]


@pytest.mark.parametrize("attributes", FINE, ids=str)
def test_films_without_a_reason(attributes: dict[str, Any]) -> None:
    judgement = judge(facts_of(**attributes))
    assert (judgement.status, judgement.reasons) == ("ok", ())


@pytest.mark.parametrize(("code", "attributes"), WRONG, ids=str)
def test_films_with_one(code: str, attributes: dict[str, Any]) -> None:
    judgement = judge(facts_of(**attributes))
    assert [reason.code for reason in judgement.reasons] == [code]
    assert judgement.status == DEFAULT_SEVERITIES[code]
    off = Rules(severity={**DEFAULT_SEVERITIES, code: "ok"})
    assert judge(facts_of(**attributes), off) == Judgement("ok", {})


def test_every_code_is_tested() -> None:
    assert {code for code, _ in WRONG} == set(DEFAULT_SEVERITIES)


def test_the_gravest_reason_decides_and_all_are_given() -> None:
    judgement = judge(facts_of(PatientAge="003Y", ViewPosition="LL", BurnedInAnnotation="YES"))
    assert judgement.status == "rejected"
    assert [reason.code for reason in judgement.reasons] == ["lateral_view", "too_young", "burned_in_annotation"]
    assert judge(None).status == "ok"


# ---------------------------------------------------------------- merging and settings


def test_judgements_are_merged() -> None:
    assert worst([]) == "ok"
    assert worst(["ok", "rejected", "review"]) == "rejected"
    one = Judgement("review", {}, (Reason("too_young", "a"),))
    two = Judgement("ok", {"image": 0.5})
    assert combined(one, two) == Judgement("review", {"image": 0.5}, (Reason("too_young", "a"),))
    assert combined(two) == two


def test_rules_of_a_site() -> None:
    rules = Rules.from_dict({"minimum_age": 5, "severity": {"burned_in_annotation": "rejected"}})
    assert codes_of(rules, PatientAge="010Y") == []
    assert codes_of(rules, PatientAge="004Y") == ["too_young"]
    assert judge(facts_of(BurnedInAnnotation="YES"), rules).status == "rejected"
    assert Rules.from_dict({}) == Rules()


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ([], "expected an object"),
        ({"age": 3}, "expected an object with minimum_age and severity"),
        ({"minimum_age": "x"}, "minimum_age is a str"),
        ({"minimum_age": True}, "minimum_age"),
        ({"minimum_age": -1}, "0 to 150"),
        ({"severity": []}, "severity is no object"),
        ({"severity": {"too_old": "ok"}}, "'too_old' is no code"),
        ({"severity": {"too_young": "error"}}, "expected ok, review or rejected"),
    ],
)
def test_senseless_rules(record: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Rules.from_dict(record)


# ---------------------------------------------------------------- in the pipeline


def test_the_pipeline_merges_them_with_the_rest(tmp_path: Path) -> None:
    with Pipeline.open(tiny_bundle.build(tmp_path / "bundle")) as pipeline:
        fine = pipeline.predict(save(tmp_path)).prediction
        assert (fine.status, fine.reasons) == ("ok", ())
        assert fine.image["dicom"]["age_years"] == 63
        flagged = pipeline.predict(save(tmp_path, PatientAge="004Y")).prediction
        assert flagged.status == "review"
        assert [reason.code for reason in flagged.reasons] == ["too_young"]
        assert flagged.label == fine.label
        rejected = pipeline.predict(save(tmp_path, ViewPosition="LL", PatientAge="004Y"))
        assert (rejected.prediction.status, rejected.prediction.label) == ("rejected", None)
        assert [reason.code for reason in rejected.prediction.reasons] == ["lateral_view", "too_young"]
        assert rejected.radiograph is not None
        own = Pipeline(pipeline.bundle, pipeline.backend, rules=SiteRules(header=Rules(minimum_age=2)))
        assert own.predict(save(tmp_path, PatientAge="004Y")).prediction.status == "ok"


def test_our_own_results_are_refused(tmp_path: Path) -> None:
    """What --dicom-out writes comes back from the archive sooner or later."""
    pytest.importorskip("highdicom")
    from magsd_runtime.dicom_results.writing import write_results

    path = save(tmp_path)
    with Pipeline.open(tiny_bundle.build(tmp_path / "bundle")) as pipeline:
        written = write_results(tmp_path / "out", path, pipeline.predict(path), pipeline.bundle)
        again = pipeline.predict(written["secondary-capture"]).prediction
        assert again.status == "rejected"
        assert again.reasons[0].code == "own_result"
        others = {kind: pipeline.predict(file).prediction for kind, file in written.items()}
    assert {one.status for kind, one in others.items() if kind != "secondary-capture"} == {"error"}
    assert "of the kind" in others["structured-report"].reasons[0].message


@pytest.mark.data
def test_the_real_dicom_files_are_accepted(cxr: Path) -> None:
    for path in sorted((cxr / "originals").glob("*.dcm")):
        assert judge(read_radiograph(path).source["dicom"]) == Judgement("ok", {})
