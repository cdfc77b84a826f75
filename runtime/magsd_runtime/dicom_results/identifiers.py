"""UIDs derived from what a result depends on, so that a rerun gives the same ones.

A result that is computed again from the same film, by the same model, with the same settings, gets the same
SOP Instance UID: an archive can replace it, and a folder does. Anything else that goes in gives other UIDs.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass

# Random once (RFC 9562, version 4), fixed for ever: every UID of ours descends from it.
_NAMESPACE = uuid.UUID("1e4e670d-1b03-442b-b8a9-5e480852ff6a")

FORMAT = "magsd.dicom-results/1"
"""Of what is written and how. A change that gives other objects for the same prediction needs another number."""


@dataclass(frozen=True)
class Origin:
    """What one film's results depend on.

    ``source_uid`` is the film's SOP Instance UID; ``pixels_sha256`` the hash of its grey pixels, because files
    with equal UIDs and different pixels do exist, and two objects must never share a UID. ``parameters``:
    canonical JSON of all settings of the bundle and the backend that can change the result.
    """

    source_uid: str
    pixels_sha256: str
    model_sha256: str
    preprocessing_sha256: str
    parameters: str

    def uid(self, *names: str) -> str:
        """The UID of what ``names`` name, for instance ``("series", "overlay")``."""
        return derive_uid({"origin": asdict(self), "names": list(names)})


def device_uid(model_sha256: str, preprocessing_sha256: str) -> str:
    """UID of the observing device: the model with its preprocessing. It changes when the model is retrained."""
    return derive_uid({"device": [model_sha256, preprocessing_sha256]})


def implementation_class_uid() -> str:
    """Implementation Class UID of the file meta information (PS3.7, D.3.3.2)."""
    return derive_uid({"implementation": "magsd"})


def derive_uid(value: object) -> str:
    """A UID for a JSON-able value: root 2.25 and a name-based UUID (PS3.5, B.2; RFC 9562, 5.5)."""
    text = canonical_json({"format": FORMAT, "of": value})
    return f"2.25.{uuid.uuid5(_NAMESPACE, text).int}"


def canonical_json(value: object) -> str:
    """One text for one value: sorted keys, no spaces, ASCII.

    Raises
    ------
    ValueError
        If the value holds NaN or an infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
