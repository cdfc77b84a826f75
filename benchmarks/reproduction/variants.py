"""What the rows of the paper's Tables 3 to 8 are, as settings of `magsd train`.

A variant is a model of Table 3 (a name of `--model`) or MAG-SD with one choice changed (Tables 4 to 8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from magsd.config import FIXED_BACKBONE, MODELS, TrainingConfig, resolve

REFERENCE = "magsd"
"""The full model: the last row of Tables 3 to 8, against which the others are held."""

# GMP and GAP train no attention, so there is nothing to guide an augmentation: magsd-oaug is their like
_NO_ATTENTION: Mapping[str, Any] = {"attention_augmentation": [], "loss": "cross-entropy"}
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "no-clahe": {"clahe_clip": 0.0},
    "scales-1": {"attention_scales": 1},
    "scales-3": {"attention_scales": 3},
    "gmp": {"pooling": "gmp", **_NO_ATTENTION},
    "gap": {"pooling": "gap", **_NO_ATTENTION},
    "mixup": {"attention_augmentation": ["mixup"]},
    "mixup-dimming": {"attention_augmentation": ["mixup", "dimming"]},
    "l2": {"loss": "l2"},
}
VARIANTS = (*MODELS, *ABLATIONS)


@dataclass(frozen=True)
class Row:
    """One line of a table. ``extra``: a line that the paper does not have."""

    variant: str
    text: str
    extra: bool = False


@dataclass(frozen=True)
class Table:
    """One table of the paper. ``pairs``: comparisons besides every row against the full model."""

    number: int
    title: str
    rows: Sequence[Row]
    pairs: Sequence[tuple[str, str]] = ()


TABLES = (
    Table(3, "Evaluation of Models", (
        Row("vgg16", "VGG16"), Row("resnet18", "ResNet18"), Row("resnet50", "ResNet50"),
        Row("inception-v3", "InceptionV3"), Row("narin-resnet50", "Narin et al. (ResNet)"),
        Row("narin-inception-v3", "Narin et al. (InceptionV3)"), Row("covid-net", "COVID-Net"), Row("bcnn", "BCNN"),
        Row("bcnn-attention", "BCNN (Attention)"), Row("fpn", "FPN"), Row("unet", "U-Net"),
        Row("plain", "bare backbone", extra=True),
        Row("magsd-oaug", "MAG-SD (OAUG)"), Row("magsd", "MAG-SD (Proposed)"),
    )),
    Table(4, "Evaluation of CLAHE", (Row("no-clahe", "w/o CLAHE"), Row("magsd", "CLAHE"))),
    Table(5, "Evaluation of Multisize Attention Maps", (
        Row("scales-1", "7*7"), Row("magsd", "7*7 + 14*14"), Row("scales-3", "7*7 + 14*14 + 28*28"),
    )),
    Table(6, "Comparison of Pooling Methods", (
        Row("gmp", "GMP"), Row("gap", "GAP"), Row("magsd-oaug", "Attention Pooling, no augmentation", extra=True),
        Row("magsd", "Attention Pooling"),
    ), (("gmp", "magsd-oaug"), ("gap", "magsd-oaug"))),
    Table(7, "Contribution of Attention Guided Augmentation", (
        Row("magsd-oaug", "none", extra=True), Row("mixup", "Mix-up"), Row("mixup-dimming", "Mix-up + Dimming"),
        Row("magsd", "Mix-up + Dimming + Patching"),
    )),
    Table(8, "Comparison of L2 and Soft Distance Regularization", (Row("l2", "L2"), Row("magsd", "Soft Distance"))),
)  # fmt: skip


def title_of(variant: str) -> str:
    """The name that Table 3 prints; an ablation's own, since its text ("7*7") says too little by itself."""
    return next((row.text for row in TABLES[0].rows if row.variant == variant), variant)


def config_of(variant: str, common: Mapping[str, Any], own: Mapping[str, Any]) -> TrainingConfig:
    """The settings of one variant: ``common`` of all, what the variant changes, then ``own``, which wins.

    Of ``common``, a model that is one network takes no backbone; COVID-Net has no weights to load and one size.

    Raises
    ------
    UsageError
        If the settings do not go together.
    """
    model = variant if variant in MODELS else REFERENCE
    unfit: tuple[str, ...] = ("backbone",) if model in FIXED_BACKBONE else ()
    if model == "covid-net":
        unfit += ("weights", "size", "backbone_rate")
    fitting = {name: value for name, value in common.items() if name not in unfit}
    return resolve({**fitting, "model": model, **ABLATIONS.get(variant, {}), **own})
