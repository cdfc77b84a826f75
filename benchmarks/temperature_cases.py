"""How far a fitted temperature lies from the true one, by the number of cases of each class.

    python benchmarks/temperature_cases.py [--draws 400] [--json FILE]

Logits of three classes are independent normal numbers; the label is drawn from softmax(logits / 2), so the true
temperature is 2, and cases are drawn until every class has the wanted number. Which standard deviation the logits
have decides how often the largest one is right. This is where the minimum number of patients in
magsd_runtime.calibrating comes from.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.calibration import fit_temperature, probabilities
from timing import save

TRUE, CLASSES = 2.0, 3
DEVIATIONS = (4.0, 16.0)
CASES = (10, 20, 40)


def draw(rng: np.random.Generator, deviation: float, each: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Logits (N, C) and labels (N,) with ``each`` cases of every class."""
    logits = rng.normal(0, deviation, (6 * each, CLASSES))
    chances = probabilities(logits, TRUE).cumsum(axis=1)
    labels = (rng.random((len(logits), 1)) > chances[:, :-1]).sum(axis=1)
    rows = np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(CLASSES)])
    return logits[rows], labels[rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--draws", type=int, default=400, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    results = []
    print("accuracy  cases of each class   95 % of fitted / true temperature")
    for deviation in DEVIATIONS:
        for each in CASES:
            rng = np.random.default_rng([int(deviation), each])
            ratios, right = [], []
            for _ in range(options.draws):
                logits, labels = draw(rng, deviation, each)
                ratios.append(fit_temperature(logits, labels).temperature / TRUE)
                right.append(float((logits.argmax(1) == labels).mean()))
            low, high = (float(value) for value in np.percentile(ratios, [2.5, 97.5]))
            accuracy = float(np.mean(right))
            results.append({"accuracy": accuracy, "each": each, "low": low, "high": high})
            print(f"{accuracy:8.2f}  {each:19}   {low:.2f} to {high:.2f}")
    save(options.json, {"draws": options.draws, "true_temperature": TRUE, "results": results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
