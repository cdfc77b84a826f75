"""Phantoms: known opacities, nothing else that tells the classes apart, the same bytes for the same seed."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from magsd.data import Manifest, check_manifest, load_standardized, read_manifest
from magsd.phantoms import CLASSES, draw_phantom, write_phantoms
from magsd_runtime.errors import UsageError
from magsd_runtime.images import read_radiograph
from magsd_runtime.preprocessing import PreprocessingSpec


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("phantoms")
    return read_manifest(write_phantoms(folder, n_per_class=24, size=256, seed=3))


def test_the_manifest_is_sound_and_can_be_trained_on(phantoms: Manifest) -> None:
    report = check_manifest(phantoms, n_folds=5)
    assert not report.errors, report.format()
    assert {issue.code for issue in report.warnings} <= {"near-duplicates"}
    assert Counter(record.label for record in phantoms.records) == {"healthy": 24, "opacity": 24}
    images = Counter(record.patient for record in phantoms.records)
    assert set(images.values()) > {1}
    labels: dict[str, set[str]] = defaultdict(set)
    for record in phantoms.records:
        labels[record.patient].add(record.label)
        assert bool(record.boxes) == (record.label == "opacity")
        assert record.label not in str(record.path.relative_to(phantoms.root))
    assert all(len(found) == 1 for found in labels.values())


def test_sizes_vary_around_the_size_asked_for_without_regard_to_the_class(phantoms: Manifest) -> None:
    ratios: dict[str, list[float]] = defaultdict(list)
    for record in phantoms.records:
        film = read_radiograph(record.path)
        assert film.source["format"] == "PNG"
        assert 200 < (film.width * film.height) ** 0.5 < 300
        ratios[record.label].append(film.width / film.height)
    for values in ratios.values():
        assert min(values) < 0.95
        assert max(values) > 1.1
    assert abs(np.mean(ratios["healthy"]) - np.mean(ratios["opacity"])) < 0.1


@pytest.mark.parametrize("patient", range(6))
@pytest.mark.parametrize("kind", ["focal", "diffuse"])
def test_the_opacity_is_the_only_difference_between_the_classes(kind, patient: int) -> None:
    with_opacity = draw_phantom(kind, seed=5, patient=patient, number=1, size=256)
    without = draw_phantom("healthy", seed=5, patient=patient, number=1, size=256)
    assert without.boxes == ()
    difference = with_opacity.pixels.astype(int) - without.pixels.astype(int)
    assert difference.min() >= 0, "an opacity only adds"
    height, width = difference.shape
    boxed = np.zeros(difference.shape, bool)
    for x, y, w, h in with_opacity.boxes:
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
        box = (slice(y, y + h), slice(x, x + w))
        boxed[box] = True
        assert difference[box].mean() > 6
        assert difference[box].max() > 15
    assert difference[boxed].sum() > 0.8 * difference.sum(), "the boxes hold the opacities"
    assert difference[~boxed].max() <= 0.6 * difference.max()
    assert (difference == 0).mean() > 0.6
    lungs = without.pixels[difference > 10]
    assert lungs.mean() < 0.75 * np.median(without.pixels), "opacities lie in the dark of the lungs"


def test_diffuse_opacities_lie_in_both_lungs_and_focal_ones_are_few() -> None:
    for patient in range(5):
        diffuse = draw_phantom("diffuse", seed=1, patient=patient, size=256)
        middle = diffuse.pixels.shape[1] / 2
        sides = {x + w / 2 > middle for x, _, w, _ in diffuse.boxes}
        assert sides == {True, False}
        assert 1 <= len(draw_phantom("focal", seed=1, patient=patient, size=256).boxes) <= 2


def test_lungs_are_dark_and_the_heart_is_bright(phantoms: Manifest) -> None:
    healthy = [record for record in phantoms.records if record.label == "healthy"]
    images = load_standardized(healthy, PreprocessingSpec(size=64, clahe_clip=0)).astype(float)
    mean = images.mean(axis=0)
    lungs, middle, belly = mean[20:38, 12:22], mean[20:38, 30:34], mean[56:62, 24:40]
    assert lungs.mean() + 60 < middle.mean()
    assert lungs.mean() + 60 < belly.mean()
    assert mean[20:38, 42:52].mean() + 60 < middle.mean()
    assert (images.std(axis=(1, 2)) > 25).all()
    # nothing of the tone curve is clipped away in the lungs
    assert lungs.min() > 10
    assert middle.max() < 250


def test_a_classifier_of_the_corners_learns_nothing(phantoms: Manifest) -> None:
    """The mean of a film's edge, its contrast and its size must not predict the class."""
    opacity = phantoms.label_indices().astype(bool)
    images = load_standardized(phantoms.records, PreprocessingSpec(size=64, clahe_clip=0)).astype(float)
    edge = np.ones((64, 64), bool)
    edge[6:-6, 6:-6] = False
    for cue in (images[:, edge].mean(axis=1), images[:, edge].std(axis=1), images[:, 56:].mean(axis=(1, 2))):
        above = (cue[opacity][:, None] > cue[~opacity][None]).mean()  # the area under the ROC curve
        assert 0.25 < above < 0.75


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    def content(folder: Path, **changes: int) -> dict[str, bytes]:
        write_phantoms(folder, **{"n_per_class": 4, "size": 128, "seed": 9, **changes})  # type: ignore[arg-type]
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    one = content(tmp_path / "one")
    assert one == content(tmp_path / "two")
    other = content(tmp_path / "three", seed=10)
    assert not set(one.values()) & set(other.values())
    # a larger set does not change how a film of a patient looks
    film = draw_phantom("healthy", seed=9, patient=0, size=128).pixels
    assert np.array_equal(film, draw_phantom("healthy", seed=9, patient=0, size=128).pixels)
    assert sum(name.endswith(".png") for name in one) == 8
    assert "manifest.csv" in one


def test_images_of_a_patient_are_alike_but_not_equal() -> None:
    spec = PreprocessingSpec(size=64)
    from magsd_runtime.preprocessing import standardize

    films = [standardize(draw_phantom("healthy", seed=2, patient=0, number=n, size=256).pixels, spec) for n in (0, 1)]
    assert not np.array_equal(*films)


def test_three_classes(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    path = write_phantoms(
        tmp_path, n_per_class=3, size=128, classes=("diffuse", "healthy", "focal"),
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    manifest = read_manifest(path)
    assert manifest.classes == ("diffuse", "focal", "healthy")
    assert steps == [(n, 9) for n in range(1, 10)]
    assert set(CLASSES) > set(manifest.classes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("healthy", "broken")}, "classes are healthy, broken: expected different ones of healthy, opac"),
        ({"classes": ("healthy", "healthy")}, "expected different ones"),
        ({"classes": ()}, "expected different ones"),
        ({"n_per_class": 0}, "n_per_class is 0"),
        ({"size": 64}, "size 64: expected"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write_phantoms(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_a_finished_set_is_not_overwritten(tmp_path: Path) -> None:
    write_phantoms(tmp_path, n_per_class=1, size=128)
    with pytest.raises(UsageError, match="holds a manifest already"):
        write_phantoms(tmp_path, n_per_class=1, size=128)
