"""Transfer syntaxes (PS3.5, annex A; PS3.6, table A-1): which can be decoded here, what the others need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_PREFIX = "1.2.840.10008.1.2"
BIG_ENDIAN = f"{_PREFIX}.2"
RLE = f"{_PREFIX}.5"
JPEG_12_BIT = f"{_PREFIX}.4.51"


@dataclass(frozen=True)
class Family:
    """``syntaxes`` that the same libraries decode: all distributions of one of ``any_of`` must be installed."""

    name: str
    syntaxes: tuple[str, ...]
    any_of: tuple[tuple[str, ...], ...]


_LIBJPEG = ("pylibjpeg", "pylibjpeg-libjpeg")
_OPENJPEG = ("pylibjpeg", "pylibjpeg-openjpeg")
_GDCM = ("python-gdcm",)

FAMILIES = (
    Family("uncompressed", (_PREFIX, f"{_PREFIX}.1", f"{_PREFIX}.1.99", BIG_ENDIAN), (("pydicom",),)),
    Family("RLE", (RLE,), (("pydicom",),)),
    Family("JPEG 8 bit", (f"{_PREFIX}.4.50",), (("pillow",),)),
    Family("JPEG 12 bit", (JPEG_12_BIT,), (_LIBJPEG, _GDCM)),
    Family("JPEG lossless", (f"{_PREFIX}.4.57", f"{_PREFIX}.4.70"), (_LIBJPEG, _GDCM)),
    Family("JPEG-LS", (f"{_PREFIX}.4.80", f"{_PREFIX}.4.81"), (("pyjpegls",), _LIBJPEG, _GDCM)),
    Family("JPEG 2000", (f"{_PREFIX}.4.90", f"{_PREFIX}.4.91"), (("pillow",),)),
    Family("high-throughput JPEG 2000", tuple(f"{_PREFIX}.4.{n}" for n in (201, 202, 203)), (_OPENJPEG,)),
)
# Two decoders of lossy data may differ by a grey level: the answer must not depend on which extras are installed.
# pylibjpeg-rle is faster, but panics on damaged data, which no "except Exception" catches.
PREFERRED = {"RLE": "pydicom", "JPEG 8 bit": "pillow", "JPEG 2000": "pillow", "JPEG-LS": "pyjpegls"}
JPEG = frozenset(uid for family in FAMILIES[2:6] for uid in family.syntaxes)
JPEG_2000 = frozenset(uid for family in FAMILIES[6:] for uid in family.syntaxes)
SLOW = frozenset(uid for family in (FAMILIES[3], FAMILIES[4], *FAMILIES[6:]) for uid in family.syntaxes)
FAMILY_NAMES = {uid: family.name for family in FAMILIES for uid in family.syntaxes}
NATIVE = frozenset(FAMILIES[0].syntaxes)


def family_of(syntax: str) -> Family | None:
    """The family of a transfer syntax; None for those that no film has (video, references), and for private ones."""
    return next((family for family in FAMILIES if syntax in family.syntaxes), None)


def decodable(version: Callable[[str], str | None]) -> dict[str, bool]:
    """By family name, whether the distributions are installed; ``version`` gives that of one, None where absent.

    From package metadata alone, so that nothing is imported to know it.
    """
    return {
        family.name: version("pydicom") is not None and any(all(map(version, names)) for names in family.any_of)
        for family in FAMILIES
    }


def missing_codec(family: Family) -> str:
    """The rest of a message: what to install."""
    return (
        f"is compressed as {family.name}, which nothing installed here can decode: "
        f"pip install 'magsd[dicom]' (or: pip install {' '.join(family.any_of[0])})"
    )
