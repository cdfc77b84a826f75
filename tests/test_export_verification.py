"""Parity: what is compared with what, against slow checks written here, and every way to fail."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from magsd_export.verification import BATCH_SIZES, TOLERANCES, Tolerance, compare, hostile_inputs, torch_network
from magsd_runtime.bundle import OUTPUT_NAMES
from magsd_runtime.errors import MagsdError, VerificationError

SIZE = 32
CLASSES, MAPS, FEATURES = 3, 2, 5
Network = Callable[[NDArray[np.float32]], dict[str, NDArray[Any]]]
Change = Callable[[str, NDArray[Any], NDArray[np.float32]], NDArray[Any]]


def network(change: Change = lambda name, values, images: values) -> Network:
    """Fixed sums over the image as outputs; ``change`` spoils them on the way out."""

    def run(images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        flat = images.reshape(len(images), -1).astype(np.float64)
        waves = np.sin(np.arange(flat.shape[1])[:, None] * np.arange(1, 1 + CLASSES * MAPS)[None] + 0.1)
        evidence = (flat @ waves).reshape(-1, CLASSES, MAPS) / 20 + np.arange(1.0, 1 + CLASSES)[:, None]
        outputs = {
            "logits": evidence.sum(2),
            "attention": np.abs(images[:, :, ::8, ::8]).repeat(MAPS, axis=1),
            "evidence": evidence,
            "embedding": np.abs(flat[:, :FEATURES]),
        }
        return {name: change(name, value.astype(np.float32), images) for name, value in outputs.items()}

    return run


def radiographs(count: int) -> list[tuple[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(4)
    return [(f"radiograph {i}", rng.normal(size=(1, SIZE, SIZE)).astype(np.float32)) for i in range(1, count + 1)]


def test_equal_networks_pass_and_everything_was_run() -> None:
    sizes: list[int] = []
    inner = network()

    def counting(images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        sizes.append(len(images))
        return inner(images)

    report = compare(network(), counting, size=SIZE, real=radiographs(10))
    report.raise_if_failed()
    assert report.passed
    assert report.labels_equal
    assert all(difference.absolute == 0 for difference in report.differences.values())
    assert report.real_images == 10
    hostile = len(hostile_inputs(SIZE))
    # hostile in batches of 1, of 2 and of 5; the radiographs as 1, 2, 5, 1 and the last one
    expected = [min(size, hostile - start) for size in BATCH_SIZES for start in range(0, hostile, size)] + [
        1,
        2,
        5,
        1,
        1,
    ]
    assert sizes == expected


@pytest.mark.parametrize("output", OUTPUT_NAMES)
@pytest.mark.parametrize("where", ["noise", "radiograph 3"])
def test_one_wrong_value_of_one_input_fails_and_is_named(output: str, where: str) -> None:
    real = radiographs(4)
    target = dict(real).get(where, hostile_inputs(SIZE)["noise"])

    def spoil(name: str, values: NDArray[Any], images: NDArray[np.float32]) -> NDArray[Any]:
        values = values.copy()
        for index, image in enumerate(images):
            if name == output and np.array_equal(image, target):
                last = values[index].reshape(-1)
                last[-1] += 0.01 * max(1.0, float(np.abs(values[index]).max()))
        return values

    report = compare(network(), network(spoil), size=SIZE, real=real)
    assert not report.passed
    with pytest.raises(VerificationError, match=rf"{output} differs by .* for input {where}.*allowed") as caught:
        report.raise_if_failed()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 5
    assert {name for name, difference in report.differences.items() if difference.share > 1} == {output}
    assert "TOO LARGE" in report.format()


@settings(max_examples=60, deadline=None)
@given(
    output=st.sampled_from(OUTPUT_NAMES),
    scale=st.floats(1e-3, 1e3),
    share=st.floats(0.05, 20).filter(lambda value: abs(value - 1) > 0.01),
)
def test_the_limit_is_absolute_plus_relative_times_the_images_largest_value(
    output: str, scale: float, share: float
) -> None:
    """Slowly: loop over the values of one image, and compare with the documented formula."""
    values = {
        "logits": np.array([1.0, -3.0, 0.5]), "attention": np.array([[[0.2, 4.0], [0.0, 1.0]]]),
        "evidence": np.array([[0.3, 0.7], [-2.0, -1.0], [0.5, 0.0]]), "embedding": np.array([0.1, 2.5]),
    }  # fmt: skip
    reference = {name: (array * scale)[np.newaxis] for name, array in values.items()}
    largest = max(abs(float(value)) for value in reference[output].ravel())
    tolerance = TOLERANCES[output]
    allowed = tolerance.absolute + tolerance.relative * largest
    exported = {name: array.copy() for name, array in reference.items()}
    exported[output].reshape(-1)[1] += share * allowed
    one = {"one": np.zeros((1, 4, 4), np.float32)}

    def repeat(outputs: dict[str, NDArray[Any]]) -> Network:
        return lambda images: {name: np.repeat(array, len(images), axis=0) for name, array in outputs.items()}

    report = compare(repeat(reference), repeat(exported), size=4, hostile=one)
    worst = report.differences[output]
    assert worst.share == pytest.approx(share, rel=1e-6)
    assert worst.absolute == pytest.approx(share * allowed, rel=1e-6)
    assert worst.relative == pytest.approx(share * allowed / largest, rel=1e-6)
    assert (worst.share <= 1) == (share <= 1)
    assert report.passed == (share <= 1)


def test_a_batch_that_mixes_its_images_is_found() -> None:
    def mix(name: str, values: NDArray[Any], images: NDArray[np.float32]) -> NDArray[Any]:
        return values + 0.05 * (values.mean(axis=0, keepdims=True) - values) if name == "attention" else values

    report = compare(network(), network(mix), size=SIZE)
    with pytest.raises(VerificationError, match=r"attention differs .* in a batch of [245]"):
        report.raise_if_failed()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["exported", "reference", "both"])
@pytest.mark.parametrize("output", ["logits", "embedding"])
def test_what_is_not_finite_fails_also_where_both_agree(value: float, side: str, output: str) -> None:
    def spoil(name: str, values: NDArray[Any], images: NDArray[np.float32]) -> NDArray[Any]:
        values = values.copy()
        if name == output:
            # only where the image is exactly 0: one of all inputs
            values[~images.reshape(len(images), -1).any(axis=1), ..., -1] = value
        return values

    plain, spoilt = network(), network(spoil)
    report = compare(spoilt if side != "exported" else plain, spoilt if side != "reference" else plain, size=SIZE)
    with pytest.raises(VerificationError, match=rf"{output} is not finite for input blank"):
        report.raise_if_failed()
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert json.loads(text)["passed"] is False
    assert json.loads(text)["worst_differences"][output]["absolute"] is None


def _two_logits(first: float, second: float) -> Network:
    def run(images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        count = len(images)
        return {
            "logits": np.tile(np.array([first, second], np.float32), (count, 1)),
            "attention": np.ones((count, 1, 1, 1), np.float32),
            "evidence": np.ones((count, 2, 1), np.float32),
            "embedding": np.ones((count, 1), np.float32),
        }

    return run


def test_a_tie_within_tolerance_is_no_flip() -> None:
    report = compare(_two_logits(1.0, 1.0 - 5e-5), _two_logits(1.0 - 5e-5, 1.0), size=SIZE)
    assert report.passed
    assert report.labels_equal
    assert set(report.ties) == set(hostile_inputs(SIZE))
    report.raise_if_failed()


def test_a_label_that_changes_beyond_the_tolerance_is_a_flip() -> None:
    report = compare(_two_logits(1.0, 0.9), _two_logits(0.9, 1.0), size=SIZE)
    assert set(report.flips) == set(hostile_inputs(SIZE))
    assert not report.ties
    assert not report.labels_equal
    assert "DIFFER" in report.format()
    with pytest.raises(VerificationError):
        report.raise_if_failed()


def test_a_flip_alone_fails() -> None:
    """Should a later tolerance let logits differ more than it counts as a tie, the label still decides."""
    report = compare(_two_logits(1.0, 0.9), _two_logits(0.9, 1.0), size=SIZE)
    within = {name: difference.__class__(share=0.5) for name, difference in report.differences.items()}
    flipped = report.__class__(within, report.tolerances, report.hostile, 0, flips=report.flips)
    assert not flipped.passed
    with pytest.raises(VerificationError, match="label differs from PyTorch for 14 inputs, first blank"):
        flipped.raise_if_failed()


def test_nothing_compared_is_not_a_pass() -> None:
    assert not compare(network(), network(), size=SIZE, hostile={}).passed


def test_other_shapes_cannot_be_judged() -> None:
    def shorter(name: str, values: NDArray[Any], images: NDArray[np.float32]) -> NDArray[Any]:
        return values[..., :-1] if name == "attention" else values

    with pytest.raises(MagsdError, match=r"attention is .* the reference gives"):
        compare(network(), network(shorter), size=SIZE)

    def dropped(name: str, values: NDArray[Any], images: NDArray[np.float32]) -> NDArray[Any]:
        return values[:1]

    with pytest.raises(MagsdError, match="for a batch of 2"):
        compare(network(), network(dropped), size=SIZE)


def test_hostile_inputs_are_what_their_names_say() -> None:
    images = hostile_inputs(64)
    for name, image in images.items():
        assert (image.dtype, image.shape) == (np.float32, (1, 64, 64)), name
        assert np.isfinite(image).all(), name
        assert np.array_equal(image, hostile_inputs(64)[name]), name
    assert not images["blank"].any()
    assert np.unique(images["constant"]).size == np.unique(images["constant-negative"]).size == 1
    assert (images["halves"][0, :, :32] == -1).all()
    assert (images["halves"][0, :, 32:] == 1).all()
    board = images["checkerboard"][0]
    assert (board[:-1] == -board[1:]).all()
    assert (board[:, :-1] == -board[:, 1:]).all()
    impulse = images["impulse"][0]
    assert (impulse > 0).sum() == 1
    assert abs(impulse.mean()) < 1e-6
    assert impulse.std() == pytest.approx(1)
    assert images["noise"].std() == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(images["noise-x1000"], images["noise"] * 1e3, rtol=1e-6)
    np.testing.assert_allclose(images["noise-x0.000001"], images["noise"] * 1e-6, rtol=1e-6)


def test_report_is_json_and_says_what_was_used() -> None:
    report = compare(network(), network(), size=SIZE, real=radiographs(3), facts={"source": "a manifest"})
    value = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert value["inputs"]["real"] == {"images": 3, "source": "a manifest"}
    assert value["inputs"]["synthetic"] == list(hostile_inputs(SIZE))
    assert value["batch_sizes"] == [1, 2, 5]
    assert value["tolerances"]["logits"] == Tolerance(1e-4, 1e-4)._asdict()
    assert set(value["worst_differences"]) == set(OUTPUT_NAMES)
    assert "labels equal over 3 real and 14 synthetic images" in report.format()


def test_torch_network_gives_arrays_by_name_in_evaluation_mode() -> None:
    import torch

    from tiny_export import stand_in

    model = stand_in().train()
    image = np.random.default_rng(0).normal(size=(2, 1, 32, 32)).astype(np.float32)
    outputs = torch_network(model)(image)
    assert not model.training
    with torch.no_grad():
        expected = model(torch.from_numpy(image))
    for name, wanted in zip(OUTPUT_NAMES, expected):
        assert outputs[name].dtype == np.float32
        np.testing.assert_array_equal(outputs[name], wanted.numpy())
