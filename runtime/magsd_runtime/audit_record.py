"""What the audit log keeps of one prediction: enough to repeat it, and nothing of a patient.

No name of the input and nothing of its header: facts of the image (a DICOM header gives an age and a device) enter
``result_sha256`` only. A hash is a pseudonym: who has the file can find its record.
"""

from __future__ import annotations

import os
import platform
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import hardware
from ._version import __version__
from .audit import append, check_appendable, sha256_of, utc_now
from .files import sha256_file
from .images import EXTENSIONS, MAX_FILE_BYTES
from .pipeline import Pipeline, Result

if TYPE_CHECKING:
    from .bundle import Bundle
    from .prediction import Prediction

# What takes part in a result, by the module that says its version
_LIBRARIES = {"numpy": "numpy", "opencv": "cv2", "pillow": "PIL", "onnxruntime": "onnxruntime"}
_DICOM_LIBRARIES = {
    "pydicom": "pydicom",
    "pylibjpeg-libjpeg": "libjpeg",
    "pylibjpeg-openjpeg": "openjpeg",
    "pyjpegls": "jpeg_ls",
}


def result_of(prediction: Prediction) -> dict[str, Any]:
    """What was found, without names, times and facts of the file; reasons by their codes."""
    record = prediction.to_dict()
    names = ("status", "label", "probability", "probabilities", "decision", "prediction_set", "acceptance", "findings")
    return {**{name: record[name] for name in names}, "reasons": [reason["code"] for reason in record["reasons"]]}


def result_sha256(prediction: Prediction) -> str:
    """SHA-256 of :func:`result_of` with the facts of the image, as canonical JSON.

    ``extension_mismatch`` is left out: it is a fact of the file's name.
    """
    image = {name: value for name, value in prediction.image.items() if name != "extension_mismatch"}
    return sha256_of({**result_of(prediction), "image": image})


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Which bundle it was: hashes of the model, the preprocessing, the calibration (None where there is none) and
    of the whole ``bundle.json``, which holds the hashes of all its files."""
    calibration = bundle.manifest.get("calibration")
    return {
        "model": {"name": bundle.name, "version": bundle.version, "sha256": bundle.model_sha256},
        "preprocessing_sha256": bundle.preprocessing.sha256(),
        "calibration_sha256": None if calibration is None else sha256_of(calibration),
        "bundle_sha256": sha256_of(bundle.manifest),
    }


def machine_facts(pipeline: Pipeline, threads: int | None) -> dict[str, Any]:
    """The backend, with the CPU threads it may use, and the processor: both can change the last digits."""
    backend, cpu = pipeline.backend, hardware.cpu()
    facts = {"name": backend.name, "device": backend.device, "precision": backend.precision}
    return {
        "backend": {**facts, "threads": threads or cpu["usable_cores"]},
        "machine": {name: cpu[name] for name in ("model", "architecture", "instruction_sets")},
    }


def versions(prediction: Prediction) -> dict[str, str]:
    """Versions of magsd, Python and of the libraries that took part in a prediction of this process."""
    found = {"magsd": __version__, "python": platform.python_version()}
    libraries = _LIBRARIES if prediction.image.get("format") in EXTENSIONS else {**_LIBRARIES, **_DICOM_LIBRARIES}
    for name, module in libraries.items():
        version = getattr(sys.modules.get(module), "__version__", None)
        if isinstance(version, str):
            found[name] = version
    return found


def hash_input(path: str | os.PathLike[str]) -> dict[str, Any]:
    """``sha256`` and ``bytes`` of a file; None where it cannot be read, or is larger than an image may be."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return {"sha256": None, "bytes": None}
        digest = sha256_file(path) if status.st_size <= MAX_FILE_BYTES else None
        return {"sha256": digest, "bytes": status.st_size}
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return {"sha256": None, "bytes": None}


class AuditedPipeline(Pipeline):
    """A pipeline that puts each prediction into an audit log before it hands it out."""

    def __init__(self, pipeline: Pipeline, log: str | os.PathLike[str], *, threads: int | None = None) -> None:
        """``threads``: what the backend was opened with.

        Raises
        ------
        BrokenChainError, UsageError
            If nothing can be appended to ``log``.
        """
        super().__init__(pipeline.bundle, pipeline.backend, rules=pipeline.rules)
        check_appendable(log)
        self._log = Path(log)
        self._constant = {
            **bundle_facts(pipeline.bundle),
            "rules_sha256": pipeline.rules.sha256(),
            **machine_facts(pipeline, threads),
        }

    def predict(self, path: str | os.PathLike[str], *, with_heat: bool = True) -> Result:
        """As :meth:`Pipeline.predict`; raises as :func:`audit.append`: what cannot be logged is not handed out."""
        started, before = utc_now(), _identity(path)
        source = hash_input(path)
        result = super().predict(path, with_heat=with_heat)
        if _identity(path) != before:  # then the hash may be of another content than the one that was judged
            source = {"sha256": None, "bytes": None, "changed": True}
        facts = {
            "started": started,
            "input": source,
            **self._constant,
            "versions": versions(result.prediction),
            "result": result_of(result.prediction),
            "result_sha256": result_sha256(result.prediction),
        }
        append(self._log, "prediction", facts)
        return result


def _identity(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
