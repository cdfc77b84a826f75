"""The five ablations, Tables 4 to 8, as options of training: each does in one step what its name says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from magsd.config import TrainingConfig, resolve
from magsd.distributed import Processes
from magsd.evaluation import evaluate
from magsd.models import MANet, build_model
from magsd.options import add_config_options, given_options
from magsd.step import draw_generator, training_step
from magsd.training import train
from magsd_runtime.preprocessing import standardize
from tiny_run import TINY, write_tiny_manifest

CPU = torch.device("cpu")
GROUP = Processes(0, 1, CPU)
WITHOUT_AUGMENTATION = "--attention-augmentation none --loss cross-entropy"
ABLATIONS = {
    "table-4-without-clahe": "--clahe-clip 0",
    "table-5-one-scale": "--attention-scales 1",
    "table-5-two-scales": "--attention-scales 2",
    "table-5-three-scales": "--attention-scales 3",
    "table-6-gmp": f"--pooling gmp {WITHOUT_AUGMENTATION}",
    "table-6-gap": f"--pooling gap {WITHOUT_AUGMENTATION}",
    "table-6-attention": "--pooling attention",
    "table-7-mixup": "--attention-augmentation mixup",
    "table-7-mixup-dimming": "--attention-augmentation mixup,dimming",
    "table-7-all": "--attention-augmentation mixup,dimming,patching",
    "table-8-l2": "--loss l2",
    "table-8-soft-distance": "--loss soft-distance",
}


def typed(options: str, **settings: Any) -> TrainingConfig:
    """What ``magsd train`` makes of ``options``, for the tiny network."""
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    return resolve({**TINY, "channels_last": False, **given_options(parser.parse_args(options.split())), **settings})


def step(config: TrainingConfig) -> tuple[MANet, float, list[torch.Tensor], torch.Tensor]:
    """The network after one backward pass, the loss, the logits of every pass, and the labels."""
    torch.manual_seed(0)
    model = build_model(config, num_classes=3)
    assert isinstance(model, MANet)
    passes: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, __, output: passes.append(output.logits.detach()))
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (6, 1, 64, 64), dtype=torch.uint8, generator=generator)
    labels = torch.arange(6) % 3
    loss, _ = training_step(model, images, labels, draw_generator(CPU, 0, 0, 0, 0, 0), config)
    return model, float(loss), passes, labels


def test_table_4_clahe_is_on_or_off(radiograph_pixels: np.ndarray) -> None:
    on, off = typed("").preprocessing(), typed(ABLATIONS["table-4-without-clahe"]).preprocessing()
    assert (on.clahe_clip, off.clahe_clip) == (4.0, 0.0)
    equalized, resized = standardize(radiograph_pixels, on), standardize(radiograph_pixels, off)
    # without it only the resize is left: the mean of the film stays, and nothing is equalized
    assert abs(float(resized.mean()) - float(radiograph_pixels.mean())) < 1

    def entropy(image: np.ndarray) -> float:
        shares = np.bincount(image.ravel(), minlength=256) / image.size
        return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())

    assert entropy(equalized) > entropy(resized)


@pytest.mark.parametrize(("name", "scales"), [("one-scale", 1), ("two-scales", 2), ("three-scales", 3)])
def test_table_5_attention_comes_from_so_many_scales(name: str, scales: int) -> None:
    model, *_ = step(typed(ABLATIONS[f"table-5-{name}"]))
    branches = list(model.attention_generator.branches)
    assert len(branches) == scales
    convolutions = [branch[0] for branch in branches]  # type: ignore[index]
    widths = list(model.backbone.feature_info.channels())[-3:]  # type: ignore[union-attr]
    assert [convolution.in_channels for convolution in convolutions] == widths[-scales:]
    assert all(float(convolution.weight.grad.abs().sum()) > 0 for convolution in convolutions)


def test_table_6_only_attention_pooling_trains_the_attention() -> None:
    reached, widths = {}, {}
    for pooling in ("gmp", "gap", "attention"):
        model, *_ = step(typed(ABLATIONS[f"table-6-{pooling}"]))
        gradients = [value.grad for value in model.attention_generator.parameters()]
        reached[pooling] = any(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in gradients)
        widths[pooling] = model.classifier.in_features
    assert reached == {"gmp": False, "gap": False, "attention": True}
    assert widths["gmp"] == widths["gap"] == model.feature_channels
    assert widths["attention"] == model.num_attention_maps * model.feature_channels
    features = torch.randn(2, 5, 3, 3)
    for pooling, expected in (("gap", features.mean((2, 3))), ("gmp", features.amax((2, 3)))):
        assert pooled_by(pooling, features).allclose(expected)


def pooled_by(pooling: str, features: torch.Tensor) -> torch.Tensor:
    """What the classifier of MA-Net sees of the last feature map (N, D, h, w)."""
    model = build_model(typed(f"--pooling {pooling} {WITHOUT_AUGMENTATION}"), num_classes=2).eval()
    assert isinstance(model, MANet)
    depth = model.feature_channels
    padded = functional.pad(features, (0, 0, 0, 0, 0, depth - features.shape[1]))
    finer = [torch.zeros(2, c, 3 * r, 3 * r) for c, r in zip(model.backbone.feature_info.channels()[-3:-1], (4, 2))]  # type: ignore[union-attr]
    model.backbone.forward = lambda _: [*finer, padded]
    model.taps = (0, 1, 2)
    seen: list[torch.Tensor] = []
    model.classifier.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.inference_mode():
        model(torch.zeros(2, 1, 96, 96))
    return seen[0][:, : features.shape[1]]


@pytest.mark.parametrize(("name", "kinds"), [("mixup", 1), ("mixup-dimming", 2), ("all", 3)])
def test_table_7_each_kind_is_one_more_pass(name: str, kinds: int) -> None:
    config = typed(ABLATIONS[f"table-7-{name}"])
    _, loss, passes, _ = step(config)
    assert len(passes) == 1 + kinds
    assert len({tuple(each.flatten().tolist()) for each in passes}) == 1 + kinds, "two kinds saw the same images"
    assert loss > 0
    # a pass that the ablation leaves out changes nothing in the others
    _, _, fewer, _ = step(typed(ABLATIONS["table-7-mixup"]))
    torch.testing.assert_close(passes[0], fewer[0])


def test_table_8_l2_is_the_mean_cross_entropy_and_soft_distance_is_not() -> None:
    _, l2, passes, labels = step(typed(ABLATIONS["table-8-l2"]))
    entropies = [float(functional.cross_entropy(each, labels)) for each in passes]
    assert l2 == pytest.approx(np.mean(entropies), rel=1e-4)
    _, soft, same, _ = step(typed(ABLATIONS["table-8-soft-distance"]))
    for one, other in zip(passes, same, strict=True):
        torch.testing.assert_close(one, other)
    # the label smoothed by 0.01 a class, but for what the network is right about with confidence 0.7
    target = torch.full((6, 3), 0.01)
    target[torch.arange(6), labels] = 0.98
    primary = torch.softmax(same[0], 1)
    for row, label in enumerate(labels.tolist()):
        if primary[row, label] >= 0.7:
            target[row] = primary[row]
    distances = [float((target - torch.softmax(each, 1)).abs().mean()) for each in same[1:]]
    assert soft == pytest.approx(entropies[0] + sum(distances), rel=1e-4)


@pytest.mark.parametrize("name", sorted(ABLATIONS))
def test_every_ablation_trains_an_epoch_and_evaluates(name: str, tmp_path: Path) -> None:
    data = write_tiny_manifest(tmp_path / "data", patients=12)
    config = typed(ABLATIONS[name], data=str(data), epochs=1, folds=2, batch_size=3)
    (result,) = train(config, tmp_path / "run", GROUP, fold=0)
    assert result.epoch == 1
    metrics = evaluate(tmp_path / "run", data, tmp_path / "report", resamples=10)
    assert 0 <= metrics["classification"]["accuracy"]["value"] <= 1
