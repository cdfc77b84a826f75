"""The acceptance statistics: scores, limits, reading, and what the pipeline makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_bundle
from magsd.cli import main
from magsd_runtime.acceptance import (
    ACCEPTANCE_NAME,
    Acceptance,
    Chosen,
    Limits,
    Subspace,
    embedding_descriptor,
    image_descriptor,
)
from magsd_runtime.backends import CheckedBackend
from magsd_runtime.bundle import load_bundle
from magsd_runtime.errors import BundleError
from magsd_runtime.files import sha256_file
from magsd_runtime.lungs import packaged_sha256
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.preprocessing import PreprocessingSpec, standardize

CHOSEN = Chosen(0.99, 200, 150, 198, 1, 5, "d" * 64, "by hand")


def subspace(size: int, components: int, seed: int = 0) -> Subspace:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(size, components)))[0].T
    return Subspace(
        rng.normal(size=size).astype(np.float32),
        basis.astype(np.float32),
        rng.uniform(0.5, 2, components).astype(np.float32),
        float(np.float32(rng.uniform(1, 3))),
    )


def slow_score(space: Subspace, x: np.ndarray) -> float:
    """One number at a time."""
    deviation = [float(a) - float(b) for a, b in zip(x, space.mean)]
    scaled, rest = [], list(deviation)
    for axis, variance in zip(space.components, space.variances):
        along = sum(d * float(a) for d, a in zip(deviation, axis))
        scaled.append(along**2 / float(variance))
        rest = [r - along * float(a) for r, a in zip(rest, axis)]
    return 0.5 * (sum(scaled) / len(scaled) + sum(r * r for r in rest) / space.rest)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 30), st.integers(0, 10**6))
def test_the_score_is_that_of_the_slow_form(size: int, components: int, seed: int) -> None:
    space = subspace(size, min(size, components), seed)
    x = np.random.default_rng(seed + 1).normal(0, 3, size).astype(np.float32)
    assert space.score(x) == pytest.approx(slow_score(space, x), rel=1e-4, abs=1e-5)
    assert space.score(space.mean) == 0


def test_the_image_descriptor_is_a_standardized_thumbnail_and_the_lungs_in_their_box() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64)).astype(np.uint8)
    blocks = image.reshape(16, 4, 16, 4).mean(axis=(1, 3))
    expected = (blocks - blocks.mean()) / blocks.std()
    np.testing.assert_allclose(image_descriptor(image, None), expected.ravel(), atol=1e-4)

    lungs = np.zeros((128, 128), bool)
    lungs[20:52, 30:94] = rng.random((32, 64)) < 0.5
    lungs[[20, 51], [30, 93]] = True
    found = image_descriptor(image, lungs)
    box = lungs[20:52, 30:94].reshape(16, 2, 16, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(found[:256], expected.ravel(), atol=1e-4)
    np.testing.assert_allclose(found[256:], 4 * box.ravel(), atol=1e-4)
    assert not image_descriptor(image, np.zeros((128, 128), bool))[256:].any()
    assert not image_descriptor(np.full((64, 64), 9, np.uint8), None).any()


def test_the_image_descriptor_knows_polarity_and_orientation_but_not_brightness(radiograph_pixels: np.ndarray) -> None:
    spec = PreprocessingSpec(clahe_clip=0)
    film = standardize(radiograph_pixels, spec)
    plain = image_descriptor(film, None)
    np.testing.assert_allclose(image_descriptor(255 - film, None), -plain, atol=1e-3)
    np.testing.assert_allclose(
        image_descriptor(film[::-1].copy(), None).reshape(16, 16)[::-1].ravel(), plain, atol=1e-3
    )
    np.testing.assert_allclose(image_descriptor((film // 2).astype(np.uint8), None), plain, atol=0.05)


def test_the_embedding_descriptor_has_length_one_and_keeps_signs() -> None:
    np.testing.assert_allclose(embedding_descriptor(np.array([16.0, -9.0, 0.0])), [0.8, -0.6, 0.0], atol=1e-6)
    assert not embedding_descriptor(np.zeros(5, np.float32)).any()
    values = np.random.default_rng(1).normal(size=50).astype(np.float32)
    np.testing.assert_allclose(embedding_descriptor(7 * values), embedding_descriptor(values), atol=1e-6)


def statistics(
    model_sha256: str = "", *, image: float = 1e9, embedding: float = 1e9, factor: float = 2.0
) -> Acceptance:
    """Statistics for the tiny bundle with these review limits; ``factor`` times that is rejected."""
    return Acceptance(
        {"image": subspace(256, 3), "embedding": subspace(tiny_bundle.FEATURES, 2)},
        {"image": Limits(image, factor * image), "embedding": Limits(embedding, factor * embedding)},
        CHOSEN,
        model_sha256,
    )


def scores_of(value: Acceptance, film: np.ndarray, embedding: np.ndarray) -> dict[str, float]:
    return dict(value.judge(film, None, embedding).scores)


def test_limits_are_met_exactly(radiograph_pixels: np.ndarray) -> None:
    film = standardize(radiograph_pixels, PreprocessingSpec())
    embedding = np.arange(tiny_bundle.FEATURES, dtype=np.float32)
    at = scores_of(statistics(), film, embedding)
    below = {name: float(np.nextafter(value, 0)) for name, value in at.items()}

    def status(image: Limits, other: Limits) -> str:
        limits = {"image": image, "embedding": other}
        judged = replace(statistics(), limits=limits).judge(film, None, embedding)
        assert [reason.code for reason in judged.reasons] == ([] if judged.status == "ok" else ["unlike_training"])
        return judged.status

    far = Limits(1e9, 1e9)
    assert status(Limits(at["image"], at["image"]), Limits(at["embedding"], at["embedding"])) == "ok"
    assert status(Limits(below["image"], at["image"]), far) == "review"
    assert status(far, Limits(below["embedding"], at["embedding"])) == "review"
    assert status(far, Limits(below["embedding"], below["embedding"])) == "rejected"
    assert status(Limits(below["image"], below["image"]), far) == "rejected"
    assert status(Limits(below["image"], at["image"]), Limits(below["embedding"], below["embedding"])) == "rejected"


def test_a_score_that_is_no_number_does_not_pass(radiograph_pixels: np.ndarray) -> None:
    film = standardize(radiograph_pixels, PreprocessingSpec())
    judged = statistics().judge(film, None, np.full(tiny_bundle.FEATURES, np.nan, np.float32))
    assert judged.status == "rejected"


def test_descriptors_of_another_length_are_refused(radiograph_pixels: np.ndarray) -> None:
    film = standardize(radiograph_pixels, PreprocessingSpec())
    with pytest.raises(ValueError, match="embedding has 7 values, its statistics 6"):
        statistics().judge(film, None, np.ones(7, np.float32))
    with pytest.raises(ValueError, match="image has 512 values"):
        statistics().judge(film, np.ones((128, 128), bool), np.ones(6, np.float32))


def add_to(folder: Path, **limits: float) -> dict[str, Any]:
    """Statistics for the bundle in ``folder``; returns its bundle.json."""
    manifest = json.loads((folder / "bundle.json").read_text())
    value = statistics(manifest["model"]["sha256"], **limits)
    value.save(folder)
    path = folder / ACCEPTANCE_NAME
    manifest["files"][ACCEPTANCE_NAME] = {"sha256": sha256_file(path), "size": path.stat().st_size}
    manifest["acceptance"] = value.to_dict()
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bundle.build(tmp_path / "b")


@pytest.fixture
def film(tmp_path: Path, radiograph_pixels: np.ndarray) -> Path:
    cv2.imwrite(str(tmp_path / "film.png"), radiograph_pixels)
    return tmp_path / "film.png"


def test_what_is_written_is_read(folder: Path) -> None:
    assert load_bundle(folder).acceptance is None
    add_to(folder, image=2.5, embedding=3.5)
    first = (folder / ACCEPTANCE_NAME).read_bytes()
    bundle = load_bundle(folder)
    read, written = bundle.acceptance, statistics(bundle.model_sha256, image=2.5, embedding=3.5)
    assert read is not None
    assert read.to_dict() == written.to_dict()
    for name, space in written.subspaces.items():
        for key in ("mean", "components", "variances", "rest"):
            np.testing.assert_array_equal(getattr(read.subspaces[name], key), getattr(space, key))
    read.save(folder)
    assert (folder / ACCEPTANCE_NAME).read_bytes() == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "acceptance.version is 2"),
        ({"model_sha256": "0" * 64}, "of another model"),
        ({"more": 1}, "has the fields"),
        ({"thresholds": {"image": {"review": 1, "rejected": 2}}}, "thresholds are of"),
        ({"thresholds": {n: {"review": 3, "rejected": 2} for n in ("image", "embedding")}}, "expected 0 < review"),
        ({"thresholds": {n: {"review": float("nan"), "rejected": 2} for n in ("image", "embedding")}}, "finite"),
        ({"chosen": {**CHOSEN.__dict__, "films": 3}}, "more films accepted"),
        ({"chosen": {**CHOSEN.__dict__, "target": 99}}, "expected 0 to 1"),
        ({"chosen": {**CHOSEN.__dict__, "other": 1}}, "other is unknown"),
        ({"chosen": {}}, "is missing"),
    ],
)
def test_a_section_is_read_strictly(folder: Path, change: dict[str, Any], message: str) -> None:
    manifest = add_to(folder)
    manifest["acceptance"] = {**manifest["acceptance"], **change}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        load_bundle(folder)


@pytest.mark.parametrize("missing", ["section", "file"])
def test_half_of_the_statistics_is_refused(folder: Path, missing: str) -> None:
    manifest = add_to(folder)
    del (manifest if missing == "section" else manifest["files"])[
        "acceptance" if missing == "section" else ACCEPTANCE_NAME
    ]
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="not both there"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("image/mean", np.zeros(255, np.float32), "do not fit"),
        ("image/mean", np.full(256, np.nan, np.float32), "not finite float32"),
        ("image/mean", np.zeros(256), "not finite float32"),
        ("embedding/variances", np.zeros(2, np.float32), "not above 0"),
        ("embedding/rest", np.float32(0), "not above 0"),
        ("embedding/components", np.ones((2, 6), np.float32), "not orthonormal"),
        ("embedding/components", np.zeros((0, 6), np.float32), "other dimensions"),
        ("other", np.zeros(1, np.float32), "has the arrays"),
        (None, None, "cannot be read"),
    ],
)
def test_arrays_are_read_strictly(folder: Path, name: str | None, array: Any, message: str) -> None:
    manifest = add_to(folder)
    path = folder / ACCEPTANCE_NAME
    if name is None:
        path.write_bytes(b"no zip")
    else:
        with np.load(path) as file:
            arrays: dict[str, Any] = {**file, name: array}
        np.savez(path, **arrays)
    manifest["files"][ACCEPTANCE_NAME] = {"sha256": sha256_file(path), "size": path.stat().st_size}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        load_bundle(folder)


def test_an_altered_file_is_refused(folder: Path) -> None:
    add_to(folder)
    path = folder / ACCEPTANCE_NAME
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="was altered"):
        load_bundle(folder)


def test_without_statistics_nothing_changes(folder: Path, film: Path) -> None:
    with Pipeline.open(folder, "cpu") as pipeline:
        record = pipeline.predict(film).prediction.to_dict()
    assert record["status"] == "ok"
    assert record["acceptance"] is None
    assert "acceptance" not in record["timings_ms"]


@pytest.mark.parametrize(
    ("limits", "status"),
    [
        ({}, "ok"),
        ({"image": 1e-6, "factor": 1e15}, "review"),
        ({"image": 1e-6}, "rejected"),
        ({"embedding": 1e-9}, "rejected"),
    ],
)
def test_what_the_pipeline_makes_of_it(folder: Path, film: Path, limits: dict[str, float], status: str) -> None:
    with Pipeline.open(folder, "cpu") as pipeline:
        plain = pipeline.predict(film)
    add_to(folder, **limits)
    with Pipeline.open(folder, "cpu") as pipeline:
        result = pipeline.predict(film)
    record, before = result.prediction.to_dict(), plain.prediction.to_dict()
    assert record["status"] == status
    assert [reason["code"] for reason in record["reasons"]] == ([] if status == "ok" else ["unlike_training"])
    assert set(record["acceptance"]) == {"scores", "thresholds"}
    assert record["acceptance"]["thresholds"]["image"]["review"] == limits.get("image", 1e9)
    assert all(value > 0 for value in record["acceptance"]["scores"].values())
    kept = ("label", "probability", "probabilities", "findings")
    if status == "rejected":
        assert [record[key] for key in kept] == [None, None, None, []]
        assert result.heat is None
    else:
        assert [record[key] for key in kept] == [before[key] for key in kept]
        np.testing.assert_array_equal(result.heat, plain.heat)
    assert json.loads(json.dumps(record, allow_nan=False)) == record


@pytest.mark.parametrize(("limits", "code"), [({}, 0), ({"image": 1e-6, "factor": 1e15}, 0), ({"image": 1e-6}, 3)])
def test_exit_codes(
    folder: Path, film: Path, capsys: pytest.CaptureFixture[str], limits: dict[str, float], code: int
) -> None:
    add_to(folder, **limits)
    assert main(["infer", str(film), "--bundle", str(folder), "--json"]) == code
    assert json.loads(capsys.readouterr().out)["status"] == {0: "review" if limits else "ok", 3: "rejected"}[code]


class _Never:
    """A backend that must not be asked, or gives an embedding of our choice."""

    name, device, precision = "cpu", "cpu", "fp32"

    def __init__(self, embedding: np.ndarray | None = None) -> None:
        self.embedding = embedding

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        assert self.embedding is not None
        return {
            "logits": np.array([[1, 3, 2]], np.float32),
            "attention": np.zeros((1, 4, 7, 7), np.float32),
            "evidence": np.zeros((1, 3, 4), np.float32),
            "embedding": self.embedding,
        }

    def close(self) -> None: ...


def test_an_embedding_that_is_no_number_is_an_error_where_it_is_used(folder: Path, film: Path) -> None:
    backend = _Never(np.full((1, tiny_bundle.FEATURES), np.inf, np.float32))
    statuses = []
    for add in (False, True):
        if add:
            add_to(folder)
        bundle = load_bundle(folder)
        prediction = Pipeline(bundle, CheckedBackend(backend, bundle, "test")).predict(film).prediction
        statuses.append((prediction.status, [reason.code for reason in prediction.reasons]))
    assert statuses == [("ok", []), ("error", ["not_finite"])]


def test_where_no_lungs_are_found_the_network_is_not_asked(tmp_path: Path) -> None:
    spec = PreprocessingSpec(crop="lungs", lungs_sha256=packaged_sha256())
    folder = tiny_bundle.build(tmp_path / "plain")
    bundle = replace(load_bundle(folder), preprocessing=spec)
    noise = np.random.default_rng(0).integers(0, 256, (200, 200)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "noise.png"), noise)
    result = Pipeline(bundle, CheckedBackend(_Never(), bundle, "test")).predict(tmp_path / "noise.png")
    prediction = result.prediction
    assert (prediction.status, prediction.label) == ("rejected", None)
    assert [reason.code for reason in prediction.reasons] == ["no_lungs"]
    assert prediction.image["width"] == 200
