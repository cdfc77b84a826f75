"""What the parts share: the device, the time left, what was found so far, timing that a dry run never does."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from magsd.cli import main as magsd
from magsd_runtime.files import write_json
from timing import measure

NOT_MEASURED = "not measured: there is no GPU"
OUT_OF_TIME = "out of time"


@dataclass
class Context:
    """``device``: cuda:0, or the CPU. ``dry``: everything runs once in a small size, and no time is taken.

    ``data``: a manifest of films. ``out``: for what is made. ``deadline``: of ``time.monotonic``. ``networks``: names
    of backbones, or ``shipped``, the model in the box. ``found``: of this part, written to ``result`` again and again,
    so that a crash takes nothing of it along.
    """

    device: torch.device
    out: Path
    data: Path
    deadline: float
    dry: bool = False
    library: str = "auto"
    networks: tuple[str, ...] = ()
    run: Path | None = None
    found: dict[str, Any] = field(default_factory=dict)
    result: Path | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds; one at least."""
        return max(1.0, self.deadline - time.monotonic())

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def size(self) -> int:
        return 64 if self.dry else 224

    @property
    def backbone(self) -> str:
        """Of the network that is trained here."""
        trained = [name for name in self.networks if name != "shipped"]
        return trained[0] if trained else "test_efficientnet" if self.dry else "resnet50"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def save(self) -> None:
        if self.result is not None:
            write_json(self.result, plain(self.found))

    def attempt(self, where: dict[str, Any], name: str, make: Callable[[], Any]) -> bool:
        """``where[name]``: what ``make`` returns, or why it has nothing; saved at once. Whether it returned."""
        if self.late:
            where[name] = {"skipped": OUT_OF_TIME}
        else:
            try:
                where[name] = make()
            except Exception as error:  # the rest is worth its figures all the same
                if os.environ.get("MAGSD_TRACEBACK"):
                    traceback.print_exc()
                where[name] = {"failed": in_a_line(error)}
        self.save()
        return not (isinstance(where[name], dict) and where[name].keys() & {"skipped", "failed"})


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: what is not finite as text, and what it does not know as well."""
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def milliseconds(
    context: Context,
    variants: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    pairs: Mapping[str, tuple[str, str]] | None = None,
    warmup: int = 10,
) -> dict[str, Any]:
    """Milliseconds of a call of each variant, which take turns: median, 90th and 99th percentile, and the ratio to the
    first with its quartiles over the rounds. ``pairs``: further ratios, a name and two variants each.

    A call ends when the device has. In a dry run each is called once, and nothing is measured.
    """
    if context.dry:
        for call in variants.values():
            call()
        return dict.fromkeys((*variants, *(pairs or {})), NOT_MEASURED)
    timings = measure(
        variants, repeats=10, seconds=seconds * len(variants), warmup=warmup, synchronize=context.synchronize
    )
    taken = {name: [1e3 * each for each in timing.seconds] for name, timing in timings.items()}
    first = next(iter(taken))
    return {
        **{name: {**spread(times), **ratio(times, taken[first])} for name, times in taken.items()},
        **{name: ratio(taken[one], taken[other]) for name, (one, other) in (pairs or {}).items()},
    }


def spread(times: list[float]) -> dict[str, float | int]:
    """Milliseconds: median and percentiles; the 99th only of 100 calls or more."""
    ordered = sorted(times)
    found: dict[str, float | int] = {
        "ms": round(statistics.median(times), 4), "p90_ms": round(ordered[int(0.9 * (len(times) - 1))], 4),
    }  # fmt: skip
    if len(times) >= 100:
        found["p99_ms"] = round(ordered[int(0.99 * (len(times) - 1))], 4)
    return {**found, "calls": len(times)}


def ratio(times: list[float], baseline: list[float]) -> dict[str, Any]:
    """Round by round: median and quartiles of the time over that of ``baseline``."""
    rounds = [a / b for a, b in zip(times, baseline)]
    low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return {"ratio": round(middle, 4), "ratio_quartiles": [round(low, 4), round(high, 4)]}


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


def script(seconds: float, *arguments: object) -> tuple[int, str]:
    """Run a Python program with this interpreter; its exit code and output, 124 and what there is when time is up."""
    try:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        return 124, said if isinstance(said, str) else said.decode(errors="replace")
    return done.returncode, done.stdout
