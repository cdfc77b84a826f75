"""``model.onnx`` with its trunk in half precision: ``model.fp16.onnx``, for TensorRT's strongly typed networks.

    image float32 -> Cast -> backbone float16 -> Cast -> attention, pooling, classifier float32 -> outputs float32

All after the last feature maps stays float32: the L2 norm of attention pooling sums 65,536 terms, float16 ends
at 65,504 (the norm becomes infinite and the softmax uniform, with no error anywhere), and the epsilons 1e-12
and 1e-24 are 0 in float16, so that an image without attention gives 0 * infinity.

Made from the finished float32 file rather than by a second export of the network in half precision: there,
batch norms would be folded with their statistics already rounded (variances below 6e-8 are 0 in float16); here
each folded weight is rounded once, and a bundle whose checkpoint is gone can have its float16 graph as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from magsd_runtime.bundle import INPUT_NAME, OUTPUT_NAMES
from magsd_runtime.errors import MagsdError
from magsd_runtime.files import replacing
from magsd_runtime.parity import BEYOND_RANGE, FP16_TOLERANCES, Network, ParityReport, compare, hostile_inputs

from .to_onnx import check_onnx

_THROUGH = {"Add", "AveragePool", "Relu", "Identity"}  # what lies between ``attention`` and its convolutions
_FLOAT_INPUTS = {"Resize": (1, 2)}  # inputs that ONNX keeps float32 whatever the type of the first
_LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class HalfParity:
    """How the float16 graph differs from the float32 one. ``beyond``: inputs that no radiograph gives, by name."""

    report: ParityReport
    beyond: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """For ``bundle.json``."""
        return {
            **self.report.to_dict(),
            "arithmetic": "float16 after every operation of the trunk, float32 within it and in the head; "
            "on the CPU by ONNX Runtime with explicit rounding",
            "beyond_range_not_required": self.beyond,
        }


def half_trunk(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` (MA-Net as :func:`to_onnx.export_onnx` writes it; left as it is) with its backbone in float16.

    Raises
    ------
    MagsdError
        If the end of the backbone cannot be found, a weight does not fit float16, or the result is not typed
        as promised: float32 in and out, one cast to float16 (of the image), no float16 after a cast back.
    """
    types = dict(_value_types(model))
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    producer = {name: node for node in graph.node for name in node.output}
    trunk = _ancestors(taps(model), producer)
    if not any(node.op_type == "Conv" or node.op_type == "MatMul" for node in _chosen(graph, trunk)):
        raise MagsdError("the network has no trunk that could be in half precision")

    made_half = {name for node in _chosen(graph, trunk) for name in node.output if types.get(name) == TensorProto.FLOAT}
    weights = _Weights(graph)
    nodes: list[onnx.NodeProto] = []
    casts: dict[str, str] = {}

    def cast(name: str, to: int, suffix: str) -> str:
        if name + suffix not in casts:
            casts[name + suffix] = name + suffix
            nodes.append(onnx.helper.make_node("Cast", [name], [name + suffix], name=f"cast_{name}{suffix}", to=to))
        return name + suffix

    for node in graph.node:
        in_trunk = bool(set(node.output) & trunk)
        if any(attribute.HasField("g") for attribute in node.attribute):
            raise MagsdError(f"{node.op_type} {node.name} holds a graph of its own: it cannot be put in half precision")
        for index, name in enumerate(node.input):
            if not name or types.get(name) != TensorProto.FLOAT:
                continue
            keep = index in _FLOAT_INPUTS.get(node.op_type, ())
            if in_trunk and not keep and name not in made_half:
                node.input[index] = (
                    weights.half(name) if name in weights else cast(name, TensorProto.FLOAT16, "_as_float16")
                )
            elif (not in_trunk or keep) and name in made_half:
                node.input[index] = cast(name, TensorProto.FLOAT, "_as_float32")
        if in_trunk:
            _retype(node)
        nodes.append(node)
    weights.drop_unused(nodes)
    rebuilt = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(rebuilt)
    onnx.helper.set_model_props(
        half, dict(sorted({**{p.key: p.value for p in model.metadata_props}, "magsd.precision": "fp16"}.items()))
    )
    _check_half(half, model)
    return half


def taps(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the feature maps that attention and embedding are made of: where the backbone ends.

    Raises
    ------
    MagsdError
        If the graph is not one that magsd exported.
    """
    producer = {name: node for node in model.graph.node for name in node.output}
    weights = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, None] = {}
    mean = producer.get("embedding")
    while mean is not None and mean.op_type in ("Flatten", "Squeeze", "Reshape"):
        mean = producer.get(mean.input[0])
    if mean is None or mean.op_type not in ("ReduceMean", "GlobalAveragePool"):
        raise MagsdError("the graph's embedding is no mean of a feature map: export the network again with this magsd")
    found[mean.input[0]] = None
    queue = ["attention"]
    while queue:
        node = producer.get(queue.pop())
        if node is not None and node.op_type == "Conv":
            found[node.input[0]] = None
        elif node is not None and node.op_type in _THROUGH:
            queue.extend(name for name in node.input if name not in weights)
        else:
            what = "the image" if node is None else node.op_type
            raise MagsdError(f"the graph's attention comes from {what}, not from convolutions of feature maps")
    return tuple(found)


def rounded_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` in float32 with the rounding of float16 written out: what its arithmetic gives, on any CPU.

    ONNX Runtime's CPU provider computes a float16 graph in float32 and fuses the casts away: the sum of 65,536
    ones came out as 65,536 there, not as infinity. Here every float16 value passes two explicit casts, which no
    optimizer may remove: products are summed in float32, as on tensor cores, and what is stored is float16.
    """
    types = dict(_value_types(model))
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    for tensor in twin.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes: list[onnx.NodeProto] = []
    for node in list(twin.graph.node):
        halves = [name for name in node.output if types.get(name) == TensorProto.FLOAT16]
        _retype(node, TensorProto.FLOAT16, TensorProto.FLOAT)
        nodes.append(node)
        for name in halves:
            index = list(node.output).index(name)
            node.output[index] = f"{name}_unrounded"
            nodes.append(
                onnx.helper.make_node("Cast", [f"{name}_unrounded"], [f"{name}_rounded"], to=TensorProto.FLOAT16)
            )
            nodes.append(onnx.helper.make_node("Cast", [f"{name}_rounded"], [name], to=TensorProto.FLOAT))
    rebuilt = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del twin.graph.node[:]
    twin.graph.node.extend(rebuilt)
    del twin.graph.value_info[:]
    return twin


def write_half(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Write the float16 graph of the float32 file ``source`` to ``path``, and return it."""
    half = half_trunk(onnx.load(os.fspath(source)))
    with replacing(path) as temporary:
        temporary.write_bytes(half.SerializeToString(deterministic=True))
    return half


def compare_half(
    reference: Network,
    half: onnx.ModelProto,
    *,
    size: int,
    real: Iterable[tuple[str, NDArray[np.float32]]] = (),
    facts: dict[str, Any] | None = None,
    threads: int | None = None,
) -> HalfParity:
    """The float16 graph, rounded as it is on a GPU, against the float32 network ``reference``, on the same inputs."""
    network = onnx_network(rounded_twin(half), threads=threads)
    hostile = hostile_inputs(size)
    within = {name: image for name, image in hostile.items() if name not in BEYOND_RANGE}
    report = compare(reference, network, size=size, real=real, hostile=within, tolerances=FP16_TOLERANCES, facts=facts)
    beyond = {}
    for name in BEYOND_RANGE:
        one = compare(reference, network, size=size, hostile={name: hostile[name]}, tolerances=FP16_TOLERANCES)
        worst = max(one.differences.values(), key=lambda difference: difference.share)
        beyond[name] = {
            "finite": bool(np.isfinite(worst.found)),
            "label_equal": one.labels_equal,
            "share_of_tolerance": float(worst.share) if np.isfinite(worst.share) else None,
        }
    return HalfParity(replace(report, reference="ONNX, float32, CPU"), beyond)


def onnx_network(model: onnx.ModelProto, *, threads: int | None = None) -> Network:
    """``model`` on ONNX Runtime's CPU provider, as a :data:`verification.Network`."""
    from magsd_runtime.backends import import_onnxruntime
    from magsd_runtime.hardware import usable_cores

    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable_cores()
    # threads that wait by spinning slow the other session of a comparison down
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.float32]) -> dict[str, NDArray[np.floating]]:
        arrays = session.run(list(OUTPUT_NAMES), {INPUT_NAME: images})
        return dict(zip(OUTPUT_NAMES, arrays))

    return run


class _Weights:
    """Initializers by name; a float16 copy of one is made when it is first asked for."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.by_name = {tensor.name: tensor for tensor in graph.initializer}

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def half(self, name: str) -> str:
        if f"{name}_as_float16" not in self.by_name:
            values = numpy_helper.to_array(self.by_name[name])
            finite = values[np.isfinite(values)]
            # +-3.4e38 as an end of Clip means no end, in float16 as well
            if finite.size > 1 and float(np.abs(finite).max()) > _LARGEST_HALF:
                raise MagsdError(f"weight {name} reaches {np.abs(finite).max():.3g}, more than float16 can hold")
            with np.errstate(over="ignore"):
                tensor = numpy_helper.from_array(values.astype(np.float16), f"{name}_as_float16")
            self.graph.initializer.append(tensor)
            self.by_name[tensor.name] = tensor
        return f"{name}_as_float16"

    def drop_unused(self, nodes: list[onnx.NodeProto]) -> None:
        used = {name for node in nodes for name in node.input}
        kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in self.graph.initializer if t.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)


def _ancestors(names: Iterable[str], producer: dict[str, onnx.NodeProto]) -> set[str]:
    """All values that ``names`` are computed from, themselves too, inputs and weights left out."""
    found: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        if name in producer and name not in found:
            found.update(producer[name].output)
            queue.extend(producer[name].input)
    return found


def _chosen(graph: onnx.GraphProto, trunk: set[str]) -> Iterator[onnx.NodeProto]:
    return (node for node in graph.node if set(node.output) & trunk)


def _retype(node: onnx.NodeProto, old: int = TensorProto.FLOAT, new: int = TensorProto.FLOAT16) -> None:
    """Constants and casts inside ``node`` from one float type to another; casts to and from the head stay."""
    to: Callable[[Any], Any] = np.float16 if new == TensorProto.FLOAT16 else np.float32
    for attribute in node.attribute:
        if attribute.HasField("t") and attribute.t.data_type == old:
            attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(to)))
        if node.op_type in ("Cast", "RandomNormal", "EyeLike") and attribute.name in ("to", "dtype"):
            attribute.i = new if attribute.i == old else attribute.i


def _value_types(model: onnx.ModelProto) -> Iterator[tuple[str, int]]:
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    for value in (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info):
        yield value.name, value.type.tensor_type.elem_type
    for tensor in inferred.graph.initializer:
        yield tensor.name, tensor.data_type


def _check_half(half: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """The promises of the module's first lines, read back from the graph."""
    shapes = {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim[1:])
        for value in (*original.graph.input, *original.graph.output)
    }
    check_onnx(
        half,
        input_shape=shapes[INPUT_NAME],
        output_shapes={name: shapes[name] for name in OUTPUT_NAMES},
        half=True,
    )
    to_half = [
        node.input[0]
        for node in half.graph.node
        if node.op_type == "Cast" and any(a.name == "to" and a.i == TensorProto.FLOAT16 for a in node.attribute)
    ]
    if to_half != [INPUT_NAME]:
        raise MagsdError(f"the half-precision graph casts {to_half} to float16: expected only {INPUT_NAME}")
    values = dict(_value_types(half))
    if any(values[name] != TensorProto.FLOAT for name in (INPUT_NAME, *OUTPUT_NAMES)):
        raise MagsdError("the half-precision graph has inputs or outputs that are not float32")
