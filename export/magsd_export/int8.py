"""``model.onnx`` with its trunk in 8-bit integers: ``model.int8.onnx``, for CPUs.

    image float32 -> Quantize -> backbone uint8 x int8 -> Dequantize -> attention, pooling, classifier float32

Static quantization in QDQ form (pairs of QuantizeLinear and DequantizeLinear around what runs in integers):
activations as uint8 with one scale a tensor, whose range is the smallest and largest value that the calibration
films give; weights as int8 with one scale an output channel.

Weights keep 7 bits (``reduce_range``). Without VNNI, x86 adds two products of uint8 and int8 in 16 bits, and
255 x 127 twice does not fit: it saturates, with no error and on some machines only. 255 x 64 twice fits, so that
one file gives the same answers everywhere.

All after the last feature maps stays float32, as in half precision (:mod:`magsd_export.precision`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from magsd_runtime.bundle import INPUT_NAME
from magsd_runtime.errors import MagsdError
from magsd_runtime.files import replacing

from .precision import taps

_THROUGH = ("Clip", "Relu", "MaxPool")  # they keep the scale of what they are given
_QUANTIZED = ("Conv", "Add", *_THROUGH)


@dataclass(frozen=True)
class Calibrated:
    """A float32 network ready to be quantized. ``layers``: its convolutions by name, in order; the image's first.

    ``ranges``: ONNX Runtime's record of the smallest and largest value of each tensor. ``others``: what is quantized
    with the convolutions around it: activations, pools and sums, with the layers that each one rests on.
    """

    model: onnx.ModelProto
    layers: tuple[str, ...]
    others: tuple[tuple[str, frozenset[str]], ...]
    weights: dict[str, str]
    ranges: Any

    def titles(self, layers: Iterable[str]) -> list[str]:
        """The layers' names as people know them: those of their weights, in the network's order."""
        chosen = set(layers)
        return [self.weights[layer].removesuffix(".weight") for layer in self.layers if layer in chosen]


def calibrate(source: str | os.PathLike[str], films: Iterable[NDArray[np.float32]]) -> Calibrated:
    """Read the float32 network ``source`` and record what values its tensors take over ``films``, each (1, S, S).

    Raises
    ------
    MagsdError
        If the graph is not one that magsd exported, has no convolution to quantize, or ``films`` is empty.
    """
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images = [image[np.newaxis] for image in films]
    if not images:
        raise MagsdError("quantization needs films to calibrate on, and there are none")
    with TemporaryDirectory(prefix="magsd-int8-") as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        # folds Pad into the convolutions; symbolic shape inference fails on attention pooling's norm
        quant_pre_process(os.fspath(source), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(prepared)
        if len({node.name for node in model.graph.node} - {""}) < len(model.graph.node):
            for number, node in enumerate(model.graph.node):  # by which layers are told apart
                node.name = f"{node.op_type}_{number}"
        layers, others, weights = _trunk(model)
        calibrator = create_calibrator(
            str(prepared),
            list(_QUANTIZED),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"symmetric": False},
        )
        for image in images:  # one at a time: it keeps all tensors of what it was given until it is through
            calibrator.collect_data(_reader({INPUT_NAME: image}))
        ranges = calibrator.compute_data()
    return Calibrated(model, layers, others, weights, ranges)


def quantize(calibrated: Calibrated, leave: Iterable[str] = (), *, reduce_range: bool = True) -> onnx.ModelProto:
    """The network with all of its layers but ``leave`` (names of :attr:`Calibrated.layers`) in 8-bit integers.

    Raises
    ------
    MagsdError
        If a layer in ``leave`` is none, no layer remains, or something outside the trunk was quantized.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    leave = set(leave)
    if unknown := leave - set(calibrated.layers):
        raise MagsdError(f"no such layer to leave in float: {', '.join(sorted(unknown))}")
    chosen = set(calibrated.layers) - leave
    if not chosen:
        raise MagsdError("all layers are left in float: nothing to quantize")
    nodes = [*(name for name in calibrated.layers if name in chosen),
             *(name for name, rests_on in calibrated.others if rests_on and rests_on <= chosen)]  # fmt: skip
    copy = onnx.ModelProto()
    copy.CopyFrom(calibrated.model)
    with _quiet():
        quantizer = QDQQuantizer(
            copy, True, reduce_range, QuantType.QInt8, QuantType.QUInt8, calibrated.ranges, nodes, [],
            list(_QUANTIZED), {},
        )  # fmt: skip
        quantizer.quantize_model()
        quantizer.model.topological_sort()  # it appends its nodes; ONNX wants each value made before it is used
    model = quantizer.model.model
    kept = {p.key: p.value for p in calibrated.model.metadata_props if p.key.startswith("magsd.")}
    onnx.helper.set_model_props(model, dict(sorted({**kept, "magsd.precision": "int8"}.items())))
    _check(model, calibrated)
    return model


def write_int8(model: onnx.ModelProto, path: str | os.PathLike[str]) -> None:
    """Write ``model`` to ``path``."""
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def _reader(feed: dict[str, NDArray[np.float32]]) -> Any:
    """One input, as ONNX Runtime's calibration reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds = iter([feed])

        def get_next(self) -> Any:
            return next(self._feeds, None)

    return Reader()


def _trunk(
    model: onnx.ModelProto,
) -> tuple[tuple[str, ...], tuple[tuple[str, frozenset[str]], ...], dict[str, str]]:
    """Convolutions up to the last feature maps, the other nodes that go with them, and the convolutions' weights."""
    producer = {name: node for node in model.graph.node for name in node.output}
    inside: set[str] = set()
    queue = list(taps(model))
    while queue:
        name = queue.pop()
        if name in producer and name not in inside:
            inside.update(producer[name].output)
            queue.extend(producer[name].input)
    nodes = [node for node in model.graph.node if set(node.output) & inside and node.op_type in _QUANTIZED]
    layers = tuple(node.name for node in nodes if node.op_type == "Conv")
    if not layers:
        raise MagsdError("the network has no convolution that could be quantized")
    rests_on: dict[str, frozenset[str]] = {}  # by value
    others: list[tuple[str, frozenset[str]]] = []
    for node in nodes:  # in the graph's order, so that what a node is given is known before it
        if node.op_type == "Conv":
            rests_on[node.output[0]] = frozenset({node.name})
            continue
        given = node.input[:1] if node.op_type in _THROUGH else node.input
        if any(name not in rests_on for name in given):
            continue  # of an operation that is not quantized
        found = frozenset[str]().union(*(rests_on[name] for name in given))
        rests_on[node.output[0]] = found
        others.append((node.name, found))
    weights = {node.name: node.input[1] for node in nodes if node.op_type == "Conv"}
    return layers, tuple(others), weights


def _check(model: onnx.ModelProto, calibrated: Calibrated) -> None:
    """The promise of the module's first lines, read back: nothing after the last feature maps is quantized."""
    onnx.checker.check_model(model)
    names = {*calibrated.layers, *(name for name, _ in calibrated.others)}
    allowed = {name for node in calibrated.model.graph.node if node.name in names for name in node.output}
    allowed |= {name for node in calibrated.model.graph.node if node.name in names for name in node.input}
    quantized = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    # the quantizer renames the output of a node whose activation it takes away
    outside = [name for name in quantized if name not in allowed and name.removesuffix("_QuantizeLinear_Input") not in
               allowed]  # fmt: skip
    if outside or not quantized:
        what = f"{', '.join(outside[:3])} after the last feature maps" if outside else "nothing"
        raise MagsdError(f"the quantizer quantized {what}: expected the trunk; another version of ONNX Runtime?")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizer's advice, which it gives through the root logger."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
