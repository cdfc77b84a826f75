"""The network becomes one ONNX file: opset 18, float32, dynamic batch, nothing of the exporting machine in it.

    image (N, 1, S, S) -> logits (N, C), attention (N, M, h, w), evidence (N, C, M), embedding (N, D)

The exporter's word is not taken for anything: opset, operators, types, shapes and names are read back
from the file that it gave. Asked for opset 17, PyTorch 2.13 wrote 18 and did not say so.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import onnx
import torch
from torch import nn

from magsd_runtime._version import __version__
from magsd_runtime.bundle import INPUT_NAME, OUTPUT_NAMES
from magsd_runtime.errors import RESEARCH_USE, MagsdError
from magsd_runtime.files import replacing
from magsd_runtime.preprocessing import PreprocessingSpec

OPSET = 18  # what the exporter writes natively; TensorRT's parser reads 9 to 20 since 10.0
IR_VERSION = 10  # the newest that ONNX Runtime 1.18 reads
LARGEST_BATCH = 4096  # a bound for the exporter's reasoning about shapes; the file holds none
LARGEST_FILE = 2**31 - 1  # a protobuf's limit; MA-Net on ResNet50 has 95 MB

_FLOATS_REFUSED = frozenset(
    value
    for name, value in onnx.TensorProto.DataType.items()
    if ("FLOAT" in name or name == "DOUBLE") and name != "FLOAT"
)


def model_metadata(classes: Sequence[str], spec: PreprocessingSpec, *, name: str, version: str) -> dict[str, str]:
    """What an ONNX file must say about itself to be used right without its bundle."""
    return {
        "magsd.version": __version__,
        "magsd.model": name,
        "magsd.model_version": version,
        "magsd.classes": json.dumps(list(classes), ensure_ascii=False),
        "magsd.preprocessing": spec.canonical_json(),
        "magsd.preprocessing_sha256": spec.sha256(),
        "magsd.research_use": RESEARCH_USE,
    }


def export_onnx(
    model: nn.Module,
    spec: PreprocessingSpec,
    path: str | os.PathLike[str],
    metadata: dict[str, str],
    *,
    verbose: bool = False,
) -> None:
    """Write ``model`` (any mode, any device; left as it is) to ``path`` as float32 ONNX with ``metadata``.

    ``model`` maps float32 (N, 1, S, S), S = ``spec.size``, to the four outputs of MA-Net in their order.
    The same weights give the same bytes under the same versions of torch and onnx. With ``verbose`` the
    exporter's messages go to stderr, else nowhere.

    Raises
    ------
    MagsdError
        If the network cannot be exported, or the file is not what was asked for.
    """
    network = copy.deepcopy(model).cpu().float().eval().to(memory_format=torch.contiguous_format)
    network.requires_grad_(False)
    # two images: of one, some exporter versions make a constant
    example = torch.zeros(2, 1, spec.size, spec.size)
    with torch.no_grad():
        outputs = network(example)
    if len(outputs) != len(OUTPUT_NAMES):
        raise MagsdError(f"the network has {len(outputs)} outputs: expected {', '.join(OUTPUT_NAMES)}")
    shapes = {name: tuple(output.shape[1:]) for name, output in zip(OUTPUT_NAMES, outputs)}

    exported = _clean(_export(network, example, verbose=verbose), metadata)
    check_onnx(exported, input_shape=(1, spec.size, spec.size), output_shapes=shapes)
    with replacing(path) as temporary:
        temporary.write_bytes(exported.SerializeToString(deterministic=True))


def check_onnx(
    model: onnx.ModelProto,
    *,
    input_shape: tuple[int, ...],
    output_shapes: dict[str, tuple[int, ...]],
    half: bool = False,
) -> None:
    """Refuse what a runtime, TensorRT's parser among them, would meet later. Shapes are without the batch.

    With ``half``, float16 is allowed beside float32 (:mod:`precision` says where).

    Raises
    ------
    MagsdError
        For another opset or operator set than ONNX's own 18, an invalid graph, an antialiased Resize,
        a float type but float32, external data, or other inputs and outputs than asked for.
    """
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if opsets != {"ai.onnx": OPSET}:
        raise MagsdError(f"the exported file has opsets {opsets}: expected only ai.onnx {OPSET}")
    if model.ir_version > IR_VERSION or model.functions:
        raise MagsdError(
            f"the exported file has IR version {model.ir_version} and {len(model.functions)} functions: "
            f"expected at most {IR_VERSION}, and none"
        )
    try:
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise MagsdError(f"the exported file is not valid ONNX: {' '.join(str(error).split())[:300]}") from error
    refused = _FLOATS_REFUSED - {onnx.TensorProto.FLOAT16} if half else _FLOATS_REFUSED
    for node in _nodes(inferred.graph):
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.domain not in ("", "ai.onnx"):
            raise MagsdError(f"the exported file uses {node.op_type} of the unknown domain {node.domain}")
        if node.op_type == "Resize" and "antialias" in attributes and attributes["antialias"].i:
            raise MagsdError("the exported file has a Resize with antialias, which TensorRT refuses")
        if node.op_type == "Cast" and attributes["to"].i in refused:
            raise MagsdError(f"the exported file casts to {_type_name(attributes['to'].i)}: expected float32 only")
    for name, data_type in _tensor_types(inferred.graph):
        if data_type in refused:
            raise MagsdError(f"{name} is {_type_name(data_type)} in the exported file: expected float32 only")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in inferred.graph.initializer):
        raise MagsdError("the exported file keeps weights in another file: expected one file")
    _check_values(inferred.graph.input, {INPUT_NAME: input_shape})
    _check_values(inferred.graph.output, output_shapes)


def _export(network: nn.Module, example: torch.Tensor, *, verbose: bool) -> onnx.ModelProto:
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    with _chatter(verbose) as said:
        try:
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: batch},),
                input_names=[INPUT_NAME],
                output_names=list(OUTPUT_NAMES),
                external_data=False,
                optimize=False,  # see _simplify
                verbose=verbose,
            )
            if program is not None:
                _simplify(program.model)
        except Exception as error:  # capture, decomposition, translation: each with exceptions of its own
            last = " ".join((str(error).strip() or said.getvalue().strip()).split())
            raise MagsdError(f"the network cannot be exported to ONNX: {last[:300]}") from error
    if program is None:
        raise MagsdError("the exporter of this torch gave no program: install torch 2.11 or newer")
    if sum(value.numel() * value.element_size() for value in network.state_dict().values()) > LARGEST_FILE:
        raise MagsdError("the network is larger than the 2 GB that one ONNX file can hold")
    return program.model_proto


def _simplify(model: Any) -> None:
    """Fold constants and batch norms of an ``onnx_ir.Model``, in place.

    Not the exporter's own ``optimize``: onnxscript takes every constant below 1e-8 for a zero and removes
    its addition, so the 1e-12 under attention pooling's square root was gone (onnxscript 0.7.2), and an
    image with faint features got other logits. Only what is exact, or exact but for rounding, is done here.
    """
    from onnx_ir.passes.common import LiftConstantsToInitializersPass
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules.common import fuse_batchnorm_into_conv_rule

    optimizer.fold_constants(model)
    rewriter.rewrite(model, [fuse_batchnorm_into_conv_rule])
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    # TensorRT wants axes and shapes as initializers, not as nodes
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


@contextlib.contextmanager
def _chatter(verbose: bool) -> Iterator[io.StringIO]:
    """The exporter prints, warns and logs, also to stdout, where the results of a command belong."""
    said = io.StringIO()
    if verbose:
        with contextlib.redirect_stdout(sys.stderr):
            yield said
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield said
    finally:
        logging.disable(disabled)


def _clean(model: onnx.ModelProto, metadata: dict[str, str]) -> onnx.ModelProto:
    """Only the computation, and ``metadata``: the exporter adds stack traces with the paths of source files."""
    cleaned = onnx.ModelProto()
    cleaned.CopyFrom(model)
    cleaned.producer_name, cleaned.producer_version = "magsd", __version__
    for field in ("doc_string", "domain", "model_version"):
        cleaned.ClearField(field)
    del cleaned.metadata_props[:]
    onnx.helper.set_model_props(cleaned, dict(sorted(metadata.items())))
    cleaned.graph.name = "magsd"
    for graph in _graphs(cleaned.graph):
        graph.ClearField("doc_string")
        # shapes between the nodes follow from the inputs' by shape inference
        for described in ("metadata_props", "value_info", "quantization_annotation"):
            graph.ClearField(described)
        for item in (*graph.input, *graph.output, *graph.initializer, *graph.node):
            item.ClearField("doc_string")
            item.ClearField("metadata_props")
    return cleaned


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for inner in _graphs(graph):
        yield from inner.node


def _tensor_types(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    """Name and element type of every value: weights, constants, inputs, outputs and all between."""
    for inner in _graphs(graph):
        for value in (*inner.input, *inner.output, *inner.value_info):
            yield value.name, value.type.tensor_type.elem_type
        for tensor in inner.initializer:
            yield tensor.name, tensor.data_type
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield f"a constant of {node.op_type} {node.name}", attribute.t.data_type


def _check_values(values: Iterable[onnx.ValueInfoProto], expected: dict[str, tuple[int, ...]]) -> None:
    found: dict[str, tuple[Any, ...]] = {}
    for value in values:
        dimensions = value.type.tensor_type.shape.dim
        found[value.name] = tuple(
            dimension.dim_value if dimension.HasField("dim_value") else dimension.dim_param or None
            for dimension in dimensions
        )
    if list(found) != list(expected):
        raise MagsdError(f"the exported file names {list(found)}: expected {list(expected)}")
    for name, shape in expected.items():
        batch, *rest = found[name] or (None,)
        if not isinstance(batch, str) or tuple(rest) != shape:
            raise MagsdError(f"{name} has shape {found[name]} in the exported file: expected ('batch', *{shape})")


def _type_name(data_type: int) -> str:
    return onnx.TensorProto.DataType.Name(data_type).lower()
