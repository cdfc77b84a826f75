"""Logits become probabilities."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def probabilities(logits: NDArray[np.floating], temperature: float = 1.0) -> NDArray[np.float64]:
    """Softmax of ``logits / temperature``: (N, C) -> float64 (N, C), rows sum to 1.

    Finite logits of any size give finite probabilities; the order of classes never depends on the
    temperature. Source: Guo et al. 2017, temperature scaling.

    Raises
    ------
    ValueError
        If the temperature is not a finite positive number.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}: expected a finite number above 0")
    values = np.asarray(logits, np.float64)
    # The maximum goes first: dividing first could overflow, and inf - inf is not a number
    with np.errstate(over="ignore"):
        exponents = np.exp((values - values.max(axis=-1, keepdims=True)) / temperature)
    return exponents / exponents.sum(axis=-1, keepdims=True)
