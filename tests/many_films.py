"""Twelve films, one file that is none and one film without contrast; and what `magsd infer` says of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from magsd_runtime.inferring_commands import infer


def draw(folder: Path) -> Path:
    """Twelve films, each another one; one that is none, and one without contrast."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    y, x = np.mgrid[0:160, 0:140]
    for number in range(12):
        centre = rng.uniform(30, 110, 2)
        blob = 120 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / 600)
        film = np.clip(60 + blob + rng.normal(0, 12, x.shape), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number:02}.png"), film)
    (folder / "05a.png").write_bytes(b"no picture")
    cv2.imwrite(str(folder / "07a.png"), np.full((100, 100), 90, np.uint8))
    return folder


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "timings_ms"}


def totals(lines: list[dict[str, Any]], before: int = 0) -> str:
    statuses = Counter(line["status"] for line in lines)
    assert set(statuses) == {"error", "ok", "rejected"}
    parts = ", ".join(f"{statuses[status]} {status}" for status in sorted(statuses))
    return f"{len(lines)} images: {parts}{f'; {before} of them before' if before else ''}\n"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[dict[str, Any]], str]:
    code = infer([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err
