"""The configuration: values from text, named models, contradictions, and the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magsd.config import MODELS, TrainingConfig, overridden, read_config, resolve, unfinished, write_config
from magsd_runtime.errors import UsageError


def test_defaults_are_the_papers() -> None:
    config = resolve({})
    assert (config.backbone, config.epochs, config.batch_size) == ("resnet50", 100, 32)
    assert (config.learning_rate, config.momentum, config.weight_decay) == (1e-3, 0.9, 1e-6)
    assert config.attention_augmentation == ("mixup", "patching", "dimming")
    assert (config.num_attention_maps, config.attention_scales, config.folds) == (32, 2, 5)


def test_text_becomes_the_fields_types() -> None:
    config = resolve(
        {"epochs": "7", "learning_rate": "1e-2", "brightness": "0.6,0.9", "attention_augmentation": "mixup"}
    )
    assert (config.epochs, config.learning_rate) == (7, 0.01)
    assert (config.brightness, config.attention_augmentation) == ((0.6, 0.9), ("mixup",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": "many"}, "--epochs is 'many': expected a whole number"),
        ({"epochs": "2.5"}, "--epochs is '2.5': expected a whole number"),
        ({"epochs": 0}, "--epochs is 0: expected more than 0"),
        ({"learning_rate": "nan"}, "--learning-rate is 'nan'"),
        ({"brightness": "0.9,0.6"}, "--brightness"),
        ({"brightness": "1"}, "expected two numbers"),
        ({"attention_augmentation": "mixup,zoom"}, "--attention-augmentation"),
        ({"pooling": "sum"}, "--pooling is 'sum': expected one of attention, gap, gmp"),
        ({"pooling": "gap"}, "--attention-augmentation none"),
        ({"loss": "cross-entropy"}, "--attention-augmentation none"),
        ({"model": "vgg"}, "--model is 'vgg': one of magsd"),
        ({"size": 100}, "multiple of 32"),
        ({"channels_last": "maybe"}, "expected true or false"),
        ({"colour": 1}, "unknown setting colour"),
    ],
)
def test_wrong_values_are_named_as_the_user_typed_them(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(values)


def test_named_models_give_way_to_what_is_said_beside_them() -> None:
    assert resolve({"model": "plain"}).pooling == "gap"
    assert resolve({"model": "plain", "pooling": "gmp"}).pooling == "gmp"
    for name in MODELS:
        assert resolve({"model": name}).model == name


@given(
    st.fixed_dictionaries(
        {
            "epochs": st.integers(1, 1000),
            "learning_rate": st.floats(1e-8, 10),
            "model": st.sampled_from(sorted(MODELS)),
            "size": st.sampled_from([32, 224, 320]),
            "crop_scale": st.tuples(st.floats(0.1, 0.5), st.floats(0.5, 1.0)),
        }
    )
)
def test_a_saved_configuration_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    if MODELS[values["model"]].get("size") or values["model"] == "covid-net":
        del values["size"]  # these take few others: test_models.py
    config = resolve(values)
    path = Path(tmp_path_factory.mktemp("config")) / "config.yaml"
    write_config(config, path)
    assert resolve(read_config(path)) == config


@pytest.mark.parametrize("before", sorted(MODELS))
@pytest.mark.parametrize("typed", sorted(MODELS))
def test_a_typed_model_is_that_model_whatever_the_file_had(before: str, typed: str) -> None:
    file = resolve({"model": before, "epochs": 7}).to_dict()
    assert resolve(overridden(file, {"model": typed})) == resolve({"model": typed, "epochs": 7})
    mine = resolve(overridden(file, {"model": typed, "batch_size": "5"}))
    assert mine == resolve({"model": typed, "epochs": 7, "batch_size": 5})


def test_whole_numbers_are_exact_and_bounded() -> None:
    assert resolve({"seed": str(2**60 + 1)}).seed == 2**60 + 1
    for values in ({"seed": "9" * 20}, {"nesterov": True, "momentum": 0}, {"model": ["a"]}, {1: 2}):
        with pytest.raises(UsageError):
            resolve(values)  # pyright: ignore[reportArgumentType]


def test_a_broken_file_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("epochs: [", "just words", ""):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"config\.yaml"):
            read_config(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_config(tmp_path / "missing.yaml")


def test_every_field_has_help() -> None:
    for field in dataclasses.fields(TrainingConfig):
        assert field.metadata["help"], field.name


def test_a_training_that_is_not_finished_is_known_by_its_log(tmp_path: Path) -> None:
    assert unfinished(tmp_path, 3) is None  # no log: nothing is known
    (tmp_path / "log.csv").write_text("epoch,best\n1,1\n2,0\n")
    assert unfinished(tmp_path, 3) == "epoch 2 of 3"
    assert unfinished(tmp_path, 2) is None
