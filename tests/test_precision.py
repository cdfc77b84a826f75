"""The float16 trunk and its float32 head: types, roundings, the overflow that a float16 head has, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import tiny_bundle
from magsd.models import MANet
from magsd.models.ma_net import attention_pooling, map_evidence
from magsd_export.precision import compare_half, half_trunk, onnx_network, rounded_twin, taps, write_half
from magsd_export.to_onnx import export_onnx
from magsd_runtime.bundle import OUTPUT_NAMES
from magsd_runtime.errors import MagsdError, VerificationError
from magsd_runtime.parity import BEYOND_RANGE, FP16_TOLERANCES, hostile_inputs
from magsd_runtime.preprocessing import PreprocessingSpec

SIZE, MAPS, FEATURES = 64, 1024, 64  # 65,536 terms under the norm, as in MA-Net on ResNet50
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


@pytest.fixture(scope="module")
def network() -> MANet:
    torch.manual_seed(5)
    model = MANet("test_efficientnet", num_classes=3, num_attention_maps=MAPS)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.05)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model.eval()


@pytest.fixture(scope="module")
def full(network: MANet, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(network, PreprocessingSpec(size=SIZE), path, {"magsd.model": "test"})
    return onnx.load(path)


@pytest.fixture(scope="module")
def half(full: onnx.ModelProto) -> onnx.ModelProto:
    return half_trunk(full)


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    found = {tensor.name: tensor.data_type for tensor in inferred.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info):
        found[value.name] = value.type.tensor_type.elem_type
    return found


def edited(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


# What is in half precision, and what is not.


def test_trunk_is_half_and_everything_after_it_float32(full: onnx.ModelProto, half: onnx.ModelProto) -> None:
    types = value_types(half)
    for value in (*half.graph.input, *half.graph.output):
        assert types[value.name] == FLOAT
    # whatever a cast back to float32 reaches, forwards, is in float32 to the end
    after: set[str] = set()
    for node in half.graph.node:
        back = node.op_type == "Cast" and any(a.name == "to" and a.i == FLOAT for a in node.attribute)
        if back or set(node.input) & after:
            assert all(types[name] != HALF for name in (*node.output, *(node.input if not back else ()))), node.name
            after.update(node.output)
    assert {"logits", "attention", "evidence", "embedding"} <= after
    convolutions = [node for node in half.graph.node if node.op_type == "Conv"]
    attending = [node for node in convolutions if node.output[0] in after]
    assert len(attending) == 2  # one a scale
    assert len(convolutions) > 10
    assert all(types[node.output[0]] == HALF for node in convolutions if node not in attending)
    assert sum(types[tensor.name] == HALF for tensor in half.graph.initializer) >= len(convolutions) - 2
    assert {p.key: p.value for p in half.metadata_props}["magsd.precision"] == "fp16"
    assert "magsd.precision" not in {p.key for p in full.metadata_props}


def test_each_weight_is_rounded_once_and_the_heads_are_kept(full: onnx.ModelProto, half: onnx.ModelProto) -> None:
    originals = {tensor.name: numpy_helper.to_array(tensor) for tensor in full.graph.initializer}
    halves = 0
    for tensor in half.graph.initializer:
        values = numpy_helper.to_array(tensor)
        original = originals[tensor.name.removesuffix("_as_float16")]
        if tensor.data_type == HALF:
            halves += 1
            with np.errstate(over="ignore"):
                np.testing.assert_array_equal(values, original.astype(np.float16))
        else:
            np.testing.assert_array_equal(values, original)
    assert halves > 10
    head = {t.name for t in half.graph.initializer if t.data_type == FLOAT}
    assert "classifier.weight" in head
    assert any(name.startswith("attention_generator") for name in head)


def test_same_float32_file_gives_the_same_bytes(full: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(full, str(tmp_path / "model.onnx"))
    write_half(tmp_path / "model.onnx", tmp_path / "a.onnx")
    write_half(tmp_path / "model.onnx", tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "model.onnx"]


def test_the_network_of_helpers_has_a_half_trunk_too(tmp_path: Path) -> None:
    tiny_bundle.write_network(tmp_path / "model.onnx", 3, 224)
    model = onnx.load(tmp_path / "model.onnx")
    assert set(taps(model)) == {"blocks", "features"}
    types = value_types(half_trunk(model))
    assert (types["blocks"], types["features"], types["attention"], types["logits"]) == (HALF, HALF, FLOAT, FLOAT)


# Its arithmetic, on a CPU that has none.


def test_rounded_twin_is_what_half_precision_gives(full: onnx.ModelProto, half: onnx.ModelProto) -> None:
    """Against ONNX's reference evaluator, which computes in NumPy's float16."""
    twin, evaluator = onnx_network(rounded_twin(half), threads=1), ReferenceEvaluator(half)
    plain = onnx_network(full, threads=1)
    images = np.stack([hostile_inputs(SIZE)[name] for name in ("normal-noise", "halves", "impulse")])
    wanted = dict(zip(OUTPUT_NAMES, evaluator.run(list(OUTPUT_NAMES), {"image": images})))
    found, exact = twin(images), plain(images)
    for name in ("attention", "embedding", "logits", "evidence"):
        error = np.abs(wanted[name] - exact[name]).max()
        scale = np.abs(exact[name]).max()
        assert 1e-5 * scale < error < 0.05 * scale  # it is half precision
        assert 1e-5 * scale < np.abs(found[name] - exact[name]).max() < 2 * error + 1e-3 * scale
        # the evaluator also accumulates in float16, so equal only as far as that goes
        assert np.abs(found[name] - wanted[name]).max() < 2 * error


def test_rounded_twin_overflows_where_half_precision_does_and_the_half_file_on_a_cpu_does_not() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["h"], to=HALF),
            helper.make_node("Mul", ["h", "h"], ["squares"]),
            helper.make_node("ReduceSum", ["squares"], ["sum"], keepdims=0),
            helper.make_node("Cast", ["sum"], ["logits"], to=FLOAT),
        ],
        "sum",
        [helper.make_tensor_value_info("x", FLOAT, ["n"])],
        [helper.make_tensor_value_info("logits", FLOAT, [])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    import onnxruntime

    def run(model: onnx.ModelProto, x: NDArray[np.float32]) -> float:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return float(session.run(None, {"x": x})[0])

    ones = np.ones(65_536, np.float32)
    assert np.isinf(run(rounded_twin(model), ones))
    assert np.isinf(ReferenceEvaluator(model).run(None, {"x": ones})[0])
    assert np.isfinite(run(model, ones))  # why the twin exists
    assert run(rounded_twin(model), ones[:1000] * np.float32(1.2345)) == pytest.approx(
        float(np.float16(1000 * np.float64(np.float16(np.float16(1.2345) ** 2)))), rel=1e-3
    )


def test_half_passes_its_tolerances_and_says_what_it_found(full: onnx.ModelProto, half: onnx.ModelProto) -> None:
    rng = np.random.default_rng(1)
    films = [(f"radiograph {i}", rng.normal(size=(1, SIZE, SIZE)).astype(np.float32)) for i in range(3)]
    parity = compare_half(onnx_network(full), half, size=SIZE, real=films, facts={"source": "noise"})
    parity.report.raise_if_failed()
    record = json.loads(json.dumps(parity.to_dict(), allow_nan=False))
    assert record["passed"]
    assert record["reference"] == "ONNX, float32, CPU"
    assert set(record["beyond_range_not_required"]) == set(BEYOND_RANGE)
    assert record["inputs"]["real"] == {"images": 3, "source": "noise"}
    assert not set(record["inputs"]["synthetic"]) & set(BEYOND_RANGE)
    assert record["tolerances"]["logits"] == FP16_TOLERANCES["logits"]._asdict()
    assert 0 < record["largest_probability_difference"]["absolute"] < 0.02
    assert 0.99 < record["lowest_map_correlation"]["value"] < 1
    for row in record["worst_differences"].values():
        assert row["relative"] > 1e-5  # float32 would be below


def test_a_trunk_that_overflows_fails_parity(full: onnx.ModelProto) -> None:
    """Feature maps a million times larger are nothing to float32, and infinite in float16."""
    model = edited(full)
    tap = taps(model)[0]
    position, producer = next((i, node) for i, node in enumerate(model.graph.node) if tap in node.output)
    producer.output[list(producer.output).index(tap)] = "small"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1000), "thousand"))
    model.graph.node.insert(position + 1, helper.make_node("Mul", ["small", "thousand"], ["larger"]))
    model.graph.node.insert(position + 2, helper.make_node("Mul", ["larger", "thousand"], [tap]))
    reference = onnx_network(model)
    assert all(np.isfinite(reference(np.ones((1, 1, SIZE, SIZE), np.float32))[name]).all() for name in OUTPUT_NAMES)
    with pytest.raises(VerificationError, match="parity failed"):
        compare_half(reference, half_trunk(model), size=SIZE).report.raise_if_failed()


# The head.


def head(half: onnx.ModelProto) -> onnx.ModelProto:
    """The part of the graph after the casts back to float32."""
    starts = [f"{name}_as_float32" for name in taps(half_source(half))]
    return onnx.utils.Extractor(onnx.shape_inference.infer_shapes(half)).extract_model(
        ["image", *starts], list(OUTPUT_NAMES)
    )


def half_source(half: onnx.ModelProto) -> onnx.ModelProto:
    """``half`` with the names that its taps have in the float32 graph."""
    renamed = onnx.ModelProto()
    renamed.CopyFrom(half)
    for node in renamed.graph.node:
        for index, name in enumerate(node.input):
            if name.endswith("_as_float32"):
                node.input[index] = name.removesuffix("_as_float32")
    return renamed


def all_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """What a plain conversion to float16 makes of the head."""
    pure = onnx.ModelProto()
    pure.CopyFrom(model)
    for value in (*pure.graph.input, *pure.graph.output):
        if value.type.tensor_type.elem_type == FLOAT:
            value.type.tensor_type.elem_type = HALF
    for tensor in pure.graph.initializer:
        if tensor.data_type == FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), name=tensor.name))
    del pure.graph.value_info[:]
    return pure


def run_head(model: onnx.ModelProto, feeds: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[Any]]:
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    cast = {
        name: values.astype(np.float16 if types[name] == HALF else np.float32)
        for name, values in feeds.items()
        if name in types
    }
    with np.errstate(all="ignore"):
        return dict(zip(OUTPUT_NAMES, ReferenceEvaluator(model).run(list(OUTPUT_NAMES), cast)))


def exact_head(f3: NDArray[Any], attention: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.float64]:
    """Logits from f3 (D, h, w), attention (M, h, w) and classifier (C, M * D): Eq. (1) and on, in float64."""
    parts = np.einsum("mhw,dhw->md", attention.astype(np.float64), f3.astype(np.float64)) / attention[0].size
    parts = np.sign(parts) * np.sqrt(np.abs(parts) + 1e-12)
    norm = max(float(np.sqrt((parts**2).sum())), 1e-12)
    return weight.astype(np.float64) @ (100.0 * parts / norm).ravel()


@pytest.fixture(scope="module")
def activations(half: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    """Feature maps as float16 holds them: strong ones, of some tens, as trained networks have."""
    inferred = {value.name: value for value in onnx.shape_inference.infer_shapes(half).graph.value_info}
    rng = np.random.default_rng(3)
    feeds = {"image": np.zeros((1, 1, SIZE, SIZE), np.float32)}
    for name in taps(half_source(half)):
        shape = [d.dim_value for d in inferred[name].type.tensor_type.shape.dim[1:]]
        values = np.abs(rng.normal(0, 30, (1, *shape))).astype(np.float16).astype(np.float32)
        feeds[f"{name}_as_float32"] = values
    return feeds


def f3_of(half: onnx.ModelProto, feeds: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    return feeds[f"{taps(half_source(half))[0]}_as_float32"][0]


def test_a_float16_head_is_silently_uniform_and_ours_is_right(
    network: MANet, half: onnx.ModelProto, activations: dict[str, NDArray[np.float32]]
) -> None:
    ours = head(half)
    found = run_head(ours, activations)
    f3, attention = f3_of(half, activations), found["attention"][0]
    weight = network.classifier.weight.detach().numpy()
    wanted = exact_head(f3, attention, weight)
    parts = np.einsum("mhw,dhw->md", attention, f3) / attention[0].size
    assert parts.size == 65_536
    assert np.abs(parts).mean() > 1
    assert np.abs(parts).max() < 60_000  # each one fits in float16: it is the sum that does not
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(found["logits"][0], wanted, rtol=1e-3, atol=1e-3)

    pure = run_head(all_float16(ours), activations)
    assert np.array_equal(pure["logits"], np.zeros_like(pure["logits"]))  # no NaN, no error: every class 1/3

    # and PyTorch's own half precision, on the same values
    features, maps = torch.from_numpy(f3)[None], torch.from_numpy(attention)[None]
    halved = attention_pooling(features.half(), maps.half())
    assert torch.count_nonzero(map_evidence(halved, torch.from_numpy(weight).half()).sum(2)) == 0
    kept = map_evidence(attention_pooling(features, maps), torch.from_numpy(weight)).sum(2)
    np.testing.assert_allclose(kept[0].numpy(), wanted, rtol=1e-3, atol=1e-3)


def test_without_any_attention_a_float16_head_has_no_number_and_ours_has(
    network: MANet, half: onnx.ModelProto, activations: dict[str, NDArray[np.float32]]
) -> None:
    """The all-zero matrix: the epsilons 1e-12 and 1e-24 are 0 in float16, and 0 * infinity is no number."""
    zeros = {name: np.zeros_like(values) for name, values in activations.items()}
    ours = head(half)
    for tensor in ours.graph.initializer:  # biases of the attention convolutions: attention is then exactly 0
        if any(node.op_type == "Conv" and tensor.name in node.input[2:] for node in ours.graph.node):
            tensor.CopyFrom(numpy_helper.from_array(-np.abs(numpy_helper.to_array(tensor)) - 1, tensor.name))
    found = run_head(ours, zeros)
    assert not found["attention"].any()
    for name in OUTPUT_NAMES:
        assert np.isfinite(found[name]).all()
    assert np.abs(found["logits"]).max() < 1e-3
    assert np.isnan(run_head(all_float16(ours), zeros)["logits"]).all()

    nothing = torch.zeros(1, FEATURES, 2, 2), torch.zeros(1, MAPS, 2, 2)
    assert torch.isnan(attention_pooling(nothing[0].half(), nothing[1].half())).all()
    assert torch.isfinite(attention_pooling(*nothing)).all()


# Refusals.


def test_a_weight_beyond_float16_is_refused(full: onnx.ModelProto) -> None:
    model = edited(full)
    tensor = next(t for t in model.graph.initializer if t.name.startswith("backbone.") and len(t.dims) == 4)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = 7e4
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(MagsdError, match=r"reaches 7e\+04, more than float16"):
        half_trunk(model)


def test_graphs_of_others_are_refused(full: onnx.ModelProto, tmp_path: Path) -> None:
    model = edited(full)
    mean = next(node for node in model.graph.node if "embedding" in node.output)
    mean.op_type = "ReduceMax"
    with pytest.raises(MagsdError, match="embedding is no mean"):
        half_trunk(model)
    model = edited(full)
    last = next(node for node in model.graph.node if "attention" in node.output)
    last.op_type = "Mul"
    with pytest.raises(MagsdError, match="attention comes from Mul"):
        half_trunk(model)


def test_half_twice_is_refused(half: onnx.ModelProto) -> None:
    with pytest.raises(MagsdError):
        half_trunk(half)
