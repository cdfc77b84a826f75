"""The pipeline and the verification, on the tiny bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import tiny_bundle
from magsd_runtime import pipeline as pipeline_module
from magsd_runtime.backends import CheckedBackend, open_backend
from magsd_runtime.bundle import load_bundle
from magsd_runtime.errors import BackendUnavailableError, BundleError, MagsdError
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.preprocessing import PreprocessingSpec, preprocess
from magsd_runtime.verification import TOLERANCE, verify_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "b", temperature=2.0)


@pytest.fixture
def film(tmp_path: Path, radiograph_pixels: np.ndarray) -> Path:
    path = tmp_path / "film.png"
    cv2.imwrite(str(path), radiograph_pixels)
    return path


def open_with(folder: Path, backend: Any) -> Pipeline:
    bundle = load_bundle(folder)
    return Pipeline(bundle, CheckedBackend(backend, bundle, "test"))


class Fixed:
    """A backend with outputs of our choice."""

    name, device, precision = "cpu", "cpu", "fp32"

    def __init__(self, **changes: np.ndarray) -> None:
        self.outputs = {
            "logits": np.array([[1, 3, 2]], np.float32),
            "attention": np.zeros((1, 4, 7, 7), np.float32),
            "evidence": np.zeros((1, 3, 4), np.float32),
            "embedding": np.zeros((1, 6), np.float32),
            **changes,
        }

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.seen = images
        return self.outputs

    def close(self) -> None: ...


def test_a_prediction_is_what_its_parts_say(folder: Path, film: Path, radiograph_pixels: np.ndarray) -> None:
    """Softmax at the bundle's temperature, the bundle's classes in order, the network's own outputs."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    image = preprocess(radiograph_pixels, PreprocessingSpec())[np.newaxis]
    logits, attention = session.run(["logits", "attention"], {"image": image})
    exponents = np.exp(logits[0].astype(np.float64) / 2.0)
    expected = exponents / exponents.sum()

    with Pipeline.open(folder, "cpu") as pipeline:
        result = pipeline.predict(film)
    prediction = result.prediction
    assert prediction.status == "ok"
    assert prediction.label == tiny_bundle.CLASSES[int(expected.argmax())]
    assert list(prediction.probabilities or {}) == list(tiny_bundle.CLASSES)
    assert list((prediction.probabilities or {}).values()) == pytest.approx(expected, abs=1e-6)
    assert prediction.probability == pytest.approx(expected.max(), abs=1e-6)

    assert result.heat is not None
    assert result.heat.shape == radiograph_pixels.shape
    assert result.heat.dtype == np.float32
    assert 0 <= result.heat.min() <= result.heat.max() <= 1
    # the hottest cell of the 7 x 7 map lies under the hottest pixel of the film
    y, x = np.unravel_index(int(result.heat.argmax()), result.heat.shape)
    row, column = np.unravel_index(int(attention[0].mean(0).argmax()), (7, 7))
    assert (y * 7 // 300, x * 7 // 260) == (row, column)
    best = prediction.findings[0].box
    assert best.x0 <= x < best.x1
    assert best.y0 <= y < best.y1


def test_the_record_holds_all_that_is_promised(folder: Path, film: Path) -> None:
    with Pipeline.open(folder, "cpu") as pipeline:
        record = pipeline.predict(film).prediction.to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    bundle = load_bundle(folder)
    assert record["path"] == str(film)
    assert record["image"]["width"] == 260
    assert record["image"]["height"] == 300
    assert record["model"] == {"name": "tiny", "version": "1", "sha256": bundle.model_sha256}
    assert record["preprocessing_sha256"] == PreprocessingSpec().sha256()
    assert record["backend"] == {"name": "cpu", "device": "cpu", "precision": "fp32"}
    timings = record["timings_ms"]
    assert list(timings) == ["decode", "preprocess", "rules", "inference", "localize", "total"]
    steps = [value for name, value in timings.items() if name != "total"]
    assert all(value >= 0 for value in steps)
    assert timings["total"] >= sum(steps) - 0.01
    assert record["research_use_only"] is True


def test_findings_come_from_the_map_and_threshold_of_the_bundle(tmp_path: Path, film: Path) -> None:
    """Attention of map 0 in one corner, of map 1 in the other; the evidence for the label is in map 1."""
    attention = np.zeros((1, 4, 7, 7), np.float32)
    attention[0, 0, 0, 0], attention[0, 1, 6, 6] = 10.0, 1.0
    evidence = np.zeros((1, 3, 4), np.float32)
    evidence[0, 1, 1] = evidence[0, 0, 0] = 3.0
    for name, corner in (("attention", "top left"), ("evidence", "bottom right")):
        folder = tiny_bundle.build(tmp_path / name, localization={"map": name, "threshold": 0.5})
        prediction = open_with(folder, Fixed(attention=attention, evidence=evidence)).predict(film).prediction
        assert prediction.label == "normal"
        (finding,) = prediction.findings
        if corner == "top left":
            assert (finding.box.x0, finding.box.y0) == (0, 0)
            assert (finding.box.x1, finding.box.y1) < (100, 100)
        else:
            assert (finding.box.x1, finding.box.y1) == (260, 300)
            assert (finding.box.x0, finding.box.y0) > (160, 200)
        assert finding.score == 1.0
    folder = tiny_bundle.build(tmp_path / "high", localization={"map": "attention", "threshold": 1.0})
    assert open_with(folder, Fixed(attention=attention)).predict(film).prediction.findings == ()


def test_a_faint_region_is_no_finding_and_stays_in_the_heat(tmp_path: Path, film: Path) -> None:
    attention = np.zeros((1, 4, 7, 7), np.float32)
    attention[0, 0, 1, 1], attention[0, 0, 5, 5] = 1.0, 0.7
    results = {}
    for minimum in (None, 0.0, 0.65, 0.8):
        localization = {"map": "attention", "threshold": 0.4}
        if minimum is not None:
            localization["minimum_score"] = minimum
        opened = open_with(
            tiny_bundle.build(tmp_path / str(minimum), localization=localization), Fixed(attention=attention)
        )
        results[minimum] = opened.predict(film)
    before = results[None]
    strong, faint = before.prediction.findings
    assert (strong.score, faint.score) == (1.0, pytest.approx(0.7))
    for minimum, found in ((0.0, (strong, faint)), (0.65, (strong, faint)), (0.8, (strong,))):
        assert results[minimum].prediction.findings == found
        np.testing.assert_array_equal(results[minimum].heat, before.heat)


def test_no_attention_means_no_finding_and_no_heat(folder: Path, film: Path) -> None:
    result = open_with(folder, Fixed()).predict(film)
    assert result.prediction.status == "ok"
    assert result.prediction.findings == ()
    assert result.heat is not None
    assert not result.heat.any()


def test_the_network_sees_exactly_what_preprocess_gives(
    folder: Path, film: Path, radiograph_pixels: np.ndarray
) -> None:
    backend = Fixed()
    open_with(folder, backend).predict(film)
    np.testing.assert_array_equal(backend.seen, preprocess(radiograph_pixels, PreprocessingSpec())[np.newaxis])


def test_heat_only_when_asked_for(folder: Path, film: Path) -> None:
    result = open_with(folder, Fixed()).predict(film, with_heat=False)
    assert result.prediction.status == "ok"
    assert result.heat is None


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_image_without_contrast_is_rejected(folder: Path, tmp_path: Path, level: int) -> None:
    path = tmp_path / "flat.png"
    cv2.imwrite(str(path), np.full((100, 90), level, np.uint8))
    result = open_with(folder, Fixed()).predict(path)
    prediction = result.prediction
    assert prediction.status == "rejected"
    assert [reason.code for reason in prediction.reasons] == ["no_contrast"]
    assert (prediction.label, prediction.probability, prediction.probabilities) == (None, None, None)
    assert result.heat is None
    assert prediction.image["width"] == 90


def test_contrast_that_the_network_never_sees_is_none(tmp_path: Path) -> None:
    """Fit crop: all that is not flat lies outside the central square."""
    folder = tiny_bundle.build(tmp_path / "b", spec=PreprocessingSpec(fit="crop"))
    pixels = np.full((100, 300), 90, np.uint8)
    pixels[:, :50] = 200
    cv2.imwrite(str(tmp_path / "wide.png"), pixels)
    prediction = open_with(folder, Fixed()).predict(tmp_path / "wide.png").prediction
    assert [reason.code for reason in prediction.reasons] == ["no_contrast"]


@pytest.mark.parametrize("content", [None, b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_a_file_that_cannot_be_read_is_an_error_result(folder: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    result = open_with(folder, Fixed()).predict(path)
    assert result.prediction.status == "error"
    (reason,) = result.prediction.reasons
    assert reason.code == "unreadable"
    assert reason.message
    assert "\n" not in reason.message
    assert str(path) not in reason.message  # it stands beside it, in path
    assert result.radiograph is None
    assert result.prediction.probabilities is None


@pytest.mark.parametrize("name", ["logits", "attention", "evidence"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_no_numbers_never_become_a_label(folder: Path, film: Path, name: str, value: float) -> None:
    array = Fixed().outputs[name].copy()
    array.flat[0] = value
    prediction = open_with(folder, Fixed(**{name: array})).predict(film).prediction
    assert prediction.status == "error"
    assert prediction.reasons[0].code == "not_finite"
    assert prediction.label is None


@pytest.mark.parametrize(
    ("exception", "code"),
    [
        (MemoryError(), "out_of_memory"),
        (MagsdError("the\nnetwork failed"), "fault"),
        (KeyError("x"), "fault"),
    ],
)
def test_whatever_goes_wrong_with_one_image_stays_with_it(
    folder: Path, film: Path, monkeypatch: pytest.MonkeyPatch, exception: Exception, code: str
) -> None:
    monkeypatch.delenv("MAGSD_TRACEBACK", raising=False)
    pipeline = open_with(folder, Fixed())

    def fail(*_: object) -> None:
        raise exception

    with monkeypatch.context() as context:
        context.setattr(pipeline_module, "standardize", fail)
        prediction = pipeline.predict(film).prediction
    assert prediction.status == "error"
    assert prediction.reasons[0].code == code
    assert "\n" not in prediction.reasons[0].message
    assert pipeline.predict(film).prediction.status == "ok"


def test_an_interrupt_is_not_swallowed(folder: Path, film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline_module, "standardize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_with(folder, Fixed()).predict(film)


def test_a_path_that_is_no_unicode_gives_a_record_that_is(folder: Path, tmp_path: Path) -> None:
    prediction = open_with(folder, Fixed()).predict(tmp_path / "caf\udce9.png").prediction
    json.dumps(prediction.to_dict(), ensure_ascii=False).encode("utf-8")
    assert prediction.path.endswith("caf\\udce9.png")


def test_open_refuses_a_backend_that_is_not_here_and_a_damaged_bundle(folder: Path, tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(BackendUnavailableError):
            Pipeline.open(folder, "cuda")
    with pytest.raises(BundleError):
        Pipeline.open(tmp_path)


# --- verification --------------------------------------------------------------------------------


def test_a_bundle_verifies_where_it_was_made(folder: Path) -> None:
    bundle = load_bundle(folder)
    with open_backend(bundle, "cpu") as backend:
        report = verify_bundle(bundle, backend)
    assert report.passed
    assert [check.name for check in report.checks] == list(tiny_bundle.GOLDEN)
    assert set(report.worst) == {"logits", "attention", "evidence", "embedding"}
    assert max(report.worst.values()) < 1e-5
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["passed"] is True
    assert "PASSED" in report.format()
    assert "Research use only" in report.format()


def edit_expected(folder: Path, **changes: Any) -> None:
    """Change the golden arrays or facts, and the manifest so that the files count as sound."""
    arrays = dict(np.load(folder / "golden" / "expected.npz"))
    facts = json.loads((folder / "golden" / "expected.json").read_text())
    changes.get("arrays", lambda _: None)(arrays)
    changes.get("facts", lambda _: None)(facts)
    np.savez(folder / "golden" / "expected.npz", **arrays)
    (folder / "golden" / "expected.json").write_text(json.dumps(facts))
    tiny_bundle.write_manifest(
        folder, tiny_bundle.CLASSES, PreprocessingSpec(), 1.0, {"map": "attention", "threshold": 0.5}
    )


@pytest.mark.parametrize("output", ["logits", "attention", "evidence", "embedding"])
@pytest.mark.parametrize(("factor", "passes"), [(0.5, True), (2.0, False)])
def test_a_difference_counts_from_the_limit_on(tmp_path: Path, output: str, factor: float, passes: bool) -> None:
    folder = tiny_bundle.build(tmp_path / "b")
    key = f"ramp/{output}"
    wanted: list[float] = []

    def shift(arrays: dict[str, np.ndarray]) -> None:
        index = int(np.abs(arrays[key]).argmin())  # not the largest, which sets the limit
        wanted.append(factor * TOLERANCE * max(1.0, float(np.abs(arrays[key]).max())))
        arrays[key].flat[index] += wanted[0]

    edit_expected(folder, arrays=shift)
    bundle = load_bundle(folder)
    with open_backend(bundle, "cpu") as backend:
        report = verify_bundle(bundle, backend)
    assert report.passed is passes
    assert report.worst[output] == pytest.approx(wanted[0], rel=0.05)
    assert ("TOO LARGE" in report.format()) is not passes


def test_another_label_or_another_preprocessing_fails(tmp_path: Path) -> None:
    for number, (field, attribute) in enumerate(
        [("label", "labels_equal"), ("preprocessed_sha256", "preprocessing_equal")]
    ):
        folder = tiny_bundle.build(tmp_path / str(number))
        edit_expected(folder, facts=lambda facts: facts["ramp"].update({field: "other"}))  # noqa: B023
        bundle = load_bundle(folder)
        with open_backend(bundle, "cpu") as backend:
            report = verify_bundle(bundle, backend)
        assert not report.passed
        assert getattr(report, attribute) is False
        assert "DIFFERENT" in report.format()


def test_outputs_that_are_no_numbers_fail(folder: Path) -> None:
    bundle = load_bundle(folder)
    outputs = Fixed(logits=np.full((1, 3), np.nan, np.float32))
    report = verify_bundle(bundle, CheckedBackend(outputs, bundle, "test"))
    assert not report.passed
    json.dumps(report.to_dict(), allow_nan=False)
    assert "inf" in report.format()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrays": lambda arrays: arrays.pop("noise/logits")}, "noise/logits is missing"),
        ({"arrays": lambda arrays: arrays.update({"noise/logits": np.full(3, np.nan)})}, "not finite"),
        ({"arrays": lambda arrays: arrays.update({"noise/logits": np.zeros(2)})}, "has shape"),
        ({"facts": lambda facts: facts.clear()}, "names no golden input"),
        ({"facts": lambda facts: facts["noise"].pop("label")}, "no preprocessed_sha256 and label"),
        ({"facts": lambda facts: facts.update({"gone": facts["noise"]})}, "gone/logits is missing"),
    ],
)
def test_golden_files_that_make_no_sense_are_a_bundle_error(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tiny_bundle.build(tmp_path / "b")
    edit_expected(folder, **changes)
    bundle = load_bundle(folder)
    with open_backend(bundle, "cpu") as backend, pytest.raises(BundleError, match=message):
        verify_bundle(bundle, backend)


def test_a_bundle_without_golden_inputs_cannot_be_verified(tmp_path: Path) -> None:
    folder = tiny_bundle.build(tmp_path / "b")
    for path in (folder / "golden").iterdir():
        path.unlink()
    tiny_bundle.write_manifest(
        folder, tiny_bundle.CLASSES, PreprocessingSpec(), 1.0, {"map": "attention", "threshold": 0.5}
    )
    bundle = load_bundle(folder)
    with open_backend(bundle, "cpu") as backend, pytest.raises(BundleError, match="no golden inputs"):
        verify_bundle(bundle, backend)
