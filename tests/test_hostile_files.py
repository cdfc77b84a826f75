"""Files made to hurt: each is refused with its reason, or read, within seconds and little memory.

The smallest bytes of each kind that took minutes or gigabytes before there was a limit; benchmarks/mutated_files.py
looks for more.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from magsd_runtime import limits
from magsd_runtime.dicom.codestreams import fragments, rle_is_bounded
from magsd_runtime.errors import ImageError
from magsd_runtime.images import read_radiograph

pydicom = pytest.importorskip("pydicom")
sys.path.append(str(Path(__file__).resolve().parents[1]))
mutated_files = pytest.importorskip("mutated_files")
from mutation_seeds import (  # noqa: E402 - in benchmarks/
    IMPLICIT,
    JPEG,
    JPEG_12,
    RLE,
    chunk,
    film,
    flat_jpeg,
    grey,
    lossless_jpeg,
    picture,
    saved,
    seeds,
    set_pixels,
    written,
)

SECONDS = 5.0
MEGABYTES = 1000


def memory_mb(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) >> 10 for line in status if line.startswith(name))


def peak_mb() -> int:
    return memory_mb("VmHWM")


@pytest.fixture
def bounded() -> Any:
    """The limits of a test: 5 s of the processor (the machine may be busy), 1 GB above what it began with."""
    Path("/proc/self/clear_refs").write_text("5")
    before, started = peak_mb(), time.process_time()
    yield
    assert time.process_time() - started < SECONDS
    assert peak_mb() - before < MEGABYTES


def write(folder: Path, content: bytes) -> Path:
    path = folder / "film"
    path.write_bytes(content)
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(ImageError, match=match) as caught:
        read_radiograph(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def png(width: int, height: int, *, packed: bytes, before: bytes = b"", depth: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def zeros(count: int, *, wbits: int = 15) -> bytes:
    packer = zlib.compressobj(1, wbits=wbits)
    block = bytes(1 << 20)
    return (
        b"".join(packer.compress(block) for _ in range(count >> 20))
        + packer.compress(bytes(count % (1 << 20)))
        + packer.flush()
    )


SMALL = zlib.compress(b"".join(b"\0" + bytes(range(64)) for _ in range(64)))


# ---------------------------------------------------------------- PNG


@pytest.mark.usefixtures("bounded")
def test_a_png_of_30000_by_30000_zeros(tmp_path: Path) -> None:
    refused(write(tmp_path, png(30_000, 30_000, packed=zeros(4 << 20))), "declares 30,000 x 30,000 pixels, at most")


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(("width", "height"), [(4000, 5000), pytest.param(8000, 10_000, marks=pytest.mark.slow)])
def test_a_large_png_with_a_transparent_level(tmp_path: Path, width: int, height: int) -> None:
    """80 million pixels took 1,059 MB: a choice between two Python integers made an int64 of every pixel."""
    packed = zeros(height * (1 + 2 * width))
    path = write(tmp_path, png(width, height, packed=packed, before=chunk(b"tRNS", b"\0\5"), depth=16))
    before = peak_mb()
    assert read_radiograph(path).pixels.max() == 0
    assert peak_mb() - before < 9 * width * height >> 20


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    ("kind", "prefix"),
    [(b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0")],
    ids=["zTXt", "iCCP", "iTXt"],
)
def test_compressed_notes_that_grow(tmp_path: Path, kind: bytes, prefix: bytes) -> None:
    content = png(64, 64, packed=SMALL, before=chunk(kind, prefix + zeros(200 << 20)))
    refused(
        write(tmp_path, content),
        "PNG data are damaged, cut short or of an unsupported kind .*Decompressed data too large",
    )


@pytest.mark.usefixtures("bounded")
def test_pixels_that_go_on_behind_the_picture(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + bytes(range(64)) for _ in range(64))
    packer = zlib.compressobj(1)
    packed = packer.compress(rows) + b"".join(packer.compress(bytes(1 << 20)) for _ in range(500)) + packer.flush()
    assert read_radiograph(write(tmp_path, png(64, 64, packed=packed))).pixels[3, 9] == 9


@pytest.mark.usefixtures("bounded")
def test_a_png_of_chunks(tmp_path: Path) -> None:
    content = png(64, 64, packed=SMALL, before=chunk(b"IDAT", b"") * (limits.MAX_READS + 9))
    refused(write(tmp_path, content), "is made of more than 200,000 pieces")


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("behind", [False, True])
def test_a_long_note(tmp_path: Path, behind: bool) -> None:
    note = chunk(b"iTXt", b"k\0\0\0\0\0" + b"a" * limits.MAX_NOTES)
    content = png(64, 64, packed=SMALL, before=b"" if behind else note)
    refused(
        write(tmp_path, content[:-12] + note + content[-12:] if behind else content),
        "more than 4 MiB beside its picture",
    )
    assert read_radiograph(write(tmp_path, png(64, 64, packed=SMALL, before=chunk(b"tEXt", b"k\0" + b"a" * 99_999))))


def test_no_room_is_taken_for_a_length_that_the_file_has_not(tmp_path: Path) -> None:
    path = write(tmp_path, bytes(100))
    before = memory_mb("VmPeak")
    with limits.MeteredFile(path, "film") as file:
        assert file.read(1 << 34) == bytes(100)
    assert limits.MeteredBytes(bytes(100), "film").read(1 << 34) == bytes(100)
    assert memory_mb("VmPeak") - before < 1000


# ---------------------------------------------------------------- JPEG


def scans_added(content: bytes, count: int) -> bytes:
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * count + content[-2:]


@pytest.mark.usefixtures("bounded")
def test_a_progressive_jpeg_that_never_ends(tmp_path: Path) -> None:
    """106 scans of 80 million pixels took 7 s."""
    large = saved(Image.new("L", (4000, 5000), 9), "JPEG", progressive=True)
    refused(
        write(tmp_path, scans_added(large, 100)), r"4,000 x 5,000 pixels in 10\d scans, at most 50 are read for this"
    )
    assert read_radiograph(write(tmp_path, scans_added(large, 2))).width == 4000
    small = saved(grey(), "JPEG", progressive=True)
    assert read_radiograph(write(tmp_path, scans_added(small, 100))).width == grey().width


def test_scans_are_counted_across_blocks(tmp_path: Path) -> None:
    for offset in (-2, -1, 0, 1):
        content = bytearray(3 << 20)
        for block in (1, 2):
            at = (block << 20) + offset
            content[at : at + 2] = b"\xff\xda"
        assert limits.count_scans(io.BytesIO(bytes(content))) == 2


@given(st.lists(st.sampled_from([b"\xff\xda", b"\xff", b"\xda", b"a"])))
def test_scans_of_anything(parts: list[bytes]) -> None:
    data = b"".join(parts)
    assert limits.count_scans(io.BytesIO(data)) == sum(data[at : at + 2] == b"\xff\xda" for at in range(len(data)))


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    ("added", "match"),
    [
        (b"\xff" * 400_000, "more than 200,000 pieces"),
        (segment(0xFE, b"") * 400_000, "more than 200,000 pieces"),
        (segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 100, "more than 4 MiB beside its picture"),
        (segment(0xE2, b"ICC_PROFILE\0\1\1") * 400_000, "more than 200,000 pieces|more than 4 MiB"),
    ],
    ids=["fill bytes", "comments", "EXIF", "profiles"],
)
def test_a_jpeg_of_segments(tmp_path: Path, added: bytes, match: str) -> None:
    content = saved(grey(), "JPEG")
    refused(write(tmp_path, content[:2] + added + content[2:]), match)


@pytest.mark.usefixtures("bounded")
def test_a_jpeg_of_64_kilobytes_a_side(tmp_path: Path) -> None:
    content = bytearray(saved(grey(), "JPEG"))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    refused(write(tmp_path, bytes(content)), "declares 65,535 x 65,535 pixels")


# ---------------------------------------------------------------- TIFF


def tiff(entries: list[tuple[int, int, int, int]], data: bytes = b"", *, order: str = "<") -> bytes:
    """``entries`` (tag, type, count, value); the value None stands for the offset of ``data``."""
    behind = 8 + 2 + 12 * len(entries) + 4
    table = b"".join(
        struct.pack(order + "HHII", tag, kind, count, behind if value is None else value)
        for tag, kind, count, value in sorted(entries, key=lambda one: one[0])
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    return head + table + bytes(4) + data


def entries(*more: Any) -> list[Any]:
    plain = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 4, 1, 8), (259, 4, 1, 8), (262, 4, 1, 1), (277, 4, 1, 1)]
    return [*plain, *more]


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("order", "<>")
def test_a_tile_far_larger_than_its_picture(tmp_path: Path, order: str) -> None:
    """40,000 x 40,000 took 1.5 GB, for a picture of 64 x 64."""
    packed = zeros(8 << 20)
    bomb = entries((322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, None), (325, 4, 1, len(packed)))
    refused(write(tmp_path, tiff(bomb, packed, order=order)), "tiles of 40,000 x 40,000 pixels for 64 x 64")
    twice = [*bomb, (256, 4, 1, 32_000), (257, 4, 1, 32_000)]
    refused(write(tmp_path, tiff(twice, packed, order=order)), "tiles of 40,000 x 40,000 pixels for 64 x 64")
    usual = zlib.compress(bytes(512 * 512))
    sound = entries((322, 4, 1, 512), (323, 4, 1, 512), (324, 4, 1, None), (325, 4, 1, len(usual)))
    assert read_radiograph(write(tmp_path, tiff(sound, usual, order=order))).width == 64


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    ("more", "match"),
    [
        ([(273, 4, 10_000_000, None), (279, 4, 10_000_000, None)], "TIFF entry 273 has 10,000,000 values"),
        ([(282, 5, 500_000, None)], "TIFF entry 282 has 500,000 values"),
        ([(273, 4, 1, None), (279, 4, 1, 9), (700, 7, 5 << 20, None)], "TIFF entry 700 has 5,242,880 values"),
    ],
)
def test_a_tiff_entry_of_millions(tmp_path: Path, more: list[Any], match: str) -> None:
    refused(write(tmp_path, tiff(entries(*more), bytes(1 << 20))), match)


def test_tiff_entries_of_anything(tmp_path: Path) -> None:
    refused(write(tmp_path, tiff(entries() * 700)), "its TIFF directory declares 4,200 entries")
    for content in (
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0+\0\x08\0\0" + b"\xff" * 8,
        b"II+\0\x08\0\0\0" + b"\x10" * 40,
    ):
        with pytest.raises(ImageError):
            read_radiograph(write(tmp_path, content))


# ---------------------------------------------------------------- DICOM


def before_rows(content: bytes, added: bytes) -> bytes:
    at = content.index(b"\x28\0\x10\0US")
    return content[:at] + added + content[at:]


PLAIN = written(film())


@pytest.mark.usefixtures("bounded")
def test_a_dataset_that_inflates_beyond_any_film(tmp_path: Path) -> None:
    content = seeds()["dicom-deflated"]
    meta = content[: 144 + int.from_bytes(content[140:144], "little")]
    refused(write(tmp_path, meta + zeros(300 << 20, wbits=-15)), "grows beyond 256 MiB when inflated")


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("implicit", [False, True])
def test_ten_thousand_sequences_in_sequences(tmp_path: Path, implicit: bool) -> None:
    head = b"\x08\0\x40\x11" + (b"" if implicit else b"SQ\0\0") + b"\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff"
    ends = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0"
    if implicit:
        content = written(film(), IMPLICIT)
        at = content.index(b"\x28\0\x10\0\2\0\0\0")
        content = content[:at] + head * 10_000 + ends * 10_000 + content[at:]
    else:
        content = before_rows(PLAIN, head * 10_000 + ends * 10_000)
    refused(write(tmp_path, content), r"the DICOM data are damaged or cut short \(RecursionError\)")


@pytest.mark.usefixtures("bounded")
def test_ten_thousand_sequences_of_known_length_are_passed_over(tmp_path: Path) -> None:
    inner = b""
    for _ in range(10_000):
        item = b"\xfe\xff\0\xe0" + struct.pack("<I", len(inner)) + inner
        inner = b"\x08\0\x40\x11SQ\0\0" + struct.pack("<I", len(item)) + item
    film_itself = read_radiograph(write(tmp_path, PLAIN)).pixels
    np.testing.assert_array_equal(read_radiograph(write(tmp_path, before_rows(PLAIN, inner))).pixels, film_itself)
    # and where it stands for an attribute that is used, which is looked into
    lut = before_rows(PLAIN, b"")
    at = lut.index(b"\xe0\x7f\x10\0")
    refused(write(tmp_path, lut[:at] + b"\x28\0\x10\x30" + inner[4:] + lut[at:]), "lookup table without|has .* bytes")


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("claimed", [0x7FFFFFF0, 0xFFFFFFFE, 0xFFFFFFFF])
@pytest.mark.parametrize("kind", [b"UN", b"OB", b"SQ"])
def test_private_elements_that_claim_gigabytes(tmp_path: Path, claimed: int, kind: bytes) -> None:
    added = b"\x29\0\x10\x10" + kind + b"\0\0" + struct.pack("<I", claimed)
    refused(write(tmp_path, before_rows(PLAIN, added)), "no Rows and Columns|without an image|damaged|cut short")


@pytest.mark.usefixtures("bounded")
def test_millions_of_elements(tmp_path: Path) -> None:
    """10 million took 10 s."""
    refused(
        write(tmp_path, before_rows(PLAIN, b"\x27\0\x10\x10SH\0\0" * 250_000)), "is made of more than 200,000 pieces"
    )
    items = b"\x28\0\x10\x30SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\0\0\0\0" * 250_000 + b"\xfe\xff\xdd\xe0\0\0\0\0"
    refused(write(tmp_path, before_rows(PLAIN, items)), "is made of more than 200,000 pieces")


@pytest.mark.usefixtures("bounded")
def test_values_that_nobody_writes(tmp_path: Path) -> None:
    window = b"\x28\0\x50\x10UT\0\0" + struct.pack("<I", 2_000_000) + b"1\\" * 1_000_000
    at = PLAIN.index(b"\x28\0\x50\x10DS")
    refused(
        write(tmp_path, PLAIN[:at] + window + PLAIN[at + 8 + PLAIN[at + 6] :]),
        "its WindowCenter has 2,000,000 bytes, at most 65,536",
    )
    items = b"\x28\0\x10\x30SQ\0\0" + struct.pack("<I", 8_000_000) + b"\xfe\xff\0\xe0\0\0\0\0" * 1_000_000
    refused(write(tmp_path, before_rows(PLAIN, items)), "its VOILUTSequence has 8,000,000 bytes, at most 1,048,576")


def test_an_empty_element_of_no_vr(tmp_path: Path) -> None:
    """Looking at the length of its value must not convert it: there is no VR of two control characters."""
    at = PLAIN.index(b"\x08\0\x20\0DA")
    content = PLAIN[:at] + b"\x08\0\x20\0\x44\x10\0\0" + PLAIN[at + 8 + PLAIN[at + 6] :]
    assert read_radiograph(write(tmp_path, content)).source["format"] == "DICOM"


def rle(*segments: bytes) -> bytes:
    starts = np.cumsum([64, *map(len, segments)])[:-1].tolist()
    return struct.pack("<16I", len(segments), *starts, *[0] * (15 - len(segments))) + b"".join(segments)


def large(bits: int = 16, **attributes: Any) -> Any:
    dataset = film(bits, **attributes)
    dataset.Rows, dataset.Columns = 10_000, 8000
    return dataset


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("segment_bytes", [b"\x80", b"\0\7"], ids=["no operation", "runs of one byte"])
def test_rle_of_too_many_runs(tmp_path: Path, segment_bytes: bytes) -> None:
    content = written(large(), RLE, rle(segment_bytes * 7_000_000, b"\x81\0"))
    refused(write(tmp_path, content), "RLE data are damaged, or unpack to more than the picture, or from too many runs")


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=130)), max_size=9), st.integers(1, 9))
def test_rle_is_bounded_as_a_slow_count_says(parts: list[tuple[int, bytes]], allowed: int) -> None:
    data = b"".join(bytes([head]) + body for head, body in parts)
    at = total = runs = 0
    while at < len(data):
        head, runs = data[at], runs + 1
        total += 0 if head == 128 else head + 1 if head < 128 else 257 - head
        at += 1 if head == 128 else head + 2 if head < 128 else 2
    frame = rle(data)
    assert rle_is_bounded(frame, allowed * 40) == (total <= 2 * allowed * 40)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    "make",
    [
        lambda: written(film(8), RLE, rle(b"\x81\0" * 3_000_000)),
        lambda: written(large(8), JPEG, saved(grey(), "JPEG")),
        lambda: written(film(8), JPEG, jpeg_that_claims(saved(grey(), "JPEG"), b"\xff\xc0")),
        lambda: written(film(12), JPEG_12, jpeg_that_claims(flat_jpeg(picture(12), 12), b"\xff\xc1")),
        lambda: written(
            film(16), "1.2.840.10008.1.2.4.70", jpeg_that_claims(lossless_jpeg(picture(16), 16), b"\xff\xc3")
        ),
        lambda: claims_more(seeds()["dicom-jpeg-ls"], b"\xff\xf7", 5, 2),
        lambda: claims_more(seeds()["dicom-jpeg-2000"], b"\xff\x4f\xff\x51", 8, 4),
    ],
    ids=["RLE", "header alone", "JPEG", "JPEG 12", "lossless", "JPEG-LS", "JPEG 2000"],
)
def test_codestreams_that_claim_more_than_they_hold(tmp_path: Path, make: Callable[[], bytes]) -> None:
    refused(write(tmp_path, make()), "unpack to more than the picture|the compressed picture is .* pixels of")


def jpeg_that_claims(content: bytes, marker: bytes) -> bytes:
    at = content.index(marker)
    return content[: at + 5] + b"\xff\xf0\xff\xf0" + content[at + 9 :]


def claims_more(content: bytes, marker: bytes, offset: int, size: int) -> bytes:
    at = content.index(marker)
    return content[: at + offset] + b"\x0f" * (2 * size) + content[at + offset + 2 * size :]


@pytest.mark.usefixtures("bounded")
def test_a_compressed_picture_in_millions_of_pieces(tmp_path: Path) -> None:
    content = written(film(8), JPEG, saved(grey(), "JPEG"))
    at = content.rindex(b"\xfe\xff\xdd\xe0")
    added = b"\xfe\xff\0\xe0\0\0\0\0" * 30_000
    refused(
        write(tmp_path, content[:at] + added + content[at:]), "its compressed picture is in more than 20,000 pieces"
    )
    assert fragments(b"\xfe\xff\0\xe0\2\0\0\0ab" * 7 + b"\xfe\xff", 100) == 7


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(("width", "height"), [(4000, 5000), pytest.param(8000, 10_000, marks=pytest.mark.slow)])
def test_large_films_without_a_window(tmp_path: Path, width: int, height: int) -> None:
    """Counting and looking up made an int64 of every pixel: 640 MB of the largest film, and most of the time."""
    dataset = film(16, WindowCenter=None, WindowWidth=None)
    dataset.Rows, dataset.Columns = height, width
    set_pixels(dataset, np.tile(np.arange(width, dtype="<u2") * 8, (height, 1)).tobytes(), False)
    path = write(tmp_path, written(dataset))
    del dataset
    before = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    pixels = read_radiograph(path).pixels
    assert memory_mb("VmHWM") - before < 8 * width * height >> 20
    assert pixels.shape == (height, width)
    assert (pixels[0] == pixels[-1]).all()
    assert (int(pixels.min()), int(pixels.max())) == (0, 255)


# ---------------------------------------------------------------- no files at all


@pytest.mark.usefixtures("bounded")
def test_what_is_no_file(tmp_path: Path) -> None:
    refused(write(tmp_path, b""), "is empty")
    refused(tmp_path, "is a folder")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    refused(tmp_path / "a", r"cannot be opened \(Too many levels of symbolic links\)")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is not a regular file")
    for device in ("/dev/zero", "/dev/null", "/dev/urandom"):
        refused(Path(device), "is not a regular file")
    (tmp_path / "link").symlink_to("/dev/zero")
    refused(tmp_path / "link", "is not a regular file")
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.truncate(1 << 40)
    refused(tmp_path / "sparse", "MiB large, at most 256 MiB")


# ---------------------------------------------------------------- mutated files


def test_seeds_are_what_they_are_called(tmp_path: Path) -> None:
    """The encoders written for the seeds are right, and few seeds are refused: damaged ones would show little."""
    read = {}
    for name, content in seeds().items():
        try:
            read[name] = read_radiograph(write(tmp_path, content)).pixels
        except ImageError:
            continue
    assert set(seeds()) - set(read) == {
        "bmp", "gif", "dicom-frames", "dicom-palette", "jpeg-cmyk", "png-animated", "tiff-pages",
    }  # fmt: skip
    for name, bits in {"dicom-jpeg-lossless": 12, "dicom-jpeg-lossless-8": 8, "dicom-jpeg-process-14": 16}.items():
        expected = read_radiograph(write(tmp_path, written(film(bits)))).pixels
        np.testing.assert_array_equal(read[name], expected)
    blocks = read["dicom-explicit"].reshape(12, 8, 10, 8).astype(float).mean((1, 3))
    assert np.abs(read["dicom-jpeg-12"][::8, ::8] - blocks).max() <= 1
    assert (read["dicom-jpeg-12"].reshape(12, 8, 10, 8).std((1, 3)) == 0).all()
    difference = read["png-interlaced-grey-16"].astype(int) - read["png-grey-16"]  # of 12 bits and of 16
    assert np.abs(difference).max() <= 1


def test_seed_and_index_make_a_file_again() -> None:
    kept = mutated_files.corpus()
    made = [mutated_files.content(mutated_files.lineage(5, index, kept)) for index in range(30)]
    again = [mutated_files.content(mutated_files.lineage(5, index, kept)) for index in (29, 3, 3)]
    assert again == [made[29], made[3], made[3]]
    assert seeds.__wrapped__() == seeds(), "made once more, with no time and no new UID in them"
    assert len(set(made)) > 25


def test_offenders_are_counted() -> None:
    fine = {"outcome": "ok", "seconds": 0.1, "bytes": 5}
    assert mutated_files.problems(fine) == []
    assert mutated_files.problems({**fine, "crash": "SIGSEGV"}) == ["crash"]
    assert mutated_files.problems({**fine, "seconds": 5.1}) == ["hang"]
    assert mutated_files.problems({**fine, "outcome": "hang"}) == ["hang"]
    assert mutated_files.problems({**fine, "bytes": 10**9 + 1}) == ["memory"]
    assert mutated_files.problems({**fine, "over": True}) == ["memory"]


@pytest.mark.parametrize(
    "count", [mutated_files.QUICK, pytest.param(2000, marks=pytest.mark.slow)], ids=["quick", "thorough"]
)
def test_mutated_files_are_a_result_or_a_rejection(count: int) -> None:
    found = mutated_files.run(range(count), seed=mutated_files.QUICK + count, quiet=True)
    assert found.offenders == []
    assert found.files == count
    assert sum(sum(kind.values()) for kind in found.kinds.values()) == count
    outcomes = set(found.kinds["dicom"])
    assert "unreadable" in outcomes
    assert outcomes & {"ok", "review"}, "some are still films"
