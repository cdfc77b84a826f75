"""What a DICOM header says against judging a film: facts of :mod:`tags` -> ok, review or rejected, with reasons.

A header is often wrong, and mostly by what is left out: what a film does not say is held against it only where
nothing else could know (which kind of image it is). docs/dicom.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..acceptance import Judgement, Severity, worst
from ..errors import UsageError
from ..fields import Unusable, number
from ..prediction import Reason
from ..rule_choices import SEVERITIES, read_choices

DEFAULT_SEVERITIES: Mapping[str, Severity] = MappingProxyType(
    {
        "own_result": "rejected",
        "wrong_modality": "rejected",
        "unusual_modality": "review",
        "not_chest": "rejected",
        "unclear_body_part": "review",
        "lateral_view": "rejected",
        "unusual_view": "review",
        "too_young": "review",
        "burned_in_annotation": "review",
        "derived_image": "review",
        "for_processing": "review",
        "contradictory_polarity": "review",
    }
)

_FILM_MODALITIES = ("CR", "DX", "RG")  # RG: a film on paper, digitized
_MAYBE_FILM = ("OT", "RF", "XA", "SC")

# PS3.16, annex L, and what else stands for it; words are looked for within the value
_CHEST = ("CHEST", "THORAX", "TORAX", "LUNG", "HEART")
_BESIDE_CHEST = (
    "RIB", "STERNUM", "CLAVICLE", "SCAPULA", "SHOULDER", "TSPINE", "THORACIC", "ABDOMEN", "ABDOM", "TRUNK",
    "BODY", "UPRTRACT", "ESOPHAGUS", "MEDIASTINUM", "DIAPHRAGM",
)  # fmt: skip
_ELSEWHERE = (
    "SKULL", "HEAD", "JAW", "MANDIBLE", "MAXILLA", "SINUS", "ORBIT", "FACE", "NOSE", "TEETH", "NECK", "CSPINE",
    "CERVICAL", "LSPINE", "LUMBAR", "SSPINE", "SACRUM", "COCCYX", "PELVIS", "HIP", "BREAST", "ARM", "HUMERUS", "ELBOW",
    "FOREARM", "WRIST", "HAND", "FINGER", "THUMB", "LEG", "FEMUR", "THIGH", "KNEE", "PATELLA", "TIBIA", "ANKLE",
    "FOOT", "TOE", "CALCANEUS", "EXTREMITY", "BLADDER", "KIDNEY", "COLON",
)  # fmt: skip
_OTHER_PARTS_IN_VIEW = ("ABD", "PELV", "NECK", "SPINE")

_LATERAL = ("LL", "RL", "LAT", "LATERAL", "LLAT", "RLAT", "L LAT", "R LAT", "LEFT LATERAL", "RIGHT LATERAL")
_LATERAL_CODES = frozenset(  # PS3.16, CID 4010: lateral, left lateral, right lateral
    f"{scheme}:{code}"
    for scheme, codes in {
        "SCT": ("399067008", "399173006", "399198007"),
        "SRT": ("R-102CD", "R-10236", "R-10232"),
        "SNM3": ("R-102CD", "R-10236", "R-10232"),
    }.items()
    for code in codes
)
_UNUSUAL_VIEWS = ("LLD", "RLD", "LLO", "RLO", "LAO", "RAO", "LPO", "RPO", "OBL", "DECUB", "LORD", "AXIAL")


@dataclass(frozen=True)
class Rules:
    """``severity`` of each code of :data:`DEFAULT_SEVERITIES` (``ok`` switches it off); a patient younger than
    ``minimum_age`` years has the code ``too_young``."""

    minimum_age: float = 18.0
    severity: Mapping[str, Severity] = field(default_factory=lambda: dict(DEFAULT_SEVERITIES))

    @classmethod
    def from_dict(cls, record: Any) -> Rules:
        """``{"minimum_age": years, "severity": {code: ok, review or rejected}}``, each part optional.

        Raises
        ------
        UsageError
            If a field, code or severity is unknown, or the age senseless.
        """
        if not isinstance(record, dict) or set(record) - {"minimum_age", "severity"}:
            raise UsageError("rules: expected an object with minimum_age and severity")
        try:
            age = number({"minimum_age": cls.minimum_age, **record}, "minimum_age")
        except Unusable as error:
            raise UsageError(f"rules: {error}") from error
        if not 0 <= age <= 150:
            raise UsageError(f"rules: minimum_age is {age:g}, expected years from 0 to 150")
        chosen = read_choices(record.get("severity", {}), dict.fromkeys(DEFAULT_SEVERITIES, SEVERITIES), "severity")
        return cls(age, {**DEFAULT_SEVERITIES, **chosen})


def judge(facts: Mapping[str, Any] | None, rules: Rules | None = None) -> Judgement:
    """Judge the facts of one film; ok for a film that is not DICOM (None). Messages quote code strings alone."""
    rules = rules or Rules()
    if facts is None:
        return Judgement("ok", {})
    found = [
        Reason(code, message)
        for check in _CHECKS
        for code, message in check(facts, rules)
        if rules.severity[code] != "ok"
    ]
    return Judgement(worst(rules.severity[reason.code] for reason in found), {}, tuple(found))


Found = Iterator[tuple[str, str]]


def _own_result(facts: Mapping[str, Any], _: Rules) -> Found:
    if (facts["manufacturer"] or "").casefold() == "magsd":
        yield "own_result", "the image is a result of magsd, not a film"


def _modality(facts: Mapping[str, Any], _: Rules) -> Found:
    modality = facts["modality"]
    if modality in _FILM_MODALITIES:
        return
    if modality is None or modality in _MAYBE_FILM:
        named = "no modality" if modality is None else f"the modality {modality}"
        yield "unusual_modality", f"the header gives {named}, expected CR or DX: is it a plain chest film?"
    else:
        yield "wrong_modality", f"the modality is {modality}, expected CR or DX"


def _body_part(facts: Mapping[str, Any], _: Rules) -> Found:
    part = facts["body_part"]
    if part is None:
        return
    if any(word in part for word in _CHEST):
        if any(word in part for word in _OTHER_PARTS_IN_VIEW):
            yield "unclear_body_part", f"the body part is {part}: more than a chest in view?"
    elif any(word in part for word in _BESIDE_CHEST) or not any(word in part for word in _ELSEWHERE):
        yield "unclear_body_part", "the header names another body part than the chest: is it a chest film?"
    else:
        yield "not_chest", "the header names a body part that is not the chest"


def _view(facts: Mapping[str, Any], _: Rules) -> Found:
    view = facts["view_position"] or ""
    if view in _LATERAL or view.startswith("LATERAL") or _LATERAL_CODES & set(facts["view_codes"]):
        yield "lateral_view", "the header says that it is a lateral view: a frontal one is needed"
    elif view.startswith(_UNUSUAL_VIEWS):
        yield "unusual_view", "the header says that the view is oblique, decubitus or lordotic, not plainly frontal"
    elif not view.startswith(("AP", "PA")) and (facts["patient_orientation"] or [""])[0][:1] in ("A", "P"):
        # Rows that run to the patient's front or back; some devices always say so, so a stated AP or PA outweighs it
        yield "unusual_view", "the patient's orientation in the header is that of a lateral view"


def _age(facts: Mapping[str, Any], rules: Rules) -> Found:
    age = facts["age_years"]
    if age is not None and age < rules.minimum_age:
        yield "too_young", f"the patient is {age:g} years old, younger than {rules.minimum_age:g}"


def _burned_in(facts: Mapping[str, Any], _: Rules) -> Found:
    if facts["burned_in_annotation"] == "YES":
        yield "burned_in_annotation", "text is burned into the image: it may sway the network, or name the patient"


def _derived(facts: Mapping[str, Any], _: Rules) -> Found:
    if facts["image_type"][:2] == ["DERIVED", "SECONDARY"]:
        yield "derived_image", "the image was derived from another one, after the examination"


def _for_processing(facts: Mapping[str, Any], _: Rules) -> Found:
    if facts["presentation_intent"] == "FOR PROCESSING" or facts["sop_class"] == "DX for processing":
        yield "for_processing", "the image is for processing, not for presentation: it looks unlike a finished film"


def _polarity(facts: Mapping[str, Any], _: Rules) -> Found:
    said = (facts["photometric_interpretation"], facts["presentation_lut_shape"])
    if said in (("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE")):
        yield (
            "contradictory_polarity",
            f"{said[0]} and a presentation LUT shape of {said[1]} contradict each other: is bone bright?",
        )


_CHECKS: tuple[Callable[[Mapping[str, Any], Rules], Found], ...] = (
    _own_result, _modality, _body_part, _view, _age, _burned_in, _derived, _for_processing, _polarity,
)  # fmt: skip
