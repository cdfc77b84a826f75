"""Checkpoints: one file that holds all a run needs to go on, or a model needs to be used.

``last.pt`` holds weights, optimizer, loss scaler, position (epoch, step), running sums and history.
Learning rate, order of the images and every random draw are functions of seed, epoch and step, so
there is no scheduler or generator state to save, and none that could be forgotten.
``best.pt`` holds the weights of the epoch that the validation part chose. Both carry classes,
configuration and the preprocessing hash. They load with ``weights_only=True``: no code in them runs.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from magsd_runtime.errors import CheckpointError, MagsdError
from magsd_runtime.files import replacing
from magsd_runtime.preprocessing import PreprocessingSpec

from .config import TrainingConfig, resolve

CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class CheckpointInfo:
    """What a model is, beside its weights. ``validation`` holds the scores that chose the epoch."""

    classes: tuple[str, ...]
    preprocessing: PreprocessingSpec
    config: TrainingConfig
    fold: int
    epoch: int
    validation: dict[str, float]
    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {
            "classes": list(self.classes),
            "preprocessing": self.preprocessing.to_dict(),
            "preprocessing_sha256": self.preprocessing.sha256(),
            "config": self.config.to_dict(),
            "fold": self.fold,
            "epoch": self.epoch,
            "validation": self.validation,
            "data": self.data,
        }


def save_checkpoint(path: Path, info: CheckpointInfo, model: nn.Module, **state: Any) -> None:
    """Write weights, ``info`` and ``state`` to ``path`` in one step: a kill leaves the old file or the new."""
    content = {"version": CHECKPOINT_VERSION, "info": info.to_dict(), "model": model.state_dict(), **state}
    with replacing(path) as temporary:
        torch.save(content, temporary)


def save_weights(path: Path, info: CheckpointInfo, model: nn.Module) -> None:
    """The weights alone as safetensors, for other tools; classes and preprocessing hash as metadata."""
    from safetensors.torch import save

    metadata = {
        "classes": "\n".join(info.classes),
        "preprocessing": info.preprocessing.canonical_json(),
        "preprocessing_sha256": info.preprocessing.sha256(),
    }
    with replacing(path) as temporary:
        # not save_file: it replaces our temporary file by one that only its owner can read
        temporary.write_bytes(save({name: value.contiguous() for name, value in model.state_dict().items()}, metadata))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Any], CheckpointInfo]:
    """The content of a checkpoint and its checked description.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, of a newer version, or its preprocessing differs from its hash.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {' '.join(str(error).split())[:200]}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(version, int) or not isinstance(content.get("info"), dict):
        raise CheckpointError(f"{path} is not a checkpoint of magsd")
    if version > CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{path} has version {version}, this magsd reads up to {CHECKPOINT_VERSION}: update magsd"
        )
    return content, _info(path, content["info"])


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, CheckpointInfo]:
    """The network of a checkpoint in evaluation mode, and its description.

    Raises
    ------
    CheckpointError
        As :func:`load_checkpoint`, or if the weights do not fit the network that the configuration names.
    """
    from .models import build_model

    content, info = load_checkpoint(path, device)
    model = build_model(info.config, num_classes=len(info.classes))
    try:
        model.load_state_dict(content["model"])
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"the weights of {path} do not fit its configuration: {str(error)[:200]}") from error
    return model.to(device).eval(), info


def _info(path: Path, value: dict[str, Any]) -> CheckpointInfo:
    try:
        spec = PreprocessingSpec.from_dict(value["preprocessing"])
        if spec.sha256() != value["preprocessing_sha256"]:
            raise CheckpointError("its preprocessing differs from its hash")
        return CheckpointInfo(
            classes=tuple(value["classes"]),
            preprocessing=spec,
            config=resolve(value["config"]),
            fold=int(value["fold"]),
            epoch=int(value["epoch"]),
            validation=dict(value["validation"]),
            data=dict(value["data"]),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}: not a checkpoint of this magsd") from error
    except MagsdError as error:
        raise CheckpointError(f"{path}: {error}") from error
