"""``magsd train-lungs``: LungNet from films with lung masks, in minutes on a CPU.

Every random change of geometry and looks is much stronger than for the classifier: the fields must also be
found on films of other hospitals, which have no masks here.
"""

from __future__ import annotations

import csv
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from magsd_runtime.errors import DataError, ImageError
from magsd_runtime.images import read_radiograph
from magsd_runtime.lungs import LUNG_SIZE, largest_fields
from magsd_runtime.preprocessing import resize_area_then_linear

from .augmentation import normalize_batch, sampling_grid
from .models.lung_net import LungNet
from .photometric import PhotometricRanges, disturb
from .progress import Report, silent

LOOKS = PhotometricRanges(probability=0.5, tone=0.5, blur=1.5, noise=20.0, erasing=0.3)
ROTATION = 20.0  # largest, degrees
SCALE, RATIO = 0.35, 0.2  # largest logarithm of the scale, and of the ratio of its axes
SHIFT = 0.2  # largest, as a fraction of half the image
BATCH = 16  # films a step
NEGATIVES = 2  # images without lungs beside them
LEARNING_RATE = 4e-3
HELD_OUT = 0.1  # share of the patients that only the Dice score sees


@dataclass(frozen=True, eq=False)
class LungFilms:
    """Films and masks uint8 (N, 1, 128, 128), masks 0 or 255; the patient of each."""

    films: Tensor
    masks: Tensor
    patients: tuple[str, ...]


@dataclass(frozen=True)
class LungScores:
    """Dice of the kept fields (:func:`largest_fields`) on the held-out patients, 0 to 1."""

    films: int
    patients: int
    mean: float
    lowest: float

    def to_dict(self) -> dict[str, Any]:
        return {"films": self.films, "patients": self.patients, "dice_mean": self.mean, "dice_lowest": self.lowest}


def read_lung_films(path: Path, patients: Path | None = None) -> LungFilms:
    """Films of a CSV with ``path,mask`` and optional ``patient``, relative to the file.

    ``patients``: another CSV with ``path,patient`` that knows the patients. Without any, each film counts as one.

    Raises
    ------
    DataError
        If a table or an image cannot be read, a mask has another shape than its film or is empty.
    """
    rows = _table(path, "path", "mask")
    known = {row["path"]: row["patient"] for row in (_table(patients, "path", "patient") if patients else [])}
    films, masks, names = [], [], []
    for row in rows:
        try:
            film = read_radiograph(path.parent / row["path"]).pixels
            mask = read_radiograph(path.parent / row["mask"]).pixels
        except ImageError as error:
            raise DataError(f"{path}: {error}") from error
        if film.shape != mask.shape or not mask.any():
            raise DataError(f"{path}: mask {row['mask']} is empty or has another shape than {row['path']}")
        films.append(resize_area_then_linear(film, LUNG_SIZE, LUNG_SIZE))
        masks.append(resize_area_then_linear((mask > 0).astype(np.uint8) * 255, LUNG_SIZE, LUNG_SIZE))
        names.append(row.get("patient") or known.get(row["path"]) or row["path"])
    return LungFilms(
        torch.from_numpy(np.stack(films))[:, None], torch.from_numpy(np.stack(masks))[:, None], tuple(names)
    )


def train_lungs(
    data: LungFilms, *, epochs: int = 200, seed: int = 0, report: Report = silent
) -> tuple[LungNet, LungScores]:
    """LungNet after ``epochs``, in evaluation mode, and its scores on the patients it never saw.

    The loss is 1 - Dice plus binary cross entropy; AdamW, one cycle.
    """
    held_out = torch.tensor([_share(seed, patient) < HELD_OUT for patient in data.patients])
    training, testing = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    if len(training) < BATCH or not len(testing):
        raise DataError(f"{len(training)} films to train on and {len(testing)} to test: expected {BATCH} and 1 or more")
    torch.manual_seed(seed)
    model = LungNet().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    steps = epochs * math.ceil(len(training) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        order = training[torch.randperm(len(training), generator=generator)]
        for part in order.split(BATCH):
            image, target = _batch(data.films[part], data.masks[part], generator)
            loss = _loss(model(image.contiguous(memory_format=torch.channels_last)), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) % 20 == 0 and epoch + 1 < epochs:
            scores = score_lungs(model, data, testing)
            report(f"epoch {epoch + 1:>3}/{epochs}  Dice {scores.mean:.3f}, lowest {scores.lowest:.3f}")
    return model.eval(), score_lungs(model, data, testing)


@torch.no_grad()
def score_lungs(model: LungNet, data: LungFilms, rows: Tensor) -> LungScores:
    """Dice on the films ``rows``, int (K,), after the same choice of fields as at run time."""
    model.eval()
    found = (model(normalize_batch(data.films[rows])) > 0).numpy()[:, 0]
    drawn = (data.masks[rows] > 127).numpy()[:, 0]
    dice = [_dice(largest_fields(one), other) for one, other in zip(found, drawn)]
    return LungScores(len(dice), len({data.patients[row] for row in rows}), float(np.mean(dice)), float(np.min(dice)))


def _share(seed: int, patient: str) -> float:
    """A number from 0 to below 1 that depends on seed and patient alone."""
    digest = hashlib.sha256(f"lungs/{seed}\0{patient}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    lung = logits.sigmoid()
    overlap, total = (lung * target).sum((1, 2, 3)), (lung + target).sum((1, 2, 3))
    dice = 1 - ((2 * overlap + 1) / (total + 1)).mean()
    return dice + functional.binary_cross_entropy_with_logits(logits, target)


def _batch(films: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Varied films with their masks, then images without lungs: input z-scored, target 0 to 1."""
    image, target = _varied(films, masks, generator)
    others = images_without_lungs(image, NEGATIVES, generator)
    return normalize_batch(torch.cat([image, others])), torch.cat([target, torch.zeros_like(others)])


def images_without_lungs(films: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """float32 (count, 1, S, S), 0 to 255: an even grey, a cloud of noise of any grain, or a shuffled film.

    Without them the network draws lungs on anything, since all it ever saw had some.
    """
    side = films.shape[-1]
    images = []
    for kind in torch.randint(3, (count,), generator=generator).tolist():
        if kind == 0:
            images.append(torch.full((1, side, side), 255 * float(torch.rand((), generator=generator))))
        elif kind == 1:
            grain = 2 ** int(torch.randint(1, 8, (), generator=generator))
            cloud = torch.rand((1, 1, grain, grain), generator=generator) * 255
            images.append(functional.interpolate(cloud, (side, side), mode="bilinear")[0])
        else:
            film = films[int(torch.randint(len(films), (), generator=generator))]
            blocks = film.unfold(1, side // 4, side // 4).unfold(2, side // 4, side // 4).reshape(16, side // 4, -1)
            blocks = blocks[torch.randperm(16, generator=generator)].view(4, 4, side // 4, side // 4)
            images.append(blocks.permute(0, 2, 1, 3).reshape(1, side, side))
    return torch.stack(images)


def _varied(films: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Film and mask under one random affine map, the film also in other looks: 0 to 255, and 0 to 1."""
    angle, scale, ratio, x, y, flip = torch.rand((6, len(films)), generator=generator) * 2 - 1
    angle, scale = angle * math.radians(ROTATION), torch.exp(scale * SCALE)
    wide = scale * torch.exp(ratio * RATIO) * torch.where(flip < 0, -1.0, 1.0)
    rows = [
        torch.stack([torch.cos(angle) * wide, -torch.sin(angle) * scale, x * SHIFT], dim=1),
        torch.stack([torch.sin(angle) * wide, torch.cos(angle) * scale, y * SHIFT], dim=1),
    ]
    grid = sampling_grid(torch.stack(rows, dim=1), LUNG_SIZE)
    image = functional.grid_sample(films.float(), grid, align_corners=False)
    target = functional.grid_sample(masks.float() / 255, grid, align_corners=False)
    return disturb(image, LOOKS, generator), target


def _table(path: Path, *columns: str) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not rows or any(not row.get(column) for row in rows for column in columns):
        raise DataError(f"{path}: expected a CSV whose every line has {', '.join(columns)}")
    return rows
