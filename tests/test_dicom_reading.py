"""DICOM files as radiographs: transfer syntaxes, real files, refusals, and nothing of the patient in any message."""

from __future__ import annotations

import copy
import io
import json
import logging
import shutil
import subprocess
import warnings
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import tiny_bundle
from dicom_film import NAME, film
from magsd_runtime.dicom import codecs, parsing
from magsd_runtime.dicom.codestreams import read_jpeg, read_jpeg_2000
from magsd_runtime.dicom.reading import read_dicom
from magsd_runtime.errors import ImageError
from magsd_runtime.images import Radiograph, find_images, read_radiograph
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.preprocessing import PreprocessingSpec, standardize

pydicom = pytest.importorskip("pydicom")

EXPLICIT, IMPLICIT, BIG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
DEFLATED, RLE, BASELINE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50"
JPEG_LS, JPEG_LS_NEAR = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"
J2K_LOSSLESS, J2K = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"
SC = "1.2.840.10008.5.1.4.1.1.7"


def bits_film(bits: int = 12, *, signed: bool = False, **attributes: Any) -> Any:
    """The film of dicom_film with ``bits`` stored and a window over all of them."""
    allocated = 8 if bits == 8 else 16
    dataset = film(
        BitsAllocated=allocated, BitsStored=bits, HighBit=bits - 1, PixelRepresentation=int(signed),
        WindowCenter=str(0 if signed else 2 ** (bits - 1)), WindowWidth=str(2**bits),
    )  # fmt: skip
    from dicom_film import stored_pixels

    pixels = stored_pixels(bits).astype(np.int32) - (2 ** (bits - 1) if signed else 0)
    array = pixels.astype(f"{'i' if signed else 'u'}{allocated // 8}")
    dataset.PixelData = array.tobytes()
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


def colour_film() -> Any:
    """A colour secondary capture, RGB uint8, of blocks large enough for a JPEG."""
    rng = np.random.default_rng(3)
    pixels = np.kron(rng.integers(0, 256, (10, 9, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    dataset = film(
        SOPClassUID=SC, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, BitsAllocated=8,
        BitsStored=8, HighBit=7, Rows=160, Columns=144, WindowCenter=None, WindowWidth=None,
        PresentationLUTShape=None, RescaleSlope=None, RescaleIntercept=None, RescaleType=None,
    )  # fmt: skip
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OB"
    return dataset, pixels


def encode(dataset: Any, syntax: str = EXPLICIT) -> bytes:
    """The dataset as a file in a transfer syntax, by pydicom's own writer and encoders."""
    dataset = copy.deepcopy(dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if syntax in (EXPLICIT, IMPLICIT, BIG, DEFLATED):
            dataset.file_meta.TransferSyntaxUID = syntax
            if syntax == BIG and dataset.BitsAllocated == 16:
                dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        elif syntax in (JPEG_LS_NEAR, J2K):
            dataset.compress(syntax, **({"jls_error": 2} if syntax == JPEG_LS_NEAR else {"j2k_cr": [10]}))
        else:
            dataset.compress(syntax)
        out = io.BytesIO()
        dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def encapsulated(dataset: Any, frame: bytes, syntax: str) -> bytes:
    """The dataset with ``frame`` as its only compressed frame, whatever it holds."""
    from pydicom.encaps import encapsulate

    dataset = copy.deepcopy(dataset)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def jpeg(pixels: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **options)
    return out.getvalue()


def refused(content: bytes, match: str) -> str:
    with pytest.raises(ImageError, match=match) as caught:
        read_dicom(content, "film.dcm")
    message = str(caught.value)
    assert message.startswith("film.dcm: ")
    assert "\n" not in message
    for identity in ("Muller", "Müller", "Jürgen", "Jurgen", "4711", "19610203", "1961", "ACC77", "Doe"):
        assert identity not in message
    return message


# ---------------------------------------------------------------- transfer syntaxes


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG, DEFLATED, RLE, JPEG_LS, J2K_LOSSLESS])
@pytest.mark.parametrize(("bits", "signed"), [(8, False), (10, False), (12, True), (16, False), (16, True)])
def test_lossless_syntaxes_give_the_same_film(syntax: str, bits: int, signed: bool) -> None:
    if syntax in (JPEG_LS, J2K_LOSSLESS):
        pytest.importorskip("jpeg_ls" if syntax == JPEG_LS else "openjpeg")
    if syntax == JPEG_LS and signed:
        pytest.skip("pyjpegls encodes no signed pixels")
    from dicom_film import stored_pixels

    read = read_dicom(encode(bits_film(bits, signed=signed), syntax))
    assert read.source["dicom"]["transfer_syntax"] == syntax
    assert read.source["bits_stored"] == bits
    stored = stored_pixels(bits).astype(float)
    # The window covers all bits, so that the film is a linear spread of them: C.11.2.1.2.1, width 2**bits
    expected = np.clip((stored - (2 ** (bits - 1) - 0.5)) / (2**bits - 1) + 0.5, 0, 1) * 255
    assert np.abs(read.pixels - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(("syntax", "module"), [(JPEG_LS_NEAR, "jpeg_ls"), (J2K, "openjpeg")])
def test_lossy_syntaxes_stay_close(syntax: str, module: str) -> None:
    pytest.importorskip(module)
    plain, lossy = read_dicom(encode(bits_film(12))), read_dicom(encode(bits_film(12), syntax))
    assert np.abs(plain.pixels.astype(int) - lossy.pixels).max() <= 4


def test_jpeg_baseline_is_pillows_picture() -> None:
    from dicom_film import stored_pixels

    frame = jpeg(stored_pixels(8).astype(np.uint8), quality=90)
    dataset = bits_film(8, WindowCenter=None, WindowWidth=None)
    read = read_dicom(encapsulated(dataset, frame, BASELINE))
    np.testing.assert_array_equal(read.pixels, np.asarray(Image.open(io.BytesIO(frame))))
    assert read.source["dicom"]["window"] == {"kind": "full"}


@pytest.mark.parametrize("option", ["+e1", "+el"], ids=["selection value 1", "process 14"])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_jpeg_lossless(option: str, bits: int, tmp_path: Path) -> None:
    pytest.importorskip("libjpeg")
    if shutil.which("dcmcjpeg") is None:
        pytest.skip("no dcmcjpeg (DCMTK) to encode with")
    plain, compressed = tmp_path / "plain.dcm", tmp_path / "compressed.dcm"
    plain.write_bytes(encode(bits_film(bits)))
    subprocess.run(["dcmcjpeg", option, "+ua", str(plain), str(compressed)], check=True, timeout=60)
    assert read_radiograph(compressed).source["dicom"]["transfer_syntax"] in codecs.FAMILIES[4].syntaxes
    np.testing.assert_array_equal(read_radiograph(compressed).pixels, read_radiograph(plain).pixels)


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG])
def test_files_without_preamble_and_meta(syntax: str) -> None:
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset

    dataset = bits_film(12)
    if syntax == BIG:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    out = DicomBytesIO()
    out.is_little_endian, out.is_implicit_VR = syntax != BIG, syntax == IMPLICIT
    del dataset.file_meta
    write_dataset(out, dataset)
    content = out.getvalue()
    assert parsing.looks_like_dicom(content[:132])
    np.testing.assert_array_equal(read_dicom(content).pixels, read_dicom(encode(bits_film(12))).pixels)


def test_high_bits_that_are_not_the_lowest() -> None:
    dataset = bits_film(12, HighBit=13)
    shifted = np.frombuffer(dataset.PixelData, np.uint16) << 2 | 0b1100_0000_0000_0011  # others' bits beside ours
    dataset.PixelData = shifted.astype(np.uint16).tobytes()
    for syntax in (EXPLICIT, RLE):
        np.testing.assert_array_equal(
            read_dicom(encode(dataset, syntax)).pixels, read_dicom(encode(bits_film(12))).pixels
        )


@pytest.mark.parametrize("syntax", [EXPLICIT, BIG, DEFLATED, RLE])
@pytest.mark.parametrize("planar", [0, 1])
def test_colour_captures_become_grey_as_a_png_does(syntax: str, planar: int) -> None:
    dataset, pixels = colour_film()
    if planar:
        if syntax == RLE:
            pytest.skip("RLE is planar in itself")
        dataset.PlanarConfiguration = 1
        dataset.PixelData = np.moveaxis(pixels, 2, 0).tobytes()
    read = read_dicom(encode(dataset, syntax))
    np.testing.assert_array_equal(read.pixels, np.asarray(Image.fromarray(pixels).convert("L")))
    assert read.source["dicom"]["window"] == {"kind": "colour"}


def test_colour_jpeg() -> None:
    dataset, pixels = colour_film()
    dataset.PhotometricInterpretation = "YBR_FULL"
    read = read_dicom(encapsulated(dataset, jpeg(pixels, quality=95, subsampling=0), BASELINE))
    assert np.abs(read.pixels.astype(int) - np.asarray(Image.fromarray(pixels).convert("L"))).max() <= 8


# ---------------------------------------------------------------- the grayscale pipeline from real elements


def item(**attributes: Any) -> Any:
    from pydicom import Dataset

    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG])
@pytest.mark.parametrize("packed", [False, True])
def test_lookup_tables_in_every_encoding(syntax: str, packed: bool) -> None:
    from dicom_film import stored_pixels

    table = (255 - np.arange(256)).astype(np.uint8) if packed else (4 * np.arange(256)[::-1]).astype(np.uint16)
    data = table.tobytes() if packed else table.astype(">u2" if syntax == BIG else "<u2").tobytes()
    lut = item(LUTDescriptor=[256, 0, 8 if packed else 10], LUTData=data)
    lut["LUTData"].VR = "OW"
    lut["LUTDescriptor"].VR = "US"
    dataset = bits_film(8, VOILUTSequence=[lut])
    read = read_dicom(encode(dataset, syntax))
    assert read.source["dicom"]["window"] == {"kind": "lut"}  # before the window that is there too
    expected = table[stored_pixels(8)] * (1 if packed else 255 / 1023)
    assert np.abs(read.pixels - expected).max() <= 0.5 + 1e-6


def test_signed_first_entry_of_a_modality_lut() -> None:
    lut = item(LUTDescriptor=[4096, 65536 - 2048, 16], LUTData=np.arange(0, 65536, 16, np.uint16).tobytes())
    lut["LUTDescriptor"].VR = "US"
    lut["LUTData"].VR = "OW"
    dataset = bits_film(12, signed=True, ModalityLUTSequence=[lut], WindowCenter="32768", WindowWidth="65536")
    for syntax in (EXPLICIT, IMPLICIT):
        read = read_dicom(encode(dataset, syntax))
        assert read.source["dicom"]["modality_lut"] == "lut"
        plain = read_dicom(encode(bits_film(12))).pixels
        assert np.abs(read.pixels.astype(int) - plain).max() <= 1


def test_inversion_comes_last_and_padding_stays_black() -> None:
    dataset = bits_film(12, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE")
    read, plain = read_dicom(encode(dataset)), read_dicom(encode(bits_film(12)))
    assert np.abs(read.pixels.astype(int) - (255 - plain.pixels.astype(int))).max() <= 1
    assert read.source["inverted"] is True
    stored = np.frombuffer(dataset.PixelData, np.uint16).copy()
    stored[:1000] = 4095
    dataset.PixelData, dataset.PixelPaddingValue = stored.tobytes(), 4095
    padded = read_dicom(encode(dataset))
    assert (padded.pixels.ravel()[:1000] == 0).all()
    assert padded.source["dicom"]["padded"] == pytest.approx((stored == 4095).mean(), abs=1e-6)


def test_a_film_without_a_window_says_so() -> None:
    read = read_dicom(encode(bits_film(12, WindowCenter=None, WindowWidth=None)))
    assert read.source["dicom"]["window"]["kind"] == "percentile"
    assert (read.pixels.min(), read.pixels.max()) == (0, 255)
    for broken in ("0", "-5"):
        assert read_dicom(encode(bits_film(12, WindowWidth=broken))).source["dicom"]["window"]["kind"] == "percentile"


def test_the_first_of_several_windows_is_taken() -> None:
    read = read_dicom(encode(bits_film(12, WindowCenter=["100", "2048"], WindowWidth=["300", "4096"])))
    assert read.source["dicom"]["window"] == {"kind": "window", "center": 100.0, "width": 300.0, "function": "LINEAR"}


# ---------------------------------------------------------------- parity with a picture of the same film


def windowed(dataset: Any, center: float, width: float) -> np.ndarray:
    """The film as a viewer exports it, by the formula of C.11.2.1.2.1 and the nearest level, uint8."""
    stored = np.frombuffer(dataset.PixelData, np.uint16).reshape(dataset.Rows, dataset.Columns).astype(float)
    grey = np.clip((stored - (center - 0.5)) / (width - 1) + 0.5, 0, 1)
    return np.rint(255 * (1 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey)).astype(np.uint8)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("exporter", ["formula", "dcm2pnm"])
def test_dicom_and_png_give_the_same_standardized_image_and_label(
    photometric: str, exporter: str, tmp_path: Path
) -> None:
    dataset = bits_film(
        12, PhotometricInterpretation=photometric, WindowCenter="1900", WindowWidth="3000", PresentationLUTShape=None
    )
    path, picture = tmp_path / "film.dcm", tmp_path / "film.png"
    path.write_bytes(encode(dataset))
    if exporter == "dcm2pnm":
        if shutil.which("dcm2pnm") is None:
            pytest.skip("no dcm2pnm (DCMTK)")
        subprocess.run(["dcm2pnm", "+Wi", "1", str(path), str(tmp_path / "film.pgm")], check=True, timeout=60)
        pixels = np.asarray(Image.open(tmp_path / "film.pgm").convert("L"))
    else:
        pixels = windowed(dataset, 1900, 3000)
    cv2.imwrite(str(picture), pixels)
    difference = np.abs(read_radiograph(path).pixels.astype(int) - read_radiograph(picture).pixels).max()
    with Pipeline.open(tiny_bundle.build(tmp_path / "bundle")) as pipeline:
        spec = pipeline.bundle.preprocessing
        images = [standardize(read_radiograph(one).pixels, spec).astype(int) for one in (path, picture)]
        first, second = (pipeline.predict(one).prediction for one in (path, picture))
    assert first.label == second.label is not None
    if exporter == "formula":
        assert difference == 0
        assert np.abs(images[0] - images[1]).max() <= 1
        assert first.probability == pytest.approx(second.probability, abs=1e-6)
    else:  # cuts the fraction off where we round; CLAHE makes several levels of one where a phantom is smooth
        assert difference <= 1
        assert np.abs(images[0] - images[1]).max() <= 16


@pytest.mark.data
def test_real_films_as_dicom_and_as_png_are_the_same(cxr: Path, tmp_path: Path) -> None:
    """Real films stretched to 12 bits, stored as DICOM with a window that gives their own greys back."""
    spec = PreprocessingSpec()
    for path in sorted((cxr / "images" / "nih").glob("*.jpg"))[:5]:
        pixels = read_radiograph(path).pixels
        dataset = bits_film(12, Rows=pixels.shape[0], Columns=pixels.shape[1])
        dataset.PixelData = (pixels.astype(np.uint16) * 16 + 5).tobytes()
        dataset.VOILUTFunction, dataset.WindowCenter, dataset.WindowWidth = "LINEAR_EXACT", "2040", "4080"
        film = read_dicom(encode(dataset))
        np.testing.assert_array_equal(film.pixels, pixels)
        np.testing.assert_array_equal(standardize(film.pixels, spec), standardize(pixels, spec))


@pytest.mark.data
def test_the_two_real_files(cxr: Path) -> None:
    """Both hold the same JPEG; what one calls MONOCHROME1 is its negative."""
    normal = next((cxr / "originals").glob("1.2.276*.dcm"))
    inverted = cxr / "originals" / "Fake_MONOHR1.dcm"
    content = normal.read_bytes()
    frame = content[content.index(b"\xff\xd8\xff") :]
    expected = np.asarray(Image.open(io.BytesIO(frame)).convert("L"))
    films = read_radiograph(normal), read_radiograph(inverted)
    np.testing.assert_array_equal(films[0].pixels, expected)
    np.testing.assert_array_equal(films[1].pixels, 255 - expected)
    assert [one.source["inverted"] for one in films] == [False, True]
    for one in films:
        facts = one.source["dicom"]
        assert (facts["modality"], facts["view_position"], facts["body_part"]) == ("CR", "PA", "CHEST")
        assert facts["pixel_spacing_mm"] == [0.168, 0.168]
        assert facts["window"] == {"kind": "full"}
        json.dumps(one.source, allow_nan=False)
    spec = PreprocessingSpec()
    np.testing.assert_array_equal(standardize(films[0].pixels, spec), standardize(expected, spec))
    assert {normal, inverted} <= set(find_images([str(cxr / "originals")]))


# ---------------------------------------------------------------- files that pydicom ships

SHIPPED = {
    "SC_rgb_jpeg_dcmtk.dcm": (100, 100),
    "SC_rgb_rle.dcm": (100, 100),
    "SC_ybr_full_422_uncompressed.dcm": (100, 100),
    "SC_rgb_dcmtk_+eb+cy+s2.dcm": (100, 100),
    "SC_rgb_gdcm_KY.dcm": (100, 100),
    "SC_jpeg_no_color_transform.dcm": (256, 256),
    "JPEG2000.dcm": (1024, 256),
    "image_dfl.dcm": (512, 512),
    "CT_small.dcm": "of the kind CT Image,",
    "MR_small.dcm": "of the kind MR Image,",
    "examples_rgb_color.dcm": "of the kind Ultrasound Image,",
    "rtplan.dcm": "of the kind RT Plan,",
    "test-SR.dcm": "of the kind Comprehensive SR,",
    "liver_1frame.dcm": "of the kind Segmentation,",
    "waveform_ecg.dcm": "Waveform",
    "SC_rgb_rle_2frame.dcm": "multi-frame",
    "SC_rgb_rle_16bit.dcm": "only colour of 8 bits",
    "SC_rgb_small_odd.dcm": "at least 64 on each side",
    "GDCMJ2K_TextGBR.dcm": "no picture header",
    "nested_priv_SQ.dcm": "no Rows and Columns|without an image",
    "priv_SQ.dcm": "without an image",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_files_that_pydicom_ships(name: str) -> None:
    from pydicom.data import get_testdata_file

    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip("this pydicom does not ship it")
    expected = SHIPPED[name]
    if isinstance(expected, str):
        with pytest.raises(ImageError, match=expected):
            read_radiograph(str(path))
        return
    try:
        read = read_radiograph(str(path))
    except ImageError as error:
        assert "magsd[dicom]" in str(error), error  # noqa: PT017
        pytest.skip("its codec is not installed")
    assert read.pixels.shape == expected
    assert len(np.unique(read.pixels)) > 8


@pytest.mark.parametrize(
    ("compressed", "plain"),
    [
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("MR_small_bigendian.dcm", "MR_small.dcm"),
        ("MR_small_implicit.dcm", "MR_small.dcm"),
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
    ],
)
def test_other_peoples_encoders(compressed: str, plain: str) -> None:
    """The same MR image, called a film, by several encoders."""
    from pydicom.data import get_testdata_file

    films = []
    for name in (compressed, plain):
        path = get_testdata_file(name, download=False)
        if path is None:
            pytest.skip("this pydicom does not ship it")
        mr = b"1.2.840.10008.5.1.4.1.1.4\0"
        content = Path(str(path)).read_bytes()
        assert mr in content
        films.append(read_dicom(content.replace(mr, b"1.2.840.10008.5.1.4.1.1.7\0")))
    np.testing.assert_array_equal(films[0].pixels, films[1].pixels)


# ---------------------------------------------------------------- refusals


def without(*keywords: str) -> Any:
    dataset = bits_film(12)
    for keyword in keywords:
        delattr(dataset, keyword)
    return dataset


@pytest.mark.parametrize(
    ("attributes", "match"),
    [
        ({"NumberOfFrames": "2"}, "multi-frame image, expected one"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "of the kind CT Image, expected a film: CR, DX"),
        ({"SOPClassUID": "1.2.840.10008.1.3.10"}, "DICOMDIR"),
        ({"SOPClassUID": "1.2.3.4"}, "private or unknown"),
        ({"Rows": 60_000, "Columns": 60_000}, "declares 60,000 x 60,000 pixels, at most 80,000,000"),
        ({"Rows": 65_535, "Columns": 64}, "32,000 on a side"),
        ({"Rows": 0}, "no Rows and Columns"),
        ({"Rows": 20}, "at least 64"),
        ({"Rows": 400}, "cut short: 39,000 of 104,000 bytes"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "palette colour"),
        ({"PhotometricInterpretation": "RGB"}, "pixels RGB with 1 samples"),
        ({"PhotometricInterpretation": "Müller Jürgen"}, "of another kind than greyscale and RGB"),
        ({"BitsStored": 20, "HighBit": 19, "BitsAllocated": 32}, "20 bits stored in 32"),
        ({"BitsStored": 6, "HighBit": 5}, "only greyscale of 8 to 16 bits"),
        ({"HighBit": 3}, "highest 3"),
        ({"RescaleSlope": "0"}, "Rescale Slope of 0"),
        ({"VOILUTSequence": [item(LUTDescriptor=[256, 0, 8])]}, "lookup table without"),
        ({"VOILUTSequence": [item(LUTDescriptor=[256, 0, 16], LUTData=bytes(100))]}, "of 50 entries, 256 are declared"),
    ],
)  # fmt: skip
def test_refusals(attributes: dict[str, Any], match: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = bits_film(12, **attributes)
        for sequence in ("VOILUTSequence",):
            for table in dataset.get(sequence, ()):
                table["LUTDescriptor"].VR = "US"
                if "LUTData" in table:
                    table["LUTData"].VR = "OW"
        refused(encode(dataset), match)


def test_no_pixels() -> None:
    refused(encode(without("PixelData")), "ends before its pixel data, or has none")
    refused(encode(without("PixelData", "Rows")), "without an image")
    content = encode(bits_film(12))
    refused(content[: len(content) - 20_000], "cut short: 19,000 of 39,000 bytes")
    refused(content[:800], "ends before its pixel data|without an image|no Rows|damaged")
    dataset = without("PixelData")
    dataset.FloatPixelData = bytes(4 * 130 * 150)
    refused(encode(dataset), "floating point")


@pytest.mark.parametrize("syntax", [JPEG_LS, J2K_LOSSLESS, RLE, BASELINE])
def test_truncated_compressed_pixels(syntax: str) -> None:
    if syntax == BASELINE:
        from dicom_film import stored_pixels

        dataset, frame = bits_film(8), jpeg(stored_pixels(8).astype(np.uint8))
    else:
        pytest.importorskip({JPEG_LS: "jpeg_ls", J2K_LOSSLESS: "openjpeg", RLE: "pydicom"}[syntax])
        from pydicom.encaps import get_frame

        dataset = bits_film(12)
        compressed = pydicom.dcmread(io.BytesIO(encode(dataset, syntax)))
        frame = get_frame(compressed.PixelData, 0, number_of_frames=1)
    assert isinstance(read_dicom(encapsulated(dataset, frame, syntax)), Radiograph)
    refused(encapsulated(dataset, frame[: len(frame) // 2 // 2 * 2], syntax), "cut short|damaged")
    refused(encapsulated(dataset, bytes(100), syntax), "damaged")


def test_a_file_that_ends_within_compressed_pixels() -> None:
    pytest.importorskip("jpeg_ls")
    content = encode(bits_film(12), JPEG_LS)
    refused(content[:-3000], "cut short|damaged|ends before")


@pytest.mark.parametrize(
    ("syntax", "match"),
    [
        ("1.2.840.10008.1.2.4.100", "encoded MPEG2"),
        ("1.2.840.10008.1.2.4.99", "private or unknown way, which is not read: export it uncompressed"),
        ("1.2.840.99999.1.2.4.50", "private or unknown way"),
    ],
)
def test_unknown_transfer_syntaxes(syntax: str, match: str) -> None:
    content = encapsulated(bits_film(12), bytes(100), "1.2.840.10008.1.2.4.100")
    element = b"\x02\0\x10\0UI\x18\x001.2.840.10008.1.2.4.100\0"
    assert element in content
    refused(content.replace(element, element[:8] + syntax.encode().ljust(24, b"\0")), match)


def test_a_missing_codec_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.pixels.decoders.base import Decoder

    monkeypatch.setattr(Decoder, "is_available", property(lambda self: False))
    for syntax, packages in {
        "1.2.840.10008.1.2.4.70": "pylibjpeg pylibjpeg-libjpeg",
        JPEG_LS: "pyjpegls",
        "1.2.840.10008.1.2.4.201": "pylibjpeg pylibjpeg-openjpeg",
    }.items():
        message = refused(encapsulated(bits_film(12), bytes(100), syntax), "pip install 'magsd\\[dicom\\]'")
        assert message.endswith(f"pip install {packages})")


def test_pillow_is_not_trusted_with_12_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.pixels.decoders.base import Decoder

    monkeypatch.setattr(Decoder, "available_plugins", property(lambda self: ("pillow",)))
    refused(encapsulated(bits_film(12), bytes(100), codecs.JPEG_12_BIT), "JPEG 12 bit.*pylibjpeg-libjpeg")


def test_the_codec_table_is_pydicoms() -> None:
    from importlib import metadata

    from pydicom.pixels.decoders.base import get_decoder

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    found = codecs.decodable(version)
    for family in codecs.FAMILIES:
        for syntax in family.syntaxes:
            plugins = get_decoder(syntax).available_plugins
            able = get_decoder(syntax).is_available and (syntax != codecs.JPEG_12_BIT or plugins != ("pillow",))
            assert able == found[family.name], family.name
    nothing = codecs.decodable(lambda name: "1" if name in ("pydicom", "pillow") else None)
    assert [name for name, able in nothing.items() if able] == ["uncompressed", "RLE", "JPEG 8 bit", "JPEG 2000"]


# ---------------------------------------------------------------- bombs


def test_a_deflated_bomb_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "MAX_INFLATED", 1 << 20)
    content = encode(bits_film(12), DEFLATED)
    start = 132
    meta_length = int.from_bytes(content[start + 8 : start + 12], "little")
    head = content[: start + 12 + meta_length]
    packer = zlib.compressobj(wbits=-15)
    refused(head + packer.compress(bytes(64 << 20)) + packer.flush(), "grows beyond 1 MiB")


def test_a_codestream_larger_than_its_header_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.pixels.decoders.base import Decoder

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("decoded")

    monkeypatch.setattr(Decoder, "as_array", fail)
    sof = b"\xff\xd8\xff\xc0\0\x0b\x08" + (60_000).to_bytes(2, "big") * 2 + b"\1\1\x11\0"
    refused(encapsulated(bits_film(8), sof + bytes(40) + b"\xff\xd9", BASELINE), "60,000 x 60,000 pixels of 1 samples")
    siz = b"\xff\x4f\xff\x51\0\x29\0\0" + (2**31).to_bytes(4, "big") * 2 + bytes(24) + b"\0\1\x0b\1\1"
    refused(encapsulated(bits_film(12), siz + bytes(40) + b"\xff\xd9", J2K), "2,147,483,648 x 2,147,483,648")


def test_an_rle_bomb() -> None:
    segment = b"\x81\0" * 200_000  # unpacks to 25 MB
    frame = (2).to_bytes(4, "little") + (64).to_bytes(4, "little") + (64 + len(segment)).to_bytes(4, "little")
    frame += bytes(52) + segment * 2
    refused(encapsulated(bits_film(12), frame, RLE), "unpack to more than the picture")
    assert isinstance(read_dicom(encode(bits_film(12), RLE)), Radiograph)


def test_sequences_within_sequences() -> None:
    content = encode(bits_film(12))
    at = content.index(b"\x28\0\x02\0US")
    deep = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" * 20_000
    refused(content[:at] + deep, "damaged|without an image|no Rows")


def test_the_sizes_in_codestreams() -> None:
    pytest.importorskip("openjpeg")
    from pydicom.encaps import get_frame

    from dicom_film import COLUMNS, ROWS, stored_pixels

    found = read_jpeg(jpeg(stored_pixels(8).astype(np.uint8), progressive=True, exif=b"Exif\0\0" + bytes(50)))
    assert (found.width, found.height, found.components, found.precision) == (COLUMNS, ROWS, 1, 8)  # type: ignore[union-attr]
    compressed = pydicom.dcmread(io.BytesIO(encode(bits_film(12), J2K_LOSSLESS)))
    found = read_jpeg_2000(get_frame(compressed.PixelData, 0, number_of_frames=1))
    assert (found.width, found.height, found.components, found.precision) == (COLUMNS, ROWS, 1, 12)  # type: ignore[union-attr]


@given(st.binary(max_size=200))
@example(b"\xff\xd8\xff\xff\xff\xff\xc0")
@example(b"\xff\xd8\xff\xe0\0\0")
def test_sizes_of_anything(data: bytes) -> None:
    for head in (b"", b"\xff\xd8", b"\xff\x4f\xff\x51"):
        read_jpeg(head + data)
        read_jpeg_2000(head + data)


SMALL = {
    name: encode(bits_film(12), syntax)
    for name, syntax in {"plain": EXPLICIT, "deflated": DEFLATED, "rle": RLE}.items()
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(SMALL)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0.001, 1),
)
def test_mutated_files_are_read_or_refused(kind: str, changes: list[tuple[float, int]], kept: float) -> None:
    content = bytearray(SMALL[kind])
    header = len(content) - 39_000 if kind == "plain" else min(len(content), 2500)
    for where, byte in changes:  # in the header mostly: what is in the pixels changes nothing
        content[int(where * header)] = byte
    content = content[: max(1, int(kept * len(content)))] if kept < 0.3 else content
    try:
        read = read_dicom(bytes(content), "film.dcm")
    except ImageError as error:
        assert str(error).startswith("film.dcm: ")  # noqa: PT017
    else:
        assert read.pixels.dtype == np.uint8


# ---------------------------------------------------------------- by content, and in folders


def test_a_name_says_nothing(tmp_path: Path, radiograph_pixels: np.ndarray) -> None:
    disguised = tmp_path / "film.png"
    disguised.write_bytes(encode(bits_film(12)))
    read = read_radiograph(disguised)
    assert (read.source["format"], read.source["extension_mismatch"]) == ("DICOM", True)
    picture = tmp_path / "picture.dcm"
    picture.write_bytes(cv2.imencode(".png", radiograph_pixels)[1].tobytes())
    assert read_radiograph(picture).source["format"] == "PNG"
    unnamed = tmp_path / "IM000001"
    unnamed.write_bytes(encode(bits_film(12)))
    assert read_radiograph(unnamed).source["extension_mismatch"] is False
    tiff = bytearray(encode(bits_film(12)))
    tiff[:4] = b"II*\0"  # a preamble may make it a TIFF as well: PS3.10, 7.1
    unnamed.write_bytes(bytes(tiff))
    assert read_radiograph(unnamed).source["format"] == "DICOM"


def test_folders_give_dicom_files_with_and_without_extension(tmp_path: Path) -> None:
    content = encode(bits_film(12))
    for name in ("a.dcm", "IM0001", "1.2.840.113619.2", "DICOMDIR", "README", "notes.txt", ".hidden.dcm"):
        (tmp_path / name).write_bytes(b"text" if name in ("README", "notes.txt") else content)
    found = {path.name for path in find_images([str(tmp_path)])}
    assert found == {"a.dcm", "IM0001", "1.2.840.113619.2"}


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (bytes(128) + b"DICM", True),
        (b"\2\0\0\0UL\4\0", True),
        (b"\x08\0\x16\0UI\x1a\0", True),
        (b"\x08\0\x05\0\x0a\0\0\0", True),
        (b"\0\x08\0\x05CS\0\x0a", True),
        (b"\x08\0\0\0\xff\xff\xff\xff", False),
        (b"\x08\0\0\x10UI\x1a\0", False),
        (b"\x89PNG\r\n\x1a\n", False),
        (b"", False),
    ],
)
def test_what_looks_like_dicom(head: bytes, expected: bool) -> None:
    assert parsing.looks_like_dicom(head) is expected


# ---------------------------------------------------------------- nothing of the patient


def test_nothing_identifies_the_patient(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from magsd.cli import main

    bundle = tiny_bundle.build(tmp_path / "bundle")
    identities = {
        "PatientName": NAME, "PatientID": "PID-4711", "PatientBirthDate": "19610203", "AccessionNumber": "ACC77",
        "ReferringPhysicianName": "Doe^Refer", "StudyInstanceUID": "1.2.3.4.5", "SOPInstanceUID": "1.2.3.4.5.6.7",
        "InstitutionName": "Hospital Nowhere", "StationName": "STATION9", "PatientAddress": "Elm Street 1",
        "StudyDescription": "of Jurgen Muller", "PatientComments": "knows Jurgen Muller",
    }  # fmt: skip
    # values that the libraries would complain about and quote, in every element that is used
    used = ("PatientAge", "PatientSex", "ViewPosition", "BodyPartExamined", "Modality", "BurnedInAnnotation")
    broken = dict.fromkeys(used, "PID-4711 Jürgen Müller")
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, more in enumerate(({}, broken, {"Rows": 400}, {"NumberOfFrames": "2"}, {"BitsStored": 3})):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = encode(bits_film(12, **identities, **more))
            (tmp_path / f"film{number}.dcm").write_bytes(content)
        caplog.clear()
        paths = [str(tmp_path / f"film{number}.dcm") for number in range(5)]
        code = main(["infer", *paths, "--bundle", str(bundle), "--out", str(tmp_path / "out"), "--json"])
    assert code == 3
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["ok", "review", "error", "error", "error"]
    written = [path.read_text() for path in (tmp_path / "out").glob("*.json")]
    assert len(written) == 5
    everything = "\n".join([captured.out, captured.err, caplog.text, *written, *(str(one.message) for one in caught)])
    for value in (*identities.values(), "Muller", "Jürgen", "Müller", "J\\u00fcrgen", "M\\u00fcller", "4711"):
        assert value not in everything
