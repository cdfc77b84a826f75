"""The ONNX file: what it is, what is not in it, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from magsd.models import MANet
from magsd_export.to_onnx import check_onnx, export_onnx, model_metadata
from magsd_runtime._version import __version__
from magsd_runtime.bundle import OUTPUT_NAMES
from magsd_runtime.errors import RESEARCH_USE, MagsdError
from magsd_runtime.preprocessing import PreprocessingSpec
from tiny_export import StandIn, stand_in

SPEC = PreprocessingSpec(size=64)
CLASSES = ("covid-19", "normal", "pneumonie é")
SHAPES = {"logits": (3,), "attention": (4, 8, 8), "evidence": (3, 4), "embedding": (6,)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(stand_in(), SPEC, path, model_metadata(CLASSES, SPEC, name="stand-in", version="3"))
    return path


def shape_of(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


def test_file_has_opset_18_names_and_shapes(exported: Path) -> None:
    model = onnx.load(exported)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert model.ir_version <= 10
    assert [value.name for value in model.graph.input] == ["image"]
    assert shape_of(model.graph.input[0]) == ("batch", 1, 64, 64)
    assert {value.name: shape_of(value) for value in model.graph.output} == {
        name: ("batch", *shape) for name, shape in SHAPES.items()
    }
    assert tuple(value.name for value in model.graph.output) == OUTPUT_NAMES
    assert list(exported.parent.iterdir()) == [exported]  # no second file with the weights


def test_file_describes_itself(exported: Path) -> None:
    model = onnx.load(exported)
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert found["magsd.version"] == __version__
    assert (found["magsd.model"], found["magsd.model_version"]) == ("stand-in", "3")
    assert tuple(json.loads(found["magsd.classes"])) == CLASSES
    assert PreprocessingSpec.from_dict(json.loads(found["magsd.preprocessing"])) == SPEC
    assert found["magsd.preprocessing_sha256"] == hashlib.sha256(found["magsd.preprocessing"].encode()).hexdigest()
    assert found["magsd.research_use"] == RESEARCH_USE
    assert list(found) == sorted(found)


def test_file_tells_nothing_about_the_machine(exported: Path) -> None:
    content = exported.read_bytes()
    places = [
        Path.cwd(), Path.home(), Path(tempfile.gettempdir()), Path(__file__).parent, exported.parent,
        Path(torch.__file__).parent, Path(sys.prefix), Path("/home"), Path("/root"),
    ]  # fmt: skip
    for place in places:
        assert str(place).encode() not in content, place
    for word in (b"stack_trace", b"site-packages", b".py", b"tiny_export", b"pkg.torch", os.uname().nodename.encode()):
        assert word not in content, word
    model = onnx.load(exported)
    assert not model.doc_string
    assert not model.graph.doc_string
    assert not model.graph.value_info
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_outputs_equal_torch_in_every_batch_size(exported: Path, batch: int) -> None:
    image = np.random.default_rng(batch).normal(size=(batch, 1, 64, 64)).astype(np.float32)
    with torch.no_grad():
        expected = stand_in()(torch.from_numpy(image))
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    # a second, slow implementation of the operators: errors of one runtime show
    for outputs in (session.run(None, {"image": image}), ReferenceEvaluator(str(exported)).run(None, {"image": image})):
        for name, found, wanted in zip(OUTPUT_NAMES, outputs, expected):
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_epsilon_under_the_root_survives(exported: Path) -> None:
    """The exporter's own optimizer removes the addition of anything below 1e-8."""
    model = stand_in()
    image = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.norm.running_mean.zero_()  # type: ignore[union-attr]
        model.norm.bias.zero_()
        path = exported.parent / "faint.onnx"
        export_onnx(model, SPEC, path, {})
        faint = image * 1e-6
        expected = model(faint)
        features = model.norm(model.features(faint))
    assert float(features.abs().max()) < 1e-5  # so that part features are of the size of the epsilon
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["logits"], {"image": faint.numpy()})[0], expected.logits.numpy(), atol=1e-4)
    path.unlink()


def test_same_weights_give_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    metadata = model_metadata(CLASSES, SPEC, name="stand-in", version="3")
    export_onnx(stand_in(), SPEC, tmp_path / "again.onnx", metadata)
    assert (tmp_path / "again.onnx").read_bytes() == exported.read_bytes()
    export_onnx(stand_in(seed=1), SPEC, tmp_path / "other.onnx", metadata)
    assert (tmp_path / "other.onnx").read_bytes() != exported.read_bytes()


@pytest.mark.slow
def test_another_process_elsewhere_gives_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    program = (
        "from tiny_export import stand_in\n"
        "from magsd_export.to_onnx import export_onnx, model_metadata\n"
        "from magsd_runtime.preprocessing import PreprocessingSpec\n"
        "spec = PreprocessingSpec(size=64)\n"
        f"export_onnx(stand_in(), spec, 'x.onnx', model_metadata({CLASSES!r}, spec, name='stand-in', version='3'))\n"
    )
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join(str(root / part) for part in ("", "export", "runtime", "tests"))
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "123"},
    )  # fmt: skip
    assert (tmp_path / "x.onnx").read_bytes() == exported.read_bytes()


def test_export_is_quiet_and_leaves_the_model_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = stand_in().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, SPEC, tmp_path / "x.onnx", {})
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_verbose_talks_on_stderr_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(stand_in(), SPEC, tmp_path / "x.onnx", {}, verbose=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "export" in captured.err.lower()


class Branching(StandIn):
    """Control flow that depends on values: no graph can hold it."""

    def forward(self, image):  # type: ignore[no-untyped-def]
        return super().forward(image if image.sum() > 0 else -image)


class Headless(StandIn):
    def forward(self, image):  # type: ignore[no-untyped-def]
        return super().forward(image)[:2]


@pytest.mark.parametrize(("kind", "message"), [(Branching, "cannot be exported to ONNX"), (Headless, "2 outputs")])
def test_what_cannot_be_exported_is_one_line_and_leaves_no_file(
    kind: type[StandIn], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MagsdError, match=message) as caught:
        export_onnx(kind().eval(), SPEC, tmp_path / "x.onnx", {})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pooling", ["attention", "gap"])
def test_the_real_network_exports(pooling: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = MANet("test_efficientnet", num_classes=3, num_attention_maps=4, pooling=pooling)  # type: ignore[arg-type]
    export_onnx(model, SPEC, tmp_path / "x.onnx", model_metadata(CLASSES, SPEC, name="m", version="1"))
    image = torch.randn(3, 1, 64, 64)
    with torch.no_grad():
        expected = model.eval()(image)
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    for found, wanted in zip(session.run(list(OUTPUT_NAMES), {"image": image.numpy()}), expected):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)
    operators = {node.op_type for node in onnx.load(tmp_path / "x.onnx").graph.node}
    assert "BatchNormalization" not in operators
    assert "Constant" not in operators


# What check_onnx refuses, on a graph made by hand.


def small_model() -> onnx.ModelProto:
    """image (batch, 1, 4, 4) -> out (batch, 1, 4, 4): image * 2."""
    nodes = [helper.make_node("Mul", ["image", "two"], ["out"])]
    shape = ["batch", 1, 4, 4]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.float32(2), "two")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def opset_17(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 17


def second_domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def newer_ir(model: onnx.ModelProto) -> None:
    model.ir_version = 11


def double_weights(model: onnx.ModelProto) -> None:
    cast = helper.make_node("Cast", ["wide"], ["two"], to=TensorProto.FLOAT)
    model.graph.node.insert(0, cast)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.float64(2), "wide"))


def half_inside(model: onnx.ModelProto) -> None:
    del model.graph.node[:]
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["image"], ["half"], to=TensorProto.FLOAT16),
            helper.make_node("Cast", ["half"], ["out"], to=TensorProto.FLOAT),
        ]
    )


def antialiased(model: onnx.ModelProto) -> None:
    del model.graph.node[:]
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "scales"))
    model.graph.node.append(helper.make_node("Resize", ["image", "", "scales"], ["out"], mode="linear", antialias=1))


def half_constant(model: onnx.ModelProto) -> None:
    value = numpy_helper.from_array(np.float16(2), "value")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["unused"], value=value))


def fixed_batch(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def free_height(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[2].dim_param = "height"


def other_name(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[0].output[0] = "result"


def dangling(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[1] = "nowhere"


def wrong_shape(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[3].dim_value = 5


def test_a_small_valid_graph_passes() -> None:
    check_onnx(small_model(), input_shape=(1, 4, 4), output_shapes={"out": (1, 4, 4)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (opset_17, "expected only ai.onnx 18"),
        (second_domain, "com.microsoft"),
        (newer_ir, "IR version 11"),
        (double_weights, "wide is double"),
        (half_inside, "casts to float16"),
        (half_constant, "float16"),
        (antialiased, "antialias"),
        (fixed_batch, r"image has shape \(2, 1, 4, 4\)"),
        (free_height, "'height'"),
        (other_name, r"\['result'\]: expected \['out'\]"),
        (dangling, "not valid ONNX"),
        (wrong_shape, "not valid ONNX"),
    ],
)
def test_other_graphs_are_refused(spoil: Callable[[onnx.ModelProto], None], message: str) -> None:
    model = small_model()
    spoil(model)
    with pytest.raises(MagsdError, match=message):
        check_onnx(model, input_shape=(1, 4, 4), output_shapes={"out": (1, 4, 4)})


def test_weights_in_another_file_are_refused(tmp_path: Path) -> None:
    model = small_model()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((1, 1, 4, 4), 2, np.float32), "two"))
    onnx.save(model, str(tmp_path / "x.onnx"), save_as_external_data=True, location="weights", size_threshold=0)
    loaded = onnx.load(tmp_path / "x.onnx", load_external_data=False)
    with pytest.raises(MagsdError, match=r"another file|not valid ONNX"):
        check_onnx(loaded, input_shape=(1, 4, 4), output_shapes={"out": (1, 4, 4)})
