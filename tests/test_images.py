"""images.py: what is stored is what is read, what cannot be judged is refused in one line."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from magsd_runtime import images
from magsd_runtime.errors import ImageError
from magsd_runtime.images import find_images, has_contrast, read_radiograph

RAMP = (np.arange(96)[:, None] * 3 + np.arange(80)[None, :] * 5).astype(np.uint16)  # (96, 80), 0..680


def png_bytes(
    samples: np.ndarray,
    *,
    depth: int = 8,
    colour: int = 0,
    before: tuple[tuple[bytes, bytes], ...] = (),
    size: tuple[int, int] | None = None,
) -> bytes:
    """A PNG written from the standard (W3C PNG, section 5), without any library."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = samples.shape[:2]
    width, height = size or (width, height)
    packed = samples.astype(">u2" if depth == 16 else np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    if depth < 8:
        per_byte = 8 // depth
        weights = 2 ** (depth * np.arange(per_byte - 1, -1, -1))
        packed = (samples.reshape(samples.shape[0], -1, per_byte) * weights).sum(2).astype(np.uint8)
        rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = b"".join(chunk(kind, data) for kind, data in before)
    idat = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + idat + chunk(b"IEND", b"")


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def grey(size: tuple[int, int] = (80, 96)) -> Image.Image:
    return Image.fromarray((RAMP % 256).astype(np.uint8)).resize(size)


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(ImageError, match=match) as caught:
        read_radiograph(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def luma(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """ITU-R BT.601 in floating point."""
    return 0.299 * red + 0.587 * green + 0.114 * blue


# ---------------------------------------------------------------- what is stored is what is read


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_grey_png_of_up_to_8_bits(tmp_path: Path, depth: int) -> None:
    samples = RAMP % 2**depth
    film = read_radiograph(write(tmp_path, "a.png", png_bytes(samples, depth=depth)))
    np.testing.assert_array_equal(film.pixels, samples * (255 // (2**depth - 1)))
    assert (film.width, film.height) == (80, 96)
    assert film.pixels.dtype == np.uint8
    assert film.source["bits_stored"] == depth


@pytest.mark.parametrize(
    ("maximum", "bits"),
    [(255, 8), (256, 10), (1023, 10), (1024, 12), (4095, 12), (4096, 14), (16384, 16), (65535, 16)],
)
@pytest.mark.parametrize("kind", ["png", "tif-little", "tif-big", "tif-packbits"])
def test_16_bits_are_scaled_by_the_bits_in_use(tmp_path: Path, maximum: int, bits: int, kind: str) -> None:
    samples = (RAMP.astype(np.int64) * maximum // RAMP.max()).astype(np.uint16)
    if kind == "png":
        path = write(tmp_path, "a.png", png_bytes(samples, depth=16))
    elif kind == "tif-big":
        path = write(tmp_path, "a.tif", tiff_16(samples, ">", photometric=1))
    else:
        options = {"compression": "packbits"} if kind == "tif-packbits" else {}
        path = write(tmp_path, "a.tif", encoded(Image.fromarray(samples), "TIFF", **options))
    film = read_radiograph(path)
    expected = np.floor(samples * 255.0 / (2**bits - 1) + 0.5)
    np.testing.assert_array_equal(film.pixels, expected)
    assert film.source["bits_stored"] == bits


def tiff_16(samples: np.ndarray, order: str, *, photometric: int) -> bytes:
    """An uncompressed 16-bit grey TIFF 6.0 of one strip, byte order ``<`` or ``>``."""
    height, width = samples.shape
    data = samples.astype(order + "u2").tobytes()
    entries = [(256, width), (257, height), (258, 16), (259, 1), (262, photometric), (273, 8)]
    entries += [(277, 1), (278, height), (279, len(data))]
    directory = struct.pack(order + "H", len(entries))
    directory += b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in entries)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    return head + data + directory + struct.pack(order + "I", 0)


def test_white_is_zero_is_inverted_at_8_and_16_bits(tmp_path: Path) -> None:
    wide = (RAMP.astype(np.int64) * 4095 // RAMP.max()).astype(np.uint16)
    film = read_radiograph(write(tmp_path, "a.tif", tiff_16(wide, "<", photometric=0)))
    np.testing.assert_array_equal(film.pixels, 255 - np.floor(wide * 255.0 / 4095 + 0.5))
    assert film.source["inverted"] is True

    narrow = encoded(grey(), "TIFF")
    at = narrow.index(struct.pack("<HHI", 262, 3, 1))
    flipped = narrow[: at + 8] + struct.pack("<H", 0) + narrow[at + 10 :]
    film = read_radiograph(write(tmp_path, "b.tif", flipped))
    np.testing.assert_array_equal(film.pixels, 255 - np.asarray(grey()))


def test_colour_becomes_luma(tmp_path: Path) -> None:
    samples = np.stack([RAMP % 256, (RAMP * 3) % 256, (RAMP * 7) % 256], axis=2)
    film = read_radiograph(write(tmp_path, "a.png", png_bytes(samples, colour=2)))
    assert np.abs(film.pixels - luma(*np.moveaxis(samples, 2, 0))).max() <= 0.51

    wide = samples * 257
    film = read_radiograph(write(tmp_path, "b.png", png_bytes(wide, depth=16, colour=2)))
    assert np.abs(film.pixels - luma(*np.moveaxis(samples, 2, 0))).max() <= 0.51
    assert film.source["bits_stored"] == 16


def test_16_bit_colour_of_fewer_bits_is_refused_not_read_as_black(tmp_path: Path) -> None:
    samples = np.stack([RAMP * 6] * 3, axis=2)  # 12 bits
    refused(write(tmp_path, "a.png", png_bytes(samples, depth=16, colour=2)), "save it as 16-bit greyscale")


@pytest.mark.parametrize("colour", [4, 6])
@pytest.mark.parametrize("depth", [8, 16])
def test_alpha_is_composed_over_black(tmp_path: Path, colour: int, depth: int) -> None:
    value, alpha = RAMP % 256, (RAMP * 11) % 256
    samples = np.stack([value] * {4: 1, 6: 3}[colour] + [alpha], axis=2)
    film = read_radiograph(
        write(tmp_path, "a.png", png_bytes(samples * (257 if depth == 16 else 1), depth=depth, colour=colour))
    )
    np.testing.assert_array_equal(film.pixels, np.floor(value * alpha / 255.0 + 0.5))
    assert film.source["alpha"] is True


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    table = np.stack([np.arange(256), 255 - np.arange(256), (np.arange(256) * 5) % 256], axis=1)
    opacity = (np.arange(256) * 3) % 256
    indices = RAMP % 256
    expected = luma(*table[indices].transpose(2, 0, 1))
    palette = (b"PLTE", table.astype(np.uint8).tobytes())
    film = read_radiograph(write(tmp_path, "a.png", png_bytes(indices, colour=3, before=(palette,))))
    assert np.abs(film.pixels - expected).max() <= 0.51

    transparency = (b"tRNS", opacity.astype(np.uint8).tobytes())
    film = read_radiograph(write(tmp_path, "b.png", png_bytes(indices, colour=3, before=(palette, transparency))))
    assert np.abs(film.pixels - expected * opacity[indices] / 255.0).max() <= 1.02
    assert film.source["alpha"] is True


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_becomes_black(tmp_path: Path, depth: int) -> None:
    samples = RAMP.astype(np.int64) % 2**depth + (60_000 if depth == 16 else 0)
    level = int(samples[5, 7]) or 1
    content = png_bytes(samples, depth=depth, before=((b"tRNS", struct.pack(">H", level)),))
    film = read_radiograph(write(tmp_path, "a.png", content))
    opaque = np.floor(samples * 255.0 / (2**depth - 1) + 0.5)
    np.testing.assert_array_equal(film.pixels, np.where(samples == level, 0, opaque))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "TIFF"])
def test_exif_orientation_is_applied_once(tmp_path: Path, orientation: int, format_name: str) -> None:
    stored = np.zeros((80, 128), np.uint8)
    stored[:16, :32], stored[:16, 96:], stored[64:, :32] = 80, 160, 240
    image = Image.fromarray(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    film = read_radiograph(write(tmp_path, "a", encoded(image, format_name, exif=exif, quality=95)))
    # The standard's table: where the stored row 0 and column 0 lie on the upright picture
    upright = {
        1: stored,
        2: np.fliplr(stored),
        3: np.rot90(stored, 2),
        4: np.flipud(stored),
        5: stored.T,
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).T,
        8: np.rot90(stored, 1),
    }[orientation]
    tolerance = 3 if format_name == "JPEG" else 0
    assert film.pixels.shape == upright.shape
    assert np.abs(film.pixels.astype(int) - upright).max() <= tolerance
    assert film.source["exif_orientation"] == orientation
    assert (film.source["width"], film.source["height"]) == (film.width, film.height)
    image.close()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_equals_pillow_without_chroma_shortcut(tmp_path: Path, mode: str) -> None:
    content = encoded(grey().convert(mode), "JPEG", quality=95)
    film = read_radiograph(write(tmp_path, "a.jpg", content))
    np.testing.assert_array_equal(film.pixels, np.asarray(Image.open(io.BytesIO(content)).convert("L")))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "group4", "jpeg"])
def test_tiff_compressions(tmp_path: Path, compression: str | None) -> None:
    image = grey().convert("1") if compression == "group4" else grey()
    film = read_radiograph(write(tmp_path, "a.tiff", encoded(image, "TIFF", compression=compression)))
    expected = np.asarray(image.convert("L")).astype(int)
    assert np.abs(film.pixels - expected).max() <= (40 if compression == "jpeg" else 0)


def test_source_is_json_and_records_a_wrong_extension(tmp_path: Path) -> None:
    film = read_radiograph(write(tmp_path, "a.jpg", encoded(grey(), "PNG")))
    assert json.loads(json.dumps(film.source)) == {
        "format": "PNG",
        "mode": "L",
        "width": 80,
        "height": 96,
        "bits_stored": 8,
        "alpha": False,
        "inverted": False,
        "exif_orientation": 1,
        "extension_mismatch": True,
    }
    for name in ("a.PNG", "without-extension"):
        film = read_radiograph(write(tmp_path, name, encoded(grey(), "PNG")))
        assert film.source["extension_mismatch"] is False


def test_pixels_can_be_written_and_are_contiguous(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    film = read_radiograph(write(tmp_path, "a.png", encoded(grey(), "PNG", exif=exif)))
    assert film.pixels.flags.c_contiguous


def test_has_contrast(tmp_path: Path) -> None:
    flat = read_radiograph(write(tmp_path, "flat.png", encoded(Image.new("L", (64, 64), 90), "PNG")))
    assert not has_contrast(flat)
    assert has_contrast(read_radiograph(write(tmp_path, "a.png", encoded(grey(), "PNG"))))


# ---------------------------------------------------------------- what cannot be judged is refused


def test_missing_empty_folder_pipe(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.png", "no such file")
    refused(write(tmp_path, "empty.png", b""), "is empty")
    refused(tmp_path, "is a folder")
    refused(tmp_path / "a" / ("x" * 300 + ".png"), "cannot be opened|no such file")
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "not a regular file")
    with pytest.raises(ImageError, match="cannot be opened"):
        read_radiograph("nul\0byte.png")
    with pytest.raises(ImageError, match=r"^'two\\nlines\.png': no such file"):
        read_radiograph("two\nlines.png")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (encoded(grey(), "GIF"), "is a GIF image, only DICOM, PNG, JPEG and TIFF are read"),
        (encoded(grey(), "BMP"), "is a BMP image"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "is a WebP image"),
        (b"%PDF-1.7\n", "is a PDF document"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "is a JPEG 2000 image"),
        (b"\0\0\0\x1cftypheic", "is a HEIC, AVIF or video file"),
        (bytes(128) + b"DICM" + bytes(64), "is a DICOM file without an image in it"),
        (b"\x08\0\5\0\x0a\0\0\0ISO_IR 100", "is a DICOM file without an image in it"),
        (b"<!DOCTYPE html>", "is a text file"),
        (b"hello, world", "not an image, or of an unknown kind"),
        (b"\0", "not an image, or of an unknown kind"),
    ],
)
def test_other_kinds_are_named(tmp_path: Path, content: bytes, match: str) -> None:
    refused(write(tmp_path, "film.png", content), match)


def test_cmyk_float_and_signed(tmp_path: Path) -> None:
    refused(write(tmp_path, "a.jpg", encoded(grey().convert("CMYK"), "JPEG")), "is a CMYK")
    refused(write(tmp_path, "a.tif", encoded(grey().convert("CMYK"), "TIFF")), "is a CMYK")
    refused(write(tmp_path, "b.tif", encoded(grey().convert("F"), "TIFF")), "pixels of kind F")
    signed = Image.fromarray(RAMP.astype(np.int32) - 100)
    refused(write(tmp_path, "c.tif", encoded(signed, "TIFF")), "pixels outside 0 to 65,535")
    large = Image.fromarray(RAMP.astype(np.int32) + 70_000)
    refused(write(tmp_path, "d.tif", encoded(large, "TIFF")), "pixels outside 0 to 65,535")


def test_several_frames(tmp_path: Path) -> None:
    frames = [grey(), ImageOps.invert(grey())]
    animated = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    refused(write(tmp_path, "a.png", animated), "holds animation frames")
    pages = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    refused(write(tmp_path, "a.tif", pages), "holds several pages")


def test_smaller_than_64_pixels(tmp_path: Path) -> None:
    refused(write(tmp_path, "a.png", encoded(grey((63, 200)), "PNG")), "is 63 x 200 pixels, at least 64")
    assert read_radiograph(write(tmp_path, "b.png", encoded(grey((64, 64)), "PNG"))).width == 64


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
def test_truncated(tmp_path: Path, format_name: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 80), np.uint8)
    content = encoded(Image.fromarray(noise), format_name)
    refused(write(tmp_path, "a", content[: int(len(content) * share)]), "damaged, cut short")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(
    "content",
    [
        png_bytes(RAMP % 256, size=(100_000, 100_000)),
        encoded(grey(), "JPEG").replace(struct.pack(">HH", 96, 80), struct.pack(">HH", 65_500, 65_500), 1),
        tiff_16(RAMP, "<", photometric=1).replace(
            struct.pack("<HHII", 256, 4, 1, 80), struct.pack("<HHII", 256, 4, 1, 10**6)
        ),
    ],
    ids=["png", "jpeg", "tiff"],
)
def test_huge_is_refused_from_the_header_in_bounded_memory(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, "huge", content)
    assert path.stat().st_size < 40_000
    refused(path, "declares .* pixels, at most 80,000,000")
    assert peak_growth_mib(path) < 30


def test_text_bombs_stay_in_bounded_memory(tmp_path: Path) -> None:
    text = b"Comment\0\0" + zlib.compress(bytes(400 << 20), 9)
    path = write(tmp_path, "one.png", png_bytes(RAMP % 256, before=((b"zTXt", text),)))
    assert path.stat().st_size < 500_000
    refused(path, "damaged, cut short or of an unsupported kind")
    assert peak_growth_mib(path) < 100

    chunks = tuple((b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1 << 20), 9)) for i in range(400))
    path = write(tmp_path, "many.png", png_bytes(RAMP % 256, before=chunks))
    refused(path, "damaged, cut short or of an unsupported kind")
    assert peak_growth_mib(path) < 200


def test_a_file_larger_than_the_limit_is_not_opened(tmp_path: Path) -> None:
    path = write(tmp_path, "a.png", encoded(grey(), "PNG"))
    os.truncate(path, images.MAX_FILE_BYTES + (2 << 20))  # sparse: takes no room
    refused(path, "is 258 MiB large, at most 256 MiB")


def peak_growth_mib(path: Path) -> float:
    """By how much reading ``path`` raises the peak memory of a fresh process."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    # Not getrusage: its maximum includes the process that forked this one
    code = (
        "import sys\n"
        "import PIL.PngImagePlugin, PIL.JpegImagePlugin, PIL.TiffImagePlugin\n"
        "from magsd_runtime.images import read_radiograph, ImageError\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "try:\n    read_radiograph(sys.argv[1])\nexcept ImageError:\n    pass\n"
        "print((peak() - before) / 1024)\n"
    )
    runtime = str(Path(images.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": runtime}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=environment, check=True
    )
    return float(done.stdout)


def test_pillow_settings_are_left_alone_and_few_plugins_are_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, "a.png", encoded(grey(), "PNG"))
    code = (
        "import sys\n"
        "from magsd_runtime.images import read_radiograph\n"
        "assert 'PIL' not in sys.modules\n"
        "read_radiograph(sys.argv[1])\n"
        "from PIL import Image, ImageFile\n"
        "assert Image.MAX_IMAGE_PIXELS == 1024 * 1024 * 1024 // 4 // 3\n"
        "assert ImageFile.LOAD_TRUNCATED_IMAGES is False\n"
        "print(*sorted(m for m in sys.modules if m.startswith('PIL.') and m.endswith('ImagePlugin')))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(images.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["PIL.PngImagePlugin"]


SEEDS = {
    "png-grey": png_bytes(RAMP % 256),
    "png-16": png_bytes(RAMP * 90, depth=16, before=((b"tRNS", b"\0\5"), (b"eXIf", b"II*\0\x08\0\0\0"))),
    "png-palette": png_bytes(RAMP % 256, colour=3, before=((b"PLTE", bytes(range(256)) * 3), (b"tRNS", bytes(256)))),
    "png-animated": encoded(grey(), "PNG", save_all=True, append_images=[ImageOps.invert(grey())]),
    "jpeg-grey": encoded(grey(), "JPEG"),
    "jpeg-colour": encoded(grey().convert("RGB"), "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0"),
    "jpeg-cmyk": encoded(grey().convert("CMYK"), "JPEG"),
    "tiff-grey": encoded(grey(), "TIFF"),
    "tiff-16": tiff_16(RAMP, ">", photometric=1),
    "tiff-lzw": encoded(grey().convert("RGB"), "TIFF", compression="tiff_lzw"),
    "tiff-jpeg": encoded(grey(), "TIFF", compression="jpeg"),
    "tiff-pages": encoded(grey(), "TIFF", save_all=True, append_images=[grey()]),
}


@pytest.mark.filterwarnings("ignore:::PIL")
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_content_raises_anything_but_image_error(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(SEEDS[data.draw(st.sampled_from(sorted(SEEDS)))])
    # Headers steer the decoders, so half of the changes fall into the first bytes
    near = st.integers(0, min(len(content), 200) - 1)
    places = st.one_of(near, st.integers(0, len(content) - 1))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)):
        content[place] = value
    if data.draw(st.booleans()):
        del content[data.draw(places) :]
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(content)))
        content[start:start] = data.draw(st.binary(max_size=20))
    path = write(tmp_path, "mutated", bytes(content))
    try:
        film = read_radiograph(path)
    except ImageError as error:
        film, message = None, str(error)
    else:
        message = ""
    if film is None:
        assert message.startswith(str(path))
        assert "\n" not in message
        return
    assert film.pixels.dtype == np.uint8
    assert min(film.pixels.shape) >= images.MIN_SIDE
    json.dumps(film.source, allow_nan=False)


@pytest.mark.filterwarnings("ignore:::PIL")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*"]),
    rest=st.binary(max_size=300),
)
def test_random_bytes_raise_image_error(tmp_path: Path, start: bytes, rest: bytes) -> None:
    path = write(tmp_path, "random", start + rest)
    with pytest.raises(ImageError):
        read_radiograph(path)


# ---------------------------------------------------------------- finding


def test_find_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "b/2.PNG",
        "b/1.jpeg",
        "b/deep/3.tif",
        "b/notes.txt",
        "b/.hidden.png",
        "b/.git/x.png",
        "[1].png",
        "1.png",
    ):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    folder = [Path("b/1.jpeg"), Path("b/2.PNG"), Path("b/deep/3.tif")]
    assert find_images(["b"]) == folder
    assert find_images(["b/notes.txt", "gone.png", "b"]) == [Path("b/notes.txt"), Path("gone.png"), *folder]
    assert find_images(["b/*.[jP]*"]) == folder[:2]
    assert find_images(["b/**/*.tif"]) == folder[2:]
    assert find_images(["*"]) == [Path("1.png"), Path("[1].png"), *folder]
    assert find_images(["[1].png"]) == [Path("[1].png")], "a file of that name goes before the pattern"
    assert find_images(["none-*.png"]) == [Path("none-*.png")], "no match stays, to be reported"
    assert find_images(["1.png", "b/1.jpeg", "b", "1.png"]) == [Path("1.png"), *folder], "each once"
    assert find_images([]) == []


def test_find_images_from_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x y.png").write_bytes(b"x")
    lines = io.StringIO("x y.png\r\n\ngone.png\n-\n")
    assert find_images(["-", "z.png"], stdin=lines) == [
        Path("x y.png"),
        Path("gone.png"),
        Path("-"),
        Path("z.png"),
    ]
    raw = io.TextIOWrapper(io.BytesIO("ü.png\n".encode() + b"\xff.png\n"), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", raw)
    assert find_images(["-"]) == [Path("ü.png"), Path(os.fsdecode(b"\xff.png"))]


# ---------------------------------------------------------------- real files


@pytest.mark.data
def test_real_films_equal_pillow(cxr: Path) -> None:
    paths = [path for path in find_images([str(cxr / "originals")]) if path.suffix != ".dcm"]
    assert len(paths) == 11
    for path in paths:
        film = read_radiograph(path)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("L"))
        if film.source["alpha"]:
            black = Image.new("RGBA", Image.open(path).size, "black")
            composed = Image.alpha_composite(black, Image.open(path).convert("RGBA"))
            assert np.abs(film.pixels.astype(int) - np.asarray(composed.convert("L"))).max() <= 1
        else:
            np.testing.assert_array_equal(film.pixels, expected)
        assert has_contrast(film)
