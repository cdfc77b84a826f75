"""The shortcut table: controls, and a trained network on changed films."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import controls
import perturbations
import reactions
import shortcuts
import tiny_bundle
from controls import changed_copies, cross_validated, film_facts, trained_control
from magsd.data import Manifest, Record, read_manifest
from magsd.folds import make_folds
from magsd.ground_truth import read_truth
from magsd.localization_metrics import Case
from magsd.phantoms import write_phantoms
from magsd.predictors import Predictions, Run, open_target
from magsd_runtime.bundle import Bundle, load_bundle
from magsd_runtime.errors import DataError, UsageError
from magsd_runtime.images import read_radiograph
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.pixel_rules import DEFAULT_SEVERITIES, PixelRules
from magsd_runtime.preprocessing import PreprocessingSpec
from magsd_runtime.site_rules import SiteRules
from tiny_run import write_tiny_manifest

FILMS = st.integers(7, 40).flatmap(
    lambda height: st.integers(7, 40).flatmap(lambda width: arrays(np.uint8, (height, width)))
)
QUICK = settings(max_examples=40, deadline=None)


# controls


@QUICK
@given(FILMS)
def test_film_facts(film: np.ndarray) -> None:
    facts = film_facts(film)
    height, width = film.shape
    assert len(facts) == len(controls.FACTS) == 19
    assert facts[:3].tolist() == [width / height, width, height]
    for number in range(16):
        share = sum(number * 16 <= int(grey) < (number + 1) * 16 for grey in film.ravel()) / film.size
        assert facts[3 + number] == pytest.approx(share)


class Memory:
    """A classifier that knows what it was fitted on, and answers the share of each label among it."""

    fitted: list[set[float]] = []  # noqa: RUF012

    def fit(self, facts: np.ndarray, labels: np.ndarray) -> Memory:
        self.seen = set(facts[:, 0].tolist())
        self.classes_ = np.unique(labels)
        self.shares = np.array([(labels == label).mean() for label in self.classes_])
        return self

    def predict_proba(self, facts: np.ndarray) -> np.ndarray:
        assert not self.seen & set(facts[:, 0].tolist())
        Memory.fitted.append(self.seen)
        return np.tile(self.shares, (len(facts), 1))


def test_a_table_never_judges_patients_that_it_was_fitted_on() -> None:
    rng = np.random.default_rng(1)
    records = tuple(Record(Path(f"{n}.png"), "abc"[int(rng.integers(3))], f"p{n // 3}", "x") for n in range(90))
    manifest = Manifest(Path(), records)
    folds = make_folds(manifest, 3)
    patient = np.array([[float(record.patient[1:])] for record in records])
    found = cross_validated(manifest, patient, folds, Memory)
    assert found.classes == ("a", "b", "c")
    for record, fold, row in zip(found.records, found.folds, found.probabilities):
        others = [r.label for r in records if folds.assignment[r.patient] != fold]
        assert folds.assignment[record.patient] == fold
        assert row == pytest.approx([others.count(label) / len(others) for label in "abc"])


def test_facts_that_give_the_class_away_are_used(tmp_path: Path) -> None:
    """Sizes that differ between classes: both classifiers find them; with equal ones they know nothing."""
    rng = np.random.default_rng(2)
    areas = {}
    for name, extra in (("sizes differ", 16), ("sizes agree", 0)):
        folder = tmp_path / name
        folder.mkdir()
        records = []
        for number in range(60):
            label = ("covid19", "other")[number % 2]
            shape = (70, 80 + extra * (number % 2) + int(rng.integers(6)))
            cv2.imwrite(str(folder / f"{number}.png"), rng.integers(0, 256, shape).astype(np.uint8))
            records.append(Record(folder / f"{number}.png", label, f"p{number}", "x"))
        manifest = Manifest(folder, tuple(records))
        found = controls.tabular_control(manifest, make_folds(manifest, 3), "covid19", resamples=20)
        assert set(found) == {"logistic regression", "gradient boosting"}
        areas[name] = [row["positive_auc"]["value"] for row in found.values()]
        for row in found.values():  # two classes: each against the other is one question
            assert row["auc"]["value"] == pytest.approx(row["positive_auc"]["value"], abs=1e-9)
            assert (row["images"], row["patients"]) == (60, 60)
    assert min(areas["sizes differ"]) > 0.95
    assert max(areas["sizes agree"]) < 0.8


def test_copies_are_written_once_and_exactly(tmp_path: Path) -> None:
    manifest = read_manifest(write_tiny_manifest(tmp_path / "films", patients=6))
    csv_file = changed_copies(manifest, perturbations.mirror, tmp_path / "copies")
    copies = read_manifest(csv_file)
    assert len(copies.records) == 6
    for copy, record in zip(copies.records, manifest.records):
        assert (copy.label, copy.patient, copy.source, copy.boxes) == (record.label, record.patient, record.source, ())
        expected = read_radiograph(record.path).pixels[:, ::-1]
        np.testing.assert_array_equal(read_radiograph(copy.path).pixels, expected)
    # complete: kept, whatever the change; without its manifest it is not complete
    (tmp_path / "copies" / "00003.png").unlink()
    changed_copies(manifest, None, tmp_path / "copies")
    assert not (tmp_path / "copies" / "00003.png").exists()
    csv_file.unlink()
    changed_copies(manifest, None, tmp_path / "copies")
    found = read_radiograph(tmp_path / "copies" / "00003.png").pixels
    np.testing.assert_array_equal(found, read_radiograph(manifest.records[3].path).pixels)


TINY: dict[str, Any] = {
    "model": "plain", "backbone": "test_efficientnet", "weights": "none", "size": 64, "epochs": 1, "batch_size": 8,
}  # fmt: skip


def test_a_control_that_is_finished_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from magsd import training

    manifest = read_manifest(write_tiny_manifest(tmp_path / "films"))
    folds = make_folds(manifest, 3)
    trainings = []

    def counted(*arguments: Any, **options: Any) -> Any:
        trainings.append(arguments[1])
        return train(*arguments, **options)

    train = training.train
    monkeypatch.setattr(training, "train", counted)

    def control(**changed: Any) -> dict[str, Any]:
        return trained_control(
            manifest, perturbations.blank_centre, "border", tmp_path / "work", {**TINY, **changed}, folds, "blob",
            device="cpu", resamples=20,
        )  # fmt: skip

    first = control()
    tested = [r for r in manifest.records if folds.assignment[r.patient] == 0]
    assert (first["images"], first["patients"]) == (len(tested), len({r.patient for r in tested}))
    assert first["positive_auc"]["value"] == pytest.approx(first["auc"]["value"])  # two classes
    assert len(trainings) == 1
    assert control() == first
    assert len(trainings) == 1

    # stopped between training and evaluation: it goes on, and nothing changes
    run = Path(first["run"])
    shutil.rmtree(run.parent / "evaluation-0")
    assert control() == first
    assert len(trainings) == 2  # it was asked, and had nothing to do

    class Begun(Exception):
        pass

    def begun(config: Any, run: Path, *arguments: Any, **options: Any) -> None:
        trainings.append(run)
        raise Begun

    # other settings are another training, on the same copies
    monkeypatch.setattr(training, "train", begun)
    with pytest.raises(Begun):
        control(epochs=2)
    assert trainings[2] != trainings[0] == Path(first["run"])
    assert len(list((tmp_path / "work" / "films").iterdir())) == 1
    assert control() == first


def test_no_copies_in_the_project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = Path(shortcuts.__file__).resolve().parents[1]
    with pytest.raises(UsageError, match="lies in the project"):
        controls.forbid_project(project / "benchmarks" / ".." / "copies")
    controls.forbid_project(tmp_path)
    data = write_tiny_manifest(tmp_path / "films", patients=6)
    assert shortcuts.main(["--data", str(data), "--only", "a", "--work", str(project / "copies")]) == 2
    assert "lies in the project" in capsys.readouterr().err
    assert not (project / "copies").exists()


# a trained network


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    path = write_phantoms(tmp_path_factory.mktemp("phantoms") / "films", n_per_class=9, size=160, seed=3)
    return controls.plain_manifest(path, None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    return load_bundle(tiny_bundle.build(folder, classes=("healthy", "opacity"), spec=PreprocessingSpec(size=64)))


def left_half(film: np.ndarray) -> np.ndarray | None:
    """Lungs in the left half of bright films; none found in the others."""
    return np.arange(film.shape[1])[np.newaxis].repeat(film.shape[0], 0) < film.shape[1] // 2 if bright(film) else None


def bright(film: np.ndarray) -> bool:
    return bool(film[0, 0] % 2)


def test_reactions_are_those_of_the_pipeline(phantoms: Manifest, bundle: Bundle, tmp_path: Path) -> None:
    """Each figure from `magsd infer`'s pipeline, film by film."""
    changes = {"gamma": lambda film: perturbations.gamma(film, 1.6), "half": perturbations.halve}
    found = reactions.reactions(
        bundle, phantoms, "opacity", device="cpu", resamples=10, changes=changes, lungs=left_half
    )

    def blanked(film: np.ndarray) -> np.ndarray | None:
        mask = left_half(film)
        return None if mask is None else perturbations.blank(film, mask)

    films = [read_radiograph(record.path).pixels for record in phantoms.records]
    assert 0 < sum(map(bright, films)) < len(films)
    rules = SiteRules(pixels=PixelRules(severity=dict.fromkeys(DEFAULT_SEVERITIES, "ok")))  # small, and spoiled
    with Pipeline.open(bundle.path, "cpu", rules=rules) as pipeline:
        for name, change in {"lungs blanked": blanked, **changes}.items():
            equal, moved, ranks = [], [], []
            for record, film in zip(phantoms.records, films):
                changed = change(film)
                if changed is None:
                    continue
                cv2.imwrite(str(tmp_path / "film.png"), changed)
                before = pipeline.predict(record.path).prediction
                after = pipeline.predict(tmp_path / "film.png").prediction
                assert before.probabilities is not None
                assert after.probabilities is not None
                equal.append(before.label == after.label)
                moved.append(abs(before.probabilities["opacity"] - after.probabilities["opacity"]))
                ranks.append(
                    (record.label == "opacity", before.probabilities["opacity"], after.probabilities["opacity"])
                )
            row = found["changes"][name]
            assert row["films"] == len(equal)
            assert row["equal_labels"] == pytest.approx(np.mean(equal))
            assert row["mean_change"] == pytest.approx(np.mean(moved), rel=1e-4)
            for column, key in ((1, "auc_before"), (2, "auc")):
                pairs = [(p[column] > n[column]) for p in ranks for n in ranks if p[0] and not n[0]]
                assert row[key]["value"] == pytest.approx(np.mean(pairs))
    assert found["films"] == len(films)


def test_comparing_finds_each_film_and_model_again() -> None:
    rng = np.random.default_rng(4)
    records = [Record(Path(f"{n}.png"), "ab"[n % 2], f"p{n}", "") for n in range(12)]
    folds = np.repeat(np.array([0, 1], np.int64), 12)
    whole = Predictions(("a", "b"), tuple(records) * 2, folds, rng.dirichlet([1, 1], 24))
    copies = [
        (replace(record, path=Path("copy") / record.path), fold) for fold in (1, 0) for record in records[3:][::-1]
    ]
    changed = Predictions(
        ("a", "b"), tuple(copy for copy, _ in copies), np.array([fold for _, fold in copies]), rng.dirichlet([1, 1], 18)
    )
    origin = {Path("copy") / record.path: record.path for record in records}
    found = reactions.compare(whole, changed, origin, "b", resamples=0)
    moved, equal = [], []
    for (copy, fold), row in zip(copies, changed.probabilities):
        before = whole.probabilities[int(copy.path.stem) + 12 * fold]
        moved.append(abs(row[1] - before[1]))
        equal.append((row[1] > row[0]) == (before[1] > before[0]))
    assert found["films"] == 9
    assert found["mean_change"] == pytest.approx(np.mean(moved))
    assert found["equal_labels"] == np.mean(equal)
    assert not np.isclose(found["mean_change"], 0)


def case_of(tmp_path: Path, spec: PreprocessingSpec, coarse: np.ndarray, mask: np.ndarray) -> Case:
    height, width = mask.shape
    rng = np.random.default_rng(5)
    cv2.imwrite(str(tmp_path / "film.png"), rng.integers(0, 256, (height, width)).astype(np.uint8))
    cv2.imwrite(str(tmp_path / "mask.png"), mask.astype(np.uint8) * 255)
    record = Record(tmp_path / "film.png", "a", "p", "", (), tmp_path / "mask.png")
    return Case(record, 0, read_truth(record, spec), {"attention": coarse.astype(np.float32)})


@pytest.mark.parametrize("fit", ["stretch", "crop", "letterbox"])
def test_shares_of_attention_in_the_lungs(tmp_path: Path, fit: Any) -> None:
    spec = PreprocessingSpec(size=64, fit=fit)
    mask = np.zeros((96, 128), bool)
    mask[20:70, 10:60] = True
    # even attention: what the network sees of the lungs is what it has
    even = reactions.lung_shares(case_of(tmp_path, spec, np.full((2, 2), 3.0), mask), spec)
    seen = np.zeros_like(mask)
    seen[:, 16 : 112 if fit == "crop" else 0] = True
    if fit != "crop":
        seen[:] = True
    assert even[0] == pytest.approx(even[2], rel=1e-5)
    assert even[2] == pytest.approx((mask & seen).sum() / seen.sum())
    assert even[1] == 0  # a map without a maximum shows nothing
    assert even[3] == pytest.approx(50 * 50 / (96 * 128))


def test_shares_against_loops_over_the_pixels(tmp_path: Path) -> None:
    """Stretched to the film bilinearly: 2 x 2 values, each pixel by its own formula."""
    spec = PreprocessingSpec(size=64)
    coarse = np.array([[4.0, 1.0], [2.0, 3.0]])
    mask = np.zeros((64, 64), bool)
    mask[5:30, 8:40] = True
    attention, heat, chance, area = reactions.lung_shares(case_of(tmp_path, spec, coarse, mask), spec)
    inside = {"attention": 0.0, "heat": 0.0}
    total = {"attention": 0.0, "heat": 0.0}
    for y in range(64):
        for x in range(64):
            a, b = (min(max((at + 0.5) / 32 - 0.5, 0), 1) for at in (y, x))
            value = (1 - a) * ((1 - b) * 4 + b * 1) + a * ((1 - b) * 2 + b * 3)
            for name, shown in (("attention", value), ("heat", (value - 1) / 3)):
                total[name] += shown
                inside[name] += shown * mask[y, x]
    assert attention == pytest.approx(inside["attention"] / total["attention"], rel=1e-5)
    assert heat == pytest.approx(inside["heat"] / total["heat"], rel=1e-4)
    assert chance == area == mask.mean()


def test_mask_files_are_matched_by_film(phantoms: Manifest, bundle: Bundle, tmp_path: Path) -> None:
    lines = ["path,mask,area_fraction"]
    for number in (2, 5, 7):
        film = read_radiograph(phantoms.records[number].path).pixels
        mask = np.zeros_like(film)
        mask[: number * 10] = 255
        cv2.imwrite(str(tmp_path / f"{number}.png"), mask)
        lines.append(f"{phantoms.records[number].path},{number}.png,0.5")
    (tmp_path / "masks.csv").write_text("\n".join([*lines, "elsewhere.png,none.png,0.1"]) + "\n")
    masks = reactions.read_lung_masks(tmp_path / "masks.csv")
    found = reactions.attention_in_lungs(bundle, phantoms, masks, device="cpu", resamples=20, lungs=left_half)
    drawn, by_network = found.values()
    assert drawn["films"] == 3
    heights = [read_radiograph(phantoms.records[number].path).height for number in (2, 5, 7)]
    assert drawn["area"] == pytest.approx(np.mean([n * 10 / height for n, height in zip((2, 5, 7), heights)]))
    assert drawn["chance"] == drawn["area"]
    films = [read_radiograph(record.path).pixels for record in phantoms.records]
    assert by_network["films"] == sum(map(bright, films))
    assert 0 < by_network["attention"]["value"] < 1
    (tmp_path / "masks.csv").write_text("path,other\na,b\n")
    with pytest.raises(DataError, match="lacks the column 'mask'"):
        reactions.read_lung_masks(tmp_path / "masks.csv")


def test_a_run_judges_only_patients_that_it_has_not_seen(tmp_path: Path) -> None:
    from magsd.run_folder import data_facts
    from tiny_export import write_run

    scores = {0: {"auc": 0.5}, 1: {"auc": 0.5}}
    folder = write_run(tmp_path / "run", tmp_path / "films", scores, model="plain")
    whole = read_manifest(tmp_path / "films" / "manifest.csv")
    (folder / "manifest.json").write_text(json.dumps(data_facts(whole)))
    run = open_target(folder)
    assert isinstance(run, Run)
    manifest = controls.plain_manifest(whole.path, None)
    of_fold = [run.folds.assignment[record.patient] for record in manifest.records]
    for fold, films in ((1, of_fold.count(1)), (None, of_fold.count(0) + of_fold.count(1))):
        found = reactions.reactions(
            run, manifest, "blob", fold=fold, device="cpu", resamples=0,
            changes={"mirrored": perturbations.mirror}, lungs=left_half,
        )  # fmt: skip
        assert found["films"] == found["changes"]["mirrored"]["films"] == films < len(manifest.records)


def test_the_lung_network_finds_the_lungs_of_a_phantom(phantoms: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    from magsd_runtime import lungs

    film = read_radiograph(phantoms.records[0].path).pixels
    mask = reactions.found_lungs(film)
    assert mask is not None
    assert mask.shape == film.shape
    assert 0.05 < mask.mean() < 0.7
    monkeypatch.setattr(lungs, "find_lungs", lambda film, sha256: np.zeros((128, 128), bool))
    assert reactions.found_lungs(film) is None


# the command


def test_the_whole_table_on_phantoms(
    phantoms: Manifest, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--data", phantoms.path, "--target", bundle.path, "--work", tmp_path / "work",
        "--json", tmp_path / "table.json", "--positive", "opacity", "--device", "cpu",
        "--backbone", "test_efficientnet", "--weights", "none",
        "--limit", "16", "--reference", "--quick",
    ]  # fmt: skip
    assert shortcuts.main([str(option) for option in options]) == 0
    out = capsys.readouterr().out
    for text in (
        "border only",
        "thumbnails",
        "unchanged films",
        "gradient boosting",
        "lungs blanked",
        "mirrored",
        "e: ",
    ):
        assert text in out
    result = json.loads((tmp_path / "table.json").read_text())
    assert list(result["parts"]) == ["a", "b", "c", "d", "e"]
    assert result["images"] == 16
    assert result["parts"]["d"]["films"] == 16
    assert len(result["parts"]["d"]["changes"]) == 1 + len(perturbations.CHANGES)
    assert set(result["parts"]["a"]["rows"]) == {"border only, central 70 % blanked", "unchanged films"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "f"], "--only is f: expected some of a,b,c,d,e"),
        (["--only", "c,d"], "part d needs --target"),
        (["--only", "b"], "part b needs --work"),
        (["--only", "c", "--positive", "flu"], "--positive is flu: the manifest has blob, plain"),
    ],
)
def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    data = write_tiny_manifest(tmp_path, patients=6)
    assert shortcuts.main(["--data", str(data), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.data
def test_facts_alone_tell_covid_in_the_real_films(cxr: Path) -> None:
    """The known shortcut of these files (SOURCES.md): without any picture the AUC is far above chance."""
    manifest = controls.plain_manifest(cxr / "dataset_a.csv", 120)
    found = controls.tabular_control(manifest, make_folds(manifest, 5), "covid19", resamples=0)
    assert min(row["positive_auc"]["value"] for row in found.values()) > 0.7
