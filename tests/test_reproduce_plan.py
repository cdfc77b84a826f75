"""Plans: what is refused and how, the cells and their keys, their order."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magsd.config import MODELS, TrainingConfig
from magsd.data import Manifest, read_manifest
from magsd_runtime.errors import DataError, UsageError
from reproduction import published
from reproduction.cells import Cell, check_settings, expand, read_data, settings_of, unique
from reproduction.plan import parse_plan, read_plan
from reproduction.variants import ABLATIONS, REFERENCE, TABLES, VARIANTS, config_of
from tiny_run import write_tiny_manifest
from typed_table_3 import TABLE_3

PLANS = Path(__file__).parents[1] / "configs" / "plans"
PAPER = Path(__file__).parents[2] / "shared" / "reference" / "mag-sd-paper.md"
GOOD: dict[str, Any] = {
    "name": "tiny",
    "data": {"A": "manifest.csv"},
    "folds": 3,
    "epochs": 2,
    "settings": {"backbone": "test_efficientnet", "weights": "none", "size": 64},
    "stages": [{"data": ["A"], "models": ["plain", "magsd"], "ablations": ["l2"]}],
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return read_manifest(write_tiny_manifest(tmp_path_factory.mktemp("films")))


def cells_of(content: dict[str, Any], manifest: Manifest) -> list[Cell]:
    plan = parse_plan(content)
    return expand(plan, dict.fromkeys(plan.data, manifest))


@pytest.mark.parametrize("name", ["quick", "full"])
def test_the_plans_that_come_with_magsd(name: str) -> None:
    plan = read_plan(PLANS / f"{name}.yaml")
    assert (plan.name, plan.folds, list(plan.data)) == (name, 5, ["A", "B", "C"])
    # all five ablations on data set A before anything else
    assert plan.stages[0].data == ("A",)
    assert plan.stages[0].variants[0] == REFERENCE
    assert set(ABLATIONS) < set(plan.stages[0].variants)


def test_the_full_plan_has_every_row_of_the_paper_with_its_settings(manifest: Manifest) -> None:
    plan = read_plan(PLANS / "full.yaml")
    rows = {(data, row.variant) for table in TABLES for row in table.rows if not row.extra for data in plan.data}
    cells = expand(plan, dict.fromkeys(plan.data, manifest))
    assert {(cell.data, cell.variant) for cell in cells} == rows
    assert len(cells) == len(rows) * 5
    config = plan.config("B", "magsd", 0)
    assert settings_of(config) == settings_of(TrainingConfig())
    assert (config.epochs, config.backbone, config.size, config.learning_rate) == (100, "resnet50", 224, 1e-3)


def test_what_is_published_is_what_the_paper_prints() -> None:
    rows = {row.variant for table in TABLES for row in table.rows if not row.extra}
    assert set(published.TABLES_3_TO_8) == rows
    # typed in by hand, independently, for the first table
    for data, table in TABLE_3.items():
        printed = {published.TABLES_3_TO_8[row.variant][data] for row in TABLES[0].rows if not row.extra}
        assert printed == set(table.values())
    if not PAPER.is_file():
        pytest.skip(f"no paper at {PAPER}")
    text = re.sub("</?b>", "", PAPER.read_text(encoding="utf-8"))
    for variant, sets in published.TABLES_3_TO_8.items():
        line = "\t".join(f"{mean:.2f}±{deviation:.2f}" for name in "ABC" for mean, deviation in sets[name])
        assert line in text, variant


def test_a_variant_is_magsd_but_for_its_choice() -> None:
    full = settings_of(config_of(REFERENCE, {}, {}))
    changed = {name: {k for k, v in settings_of(config_of(name, {}, {})).items() if v != full[k]} for name in ABLATIONS}
    assert changed == {
        "no-clahe": {"clahe_clip"}, "scales-1": {"attention_scales"}, "scales-3": {"attention_scales"},
        "gmp": {"pooling", "attention_augmentation", "loss"}, "gap": {"pooling", "attention_augmentation", "loss"},
        "mixup": {"attention_augmentation"}, "mixup-dimming": {"attention_augmentation"}, "l2": {"loss"},
    }  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_common_settings_fit_every_variant(name: str) -> None:
    common = {"backbone": "tf_efficientnet_lite0", "weights": "imagenet", "size": 128, "backbone_rate": 0.5}
    config = config_of(name, common, {})
    assert config.model == (name if name in MODELS else REFERENCE)
    assert config.size == (224 if name == "covid-net" else 128)
    fixed = MODELS[config.model].get("backbone") is not None and not name.startswith("bcnn")
    assert (config.backbone == "tf_efficientnet_lite0") is not fixed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "the plan has the unknown key 'epoch': one of name, "),
        ({"stages": None}, "the plan lacks stages"),
        ({"epochs": 0}, "epochs is 0: expected a whole number, 1 or more"),
        ({"epochs": {"A": 0}}, "epochs.A is 0: expected a whole number, 1 or more"),
        ({"epochs": {"A": 1, "B": 2}}, "epochs has the unknown key 'B'"),
        ({"epochs": {}}, "epochs lacks A"),
        ({"epochs": True}, "epochs is True: expected a whole number"),
        ({"folds": 1}, "folds is 1: expected a whole number, 2 or more"),
        ({"seeds": [0, 0]}, "seeds is [0, 0]: expected each at most once"),
        ({"seeds": 3}, "seeds is 3: expected a list"),
        ({"name": "a b"}, "name is 'a b': expected letters"),
        ({"data": {}}, "data is empty"),
        ({"data": {"A": 3}}, "data.A is 3: expected text"),
        ({"data": {"../A": "x"}}, "data.../A: expected a name"),
        ({"stages": [{"data": ["A"], "models": ["magsd", "vgg"]}]}, "stages[0].models[1] is 'vgg': one of magsd, "),
        ({"stages": [{"data": ["A"], "ablations": ["magsd"]}]}, "stages[0].ablations[0] is 'magsd': one of no-clahe"),
        ({"stages": [{"data": ["B"], "models": ["magsd"]}]}, "stages[0].data[0] is 'B': one of A"),
        ({"stages": [{"data": ["A"]}]}, "stages[0] has neither models nor ablations"),
        ({"settings": {"epochs": 3}}, "settings has the unknown key 'epochs'"),
        ({"settings": {"size": 65}}, "magsd: preprocessing size is 65"),
        ({"settings": {"loss": "l1"}}, "--loss is 'l1'"),
        ({"own": {"fpn2": {}}}, "own has the unknown key 'fpn2'"),
        ({"own": {"l2": {"loss": "cross-entropy"}}}, "l2: --loss cross-entropy does not use the auxiliary images"),
        ({"keep": "some"}, "keep is 'some': one of all, best, reference, none"),
        ({"positive": {"B": "x"}}, "positive has the unknown key 'B': one of A"),
        ({"localization": {"data": "l.csv"}}, "localization lacks trained_on"),
        ({"localization": {"data": "l.csv", "trained_on": "Z"}}, "localization.trained_on is 'Z': one of A"),
        ({"assumed_rate": {"multiply_adds_per_second": "fast", "machine": "m"}}, "expected a number above 0"),
    ],
)
def test_a_bad_plan_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    content = {**GOOD, **change}
    content = {name: value for name, value in content.items() if value is not None}
    with pytest.raises(UsageError) as caught:
        parse_plan(content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_file_is_named_and_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    for text, message in [
        ("name: a\nname: b\n", "the key 'name' is given twice, line 1"),
        ("name: [\n", "is not YAML"),
        ("", "the plan is None: expected lines"),
        ("name: a\n", "the plan lacks data, epochs, stages"),
    ]:
        path.write_text(text)
        with pytest.raises(UsageError, match=re.escape(message)) as caught:
            read_plan(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot read the plan"):
        read_plan(tmp_path / "none.yaml")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([*VARIANTS, "A"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(place=st.sampled_from([*GOOD, "own", "seeds", "keep", "localization", "positive", "fold_seed"]), value=_VALUES)
def test_whatever_yaml_gives_is_a_plan_or_a_usage_error(place: str, value: Any) -> None:
    content = {**copy.deepcopy(GOOD), place: value}
    said = ""
    try:
        assert parse_plan(content).variants()
    except UsageError as error:
        said = str(error)
    assert "\n" not in said


def test_the_most_informative_cells_come_first(manifest: Manifest) -> None:
    content = {
        **GOOD, "data": {"A": "a", "B": "b"}, "seeds": [4, 1],
        "stages": [{"data": ["A"], "models": ["plain", "magsd"]}, {"data": ["B", "A"], "ablations": ["l2"]}],
    }  # fmt: skip
    order = [(cell.data, cell.config.seed, cell.fold, cell.variant) for cell in cells_of(content, manifest)]
    assert {cell.config.epochs for cell in cells_of(content, manifest)} == {2}
    content["epochs"] = {"A": 5, "B": 7}
    assert {(cell.data, cell.config.epochs) for cell in cells_of(content, manifest)} == {("A", 5), ("B", 7)}
    first = [("A", seed, fold, v) for seed in (4, 1) for fold in range(3) for v in ("magsd", "plain")]
    second = [(data, seed, fold, "l2") for seed in (4, 1) for fold in range(3) for data in ("B", "A")]
    assert order == first + second


def test_a_key_changes_with_all_that_matters_and_nothing_else(manifest: Manifest) -> None:
    (cell,) = [each for each in cells_of(GOOD, manifest) if (each.variant, each.fold) == ("magsd", 1)]
    config = cell.config
    for other in (
        replace(cell, fold=2),
        replace(cell, fold_seed=1),
        replace(cell, digest="0" * 64),
        replace(cell, config=replace(config, seed=1)),
        replace(cell, config=replace(config, epochs=3)),
        replace(cell, config=replace(config, folds=4)),
        replace(cell, config=replace(config, attention_augmentation=("mixup",))),
    ):
        assert other.key != cell.key
    for same in (
        replace(cell, manifest=Path("elsewhere.csv"), data="Z", variant="another"),
        replace(cell, config=replace(config, data="x.csv", folds_file="folds.json")),
    ):
        assert same.key == cell.key
    # spelled out or not, a default is the same setting
    spelled = cells_of({**GOOD, "settings": {**GOOD["settings"], "momentum": 0.9}}, manifest)
    assert cell.key in {each.key for each in spelled}
    # a plan of today and one of tomorrow read each other's cells: this value is a contract
    assert replace(cell, digest="ab").key == "43067755033d"


def test_cells_that_are_the_same_run_are_done_once(manifest: Manifest) -> None:
    content = {
        **GOOD,
        "stages": [
            {"data": ["A"], "models": ["magsd", "plain"], "ablations": ["gap"]},
            {"data": ["A"], "models": ["magsd"]},
        ],
    }
    cells = cells_of(content, manifest)
    assert len(cells) == 12
    # --pooling gap is the model plain under another name
    assert [(cell.variant, cell.fold) for cell in unique(cells)] == [
        (variant, fold) for fold in range(3) for variant in ("magsd", "plain")
    ]


def test_settings_of_another_magsd_are_refused(manifest: Manifest) -> None:
    cell = cells_of(GOOD, manifest)[0]
    saved = settings_of(cell.config)
    check_settings(cell, saved, Path("cell"))
    check_settings(cell, {**saved, "model": "plain"}, Path("cell"))  # a name, not a choice
    check_settings(cell, {**saved, "an_option_of_tomorrow": 1}, Path("cell"))
    with pytest.raises(UsageError, match=r"was made with momentum 0\.8 and this plan has 0\.9"):
        check_settings(cell, {**saved, "momentum": 0.8}, Path("cell"))


def test_a_file_of_weights_counts_by_what_is_in_it(tmp_path: Path) -> None:
    for name, content in (("one", b"a"), ("same", b"a"), ("other", b"b")):
        (tmp_path / name).write_bytes(content)
    one, same, other = (
        settings_of(config_of(REFERENCE, {"weights": str(tmp_path / name)}, {})) for name in ("one", "same", "other")
    )
    assert one == same
    assert {name for name in one if one[name] != other[name]} == {"weights"}
    with pytest.raises(UsageError, match="none cannot be read"):
        settings_of(config_of(REFERENCE, {"weights": str(tmp_path / "none")}, {}))


def test_data_that_cannot_be_read_is_named(tmp_path: Path, manifest: Manifest) -> None:
    plan = parse_plan(GOOD)
    with pytest.raises(DataError, match=r"data set A: .*--data-root"):
        read_data(plan, tmp_path)
    assert read_data(plan, manifest.root)["A"].digest() == manifest.digest()
    with pytest.raises(DataError, match=r"positive\.A is dog: expected one of two classes, data set A has blob, plain"):
        read_data(replace(plan, positive={"A": "dog"}), manifest.root)
