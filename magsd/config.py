"""What a training run is: frozen dataclasses, filled from one YAML file and the command line.

Nothing heavy is imported here. Every field has its option on the command line (``--epochs``,
``--loss``, ...) and its place in the file; the resolved configuration is saved as ``config.yaml``
in the run folder, and ``magsd train --config RUN/config.yaml`` repeats the run.

Defaults are the paper's (section 4.1 and 4.2, Table 2). Where the paper is silent, the authors'
released code decides; where the two differ, ``docs/method.md`` says which was taken and why.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from magsd_runtime.errors import UsageError, require
from magsd_runtime.files import write_text
from magsd_runtime.preprocessing import INCEPTION_SIZE, PreprocessingSpec

ATTENTION_AUGMENTATIONS = ("mixup", "patching", "dimming")

# No attention, hence nothing to guide an augmentation or to hold against it.
_PLAIN: dict[str, Any] = {"pooling": "gap", "attention_augmentation": (), "loss": "cross-entropy"}

# A named model is a set of choices; what the user says beside it wins.
MODELS: dict[str, dict[str, Any]] = {
    "magsd": {},
    # Table 3, "OAUG": the same network without attention-guided augmentation
    "magsd-oaug": {"attention_augmentation": (), "loss": "cross-entropy"},
    # the bare backbone: global average pooling, linear classifier, cross entropy
    "plain": _PLAIN,
    # the other networks of Table 3: magsd.models, docs/models.md
    "vgg16": {**_PLAIN, "backbone": "vgg16"},
    "resnet18": {**_PLAIN, "backbone": "resnet18"},
    "resnet50": {**_PLAIN, "backbone": "resnet50"},
    "inception-v3": {**_PLAIN, "backbone": "inception_v3", "size": INCEPTION_SIZE},
    "narin-resnet50": {**_PLAIN, "backbone": "resnet50"},
    "narin-inception-v3": {**_PLAIN, "backbone": "inception_v3", "size": INCEPTION_SIZE},
    "covid-net": {**_PLAIN, "backbone": "pepx", "weights": "none"},
    "bcnn": {**_PLAIN, "backbone": "vgg16"},
    "bcnn-attention": {"backbone": "vgg16", "attention_augmentation": (), "loss": "cross-entropy"},
    "fpn": _PLAIN,
    "unet": _PLAIN,
}

MA_NETS = ("magsd", "magsd-oaug", "plain")
"""The models that are MA-Net."""

FIXED_BACKBONE = (
    "vgg16", "resnet18", "resnet50", "inception-v3", "narin-resnet50", "narin-inception-v3", "covid-net",
)  # fmt: skip
"""The models that are one network; the others take any backbone."""


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass field that is also a command-line option with ``text`` as its help."""
    if isinstance(default, list | dict):
        raise TypeError("use an immutable default")
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class TrainingConfig:
    """One training run. Field names are the names of the options, with ``-`` for ``_``."""

    data: str = option("", "manifest CSV, or a folder with one subfolder a class", metavar="M.csv")
    # network
    model: str = option(
        "magsd", f"{', '.join(MODELS)}: a network of Table 3, or a named set of the choices below",
        choices=tuple(MODELS),
    )  # fmt: skip
    backbone: str = option("resnet50", "any timm backbone with features at strides 8, 16 and 32")
    weights: str = option("imagenet", "imagenet, none, or a file", metavar="imagenet|none|FILE")
    attention_scales: int = option(2, "feature maps that attention comes from: 1, 2 or 3 (Table 5)")
    num_attention_maps: int = option(32, "attention maps M (section 3.2.2)")
    pooling: Literal["attention", "gap", "gmp"] = option("attention", "pooling before the classifier (Table 6)")
    # input
    size: int = option(
        224, f"side of the network's input in pixels, a multiple of 32; inception-v3: {INCEPTION_SIZE} by default"
    )
    fit: Literal["stretch", "letterbox", "crop"] = option("stretch", "how a film becomes a square")
    clahe_clip: float = option(4.0, "CLAHE clip limit; 0 switches CLAHE off (Table 4)")
    clahe_grid: int = option(4, "CLAHE tiles along each axis")
    crop: Literal["none", "lungs"] = option("none", "lungs: the network sees only the box around the lung fields")
    crop_margin: float = option(0.06, "margin of that box on each side, a fraction of its own width and height")
    lungs: str = option("", "network of magsd train-lungs instead of magsd's own", metavar="FILE.onnx")
    # data augmentation (Table 2)
    augment_probability: float = option(0.5, "probability of each data augmentation; 0 switches all off")
    brightness: tuple[float, float] = option((0.5, 1.0), "brightness factors")
    contrast: tuple[float, float] = option((0.7, 1.0), "contrast factors")
    crop_scale: tuple[float, float] = option((0.6, 1.0), "area fraction of the resized crop")
    crop_ratio: tuple[float, float] = option((0.75, 1.3333333333333333), "aspect ratio of the resized crop")
    rotation: float = option(120.0, "largest rotation either way, degrees")
    horizontal_flip: bool = option(True, "mirror left and right")
    vertical_flip: bool = option(True, "mirror top and bottom")
    # not in the paper: what differs between hospitals and is no disease
    tone: float = option(0.0, "random tone curves: spread of the logarithm of their slopes; 0 switches them off")
    blur: float = option(0.0, "random blur: largest standard deviation in pixels")
    noise: float = option(0.0, "random noise: largest standard deviation in grey levels of 255")
    erasing: float = option(0.0, "random rectangles of one grey: largest side as a fraction of the image")
    spectrum: float = option(0.0, "taking over another film's radial power spectrum: how far, 0 to 1")
    lung_attention: float = option(0.0, "weight in the loss of a term that draws the attention to a target; 0: none")
    lung_attention_target: Literal["lungs", "opacity"] = option(
        "lungs", "of that term. lungs: anywhere in the lung fields; opacity: where they are brighter than their mean"
    )
    # attention-guided augmentation (section 3.3) and loss (section 3.4)
    attention_augmentation: tuple[str, ...] = option(
        ATTENTION_AUGMENTATIONS, "any of mixup, patching, dimming; none switches all off (Table 7)"
    )
    mixup_gamma: float = option(0.6, "weight of the whole image in attention mix-up (Eq. 3)")
    dimming_factor: float = option(0.1, "what attention dimming multiplies the attended region by (Eq. 4)")
    auxiliary_passes: Literal["separate", "one-batch"] = option(
        "separate", "auxiliary images as one pass each, or as one batch (changes batch-norm statistics)"
    )
    loss: Literal["soft-distance", "l2", "cross-entropy"] = option("soft-distance", "loss (Table 8)")
    soft_distance_threshold: float = option(0.7, "theta of Algorithm 1")
    soft_distance_rule: Literal["label-and-confidence", "confidence"] = option(
        "label-and-confidence",
        "when the prediction replaces the label: the released code's rule, or the paper's",
    )
    soft_distance_reduction: Literal["sum", "mean"] = option(
        "sum", "of the distances of the auxiliary images: the released code's sum, or Eq. 7's mean"
    )
    label_smoothing: float = option(0.01, "smoothing of the label target of Algorithm 1, a class")
    # optimisation (section 4.1)
    epochs: int = option(100, "passes over the training images")
    batch_size: int = option(32, "images a step, over all processes")
    learning_rate: float = option(1e-3, "learning rate at the beginning")
    backbone_rate: float = option(
        1.0, "factor of the learning rate for the backbone; 0 leaves it as it is, batch norm too"
    )
    attention_rate: float = option(1.0, "factor of the learning rate for the attention generator")
    momentum: float = option(0.9, "SGD momentum")
    nesterov: bool = option(False, "Nesterov momentum, as in the released code")
    weight_decay: float = option(1e-6, "weight decay")
    schedule: Literal["step", "cosine", "constant"] = option(
        "step", "step: a tenth at one half and at five sixths of the run, as in the released code"
    )
    warmup_epochs: float = option(0.0, "epochs of linear warm-up")
    gradient_clip: float = option(0.0, "largest gradient norm; 0 switches clipping off")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "arithmetic of the forward pass")
    sampling: Literal["uniform", "balanced", "balanced-sources"] = option(
        "uniform", "balanced: every class equally often; balanced-sources: and its sources by the root of their size"
    )
    class_weights: Literal["none", "balanced"] = option("none", "weights of the cross entropy")
    # protocol
    folds: int = option(5, "folds of the cross-validation, grouped by patient")
    folds_file: str = option("", "a folds.json to reuse, so that models share their folds", metavar="FILE")
    validation_fraction: float = option(0.2, "share of the training folds' patients that chooses the epoch")
    select: Literal["auc", "loss", "accuracy", "last"] = option(
        "auc", "validation score that chooses the epoch; last: the last one, whatever its score"
    )
    average: float = option(0.0, "decay a step of an average of the weights over the second half; 0 switches it off")
    seed: int = option(0, "seed of folds, initialisation, order and draws")
    channels_last: bool = option(True, "memory layout of the network; the results differ by rounding")

    def __post_init__(self) -> None:
        _check_literals(self)
        positive = ("epochs", "batch_size", "learning_rate", "num_attention_maps")
        for name in positive:
            if getattr(self, name) <= 0:
                raise _wrong(self, name, "more than 0")
        for name in (
            "momentum", "weight_decay", "warmup_epochs", "gradient_clip", "seed", "rotation",
            "tone", "blur", "noise", "lung_attention", "backbone_rate", "attention_rate",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise _wrong(self, name, "0 or more")
        for name in (
            "augment_probability", "mixup_gamma", "dimming_factor", "soft_distance_threshold", "erasing", "spectrum",
            "crop_margin",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise _wrong(self, name, "0 to 1")
        for name in ("brightness", "contrast", "crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise _wrong(self, name, "two numbers above 0, the smaller first")
        if self.crop_scale[1] > 1:
            raise _wrong(self, "crop_scale", "at most 1")
        if not 0 < self.validation_fraction < 1:
            raise _wrong(self, "validation_fraction", "between 0 and 1")
        if not 0 <= self.label_smoothing < 0.5:
            raise _wrong(self, "label_smoothing", "0 to below 0.5")
        if not 0 <= self.average < 1:
            raise _wrong(self, "average", "0 to below 1")
        if self.lungs and self.crop == "none":
            raise UsageError("--lungs names the network that finds the lung fields: add --crop lungs")
        if self.lung_attention and self.crop == "none":
            raise UsageError("--lung-attention needs the lung fields: add --crop lungs")
        if self.lung_attention and self.pooling != "attention":
            raise UsageError(f"--lung-attention needs attention: --pooling is {self.pooling}")
        if self.seed >= 2**63:
            raise _wrong(self, "seed", "less than 2**63")
        if self.nesterov and self.momentum == 0:
            raise UsageError("--nesterov needs --momentum above 0")
        if self.folds < 2:
            raise _wrong(self, "folds", "2 or more")
        if self.attention_scales not in (1, 2, 3):
            raise _wrong(self, "attention_scales", "1, 2 or 3")
        unknown = set(self.attention_augmentation) - set(ATTENTION_AUGMENTATIONS)
        if unknown or len(set(self.attention_augmentation)) != len(self.attention_augmentation):
            raise _wrong(self, "attention_augmentation", f"each of {', '.join(ATTENTION_AUGMENTATIONS)} at most once")
        if self.attention_augmentation and self.loss == "cross-entropy":
            raise UsageError(
                "--loss cross-entropy does not use the auxiliary images: add --attention-augmentation none"
            )
        if self.attention_augmentation and self.pooling != "attention":
            raise UsageError(
                f"--pooling {self.pooling} trains no attention to guide the augmentation: "
                "add --attention-augmentation none --loss cross-entropy"
            )
        self.preprocessing()
        _check_network(self)

    def preprocessing(self) -> PreprocessingSpec:
        """The preprocessing contract of this run.

        Raises
        ------
        ArtefactError
            If the lung network is not there.
        """
        plain = PreprocessingSpec(size=self.size, fit=self.fit, clahe_clip=self.clahe_clip, clahe_grid=self.clahe_grid)
        if self.crop == "none":
            return plain
        from magsd_runtime import lungs  # brings OpenCV's networks

        sha256 = lungs.register(Path(self.lungs)) if self.lungs else lungs.packaged_sha256()
        return dataclasses.replace(plain, version=0, crop=self.crop, crop_margin=self.crop_margin, lungs_sha256=sha256)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, tuples as lists: what is saved."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}


def resolve(values: Mapping[str, Any]) -> TrainingConfig:
    """Defaults, then what the named model sets, then ``values``.

    Raises
    ------
    UsageError
        For an unknown name or an impossible value, in the words that the user typed.
    """
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    if unknown := sorted(map(str, set(values) - known)):
        raise UsageError(f"unknown setting {', '.join(unknown)}: one of {', '.join(sorted(known))}")
    name = values.get("model", "magsd")
    if not isinstance(name, str) or name not in MODELS:
        raise UsageError(f"--model is {name!r}: one of {', '.join(MODELS)}")
    hints = typing.get_type_hints(TrainingConfig)
    merged = {**MODELS[name], **values}
    return TrainingConfig(**{k: _convert(k, v, hints[k]) for k, v in merged.items()})


def overridden(file: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file with those typed beside it, which win.

    A typed model also takes back what the file set for another one: a saved configuration is resolved, and
    would otherwise turn ``--model plain`` into MAG-SD under the name of plain.
    """
    kept = dict(file)
    before = file.get("model", "magsd")
    if "model" in typed and typed["model"] != before:
        for name in {name for settings in MODELS.values() for name in settings}:
            # a size, a backbone or weights may be the user's own, for whatever model
            set_by_model = {**_DEFAULTS, **MODELS.get(str(before), {})}[name]
            if name not in ("backbone", "size", "weights") or file.get(name) == set_by_model:
                kept.pop(name, None)
        if typed["model"] in FIXED_BACKBONE:
            kept.pop("backbone", None)
    return {**kept, **typed}


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, unchecked: :func:`resolve` checks them.

    Raises
    ------
    UsageError
        If the file is missing or is not one YAML mapping.
    """
    yaml = require("yaml", feature="a configuration file", extra="train")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the configuration {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no settings: expected lines like 'epochs: 30'")
    return values


def unfinished(fold_folder: Path, epochs: int) -> str | None:
    """``epoch 3 of 50`` if the fold's log.csv ends before ``epochs``; None if complete, or without a log."""
    try:
        rows = len((fold_folder / "log.csv").read_text(encoding="utf-8").splitlines()) - 1
    except OSError:
        return None
    return f"epoch {rows} of {epochs}" if rows < epochs else None


def write_config(config: TrainingConfig, path: Path) -> None:
    """Save the resolved configuration as YAML, in one step."""
    yaml = require("yaml", feature="a configuration file", extra="train")
    write_text(path, yaml.safe_dump(config.to_dict(), sort_keys=False))


def _wrong(config: TrainingConfig, name: str, expected: str) -> UsageError:
    return UsageError(f"--{name.replace('_', '-')} is {getattr(config, name)!r}: expected {expected}")


def _check_network(config: TrainingConfig) -> None:
    """What the named network, where it is another than MA-Net, can be asked for."""
    name, settings = config.model, MODELS.get(config.model, {})
    if name in FIXED_BACKBONE and config.backbone != settings["backbone"]:
        raise UsageError(
            f"--model {name} is one network, and --backbone is {config.backbone!r}: leave --backbone out, "
            f"or use --model plain with it"
        )
    pooling = settings.get("pooling", "attention")
    if name not in MA_NETS and config.pooling != pooling:
        raise UsageError(f"--model {name} pools in its own way, and --pooling is {config.pooling!r}: leave it out")
    if name == "covid-net":
        if config.weights != "none":
            raise UsageError("--model covid-net has no pretrained weights to load: leave --weights out")
        if config.backbone_rate != 1:
            raise UsageError("--model covid-net has no pretrained backbone: leave --backbone-rate out")
        if config.size != 224:
            raise _wrong(config, "size", "224, which the fully connected layers of covid-net need")
    elif config.backbone.startswith("inception_v3") and name in FIXED_BACKBONE:
        if config.size < 128:
            raise _wrong(config, "size", f"128 or more for --model {name}, whose last map is one pixel below")
    elif config.size % 32:
        raise _wrong(config, "size", f"a multiple of 32 for --model {name} ({INCEPTION_SIZE} is for inception-v3)")


def _check_literals(config: TrainingConfig) -> None:
    for name, hint in typing.get_type_hints(TrainingConfig).items():
        if typing.get_origin(hint) is Literal and getattr(config, name) not in typing.get_args(hint):
            raise _wrong(config, name, f"one of {', '.join(typing.get_args(hint))}")


def _convert(name: str, value: Any, hint: Any) -> Any:
    """``value`` from YAML or the command line as the field's type, or a UsageError."""
    wrong = UsageError(f"--{name.replace('_', '-')} is {value!r}: expected {_describe(hint)}")
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        if name == "attention_augmentation" and value in ("none", None, ""):
            return ()
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or (inner[-1] is not Ellipsis and len(items) != len(inner)):
            raise wrong
        return tuple(_convert(name, item, inner[0]) for item in items)
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise wrong
    if hint in (int, float):
        # bool is an int in Python, and YAML 1.1 reads 1e-3 as text
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise wrong
        if hint is int and isinstance(value, str) and value.strip().isdecimal():
            value = int(value)  # not through float, which is exact up to 2**53 only
        if hint is int and isinstance(value, int):
            return value
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise wrong from None
        if number != number or number in (float("inf"), float("-inf")) or (hint is int and number != int(number)):
            raise wrong
        return hint(number)
    if not isinstance(value, str):
        raise wrong
    return value.strip()


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    if isinstance(hint, types.GenericAlias):
        return "a list" if typing.get_args(hint)[-1] is Ellipsis else "two numbers, as in 0.5,1.0"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]
