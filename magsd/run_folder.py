"""The run folder: what it holds, who may write to it, and what a resumed run must agree with.

    config.yaml  folds.json  manifest.json  environment.json
    fold0/  last.pt  best.pt  best.safetensors  log.csv  tensorboard/   ... fold1/ ... final/

``config.yaml`` is written last, so its presence says that the setup is complete.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from magsd_runtime._version import __version__
from magsd_runtime.errors import CheckpointError, UsageError
from magsd_runtime.files import write_json, write_text

from .config import TrainingConfig, read_config, resolve, write_config
from .data import Manifest
from .distributed import Processes
from .folds import Folds

LOG_COLUMNS: tuple[str, ...] = (
    "epoch", "learning_rate", "train_loss", "train_accuracy",
    "validation_loss", "validation_accuracy", "validation_auc", "best", "images_per_second", "seconds",
)  # fmt: skip


def is_set_up(out: Path) -> bool:
    """Whether ``out`` holds a run whose setup was completed."""
    return (out / "config.yaml").is_file()


def set_up(out: Path, config: TrainingConfig, folds: Folds, facts: dict[str, Any], group: Processes) -> None:
    """Write all that a run needs to be resumed, the configuration last."""
    folds.save(out / "folds.json")
    write_json(out / "manifest.json", facts)
    write_json(out / "environment.json", _environment(group))
    write_config(config, out / "config.yaml")


def resumed_config(out: Path, given: dict[str, Any]) -> TrainingConfig:
    """The configuration of the run in ``out``; ``given`` options must agree with it.

    Raises
    ------
    UsageError
        Naming the first option that differs: a resumed run is the same run.
    """
    saved = resolve(read_config(out / "config.yaml"))
    wanted = resolve({**saved.to_dict(), **given})
    for name, value in wanted.to_dict().items():
        # data may have moved: their digest is compared later
        if name != "data" and value != saved.to_dict()[name]:
            raise UsageError(
                f"--{name.replace('_', '-')} is {value!r} but the run in {out} has {saved.to_dict()[name]!r}: "
                "resume without it, or start another run in another --out"
            )
    return wanted


def data_facts(manifest: Manifest) -> dict[str, Any]:
    counts = {name: sum(record.label == name for record in manifest.records) for name in manifest.classes}
    patients = len({record.patient for record in manifest.records})
    return {
        "digest": manifest.digest(), "classes": list(manifest.classes), "images": len(manifest.records),
        "patients": patients, "images_per_class": counts,
    }  # fmt: skip


def check_same_data(out: Path, facts: dict[str, Any]) -> None:
    try:
        saved = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{out / 'manifest.json'} is missing or damaged: the run cannot be resumed") from error
    if saved.get("digest") != facts["digest"]:
        raise CheckpointError(
            f"the manifest has changed since the run in {out} began "
            f"({saved.get('images')} images then, {facts['images']} now): use another --out"
        )


def _environment(group: Processes) -> dict[str, Any]:
    import cv2
    import timm

    return {
        "magsd": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "timm": timm.__version__, "opencv": cv2.__version__, "numpy": np.__version__,
        "platform": platform.platform(), "device": str(group.device), "processes": group.world_size,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else None,
    }  # fmt: skip


def write_log(folder: Path, history: tuple[dict[str, Any], ...]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, LOG_COLUMNS)
    table.writeheader()
    table.writerows(history)
    write_text(folder / "log.csv", text.getvalue())


def tensorboard_writer(folder: Path, done: int) -> Any:
    """A writer of curves for TensorBoard; None where it is not installed: log.csv holds the same figures."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return None

    # purge_step hides what a killed run logged beyond its checkpoint
    return SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)


@contextmanager
def locked(out: Path, group: Processes) -> Iterator[None]:
    """Hold the run folder: two trainings in one folder would overwrite each other."""
    if not group.is_main:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UsageError(f"another process is training in {out}: wait for it, or choose another --out") from None
    try:
        yield
    finally:
        os.close(handle)
