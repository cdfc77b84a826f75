"""A bundle that is there already gets its network in half precision: no checkpoint is needed for that."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magsd_runtime.backends import open_backend
from magsd_runtime.bundle import MANIFEST_NAME, MODEL_NAMES, Bundle, load_bundle
from magsd_runtime.bundle_writing import check_out, copy_bundle, list_files, publishing
from magsd_runtime.errors import DataError, UsageError
from magsd_runtime.files import write_json
from magsd_runtime.verification import VerificationReport

from .bundling import DEFAULT_IMAGES, add_half, describe_half, prove
from .precision import HalfParity
from .sources import RealImages, spread


@dataclass(frozen=True)
class Halved:
    """The new bundle, and how its two networks differ."""

    bundle: Bundle
    half: HalfParity
    verification: VerificationReport

    def to_dict(self) -> dict[str, Any]:
        files = self.bundle.manifest["files"]
        return {
            "bundle": str(self.bundle.path),
            "model": {"name": self.bundle.name, "version": self.bundle.version, "sha256": self.bundle.model_sha256},
            "files": {name: files[name] for name in MODEL_NAMES.values() if name in files},
            "parity": self.half.to_dict(),
            "research_use_only": True,
        }


def halve_bundle(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    images: int = DEFAULT_IMAGES,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Halved:
    """Copy the bundle at ``path`` to ``out`` (itself, with ``force``) with ``model.fp16.onnx`` added.

    All else stays as it is: model hash, calibration, golden inputs. ``data``: a manifest whose images, at most
    ``images`` of them, the two networks are compared on beside the synthetic inputs.

    Raises
    ------
    BundleError
        If there is no sound bundle at ``path``.
    UsageError, DataError
        If an argument cannot be used, or ``out`` exists.
    VerificationError
        If half precision changes the outputs by more than it may; there is no new bundle then.
    """
    bundle, out = load_bundle(path), Path(out)
    if images < 0:
        raise UsageError(f"--images is {images}: expected 0 or more")
    check_out(out, force)
    real = _real_images(bundle, data, images)
    with publishing(out, force) as folder:
        copy_bundle(bundle, folder)
        report(f"halving     the trunk's precision; comparing on {len(real.records)} radiographs and synthetic inputs")
        with open_backend(bundle, "cpu") as backend:
            half = add_half(folder, backend.run, bundle.preprocessing.size, real, real.facts)
        precisions = {"fp16": describe_half(folder, bundle.model_sha256, half)}
        manifest = {**bundle.manifest, "precisions": {**(bundle.manifest.get("precisions") or {}), **precisions}}
        write_json(folder / MANIFEST_NAME, {**manifest, "files": list_files(folder)})
        report("verifying   the bundle with the runtime")
        verification = prove(folder)
    return Halved(load_bundle(out), half, verification)


def _real_images(bundle: Bundle, data: str | os.PathLike[str] | None, images: int) -> RealImages:
    if data is None:
        return RealImages((), bundle.preprocessing, {"source": "none: a bundle holds no films"})
    from magsd.data import read_manifest

    manifest = read_manifest(Path(data), lenient=True)
    if not manifest.records:
        raise DataError(f"--data {data} names no images to compare on")
    facts = {"source": "the manifest given (--data)", "digest": manifest.digest()}
    return RealImages(spread(manifest.records, images), bundle.preprocessing, facts)
