"""The networks of Table 3: published counts, torchvision's arithmetic, what each learns with, sizes, a whole run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import magsd.fold_training
import models as counts  # benchmarks/models.py
from magsd.checkpoint import load_model
from magsd.config import FIXED_BACKBONE, MA_NETS, MODELS, overridden, resolve
from magsd.distributed import Processes
from magsd.evaluation import evaluate
from magsd.models import CovidNet, ImageNetClassifier, build_model, load_imagenet_weights
from magsd.models.bilinear import bilinear_pooling
from magsd.models.covid_net import Stage
from magsd.step import draw_generator, training_step
from magsd.training import train
from magsd_export.bundling import build_bundle
from magsd_runtime.errors import UsageError
from magsd_runtime.preprocessing import INCEPTION_SIZE, PreprocessingSpec, standardize
from test_resume import Killed, assert_equal_runs
from tiny_run import TINY, write_tiny_manifest

GROUP = Processes(0, 1, torch.device("cpu"))
CPU = torch.device("cpu")
# the smallest input each takes here without batch norm over single pixels
SMALLEST = {"vgg16": 32, "inception-v3": 128, "narin-inception-v3": 128, "covid-net": 224}
OTHERS = [name for name in MODELS if name not in MA_NETS]
ANY_BACKBONE = [name for name in OTHERS if name not in FIXED_BACKBONE]
WHOLE = {name: [] if name in ANY_BACKBONE else [pytest.mark.slow] for name in OTHERS}


def smallest(name: str, **settings: Any) -> dict[str, Any]:
    """Settings of a tiny run of ``name``."""
    values = {**TINY, "model": name, "size": SMALLEST.get(name, 64), **settings}
    if name in FIXED_BACKBONE:
        values.pop("backbone")
    return values


# ---------------------------------------------------------------- published counts


@pytest.mark.parametrize("name", sorted(counts.PUBLISHED))
def test_parameters_and_multiply_adds_are_the_published_ones_within_one_percent(name: str) -> None:
    found = counts.row(name, 3)
    assert found.published is not None
    assert found.form_parameters is not None
    assert found.form_multiply_adds is not None
    assert found.form_parameters == pytest.approx(found.published.parameters, rel=0.01)
    assert found.form_multiply_adds / 1e9 == pytest.approx(found.published.multiply_adds, rel=0.01)


@pytest.mark.parametrize("name", ["VGG16", "ResNet18", "ResNet50", "Inception_V3"])
def test_the_published_counts_are_those_that_torchvision_states(name: str) -> None:
    meta = getattr(torchvision.models, f"{name}_Weights").IMAGENET1K_V1.meta
    stated = counts.PUBLISHED[{"Inception_V3": "inception-v3"}.get(name, name.lower())]
    assert stated.parameters == meta["num_params"]
    assert stated.multiply_adds == pytest.approx(meta["_ops"], abs=0.006)


def test_counts_are_of_parameters_and_products(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: one convolution of 3 x 3 over 8 x 8 positions, and one linear layer."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5, bias=False))
    assert counts.count(model, 8) == (4 * 9 + 4 + 256 * 5, 9 * 4 * 64 + 256 * 5)
    assert counts.main(["--json", "--classes", "2", "resnet18"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["parameters"] == 11_689_512 - 2 * 64 * 49 - 1000 * 513 + 2 * 513
    assert counts.main(["resnet18"]) == 0
    assert "| resnet18 | 224 | 11,171,779 |" in capsys.readouterr().out


# ---------------------------------------------------------------- against torchvision and slow references


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        pytest.param("resnet50", 64, marks=pytest.mark.slow),
        pytest.param("vgg16", 224, marks=pytest.mark.slow),
        pytest.param("inception-v3", 128, marks=pytest.mark.slow),
    ],
)
def test_with_torchvisions_weights_a_network_answers_as_torchvisions_does(name: str, size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    factory = {"inception-v3": "inception_v3"}.get(name, name)
    settings = {"init_weights": False} if name == "inception-v3" else {}
    theirs = getattr(torchvision.models, factory)(weights=None, num_classes=3, **settings)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    config = resolve({"model": name, "weights": str(tmp_path / "theirs.pth"), "size": size})
    ours = build_model(config, num_classes=3)
    assert "theirs.pth" in load_imagenet_weights(ours, config.weights)
    last = {"vgg16": "classifier.6"}.get(name, "fc")
    ours.get_submodule("classifier").load_state_dict(theirs.get_submodule(last).state_dict())
    image = torch.randn(2, 1, size, size)
    with torch.inference_mode():
        expected = theirs.eval()(image.expand(-1, 3, -1, -1))
        found = ours.eval()(image).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["bcnn", "bcnn-attention"])
def test_the_bilinear_networks_take_vgg16_up_to_relu5_3(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"]).eval()
    torch.save({f"features.{key}": value for key, value in theirs.state_dict().items()}, tmp_path / "vgg16.pth")
    ours = build_model(resolve({"model": name, "weights": str(tmp_path / "vgg16.pth")}), num_classes=2).eval()
    load_imagenet_weights(ours, str(tmp_path / "vgg16.pth"))
    image = torch.randn(1, 1, 64, 64)
    with torch.inference_mode():
        expected = theirs[:30](image.expand(-1, 3, -1, -1))  # all but the last pooling
        found = ours(image)
    assert expected.shape == (1, 512, 4, 4)
    torch.testing.assert_close(found.embedding, expected.mean((2, 3)), rtol=1e-3, atol=1e-5)
    assert found.attention.shape[2:] == (4, 4)


def test_bilinear_pooling_is_the_outer_product_of_every_position() -> None:
    features = np.random.default_rng(0).normal(0, 1, (2, 5, 3, 4))
    for found, maps in zip(bilinear_pooling(torch.from_numpy(features)).numpy(), features):
        total = np.zeros((5, 5))
        for y in range(3):
            for x in range(4):
                total += np.outer(maps[:, y, x], maps[:, y, x])
        rooted = np.sign(total) * np.sqrt(np.abs(total))
        np.testing.assert_allclose(found, 100 * rooted / np.linalg.norm(rooted), rtol=1e-6)
    zero = torch.zeros(1, 3, 2, 2, requires_grad=True)
    bilinear_pooling(zero).sum().backward()
    assert zero.grad is not None
    assert torch.isfinite(zero.grad).all()


def test_each_pepx_sees_the_sum_of_all_before_it() -> None:
    torch.manual_seed(0)
    stage = Stage(6, 8, 3, 2, 4).eval()
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        far, seen = stage.long_range(x), []
        for position, module in enumerate(stage.pepx):
            before = x if position == 0 else torch.relu(far + sum(seen))
            seen.append(module(before))
        torch.testing.assert_close(stage(x), torch.relu(far + sum(seen)))


def test_covid_net_has_the_published_modules_and_shapes() -> None:
    model = CovidNet(num_classes=3).eval()
    shapes: list[tuple[int, ...]] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    with torch.inference_mode():
        model(torch.zeros(1, 1, 224, 224))
    assert shapes == [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    assert [len(stage.get_submodule("pepx")._modules) for stage in model.stages] == [3, 4, 6, 3]
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 16
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)


# ---------------------------------------------------------------- every model


@pytest.mark.parametrize("name", OTHERS)
def test_a_step_reaches_every_parameter_and_the_outputs_keep_their_contract(name: str) -> None:
    torch.manual_seed(0)
    config = resolve(smallest(name, channels_last=False))
    model = build_model(config, num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # timm's residual blocks begin at 0 and hide what is before
    images = torch.randint(0, 256, (2, 1, config.size, config.size), dtype=torch.uint8)
    labels = torch.tensor([0, 2])
    loss, _ = training_step(model, images, labels, draw_generator(CPU, 0, 0, 0, 0, 0), config)
    assert 0 < float(loss) < 20
    assert math.isfinite(float(loss))
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert len(trained) > 0.6 * len(list(model.parameters()))
    silent = [key for key, value in trained.items() if value.grad is None or not value.grad.abs().sum() > 0]
    # dead channels of ReLU aside, all take part: a layer that the loss cannot see would be silent as a whole
    assert not [key for key in silent if trained[key].ndim > 1], silent[:5]
    with torch.inference_mode():
        out = model.eval()(torch.randn(2, 1, config.size, config.size))
    assert [value.dtype for value in out] == [torch.float32] * 4
    maps = config.num_attention_maps if name == "bcnn-attention" else 1
    assert out.logits.shape == (2, 3)
    assert out.evidence.shape == (2, 3, maps)
    assert out.attention.shape[:2] == (2, maps)
    assert float(out.attention.min()) >= 0
    torch.testing.assert_close(out.evidence.sum(2), out.logits)


@pytest.mark.parametrize("name", [pytest.param(name, marks=WHOLE[name]) for name in OTHERS])
def test_a_model_trains_evaluates_and_exports(name: str, tmp_path: Path) -> None:
    data = write_tiny_manifest(tmp_path / "data", patients=12)
    config = resolve(smallest(name, data=str(data), epochs=1, folds=2, batch_size=3))
    if name == "vgg16":
        config = replace(config, size=224)
    (result,) = train(config, tmp_path / "run", GROUP, fold=0)
    model, info = load_model(result.folder / "best.pt")
    assert info.config.model == name
    assert model(torch.zeros(2, 1, config.size, config.size)).logits.shape == (2, 2)
    metrics = evaluate(tmp_path / "run", data, tmp_path / "report", resamples=20)
    assert 0 <= metrics["classification"]["accuracy"]["value"] <= 1
    said = [entry["text"] for entry in metrics["notes"] if "has no attention" in entry["text"]]
    assert bool(said) == (name != "bcnn-attention")
    if name != "bcnn-attention":
        with pytest.raises(UsageError, match=f"--precision fp16 needs a network with attention.*{name} has none"):
            build_bundle(tmp_path / "run", tmp_path / "half", precision="fp16")
    built = build_bundle(tmp_path / "run", tmp_path / "bundle", images=2, acceptance=False)  # parity, or it raises
    facts = built.bundle.manifest["model"]["architecture"]
    assert facts["network"] == name
    assert facts["num_attention_maps"] == (4 if name == "bcnn-attention" else 0)
    assert "A network (" in (tmp_path / "bundle" / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("name", ["unet", "bcnn-attention"])
def test_a_stopped_run_goes_on_to_the_same_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_tiny_manifest(tmp_path / "data", patients=12)
    config = resolve(smallest(name, data=str(data), epochs=2, folds=2, batch_size=3))
    train(config, tmp_path / "whole", GROUP, fold=0)
    monkeypatch.setattr(magsd.fold_training, "CHECKPOINT_SECONDS", -1.0)
    real, calls = magsd.fold_training.draw_generator, [0]

    def stopping(*arguments: Any) -> torch.Generator:
        calls[0] += 1
        if calls[0] == 3:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(magsd.fold_training, "draw_generator", stopping)
    with pytest.raises(Killed):
        train(config, tmp_path / "stopped", GROUP, fold=0)
    train(config, tmp_path / "stopped", GROUP, fold=0, resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped", [0])


# ---------------------------------------------------------------- settings


def test_the_size_follows_the_model_and_gives_way_to_the_users() -> None:
    assert resolve({}).size == 224
    assert resolve({"model": "inception-v3"}).size == 299
    assert resolve({"model": "inception-v3"}).preprocessing().size == 299
    assert resolve({"model": "inception-v3", "size": 256}).size == 256
    of_inception = resolve({"model": "inception-v3"}).to_dict()
    assert resolve(overridden(of_inception, {"model": "vgg16"})).size == 224
    assert resolve(overridden({"size": 160, "backbone": "resnet18"}, {"model": "fpn"})).size == 160
    assert resolve(overridden({"size": 160, "backbone": "resnet18"}, {"model": "fpn"})).backbone == "resnet18"
    assert resolve(overridden({"backbone": "resnet18"}, {"model": "vgg16"})).backbone == "vgg16"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "covid-net", "size": 256}, "--size is 256: expected 224, which the fully connected layers"),
        ({"model": "inception-v3", "size": 96}, "--size is 96: expected 128 or more"),
        ({"model": "vgg16", "size": 299}, "--size is 299: expected a multiple of 32"),
        ({"size": 299}, "--size is 299: expected a multiple of 32"),
        ({"model": "inception-v3", "size": 300}, "size is 300: expected a multiple of 32"),
        ({"model": "vgg16", "backbone": "resnet18"}, "--model vgg16 is one network"),
        ({"model": "fpn", "pooling": "gmp"}, "--model fpn pools in its own way"),
        ({"model": "resnet18", "attention_augmentation": "mixup", "loss": "l2"}, "trains no attention"),
        ({"model": "covid-net", "weights": "imagenet"}, "no pretrained weights to load"),
        ({"model": "covid-net", "backbone_rate": 0}, "no pretrained backbone"),
    ],
)
def test_what_a_model_cannot_do_is_said(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(values)


def test_weights_and_backbones_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="no pretrained weights"):
        load_imagenet_weights(CovidNet(num_classes=2), "imagenet")
    with pytest.raises(UsageError, match=r"strides \[4, 8, 16, 32\], not at \[2\]"):
        build_model(resolve({"model": "unet", "backbone": "convnext_atto"}), num_classes=2)
    with pytest.raises(UsageError, match="is no convolutional network"):
        build_model(resolve({"model": "fpn", "backbone": "swin_tiny_patch4_window7_224"}), num_classes=2)
    with pytest.raises(UsageError, match="at least 2"):
        ImageNetClassifier("resnet18", num_classes=1)


@pytest.mark.parametrize("grid", [1, 4, 8])
def test_clahe_of_299_pixels_mirrors_the_edges(grid: int, radiograph_pixels: np.ndarray) -> None:
    plain = standardize(radiograph_pixels, PreprocessingSpec(size=INCEPTION_SIZE, clahe_clip=0.0))
    assert plain.shape == (299, 299)
    more = -INCEPTION_SIZE % grid
    whole = cv2.copyMakeBorder(plain, 0, more, 0, more, cv2.BORDER_REFLECT_101)
    expected = cv2.createCLAHE(4.0, (grid, grid)).apply(whole)[:INCEPTION_SIZE, :INCEPTION_SIZE]
    spec = PreprocessingSpec(size=INCEPTION_SIZE, clahe_grid=grid)
    np.testing.assert_array_equal(standardize(radiograph_pixels, spec), expected)
    assert PreprocessingSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize("name", ["fpn", "unet"])
def test_every_fused_level_sees_the_coarsest_features(name: str) -> None:
    """A change of the last feature map alone changes every fused level."""
    torch.manual_seed(0)
    model = build_model(resolve(smallest(name)), num_classes=3).eval()
    backbone, taps = model.get_submodule("backbone"), list(model.taps)  # type: ignore[arg-type]
    levels: list[torch.Tensor] = []
    for module in [model.get_submodule("pyramid")] if name == "fpn" else model.get_submodule("up").children():
        module.register_forward_hook(
            lambda _, __, output: levels.extend(output.values() if isinstance(output, dict) else [output])
        )
    image = torch.randn(1, 1, 64, 64)
    with torch.inference_mode():
        model(image)
        backbone.register_forward_hook(
            lambda _, __, output: [value + (position == taps[-1]) for position, value in enumerate(output)]
        )
        model(image)
    before, after = levels[:4], levels[4:]
    assert sorted(level.shape[-1] for level in before) == ([2, 4, 8, 16] if name == "fpn" else [4, 8, 16, 32])
    assert all(float((one - other).abs().max()) > 1e-4 for one, other in zip(before, after, strict=True))
