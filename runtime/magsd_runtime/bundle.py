"""A bundle is what is deployed: one folder with the network and all that is needed to use it right.

``bundle.json`` describes it and holds size and SHA-256 of every other file; ``golden/`` holds inputs
with expected outputs, so that a device can prove itself (``verification.py``).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .calibration_record import Calibration
from .errors import ArtefactError, BundleError
from .fields import Unusable as _Unusable
from .fields import field as _field
from .fields import fraction as _fraction
from .fields import number as _number
from .files import sha256_file

if TYPE_CHECKING:
    from .acceptance import Acceptance
    from .preprocessing import PreprocessingSpec

BUNDLE_SCHEMA = "magsd.bundle/1"
MANIFEST_NAME = "bundle.json"
MODEL_NAME = "model.onnx"
# by precision; only the first is in every bundle
MODEL_NAMES = {"fp32": MODEL_NAME, "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
INPUT_NAME = "image"
OUTPUT_NAMES = ("logits", "attention", "evidence", "embedding")
LUNGS_NAME = "lungs.onnx"
LOCALIZATION_MAPS = ("attention", "evidence", "attention-lungs", "evidence-lungs")

_REMEDY = "copy or export the bundle again"


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle whose description was checked; ``manifest`` is the whole of ``bundle.json``.

    ``classes`` are in the order of the logits. ``localization``: ``map`` (one of
    :data:`LOCALIZATION_MAPS`), ``threshold`` and perhaps ``minimum_score`` (0 to 1).
    ``model_sha256``: of ``model.onnx``, the model's identity.
    ``acceptance``: statistics of the training films, None in a bundle without.
    """

    path: Path
    manifest: dict[str, Any]
    name: str
    version: str
    classes: tuple[str, ...]
    preprocessing: PreprocessingSpec
    calibration: Calibration
    localization: dict[str, Any]
    model_sha256: str
    acceptance: Acceptance | None = None

    @property
    def temperature(self) -> float:
        """What the logits are divided by."""
        return self.calibration.temperature

    @property
    def minimum_score(self) -> float:
        """The heat that a region must reach somewhere to be a finding, 0 to 1; 0 in a bundle that names none."""
        return float(self.localization.get("minimum_score", 0.0))

    @property
    def model_path(self) -> Path:
        return self.path / MODEL_NAME

    def onnx_file(self, precision: str) -> tuple[Path, str]:
        """Path and SHA-256 of the network's ONNX file of ``precision`` (fp32, fp16, int8).

        Raises
        ------
        BundleError
            If the bundle has none of that precision.
        """
        facts = (self.manifest.get("files") or {}).get(MODEL_NAMES.get(precision, ""))
        if facts is None:
            films = " --calibration-data M.csv" if precision == "int8" else ""
            raise BundleError(
                f"{self.path}: has no network in {precision}: "
                f"magsd export {self.path} --out NEW --precision {precision}{films} makes a copy that has"
            )
        return self.path / MODEL_NAMES[precision], str(facts["sha256"])


def load_bundle(path: str | os.PathLike[str], *, check_files: bool = True) -> Bundle:
    """Read and check the bundle in folder ``path``; with ``check_files``, every file's size and SHA-256.

    Raises
    ------
    BundleError
        If the folder is no bundle, of a newer version, incomplete or altered, or asks for a
        preprocessing that this magsd does not reproduce exactly. The line says which file.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    _check_schema(folder, manifest)
    try:
        bundle = _describe(folder, manifest)
    except _Unusable as error:
        raise BundleError(f"{folder / MANIFEST_NAME}: {error}: {_REMEDY}") from error
    files = manifest.get("files")
    if not isinstance(files, dict) or MODEL_NAME not in files:
        raise BundleError(f"{folder / MANIFEST_NAME}: does not list {MODEL_NAME} in files: {_REMEDY}")
    for name, facts in files.items():
        _check_file(folder, name, facts, hash_too=check_files)
    if wanted := bundle.preprocessing.lungs_sha256:
        _bring_lungs(folder, files.get(LUNGS_NAME), wanted)
    if files[MODEL_NAME]["sha256"] != bundle.model_sha256:
        raise BundleError(
            f"{folder / MANIFEST_NAME}: model.sha256 is not the sha256 of {MODEL_NAME} in files: {_REMEDY}"
        )
    _check_precisions(folder, manifest, files)
    try:
        return replace(bundle, acceptance=_acceptance(folder, manifest, bundle))
    except _Unusable as error:
        raise BundleError(f"{folder / MANIFEST_NAME}: {error}: {_REMEDY}") from error


def _check_precisions(folder: Path, manifest: dict[str, Any], files: dict[str, Any]) -> None:
    """Networks of other precisions: each is described and listed, or neither, and belongs to this model."""
    described = manifest.get("precisions", {})
    listed = {precision for precision, name in MODEL_NAMES.items() if name in files} - {"fp32"}
    if not isinstance(described, dict) or listed != described.keys() & MODEL_NAMES.keys():
        raise BundleError(f"{folder / MANIFEST_NAME}: precisions and files name different networks: {_REMEDY}")
    for precision in listed:
        facts = described[precision]
        expected = {"sha256": files[MODEL_NAMES[precision]]["sha256"], "model_sha256": manifest["model"]["sha256"]}
        if not isinstance(facts, dict) or {key: facts.get(key) for key in expected} != expected:
            name = MODEL_NAMES[precision]
            raise BundleError(f"{folder / MANIFEST_NAME}: {name} is not described as made from this model: {_REMEDY}")


def _acceptance(folder: Path, manifest: dict[str, Any], bundle: Bundle) -> Acceptance | None:
    """The statistics of the training films, if the bundle has them."""
    from .acceptance import ACCEPTANCE_NAME, read_acceptance  # brings OpenCV

    listed = ACCEPTANCE_NAME in manifest["files"]
    if manifest.get("acceptance") is None and not listed:
        return None
    if manifest.get("acceptance") is None or not listed:
        raise _Unusable(f"the field acceptance and the file {ACCEPTANCE_NAME} are not both there")
    try:
        shapes = {output["name"]: output["shape"] for output in manifest["outputs"]}
        length = int(shapes["embedding"][-1])
    except (KeyError, IndexError, TypeError, ValueError):
        length = None  # not described; the pipeline compares with what the network gives
    return read_acceptance(
        manifest["acceptance"],
        folder / ACCEPTANCE_NAME,
        model_sha256=bundle.model_sha256,
        embedding=length,
        with_lungs=bundle.preprocessing.crop == "lungs",
    )


def _bring_lungs(folder: Path, facts: Any, wanted: str) -> None:
    """Make the bundle's lung network known to the preprocessing. Its content was checked, or will not be used."""
    if facts is None or facts["sha256"] != wanted:
        raise BundleError(f"{folder / LUNGS_NAME}: is not the lung network that the preprocessing names: {_REMEDY}")
    from .lungs import register

    if register(folder / LUNGS_NAME) != wanted:
        raise BundleError(f"{folder / LUNGS_NAME}: was altered, its sha256 is not the one listed: {_REMEDY}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.exists():
            what = "no such folder"
        elif not folder.is_dir():
            what = "is a file, expected the folder that magsd export wrote"
        else:
            what = f"holds no {MANIFEST_NAME}, so it is no bundle (magsd export writes one)"
        raise BundleError(f"{folder}: {what}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read ({error}): {_REMEDY}") from error
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: is not JSON ({error}): {_REMEDY}") from error
    if not isinstance(manifest, dict):
        raise BundleError(f"{path}: holds a {type(manifest).__name__}, expected an object: {_REMEDY}")
    return manifest


def _check_schema(folder: Path, manifest: dict[str, Any]) -> None:
    schema = manifest.get("schema")
    if schema == BUNDLE_SCHEMA:
        return
    kind, _, version = schema.rpartition("/") if isinstance(schema, str) else ("", "", "")
    own_kind, _, own_version = BUNDLE_SCHEMA.rpartition("/")
    if kind == own_kind and version.isdecimal() and int(version) > int(own_version):
        raise BundleError(
            f"{folder}: is a bundle of version {version}, this magsd reads version {own_version}: "
            "install a newer magsd, or export with this one"
        )
    raise BundleError(f"{folder / MANIFEST_NAME}: schema is {schema!r}, expected {BUNDLE_SCHEMA!r}")


def _describe(folder: Path, manifest: dict[str, Any]) -> Bundle:
    from .preprocessing import PreprocessingSpec  # brings OpenCV, which `magsd doctor` can do without

    model = _field(manifest, "model", dict)
    classes = _field(manifest, "classes", list)
    if len(classes) < 2 or not all(isinstance(name, str) and name for name in classes):
        raise _Unusable("classes are not a list of two or more names")
    if len(set(classes)) != len(classes):
        raise _Unusable("classes holds a name twice")

    try:
        spec = PreprocessingSpec.from_dict(_field(manifest, "preprocessing", dict))
    except ArtefactError as error:
        raise BundleError(f"{folder}: {error}") from error
    if _field(manifest, "preprocessing_sha256", str) != spec.sha256():
        raise _Unusable("preprocessing_sha256 is not the hash of preprocessing")

    sha256 = _field(model, "sha256", str, "model.")
    try:
        calibration = Calibration.from_dict(manifest.get("calibration"), classes=classes, model_sha256=sha256)
    except _Unusable:
        raise
    except ArtefactError as error:
        raise BundleError(f"{folder / MANIFEST_NAME}: {error}") from error
    localization = _field(manifest, "localization", dict)
    if localization.get("map") not in LOCALIZATION_MAPS:
        raise _Unusable(
            f"localization.map is {localization.get('map')!r}, expected one of {', '.join(LOCALIZATION_MAPS)}"
        )
    if not 0 <= _number(localization, "threshold", "localization.") <= 1:
        raise _Unusable(f"localization.threshold is {localization['threshold']}, expected 0 to 1")
    if "minimum_score" in localization:
        _fraction(localization, "minimum_score", "localization.")
    return Bundle(
        path=folder,
        manifest=manifest,
        name=_field(model, "name", str, "model."),
        version=str(_field(model, "version", (str, int, float), "model.")),
        classes=tuple(classes),
        preprocessing=spec,
        calibration=calibration,
        localization=localization,
        model_sha256=sha256,
    )


def _check_file(folder: Path, name: str, facts: Any, *, hash_too: bool) -> None:
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise BundleError(f"{folder / MANIFEST_NAME}: file name {name!r} leads out of the bundle: {_REMEDY}")
    if not isinstance(facts, dict) or not {"sha256", "size"} <= set(facts):
        raise BundleError(f"{folder / MANIFEST_NAME}: file {name} has no sha256 and size: {_REMEDY}")
    path = folder / pure
    try:
        if not path.is_file():
            raise BundleError(f"{path}: is missing from the bundle: {_REMEDY}")
        size = path.stat().st_size
        if size != facts["size"]:
            raise BundleError(f"{path}: has {size} bytes, the bundle lists {facts['size']}: {_REMEDY}")
        if hash_too and sha256_file(path) != facts["sha256"]:
            raise BundleError(f"{path}: was altered, its sha256 is not the one listed: {_REMEDY}")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise BundleError(f"{str(path)!a}: cannot be read ({error}): {_REMEDY}") from error
