"""All rules that a site may set, in one file: header, pixels, what the model's own checks may do, unsure answers.

    {"schema": "magsd.rules/1",
     "header": {"minimum_age": 5, "severity": {"derived_image": "ok"}},
     "pixels": {"severity": {"tiny": "rejected"}, "limits": {"tiny_side": 300}},
     "model":  {"unlike_training": "rejected", "no_lungs": "review"},
     "uncertainty": {"near_threshold": "ok", "unsure": "review"}}

Each part is optional; what is left out keeps its default. ``magsd infer --print-rules`` prints a whole file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import pixel_rules
from .acceptance import Judgement, Severity, combined, unlike_training
from .dicom.rules import Rules
from .errors import UsageError
from .images import Radiograph, has_contrast
from .pixel_rules import PixelRules
from .prediction import Reason
from .preprocessing import Framing
from .rule_choices import read_choices, short
from .uncertainty import UncertaintyRules

RULES_SCHEMA = "magsd.rules/1"
MODEL_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"unlike_training": ("by_score", "review", "rejected"), "no_lungs": ("review", "rejected")}
)
"""What may be said of each; ``by_score``: as the bundle's two limits say. ``ok`` is none of them: what the model
cannot be expected to judge is never accepted silently."""

_LARGEST = 1 << 20  # bytes of a rules file
_NO_CONTRAST = Reason("no_contrast", "the image has one grey value only: there is nothing to judge")
_NO_LUNGS = Reason("no_lungs", "no lungs were found in the image: a frontal chest film is needed, upright")


@dataclass(frozen=True)
class SiteRules:
    """``header``: rules on a DICOM header; ``pixels``: rules on pixels; ``unlike_training``, ``no_lungs``: one of
    :data:`MODEL_CHOICES`; ``uncertainty``: whether answers that are not sure are for review."""

    header: Rules = field(default_factory=Rules)
    pixels: PixelRules = field(default_factory=PixelRules)
    unlike_training: str = "by_score"
    no_lungs: Severity = "rejected"
    uncertainty: UncertaintyRules = field(default_factory=UncertaintyRules)

    @classmethod
    def from_dict(cls, record: Any) -> SiteRules:
        """The rules of a file's content, see the module.

        Raises
        ------
        UsageError
            One line: which field, code, severity or limit is unknown or senseless.
        """
        if not isinstance(record, dict):
            raise UsageError("rules: expected an object with schema, header, pixels and model")
        if record.get("schema") != RULES_SCHEMA:
            raise UsageError(f"rules: schema is {short(record.get('schema'))}, expected {RULES_SCHEMA!r}")
        if unknown := set(record) - {"schema", "header", "pixels", "model", "uncertainty"}:
            raise UsageError(f"rules: {short(min(unknown))} is no part, expected header, pixels, model or uncertainty")
        model = record.get("model", {})
        if isinstance(model, dict) and "no_contrast" in model:
            raise UsageError("rules: no_contrast cannot be set: an image of one grey value is always rejected")
        return cls(
            header=Rules.from_dict(record.get("header", {})),
            pixels=PixelRules.from_dict(record.get("pixels", {})),
            uncertainty=UncertaintyRules.from_dict(record.get("uncertainty", {})),
            **read_choices(model, MODEL_CHOICES, "model"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The whole file, with every default."""
        return {
            "schema": RULES_SCHEMA,
            "header": {"minimum_age": self.header.minimum_age, "severity": dict(self.header.severity)},
            "pixels": self.pixels.to_dict(),
            "model": {name: getattr(self, name) for name in MODEL_CHOICES},
            "uncertainty": self.uncertainty.to_dict(),
        }

    def sha256(self) -> str:
        """Hash of :meth:`to_dict` as canonical JSON: of what the rules are, not of how a file puts them."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def judge_film(
        self, radiograph: Radiograph, framing: Framing, standardized: NDArray[np.uint8]
    ) -> tuple[Judgement, bool]:
        """Judge the pixels of a film; also whether the judgement says how the film lies: see :meth:`judge_likeness`.

        ``standardized``: uint8 (S, S), what the network would see. An image without contrast is rejected, and lungs
        that were not found are said where nothing else has rejected the film, and so says why.
        """
        # Standardizing can even out what little contrast there was, or crop it away
        if not has_contrast(radiograph) or standardized.min() == standardized.max():
            return Judgement("rejected", {}, (_NO_CONTRAST,)), False
        judgement = pixel_rules.judge(pixel_rules.measure(radiograph, framing), self.pixels)
        explained = any(reason.code in pixel_rules.LAYOUT_CODES for reason in judgement.reasons)
        if framing.lungs_found is False and judgement.status != "rejected":
            judgement = combined(judgement, Judgement(self.no_lungs, {}, (_NO_LUNGS,)))
        return judgement, explained

    def judge_likeness(self, likeness: Judgement, *, explained: bool = False) -> Judgement:
        """What the bundle's acceptance says, at the severity of these rules; ``explained``: that the film lies
        otherwise than the films of the training was said, so that a mere ``review`` would say it twice."""
        if likeness.status == "ok":
            return likeness
        severity: Any = likeness.status if self.unlike_training == "by_score" else self.unlike_training
        reasons = () if explained and severity == "review" else (unlike_training(severity),)
        return Judgement(severity, likeness.scores, reasons)


def read_rules(path: str | os.PathLike[str]) -> SiteRules:
    """The rules of a JSON file.

    Raises
    ------
    UsageError
        One line: the path and what is wrong with it, as :meth:`SiteRules.from_dict`.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--rules {os.fspath(path)}: cannot be read ({reason})") from error
    if len(content) > _LARGEST:
        raise UsageError(f"--rules {os.fspath(path)}: is larger than {_LARGEST >> 20} MiB: is it a rules file?")
    try:
        record = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, numbers too long, too deep
        raise UsageError(f"--rules {os.fspath(path)}: is no JSON ({' '.join(str(error).split())[:100]})") from error
    except UsageError as error:
        raise UsageError(f"--rules {os.fspath(path)}: {error}") from error
    try:
        return SiteRules.from_dict(record)
    except UsageError as error:
        raise UsageError(f"--rules {os.fspath(path)}: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a name that stands in it twice, one would silently lose."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise UsageError(f"rules: {short(next(name for name in names if names.count(name) > 1))} stands there twice")
    return found
