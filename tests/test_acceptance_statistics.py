"""From films to statistics: subspaces, held-out scores, limits; the set of non-films that measures them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import acceptance as benchmark
import tiny_bundle
from magsd.checkpoint import load_model
from magsd.cli import main
from magsd.data import read_manifest
from magsd_export import acceptance_statistics
from magsd_export.acceptance_statistics import (
    FARTHER,
    Films,
    acceptance_of_run,
    choose_limits,
    describe_films,
    fit_acceptance,
    fit_subspace,
    held_out_scores,
    patient_groups,
)
from magsd_export.sources import find_checkpoint
from magsd_runtime.acceptance import embedding_descriptor, image_descriptor
from magsd_runtime.bundle import load_bundle
from magsd_runtime.errors import DataError
from magsd_runtime.images import read_radiograph
from magsd_runtime.prediction import Prediction, Reason
from magsd_runtime.preprocessing import PreprocessingSpec, normalize, standardize
from non_films import CHANGES, DRAWINGS, DRAWN, PHOTOGRAPHS, mirrored, non_films
from tiny_export import write_run


def films(count: int = 120, seed: int = 0) -> Films:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(3, 12))
    values = {
        name: (rng.normal(size=(count, 3)) @ mixing + 0.1 * rng.normal(size=(count, 12))).astype(np.float32)
        for name in ("image", "embedding")
    }
    return Films(values, tuple(f"p{index // 2}" for index in range(count)), digest="d")


def test_a_subspace_is_that_of_the_covariance() -> None:
    values = films().descriptors["image"]
    space = fit_subspace(values, components=3)
    np.testing.assert_allclose(space.mean, values.mean(axis=0), atol=1e-5)
    centred = values.astype(float) - values.mean(axis=0)
    covariance = sum(np.outer(row, row) for row in centred) / len(values)
    eigenvalues, axes = np.linalg.eigh(covariance)
    np.testing.assert_allclose(space.variances, eigenvalues[::-1][:3], rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(space.components * axes[:, ::-1][:, :3].T, axis=1)), 1, atol=1e-4)
    assert space.rest == pytest.approx(eigenvalues[:-3].sum(), rel=1e-4)
    # 1 on average over the films that it is of
    assert np.mean([space.score(row) for row in values]) == pytest.approx(1, rel=1e-3)


def test_films_that_do_not_differ_have_no_subspace() -> None:
    with pytest.raises(DataError, match="do not differ"):
        fit_subspace(np.ones((50, 5), np.float32))


def test_films_on_a_line_have_one_component() -> None:
    values = np.outer(np.arange(50), np.ones(5)).astype(np.float32)
    space = fit_subspace(values)
    assert len(space.components) == 1
    assert space.score(values[10] + np.array([1, -1, 0, 0, 0])) > 100 * space.score(values[10])


def test_each_film_is_scored_without_the_films_of_its_patient() -> None:
    descriptors, patients = films().descriptors["image"], films().patients
    groups = patient_groups(patients)
    assert set(groups.tolist()) == set(range(5))
    assert all(len({int(g) for g, p in zip(groups, patients) if p == patient}) == 1 for patient in set(patients))
    found = held_out_scores(descriptors, groups)
    for index in (0, 17, 119):
        space = fit_subspace(descriptors[groups != groups[index]])
        assert found[index] == pytest.approx(space.score(descriptors[index]))
    with pytest.raises(DataError, match="one group"):
        held_out_scores(descriptors, np.zeros(120, np.int64))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 10), st.sampled_from([0.9, 0.95, 0.99, 1.0]), st.integers(0, 10**6))
def test_no_more_films_are_flagged_than_may_be(count: int, without: int, target: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = {name: rng.gamma(2, size=count).round(1) for name in ("image", "embedding")}  # with ties
    limits = choose_limits(scores, without, target)
    flagged = np.any([scores[name] > limits[name].review for name in scores], axis=0).sum()
    assert flagged <= max(0, round((1 - target) * (count + without)) - without)
    for name, limit in limits.items():
        assert limit.rejected == FARTHER * scores[name].max()
        assert 0 <= limit.review <= limit.rejected


def test_limits_by_hand() -> None:
    """1000 films: 10 may be flagged, 9 by the image, 1 by the embedding."""
    scores = {"image": np.arange(1.0, 1001), "embedding": np.arange(1000.0, 0, -1)}
    limits = choose_limits(scores, 0, 0.99)
    assert (limits["image"].review, limits["image"].rejected) == (991, 1500)
    assert (limits["embedding"].review, limits["embedding"].rejected) == (999, 1500)
    # of 1004 films, 4 without lungs are refused anyway: 6 are left, none for the embedding
    limits = choose_limits(scores, 4, 0.99)
    assert (limits["image"].review, limits["embedding"].review) == (994, 1000)


def test_statistics_say_how_they_were_chosen() -> None:
    value = fit_acceptance(films(300), "a" * 64)
    chosen = value.chosen
    assert (chosen.films, chosen.patients, chosen.groups, chosen.digest) == (300, 150, 5, "d")
    assert 297 <= chosen.accepted <= 300
    groups = patient_groups(films(300).patients)
    held_out = {name: held_out_scores(films(300).descriptors[name], groups) for name in value.limits}
    passed = np.all([held_out[name] <= value.limits[name].review for name in held_out], axis=0)
    assert passed.sum() == chosen.accepted


def test_too_few_films_give_none() -> None:
    with pytest.raises(DataError, match="50 films of 25 patients"):
        fit_acceptance(films(50), "")
    few = films(120)
    with pytest.raises(DataError, match="of 3 patients"):
        fit_acceptance(Films(few.descriptors, tuple("abc"[index % 3] for index in range(120))), "")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return write_run(folder / "run", folder / "data", {0: {"auc": 0.5}})


def test_films_are_described_as_the_runtime_sees_them(run: Path) -> None:
    records = read_manifest(run.parent / "data" / "manifest.csv").records
    spec = PreprocessingSpec(size=64)
    seen = []

    def network(images: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(images)
        return {"embedding": images.reshape(1, -1)[:, :9]}

    described = describe_films(records, spec, network)
    assert described.patients == tuple(record.patient for record in records)
    standardized = standardize(read_radiograph(records[1].path).pixels, spec)
    np.testing.assert_array_equal(seen[1][0], normalize(standardized))
    np.testing.assert_array_equal(described.descriptors["image"][1], image_descriptor(standardized, None))
    expected = embedding_descriptor(normalize(standardized).ravel()[:9])
    np.testing.assert_array_equal(described.descriptors["embedding"][1], expected)


def test_export_puts_them_into_the_bundle(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(run), "--images", "2", "--json", "--out"]
    monkeypatch.setattr(acceptance_statistics, "MINIMUM_FILMS", 5)
    monkeypatch.setattr(acceptance_statistics, "MINIMUM_PATIENTS", 3)
    assert main([*command, str(tmp_path / "b")]) == 0
    record = json.loads(capsys.readouterr().out)["acceptance"]
    bundle = load_bundle(tmp_path / "b")
    assert bundle.acceptance is not None
    assert bundle.acceptance.model_sha256 == bundle.model_sha256
    assert record["thresholds"] == bundle.acceptance.to_dict()["thresholds"]
    assert "are like the others" in record["text"]

    assert main([*command, str(tmp_path / "without"), "--no-acceptance"]) == 0
    assert json.loads(capsys.readouterr().out)["acceptance"] == {"text": "none: left out"}
    assert load_bundle(tmp_path / "without").acceptance is None


def test_a_run_of_few_films_gives_none(run: Path) -> None:
    def network(images: np.ndarray) -> dict[str, np.ndarray]:
        return {"embedding": images.reshape(1, -1)[:, :9]}

    source = find_checkpoint(run, None)
    found, said = acceptance_of_run(source, load_model(source.checkpoint)[1], network, "")
    assert found is None
    assert said.startswith("none: ")
    assert "expected 100 of 20" in said


def test_films_that_changed_give_none(run: Path, tmp_path: Path) -> None:
    def never(_: np.ndarray) -> dict[str, np.ndarray]:
        raise AssertionError("no film should be read")

    data = run.parent / "data" / "manifest.csv"
    source = find_checkpoint(run, None)
    info = load_model(source.checkpoint)[1]
    text = data.read_text()
    try:
        data.write_text("\n".join(text.splitlines()[:-1]) + "\n")
        assert acceptance_of_run(source, info, never, "") == (None, "none: the run's manifest has changed")
        data.unlink()
        assert acceptance_of_run(source, info, never, "") == (None, "none: the run's manifest is not there")
    finally:
        data.write_text(text)


def test_the_non_films_are_the_same_every_time_and_the_halves_share_none() -> None:
    pytest.importorskip("skimage")
    first = list(non_films("report"))
    for (kind, name, pixels), (again_kind, again_name, again) in zip(first, non_films("report"), strict=True):
        assert (kind, name) == (again_kind, again_name)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 2
        assert pixels.std() > 0
        np.testing.assert_array_equal(pixels, again)
    other = {pixels.tobytes() for _, _, pixels in non_films("development")}
    assert other.isdisjoint(pixels.tobytes() for _, _, pixels in first)
    assert set(PHOTOGRAPHS["report"]).isdisjoint(PHOTOGRAPHS["development"])
    assert sum(kind != "photograph" for kind, _, _ in first) == DRAWN * len(DRAWINGS)
    assert len(first) + 40 * len(CHANGES) >= 200


def test_changes_of_a_film() -> None:
    film = np.arange(6, dtype=np.uint8).reshape(2, 3)
    found = {kind: change(film).tolist() for kind, change in CHANGES.items()}
    assert found["film inverted"] == [[255, 254, 253], [252, 251, 250]]
    assert found["film turned by 90"] == [[2, 5], [1, 4], [0, 3]]
    assert found["film turned by 180"] == [[5, 4, 3], [2, 1, 0]]
    assert found["film turned by 270"] == [[3, 0], [4, 1], [5, 2]]
    assert found["film upside down"] == [[3, 4, 5], [0, 1, 2]]
    assert mirrored(film).tolist() == [[2, 1, 0], [5, 4, 3]]


def test_the_benchmark_counts_by_kind_and_status() -> None:
    refused = Prediction("a", "rejected", (Reason("no_lungs", "none"),))
    flagged = Prediction("b", "review", (Reason("unlike_training", "?"),), "x", 1.0, {"x": 1.0})
    passed = Prediction("c", "ok", (), "x", 1.0, {"x": 1.0})
    rows = benchmark.shares([("noise", refused), ("text", flagged), ("noise", passed)])
    assert list(rows) == ["noise", "text", "all"]
    assert rows["noise"] == {"images": 2, "ok": 1, "review": 0, "rejected": 1, "error": 0, "reasons": {"no_lungs": 1}}
    assert rows["all"]["reasons"] == {"no_lungs": 1, "unlike_training": 1}
    lines = benchmark.table("kinds", rows).splitlines()
    assert lines[1].split() == ["noise", "2", "50.0", "0.0", "50.0", "0.0", "no_lungs", "1"]
    assert benchmark.shares([]) == {}


def test_the_benchmark_needs_statistics(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tiny_bundle.build(tmp_path / "b")
    assert benchmark.main([str(bundle), "--data", str(run.parent / "data" / "manifest.csv")]) == 2
    assert "has no acceptance statistics" in capsys.readouterr().err
