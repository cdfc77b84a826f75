"""What is worth taking off a machine: figures and weights of a training, in files of a size that anything carries."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

PART = 15 << 20
MOST = 60 << 20
"""Bytes of one part, and of all of them."""


def bring(run: Path, out: Path, *, part: int = PART, most: int = MOST) -> list[str]:
    """Write ``out/trained.tar.0``, ``.1`` and so on, which ``cat`` joins: the facts of ``run``, then the weights of one
    fold after the other in float16, as many as ``most`` bytes hold. Names of what is inside; nothing without a run.
    """
    for old in out.glob("trained.tar.*"):
        old.unlink()
    if not run.is_dir():
        return []
    held, names = io.BytesIO(), []
    with tarfile.open(fileobj=held, mode="w") as archive:
        facts = [path for path in sorted(run.rglob("*")) if path.suffix in (".json", ".yaml", ".csv")]
        weights = sorted(run.glob("fold*/best.safetensors"))
        for path in [*facts, *weights]:
            content = path.read_bytes() if path in facts else _half(path)
            if held.tell() + len(content) + 8192 > most:  # a header, filling, and the two blocks at the end
                continue
            entry = tarfile.TarInfo(str(path.relative_to(run)))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
            names.append(entry.name)
    whole = held.getvalue()
    out.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(whole), part)):
        (out / f"trained.tar.{number}").write_bytes(whole[start : start + part])
    return names


def _half(path: Path) -> bytes:
    """Weights with floating point in float16, whose rounding is far below what training them again changes."""
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        facts = file.metadata()
    return save({n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}, facts)
