"""What the files are called that ``magsd infer --out`` writes: never by a name that may tell who the patient is.

A picture (PNG, JPEG, TIFF) lends its own name: somebody chose it when the picture was exported. The name of a DICOM
file was given by a device, a viewer or an archive, and often holds the patient's name, an accession number or a UID;
what is made of it is called by its content.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from .dicom.parsing import looks_like_dicom
from .files import sha256_file
from .images import EXTENSIONS, MAX_FILE_BYTES

_PICTURES = frozenset(suffix for known in EXTENSIONS.values() for suffix in known)
_LONGEST_STEM = 180  # bytes; file systems end at 255, and suffixes and temporary names come on top
_DIGITS = 16  # of a hash, as a name


@dataclass(frozen=True)
class OutputName:
    """``stem`` of an image's output files; ``shown``: what a record that is kept calls the image, None for its path."""

    stem: str
    shown: str | None = None


class OutputNames(Sequence[OutputName]):
    """A name for each image, looked up when it is asked for: of a hundred thousand films none waits for the others.

    Of a picture: its stem, and where stems collide also a hash of the path. Of anything else the SHA-256 of its
    content, of which the stem has the first 16 digits; ``input-N`` where it cannot be read, N counted from 1.
    ``keep_names``: the stem for all of them.

    The names depend on the paths and contents, not on their order, so that a rerun replaces its own files. Stems that
    differ in case only collide as well: some file systems do not tell them apart.
    """

    def __init__(self, images: Sequence[str | Path], *, keep_names: bool = False) -> None:
        self._images, self._keep_names = images, keep_names
        named = [keep_names or Path(path).suffix.lower() in _PICTURES for path in images]
        counts = Counter(Path(path).stem.casefold() for path, by_stem in zip(images, named) if by_stem)
        once = {stem for stem, count in counts.items() if count == 1}
        # Only where stems collide a DICOM file that is called a picture would make a difference: most are not opened
        again = Counter[str]()
        for path, by_stem in zip(images, named):
            if by_stem and (stem := Path(path).stem.casefold()) not in once:
                again[stem] += keep_names or _lends_its_name(Path(path))
        self._colliding = frozenset(stem for stem, count in again.items() if count > 1)

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, number: int) -> OutputName: ...
    @overload
    def __getitem__(self, number: slice) -> list[OutputName]: ...
    def __getitem__(self, number: int | slice) -> OutputName | list[OutputName]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        path = Path(self._images[number])
        if not self._keep_names and not _lends_its_name(path):
            digest = _content_sha256(path)
            shown = f"sha256:{digest}" if digest else f"input-{number + 1}"
            return OutputName(digest[:_DIGITS] if digest else shown, shown)
        stem = path.stem
        too_long = len(os.fsencode(stem)) > _LONGEST_STEM
        if too_long or stem.casefold() in self._colliding:
            start = os.fsencode(stem)[:_LONGEST_STEM].decode("utf-8", "ignore") if too_long else stem
            stem = start + "-" + hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
        return OutputName(stem)


def _lends_its_name(path: Path) -> bool:
    """Whether it is called a picture and does not begin as DICOM does, whatever else is in it."""
    if path.suffix.lower() not in _PICTURES:
        return False
    try:
        # Before opening: opening a pipe would wait for its writer
        if not stat.S_ISREG(os.stat(path).st_mode):
            return True
        with open(path, "rb") as file:
            return not looks_like_dicom(file.read(132))
    except (OSError, ValueError):
        return True


def _content_sha256(path: Path) -> str | None:
    try:
        status = os.stat(path)
        readable = stat.S_ISREG(status.st_mode) and status.st_size <= MAX_FILE_BYTES
        return sha256_file(path) if readable else None
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
