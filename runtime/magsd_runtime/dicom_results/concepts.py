"""Coded concepts. A code is the standard's or SNOMED CT's where one says exactly what is meant; what has no
code there gets one of scheme 99MAGSD: the prefix 99 marks a private scheme (PS3.3, section 8.2).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom.sr.coding import Code

PRIVATE_SCHEME = "99MAGSD"

# (value, scheme, meaning); PS3.16, where it lists them
CERTAINTY_OF_FINDING = ("111012", "DCM", "Certainty of Finding")  # in percent: TID 4104, row 12
SOURCE_FOR_PROCESSING = ("121322", "DCM", "Source image for image processing operation")  # CID 7222
DEVICE = ("121007", "DCM", "Device")  # CID 270
PLAIN_CHEST_XRAY = ("399208008", "SCT", "Plain chest X-ray")
CHEST = ("816094009", "SCT", "Chest")  # CID 4031
BOUNDED_BY = ("75958009", "SCT", "Bounded by")  # CID 219
PERCENT = ("%", "UCUM", "Percent")  # CID 7181
NO_UNITS = ("1", "UCUM", "no units")  # CID 7181

_PRIVATE = {
    "attended-region": "Region attended by the network, not a finding",
    "peak-attention": "Peak attention in the region",
    "image-share": "Share of the image",
    "attention": "Attention of the network",
    "evidence": "Evidence for the class, by place",
    "intended-use": "Intended use",
    "research-use": "Research use only. Not for clinical use.",
    "status": "Status of the result",
    "status-ok": "Judged",
    "status-review": "Needs review",
    "review-reason": "Reason for review",
    "decision": "Decision at the operating point",
    "positive": "Positive",
    "negative": "Negative",
}

# What classes are called, in lower case without signs, and what that is called elsewhere
_CLASSES = {
    "pneumonia": ("233604007", "SCT", "Pneumonia"),
    "viralpneumonia": ("75570004", "SCT", "Viral pneumonia"),
    "bacterialpneumonia": ("53084003", "SCT", "Bacterial pneumonia"),
    "covid19": ("840539006", "SCT", "Disease caused by SARS-CoV-2"),
    "opacity": ("112001", "DCM", "Opacity"),  # CID 6102
    "normal": ("17621005", "SCT", "Normal"),  # CID 222
    "healthy": ("17621005", "SCT", "Normal"),
    "nofinding": ("17621005", "SCT", "Normal"),
}


def code(concept: tuple[str, str, str]) -> Code:
    """A concept of this module, for highdicom."""
    from pydicom.sr.coding import Code

    return Code(*concept)


def private(value: str) -> Code:
    """A concept of our own scheme, by its value."""
    return code((value, PRIVATE_SCHEME, _PRIVATE[value]))


def class_code(name: str) -> Code:
    """What a class of a bundle is called: a known concept for a known name, a private one for any other."""
    known = _CLASSES.get("".join(letter for letter in name.casefold() if letter.isalnum()))
    return code(known or (_digest("class", name), PRIVATE_SCHEME, long_string(name)))


def class_probability_code(name: str) -> Code:
    """The name of the number that is a class's probability."""
    return code((_digest("prob", name), PRIVATE_SCHEME, long_string(f"Probability of {name}")))


def reason_code(name: str, message: str) -> Code:
    """A reason of a prediction; the message is cut to 64 characters."""
    return code((_digest("why", name), PRIVATE_SCHEME, long_string(message)))


def long_string(text: str, limit: int = 64) -> str:
    """``text`` as a value of VR LO (PS3.5, 6.2): one line, no backslash, at most 64 characters."""
    clean = " ".join("".join(letter if letter.isprintable() else " " for letter in text).replace("\\", "/").split())
    return clean if len(clean) <= limit else clean[: limit - 3].rstrip() + "..."


def _digest(kind: str, name: str) -> str:
    # A Code Value has 16 characters: the name itself would not always fit
    return f"{kind}-{hashlib.sha256(name.encode('utf-8', 'backslashreplace')).hexdigest()}"[:16]
