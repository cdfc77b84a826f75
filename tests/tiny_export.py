"""What tests of the export share: a torch module with the outputs of MA-Net, and a run that was never trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from magsd.checkpoint import CheckpointInfo, save_checkpoint
from magsd.config import TrainingConfig, resolve, write_config
from magsd.data import read_manifest
from magsd.folds import make_folds
from magsd.models import build_model
from magsd.run_folder import data_facts
from tiny_run import TINY, write_tiny_manifest


class Outputs(NamedTuple):
    logits: Tensor
    attention: Tensor
    evidence: Tensor
    embedding: Tensor


class StandIn(nn.Module):
    """Two convolutions, a batch norm, and the signed square root with its epsilon of 1e-12, as in MA-Net."""

    def __init__(self, classes: int = 3, maps: int = 4, channels: int = 6) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, channels, 3, stride=8, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.attend = nn.Conv2d(channels, maps, 1, bias=False)
        self.weight = nn.Parameter(torch.randn(classes, maps, channels))

    def forward(self, image: Tensor) -> Outputs:
        features = self.norm(self.features(image))
        attention = torch.relu(self.attend(features))
        parts = torch.einsum("nmhw,ndhw->nmd", attention, features) / attention[0, 0].numel()
        parts = torch.sign(parts) * torch.sqrt(parts.abs() + 1e-12)
        parts = parts * torch.rsqrt((parts * parts).sum((1, 2), keepdim=True).clamp(min=1e-24))
        evidence = torch.einsum("nmd,cmd->ncm", parts, self.weight)
        return Outputs(evidence.sum(2), attention, evidence, features.mean((2, 3)))


def stand_in(seed: int = 0) -> StandIn:
    """In evaluation mode, with batch-norm statistics that are not the identity."""
    torch.manual_seed(seed)
    model = StandIn()
    model.norm.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
    model.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model.eval()


def write_run(folder: Path, data: Path, scores: dict[int, dict[str, Any]], **settings: Any) -> Path:
    """A run folder as ``magsd train`` leaves it, with a random network for every fold of ``scores``.

    ``scores``: the validation scores that each fold's checkpoint claims. The images are written to ``data``.
    """
    manifest_path = data / "manifest.csv"
    if not manifest_path.is_file():
        write_tiny_manifest(data)
    config = resolve({**TINY, "data": str(manifest_path), **settings})
    manifest = read_manifest(manifest_path)
    folder.mkdir(parents=True)
    make_folds(manifest, config.folds, config.seed).save(folder / "folds.json")
    write_config(config, folder / "config.yaml")
    facts = data_facts(manifest)
    for fold, validation in scores.items():
        (folder / f"fold{fold}").mkdir()
        save_random_checkpoint(folder / f"fold{fold}" / "best.pt", config, facts, fold, validation)
    return folder


def save_random_checkpoint(
    path: Path, config: TrainingConfig, facts: dict[str, Any], fold: int, validation: dict[str, Any]
) -> None:
    torch.manual_seed(100 + fold)
    model = build_model(config, num_classes=2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.05)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    info = CheckpointInfo(
        classes=tuple(facts["classes"]),
        preprocessing=config.preprocessing(),
        config=config,
        fold=fold,
        epoch=2,
        validation=validation,
        data=facts,
    )
    save_checkpoint(path, info, model)
