"""Make the template by which the runtime knows how a film lies: assets/layout.npy, float32 (16, 16).

    python benchmarks/layout_template.py --data train.csv --out runtime/magsd_runtime/assets/layout.npy

The template is fitted so that, of the 16 ways in which a film may lie (magsd_runtime.pixel_rules.layout_scores),
upright and positive scores highest: a softmax over the 16 scores, with a penalty on the template's size and roughness.
Films: those of the half of the patients by whose hash limits are chosen, without --leave-out (default: kermany), each
also four times turned by up to 8 degrees, enlarged and shifted a little. Sources count alike.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd_runtime.errors import MagsdError, UsageError
from magsd_runtime.files import replacing
from magsd_runtime.images import read_radiograph
from magsd_runtime.pixel_rules import layout_thumbnail

COPIES = 4
PENALTY = 3e-4
Pixels = NDArray[np.uint8]


def chosen_on(row: Mapping[str, str], left_out: Sequence[str] = ("kermany",)) -> bool:
    """Whether limits and template are chosen on this row's films: half of the patients, none of ``left_out``."""
    return row.get("source") not in left_out and hashlib.sha256(row["patient"].encode()).digest()[0] % 2 == 0


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a manifest, ``path`` made absolute. Raises UsageError if it cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    return [{**row, "path": str(path.parent / row["path"])} for row in rows]


def jittered(film: Pixels, rng: np.random.Generator) -> Pixels:
    """Turned by up to 8 degrees, 0.9 to 1.15 times as large, shifted by up to 5 %; beyond it black or its edge."""
    height, width = film.shape
    warp = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-8, 8), rng.uniform(0.9, 1.15))
    warp[:, 2] += rng.uniform(-0.05, 0.05, 2) * (width, height)
    border = cv2.BORDER_REPLICATE if rng.random() < 0.5 else cv2.BORDER_CONSTANT
    return np.asarray(cv2.warpAffine(film, warp, (width, height), borderMode=border), np.uint8)


def fit(thumbnails: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 (N, 16, 16) of upright films and their weights (N,), sum 1 -> the template float32 (16, 16)."""
    import torch

    films, share = torch.tensor(thumbnails), torch.tensor(weights)
    ways = torch.stack(
        [torch.rot90(one, turns, [1, 2]) for one in (films, torch.flip(films, [1])) for turns in range(4)], 1
    )
    template = torch.zeros(films.shape[1:], requires_grad=True)
    optimizer = torch.optim.LBFGS([template], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores = (ways * template).sum((2, 3))
        wrong = -torch.log_softmax(torch.cat([scores, -scores], 1), 1)[:, 0]
        rough = (template[1:] - template[:-1]).square().sum() + (template[:, 1:] - template[:, :-1]).square().sum()
        total = (share * wrong).sum() + PENALTY * (template.square().sum() + rough)
        total.backward()
        return total

    optimizer.step(loss)  # type: ignore[arg-type]
    return np.asarray(template.detach().numpy(), np.float32)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, type=Path, metavar="M.csv")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.npy")
    parser.add_argument("--leave-out", action="append", metavar="SOURCE", help="default: kermany")
    options = parser.parse_args(argv)
    try:
        rows = [row for row in read_rows(options.data) if chosen_on(row, options.leave_out or ("kermany",))]
        if not rows:
            raise UsageError(f"{options.data}: holds no films to choose on")
        films = [read_radiograph(row["path"]).pixels for row in rows]
    except MagsdError as error:
        print(f"layout_template: {error}", file=sys.stderr)
        return error.exit_code
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    counts = Counter(row["source"] for row in rows)
    shown = films + [jittered(film, rng) for _ in range(COPIES) for film in films]
    weights = np.tile([1 / counts[row["source"]] for row in rows], COPIES + 1)
    template = fit(np.stack([layout_thumbnail(film) for film in shown]), (weights / weights.sum()).astype(np.float32))
    with replacing(options.out) as temporary, open(temporary, "wb") as file:
        np.save(file, template)
    print(f"{len(films)} films of {len({row['patient'] for row in rows})} patients: {dict(counts)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
