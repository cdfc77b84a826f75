from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from magsd_runtime.calibration import probabilities

SHAPES = st.tuples(st.integers(1, 4), st.integers(2, 5))


@given(
    hnp.arrays(np.float32, SHAPES, elements=st.floats(-50, 50, width=32)),
    st.floats(0.1, 10),
)
def test_softmax_equals_the_definition(logits: np.ndarray, temperature: float) -> None:
    result = probabilities(logits, temperature)
    for row, values in zip(result, logits):
        exponents = [math.exp(float(value) / temperature) for value in values]
        for value, exponent in zip(row, exponents):
            assert value == pytest.approx(exponent / math.fsum(exponents), rel=1e-9, abs=1e-300)


@given(
    hnp.arrays(np.float32, SHAPES, elements=st.floats(-(2.0**127), 2.0**127, width=32)),
    st.floats(1e-6, 1e6),
)
def test_any_finite_logits_give_probabilities_in_the_same_order(logits: np.ndarray, temperature: float) -> None:
    result = probabilities(logits, temperature)
    assert np.isfinite(result).all()
    assert result.sum(axis=1) == pytest.approx(np.ones(len(logits)))
    for row, values in zip(result, logits):
        assert row[values.argmax()] == row.max()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="finite number above 0"):
        probabilities(np.zeros((1, 2)), temperature)
