"""Several processes on the CPU, started as a user would, by torchrun."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import torch

from magsd.checkpoint import load_model
from magsd.config import resolve
from magsd.models import build_model
from magsd.step import training_step
from tiny_run import TINY, write_tiny_manifest

# Each process takes the gradient of its share of one batch; batch norm is fixed, so that the mean of the
# shares' gradients must be the gradient of the whole batch.
GRADIENT_SCRIPT = """
import sys, torch
from magsd.config import resolve
from magsd.distributed import processes
from magsd.models import build_model
from magsd.step import draw_generator, training_step, wrap

def main(group):
    config = resolve({config})
    torch.manual_seed(0)
    model = build_model(config, num_classes=2).eval()
    network = wrap(model, group)
    torch.manual_seed(1)
    images = torch.randint(0, 256, (8, 1, 64, 64), dtype=torch.uint8)
    labels = torch.arange(8) % 2
    share = slice(group.rank, None, group.world_size)
    training_step(network, images[share], labels[share], draw_generator(group.device, 0, 0, 0, 0, group.rank), config)
    if group.is_main:
        torch.save([p.grad for p in model.parameters()], sys.argv[1])

with processes("cpu") as group:
    main(group)
"""

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node=2",
    "--master-port=0",
    "--standalone",
]


def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    values = {**TINY, "model": "magsd-oaug", "augment_probability": 0.0}
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENT_SCRIPT.replace("{config}", repr(values)))
    command = [*TORCHRUN, str(script), str(tmp_path / "two.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    config = resolve(values)
    torch.manual_seed(0)
    model = build_model(config, num_classes=2).eval()
    torch.manual_seed(1)
    images = torch.randint(0, 256, (8, 1, 64, 64), dtype=torch.uint8)
    training_step(model, images, torch.arange(8) % 2, torch.Generator(), config)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    largest = max(float(gradient.abs().max()) for gradient in two)
    for (name, parameter), other in zip(model.named_parameters(), two, strict=True):
        # float32 sums in another order: what cancels leaves rounding of the size of what was summed
        torch.testing.assert_close(parameter.grad, other, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_the_whole_training_under_torchrun_and_its_resume(tmp_path: Path) -> None:
    data, run = write_tiny_manifest(tmp_path / "data"), tmp_path / "run"
    options = [f"--{k.replace('_', '-')}={v}" for k, v in {**TINY, "epochs": 2}.items()]
    command = [
        *TORCHRUN,
        "-m",
        "magsd.cli",
        "train",
        f"--data={data}",
        f"--out={run}",
        "--fold=0",
        "--device=cpu",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("chosen by validation") == 1  # one process speaks for all
    rows = list(csv.DictReader((run / "fold0" / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    load_model(run / "fold0" / "best.pt")
    again = subprocess.run([*command, "--resume", *options], capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert list(csv.DictReader((run / "fold0" / "log.csv").open())) == rows
