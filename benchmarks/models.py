"""Parameters and multiply-adds of every model, beside the published ones. Prints a table, with --json an object a line.

    python benchmarks/models.py [--classes 3] [--json] [MODEL ...]

Counted by ``torch.utils.flop_counter`` (two operations a multiply-add) at the model's own input size, on tensors
without storage: seconds, and no memory. Convolutions and matrix products count; normalization, activations, pooling
and the square roots of attention and bilinear pooling do not.

Published figures are of the published form: colour images and 1000 classes, COVID-Net 3 classes. Beside them stands
what we count of our network in that form.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from magsd.config import MODELS, resolve
from magsd.models import CovidNet, ImageNetClassifier, build_model


@dataclass(frozen=True)
class Published:
    """``multiply_adds`` in billions, as printed; ``classes`` and colour images are the form they are of."""

    parameters: int
    multiply_adds: float
    classes: int
    source: str


_TORCHVISION = "torchvision documentation, {}_Weights.IMAGENET1K_V1 (num_params, GFLOPS: multiply-adds)"
PUBLISHED = {
    "vgg16": Published(138_357_544, 15.47, 1000, _TORCHVISION.format("VGG16")),
    "resnet18": Published(11_689_512, 1.81, 1000, _TORCHVISION.format("ResNet18")),
    "resnet50": Published(25_557_032, 4.09, 1000, _TORCHVISION.format("ResNet50")),
    "inception-v3": Published(27_161_264, 5.71, 1000, _TORCHVISION.format("Inception_V3")),
    "covid-net": Published(
        127_400_000, 3.59, 3, "github.com/lindawangg/COVID-Net, docs/models.md, COVIDNet-CXR Large at 224 x 224"
    ),
}


@dataclass(frozen=True)
class Row:
    """One model. ``multiply_adds``: of one image. ``form``: our count in the published form, with colour."""

    model: str
    size: int
    parameters: int
    multiply_adds: int
    form_parameters: int | None = None
    form_multiply_adds: int | None = None
    published: Published | None = None


def count(model: nn.Module, size: int, channels: int = 1) -> tuple[int, int]:
    """Parameters, and multiply-adds for one image (1, ``channels``, ``size``, ``size``); under ``FakeTensorMode``."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, channels, size, size))
    return sum(value.numel() for value in model.parameters()), counter.get_total_flops() // 2


def row(name: str, classes: int) -> Row:
    """The counts of ``--model name`` for ``classes`` classes and grey images."""
    config = resolve({"model": name})
    published = PUBLISHED.get(name)
    with FakeTensorMode():
        found = Row(name, config.size, *count(build_model(config, num_classes=classes), config.size))
        if published is None:
            return found
        if name == "covid-net":
            form: nn.Module = CovidNet(num_classes=published.classes, in_channels=3)
        else:
            form = ImageNetClassifier(config.backbone, num_classes=published.classes, in_channels=3)
        parameters, multiply_adds = count(form, config.size, channels=3)
        if name == "inception-v3":
            parameters += auxiliary_classifier(published.classes)
    return Row(
        found.model, found.size, found.parameters, found.multiply_adds, parameters, multiply_adds, published
    )  # fmt: skip


def auxiliary_classifier(classes: int) -> int:
    """Parameters of Inception v3's auxiliary classifier: in the published count, and not in our network."""
    from torchvision.models.inception import InceptionAux

    return sum(value.numel() for value in InceptionAux(768, classes).parameters())


def table(rows: Sequence[Row]) -> str:
    """Markdown: ours, then the published form as published and as counted here."""
    lines = [
        "| model | input | parameters | multiply-adds (10^9) | published parameters | counted in that form "
        "| published multiply-adds (10^9) | counted in that form |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        cells = [each.model, f"{each.size}", f"{each.parameters:,}", f"{each.multiply_adds / 1e9:.2f}"]
        if each.published is None or each.form_parameters is None or each.form_multiply_adds is None:
            cells += ["-"] * 4
        else:
            cells += [
                f"{each.published.parameters:,}",
                f"{each.form_parameters:,} ({each.form_parameters / each.published.parameters - 1:+.2%})",
                f"{each.published.multiply_adds:g}",
                f"{each.form_multiply_adds / 1e9:.2f} "
                f"({each.form_multiply_adds / 1e9 / each.published.multiply_adds - 1:+.1%})",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Parameters and multiply-adds of every model, beside published ones.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names of --model (default: all)")
    parser.add_argument("--classes", type=int, default=3, metavar="C", help="classes (default: 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with the sources")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.models if name not in MODELS]:
        parser.error(f"unknown model {', '.join(unknown)}: one of {', '.join(MODELS)}")
    if arguments.classes < 2:
        parser.error(f"--classes is {arguments.classes}: expected at least 2")
    rows = [row(name, arguments.classes) for name in arguments.models or MODELS]
    if arguments.json:
        for each in rows:
            print(json.dumps(asdict(each)))
    else:
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
