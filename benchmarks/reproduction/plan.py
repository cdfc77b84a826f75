"""Plan files: which cells there are, read from YAML and checked, one line an error.

name: quick                      # goes into the tables
data: {A: dataset_a.csv}         # manifests, relative to the data root
positive: {A: covid19}           # of two classes: sensitivity, specificity and F1 are of this one
localization: {data: localization.csv, trained_on: A}       # Figure 7
folds: 5
fold_seed: 0                     # who is in which fold; the same for all seeds
seeds: [0]                       # of initialisation, order and draws
epochs: {A: 12, B: 4}            # or one number for all
settings: {backbone: ...}        # of `magsd train`, for all
own: {vgg16: {batch_size: 8}}    # for one model or ablation
stages:                          # done in this order
  - {data: [A], models: [magsd], ablations: [l2]}
keep: reference                  # whose weights stay after the evaluation: all, best, reference, none
assumed_rate: {multiply_adds_per_second: 4.5e12, machine: a sentence}    # for a time computed, not measured
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from magsd.config import MODELS, TrainingConfig
from magsd_runtime.errors import UsageError, require

from .variants import ABLATIONS, REFERENCE, VARIANTS, config_of

KEEP = ("all", "best", "reference", "none")
_OF_THE_PLAN = ("data", "model", "folds", "folds_file", "seed", "epochs")
_SETTINGS = tuple(field.name for field in fields(TrainingConfig) if field.name not in _OF_THE_PLAN)
_OWN = (*_SETTINGS, "epochs")


@dataclass(frozen=True)
class Stage:
    """Every variant on every data set; stages are done one after the other."""

    data: tuple[str, ...]
    variants: tuple[str, ...]


@dataclass(frozen=True)
class AssumedRate:
    """Multiply-adds a second of a machine that is not at hand, and where the figure is from."""

    multiply_adds_per_second: float
    machine: str


@dataclass(frozen=True)
class Plan:
    """A plan file. ``data``: name -> manifest as written in the file."""

    path: Path
    name: str
    data: Mapping[str, str]
    stages: tuple[Stage, ...]
    epochs: Mapping[str, int]
    folds: int = 5
    fold_seed: int = 0
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, Any] | None = None
    own: Mapping[str, Mapping[str, Any]] | None = None
    positive: Mapping[str, str] | None = None
    localization: tuple[str, str] | None = None
    keep: str = "reference"
    assumed_rate: AssumedRate | None = None

    def config(self, data: str, variant: str, seed: int) -> TrainingConfig:
        """The resolved settings of one variant on one data set; without data and folds file."""
        common = {**(self.settings or {}), "epochs": self.epochs[data], "folds": self.folds, "seed": seed}
        return config_of(variant, common, (self.own or {}).get(variant, {}))

    def variants(self) -> tuple[str, ...]:
        """All that are planned, in order, each once."""
        return tuple(dict.fromkeys(name for stage in self.stages for name in stage.variants))


def read_plan(path: Path) -> Plan:
    """Read and check a plan file.

    Raises
    ------
    UsageError
        Naming the file, the place in it, what is there and what was expected.
    """
    yaml = require("yaml", feature="a plan file", extra="train")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_strict_loader(yaml))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the plan {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return parse_plan(content, path)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def parse_plan(content: Any, path: Path = Path("plan")) -> Plan:
    """The plan of what YAML gave.

    Raises
    ------
    UsageError
        For the first thing that is wrong.
    """
    known = (
        "name", "data", "positive", "localization", "folds", "fold_seed", "seeds", "epochs", "settings", "own",
        "stages", "keep", "assumed_rate",
    )  # fmt: skip
    top = _mapping(content, "the plan", known, needed=("name", "data", "epochs", "stages"))
    data = _mapping(top["data"], "data", None)
    for name, manifest in data.items():
        _text(name, "a name in data")
        _text(manifest, f"data.{name}")
        if not name.replace("_", "").isalnum():
            raise UsageError(f"data.{name}: expected a name of letters, digits and _")
    if not data:
        raise UsageError("data is empty: expected lines like 'A: dataset_a.csv'")
    stages = tuple(
        _stage(each, f"stages[{number}]", tuple(data)) for number, each in enumerate(_list(top["stages"], "stages"))
    )
    seeds = tuple(
        _whole(seed, f"seeds[{number}]", 0) for number, seed in enumerate(_list(top.get("seeds", [0]), "seeds"))
    )
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds is {list(seeds)}: expected each at most once")
    own = {
        name: dict(_mapping(values, f"own.{name}", _OWN))
        for name, values in _mapping(top.get("own", {}), "own", VARIANTS).items()
    }
    positive = {
        name: _text(label, f"positive.{name}")
        for name, label in _mapping(top.get("positive", {}), "positive", tuple(data)).items()
    }
    localization = None
    if "localization" in top:
        values = _mapping(top["localization"], "localization", ("data", "trained_on"), needed=("data", "trained_on"))
        localization = (
            _text(values["data"], "localization.data"),
            _one_of(values["trained_on"], "localization.trained_on", tuple(data)),
        )
    assumed = None
    if "assumed_rate" in top:
        needed = ("multiply_adds_per_second", "machine")
        values = _mapping(top["assumed_rate"], "assumed_rate", needed, needed=needed)
        rate = _positive(values["multiply_adds_per_second"], "assumed_rate.multiply_adds_per_second")
        assumed = AssumedRate(rate, _text(values["machine"], "assumed_rate.machine"))
    name = _text(top["name"], "name")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UsageError(f"name is {name!r}: expected letters, digits, - and _")
    epochs = top["epochs"]
    if isinstance(epochs, dict):
        _mapping(epochs, "epochs", tuple(data), needed=tuple(data))
        epochs = {name: _whole(each, f"epochs.{name}", 1) for name, each in epochs.items()}
    else:
        epochs = dict.fromkeys(data, _whole(epochs, "epochs", 1))
    plan = Plan(
        path, name, data, stages, epochs, _whole(top.get("folds", 5), "folds", 2),
        _whole(top.get("fold_seed", 0), "fold_seed", 0), seeds,
        dict(_mapping(top.get("settings", {}), "settings", _SETTINGS)), own, positive, localization,
        _one_of(top.get("keep", "reference"), "keep", KEEP), assumed,
    )  # fmt: skip
    for variant in plan.variants():
        try:
            plan.config(next(iter(data)), variant, seeds[0])
        except UsageError as error:
            raise UsageError(f"{variant}: {error}") from None
    return plan


def _stage(value: Any, place: str, data: tuple[str, ...]) -> Stage:
    stage = _mapping(value, place, ("data", "models", "ablations"), needed=("data",))
    names: list[str] = []
    for kind, known in (("models", tuple(MODELS)), ("ablations", tuple(ABLATIONS))):
        for number, name in enumerate(_list(stage.get(kind, []), f"{place}.{kind}", empty=True)):
            names.append(_one_of(name, f"{place}.{kind}[{number}]", known))
    sets = [
        _one_of(name, f"{place}.data[{number}]", data)
        for number, name in enumerate(_list(stage["data"], f"{place}.data"))
    ]
    if not names:
        raise UsageError(f"{place} has neither models nor ablations")
    # the reference first: every difference needs it
    names.sort(key=lambda name: name != REFERENCE)
    return Stage(tuple(dict.fromkeys(sets)), tuple(dict.fromkeys(names)))


def _mapping(
    value: Any, place: str, known: Sequence[str] | None, needed: Sequence[str] = ()
) -> Mapping[str, Any]:  # fmt: skip
    if not isinstance(value, dict):
        raise UsageError(f"{place} is {_shown(value)}: expected lines like 'key: value'")
    if known is not None and (unknown := [key for key in value if key not in known]):
        raise UsageError(f"{place} has the unknown key {_shown(unknown[0])}: one of {', '.join(known)}")
    if missing := [key for key in needed if key not in value]:
        raise UsageError(f"{place} lacks {', '.join(missing)}")
    return value


def _list(value: Any, place: str, *, empty: bool = False) -> list[Any]:
    if not isinstance(value, list) or not (value or empty):
        raise UsageError(f"{place} is {_shown(value)}: expected a list, as in [A, B]")
    return value


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{place} is {_shown(value)}: expected text")
    return value.strip()


def _one_of(value: Any, place: str, known: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise UsageError(f"{place} is {_shown(value)}: one of {', '.join(known)}")
    return value


def _whole(value: Any, place: str, least: int) -> int:
    if type(value) is not int or not least <= value < 2**63:
        raise UsageError(f"{place} is {_shown(value)}: expected a whole number, {least} or more")
    return value


def _positive(value: Any, place: str) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else -1.0  # YAML 1.1 reads 4.5e12 as text
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not 0 < number < float("inf"):
        raise UsageError(f"{place} is {_shown(value)}: expected a number above 0")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _strict_loader(yaml: Any) -> Any:
    """PyYAML's safe loader, which would keep the last of two equal keys, with an error for the second."""

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        twice = {repr(key) for key in keys if [repr(other) for other in keys].count(repr(key)) > 1}
        if twice:
            raise ValueError(f"the key {min(twice)} is given twice, line {node.start_mark.line + 1}")
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader
