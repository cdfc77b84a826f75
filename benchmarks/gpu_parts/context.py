"""What the parts share: the device, the time left, timing that a dry run never pretends to have done."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from magsd.cli import main as magsd

NOT_MEASURED = "not measured"


@dataclass
class Context:
    """``device``: cuda:0, or the CPU in a dry run, where everything runs once in a small size and no time is taken.

    ``data``: a manifest of films. ``out``: for what is made. ``deadline``: of ``time.monotonic``.
    """

    device: torch.device
    out: Path
    data: Path
    deadline: float
    library: str = "auto"

    @property
    def dry(self) -> bool:
        return self.device.type == "cpu"

    @property
    def left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def backbones(self) -> tuple[str, ...]:
        """The research network and the edge one; in a dry run timm's own test network."""
        return ("test_efficientnet",) if self.dry else ("resnet50", "tf_efficientnet_lite0")

    @property
    def size(self) -> int:
        return 64 if self.dry else 224

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()


def milliseconds(context: Context, variants: Mapping[str, Callable[[], object]], *, seconds: float = 2.0) -> Any:
    """Median milliseconds of a call of each variant and its ratio to the first, the variants taking turns.

    In a dry run each is called once, and nothing is measured.
    """
    for call in variants.values():
        for _ in range(1 if context.dry else 10):
            call()
    context.synchronize()
    if context.dry:
        return dict.fromkeys(variants, NOT_MEASURED)
    taken: dict[str, list[float]] = {name: [] for name in variants}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds * len(variants) or min(map(len, taken.values())) < 10:
        for name, call in variants.items():
            started = time.perf_counter()
            call()
            context.synchronize()
            taken[name].append(1e3 * (time.perf_counter() - started))
    first = next(iter(taken))
    return {
        name: {
            "ms": round(statistics.median(times), 4),
            "p90_ms": round(sorted(times)[int(0.9 * (len(times) - 1))], 4),
            "ratio": round(statistics.median(a / b for a, b in zip(times, taken[first])), 4),
        }
        for name, times in taken.items()
    }


def command(*arguments: object, expected: tuple[int, ...] = (0,)) -> str:
    """Run a verb of magsd here and return what it printed.

    Raises
    ------
    RuntimeError
        If it ends with another code than ``expected``; the message has its last line.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = magsd([str(argument) for argument in arguments])
    if code not in expected:
        said = (err.getvalue().strip() or out.getvalue().strip() or "nothing").splitlines()
        raise RuntimeError(f"magsd {arguments[0]} ended with {code}: {said[-1]}")
    return out.getvalue()


def record(*arguments: object, expected: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """The JSON object that a verb prints."""
    return json.loads(command(*arguments, "--json", expected=expected).splitlines()[-1])


def script(context: Context, *arguments: object) -> tuple[int, str]:
    """Run a Python program with this interpreter; its exit code and output, 124 and what there is when time is up."""
    try:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=context.left,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        return 124, said if isinstance(said, str) else said.decode(errors="replace")
    return done.returncode, done.stdout
