"""An ONNX file becomes a plan: one path for TensorRT 10.3 to 11 and TensorRT-RTX.

The network is strongly typed: its precision is that of the graph, in every version. TensorRT 11 has no other way, and
with the old one, a flag that allows half precision, builders of other projects came to give float32 engines with no
more than a warning. Here the types of the parsed layers are counted, and a half-precision engine without a layer in
half precision is an error.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import INPUT_NAME, OUTPUT_NAMES
from ..errors import UsageError
from .library import Library, Messages

LARGEST_BATCH = 4096
PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True)
class Profile:
    """Batch sizes that an engine accepts, ``minimum`` to ``maximum``, and the one that it is tuned for."""

    minimum: int = 1
    optimum: int = 1
    maximum: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum <= LARGEST_BATCH:
            raise UsageError(
                f"--batch is {self}: expected MIN:OPT:MAX, ascending, from 1 to {LARGEST_BATCH}, such as 1:8:32"
            )

    @classmethod
    def parse(cls, text: str) -> Profile:
        """``1:8:32`` -> Profile(1, 8, 32).

        Raises
        ------
        UsageError
            If it is not three ascending whole numbers.
        """
        parts = text.split(":")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise UsageError(f"--batch is {text!r}: expected MIN:OPT:MAX, such as 1:8:32")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.minimum}:{self.optimum}:{self.maximum}"


@dataclass(frozen=True)
class Plan:
    """A built plan. ``layers``: how many layer outputs of each type the parsed network has, before fusion."""

    content: bytes
    layers: dict[str, int]
    seconds: float
    timing_cache: bytes
    messages: Messages


def build_plan(
    library: Library,
    onnx_file: Path,
    *,
    precision: str,
    profile: Profile | None,
    size: int,
    compute_capability: str | None = None,
    workspace: int | None = None,
    timing_cache: bytes = b"",
) -> Plan:
    """Parse ``onnx_file`` and build its plan.

    ``precision``: fp32 or fp16, what the graph must be in. ``profile``: its batch sizes; None adds no profile, which
    a network with a free batch size cannot be built without. ``size``: S of the input (N, 1, S, S).
    ``compute_capability``: as ``"8.6"``, for TensorRT-RTX, which then builds for that GPU, without one if need be;
    None builds for the GPU that is here. ``workspace``: most bytes of scratch memory, None for the library's default.
    ``timing_cache``: of an earlier build with the same TensorRT and GPU; one that does not fit is left.

    Raises
    ------
    UsageError
        If the library knows no GPU of that compute capability.
    EngineBuildError
        If the file cannot be parsed or built, or is not in ``precision``; with the library's messages.
    """
    trt, said = library.module, Messages(library)
    builder = _builder(library, said)
    # 10: without it the types of the graph are wishes; 11 and RTX ignore it
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, said.logger)
    if not parser.parse_from_file(str(onnx_file)):
        raise said.build_error(f"{onnx_file}: {library.title} cannot parse it ({_parse_failure(parser, said)})")
    layers = layer_types(network)
    _check_network(network, trt, onnx_file, precision, layers, size, said)

    config = builder.create_builder_config()
    # TF32 keeps 10 bits of the mantissa: not the float32 that the bundle was verified with
    config.clear_flag(trt.BuilderFlag.TF32)
    if profile is not None:
        shapes = builder.create_optimization_profile()
        shapes.set_shape(
            INPUT_NAME, *((batch, 1, size, size) for batch in (profile.minimum, profile.optimum, profile.maximum))
        )
        if config.add_optimization_profile(shapes) < 0:
            raise said.build_error(f"{library.title} refuses the batch sizes {profile} ({said.first_error()})")
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if compute_capability is not None and library.is_rtx:
        _set_target(config, trt, compute_capability, library)
    cache = None if library.is_rtx else _set_timing_cache(config, timing_cache)

    begin = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - begin
    if plan is None:
        raise said.build_error(f"{onnx_file}: {library.title} cannot build an engine of it ({said.first_error()})")
    kept = b"" if cache is None else bytes(cache.serialize())
    return Plan(bytes(plan), layers, seconds, kept, said)


def layer_types(network: Any) -> dict[str, int]:
    """Types of all layers' outputs in a parsed network, ``{"HALF": 95, ...}``, most frequent first."""
    counts: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output in range(layer.num_outputs):
            counts[str(layer.get_output(output).dtype).rpartition(".")[2]] += 1
    return dict(counts.most_common())


def can_target(library: Library, compute_capability: str) -> bool:
    """Whether TensorRT-RTX builds for GPUs of this compute capability by name."""
    known = getattr(library.module, "ComputeCapability", None)
    return hasattr(known, f"SM{compute_capability.replace('.', '')}")


def _parse_failure(parser: Any, said: Messages) -> str:
    """The parser's first error, with the operator that it stopped at."""
    if not parser.num_errors:
        return said.first_error()
    error = parser.get_error(0)
    reason = " ".join(str(error.desc()).split())[:300]
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    return f"operator {operator} {error.node_name()}: {reason}" if operator else reason


def _builder(library: Library, said: Messages) -> Any:
    try:
        builder = library.module.Builder(said.logger)
    except (TypeError, RuntimeError) as error:  # the binding's word for a null pointer
        raise said.build_error(f"{library.title} has no builder here ({said.first_error()})") from error
    if builder is None:
        raise said.build_error(f"{library.title} has no builder here ({said.first_error()})")
    return builder


def _check_network(
    network: Any, trt: Any, onnx_file: Path, precision: str, layers: dict[str, int], size: int, said: Messages
) -> None:
    halves = layers.get("HALF", 0)
    found = ", ".join(f"{count} {name}" for name, count in layers.items()) or "no layer at all"
    if precision == "fp16" and not halves:
        raise said.build_error(f"{onnx_file}: fp16 was asked for, and no layer is in half precision ({found})")
    if precision == "fp32" and halves:
        raise said.build_error(f"{onnx_file}: fp32 was asked for, and layers are in half precision ({found})")
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    outputs = {network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)}
    shape = tuple(inputs[INPUT_NAME].shape) if INPUT_NAME in inputs else None
    if list(inputs) != [INPUT_NAME] or shape != (-1, 1, size, size) or not set(outputs) >= set(OUTPUT_NAMES):
        raise said.build_error(
            f"{onnx_file}: has inputs {list(inputs)} {shape} and outputs {list(outputs)}, expected "
            f"[{INPUT_NAME!r}] (-1, 1, {size}, {size}) and {list(OUTPUT_NAMES)}: export the bundle again"
        )
    for tensor in (*inputs.values(), *outputs.values()):
        if tensor.dtype != trt.DataType.FLOAT:
            raise said.build_error(f"{onnx_file}: {tensor.name} is {tensor.dtype}: expected float32 in and out")


def _set_target(config: Any, trt: Any, compute_capability: str, library: Library) -> None:
    if not can_target(library, compute_capability):
        names = [name[2:] for name in dir(trt.ComputeCapability) if name[:2] == "SM" and name[2:].isdecimal()]
        known = [f"{name[:-1]}.{name[-1]}" for name in sorted(names, key=int)]
        raise UsageError(f"--compute-capability is {compute_capability}: {library.title} builds for {', '.join(known)}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{compute_capability.replace('.', '')}"), 0)


def _set_timing_cache(config: Any, content: bytes) -> Any:
    """The cache of kernel timings that a build reads and fills; one of another TensorRT or GPU is not taken."""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        if cache is not None and not config.set_timing_cache(cache, False):
            return None
    return cache
