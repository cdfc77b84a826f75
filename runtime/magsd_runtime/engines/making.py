"""A bundle's network becomes an engine in its folder ``engines``: built, compared if there is a GPU, then written.

    engines/nvidia-geforce-rtx-3060-sm86-trt10.13.3.9-fp16.engine   the plan, as TensorRT gave it
    engines/nvidia-geforce-rtx-3060-sm86-trt10.13.3.9-fp16.json     its passport

They are not listed in ``bundle.json``: an engine belongs to a device, a bundle does not, and the passport holds the
hashes that bind the two.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._version import __version__
from ..bundle import Bundle
from ..errors import BackendUnavailableError, MagsdError, MissingExtraError, UsageError, VerificationError
from ..files import replacing
from ..parity import BEYOND_RANGE, TOLERANCES_OF, Network, Outputs, compare, hostile_inputs
from .building import PRECISIONS, Plan, Profile, build_plan, can_target
from .library import Library, find_library
from .passport import FOLDER, NOT_MEASURED, Machine, Passport, engine_name, this_machine

_CAPABILITY = "expected major.minor, such as 8.6"


@dataclass(frozen=True)
class Engine:
    """A finished engine and the file that holds it; ``plan`` also has what the library said."""

    path: Path
    passport: Passport
    plan: Plan


def make_engine(
    bundle: Bundle,
    *,
    precision: str = "fp16",
    profile: Profile | None = None,
    library: str = "auto",
    compute_capability: str | None = None,
    workspace: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Engine:
    """Build an engine of ``bundle`` for the GPU that is here, or with TensorRT-RTX for ``compute_capability``.

    ``profile``: batch sizes, by default 1:1:8. ``workspace``: most bytes of scratch memory while building and running.
    An engine of the same name is replaced.

    Raises
    ------
    UsageError, MissingExtraError
        If an argument cannot be used, or no library is installed.
    BackendUnavailableError
        If the library cannot be loaded, or needs a GPU that is not there.
    BundleError
        If the bundle has no network of that precision.
    EngineBuildError
        If no engine can be built; its ``log`` is what the library said.
    VerificationError
        If the engine's outputs differ from those of the bundle by more than its precision may. Nothing is written.
    """
    profile = Profile(1, 1, 8) if profile is None else profile
    if precision not in PRECISIONS:
        raise UsageError(f"--precision is {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if workspace is not None and workspace < 1 << 20:
        raise UsageError(f"the workspace is {workspace} bytes: expected a MiB or more")
    onnx_file, onnx_sha256 = bundle.onnx_file(precision)
    machine = this_machine()
    chosen = find_library(library, gpu=machine.gpu is not None)
    target = _target(chosen, compute_capability, machine)
    built_for_here = machine.gpu is not None and target == machine.compute_capability
    if chosen.is_rtx and (not built_for_here or can_target(chosen, target)):
        named: str | None = target
    else:
        named = None  # a GPU that the library cannot name: it is left to judge what is here

    folder = bundle.path / FOLDER
    cache_file = folder / f"{engine_name(machine.gpu, target, chosen.name, chosen.version, 'timing')[:-7]}.cache"
    report(f"building    {onnx_file.name} with {chosen.title} for compute capability {target}, batches {profile}")
    plan = build_plan(
        chosen,
        onnx_file,
        precision=precision,
        profile=profile,
        size=bundle.preprocessing.size,
        compute_capability=named,
        workspace=workspace,
        timing_cache=_read_cache(cache_file),
    )
    report(f"built       {len(plan.content) / 1e6:.1f} MB in {plan.seconds:.1f} s")
    if built_for_here:
        report("comparing   its outputs on this GPU with the bundle's")
        parity = measure_parity(bundle, chosen, plan.content, precision, profile)
    else:
        reason = machine.problem or f"the GPU here has compute capability {machine.compute_capability}"
        parity = {"status": NOT_MEASURED, "reason": f"built without the GPU that it is for: {reason}"}
    name = engine_name(machine.gpu if built_for_here else None, target, chosen.name, chosen.version, precision)
    passport = Passport(
        plan=name,
        plan_sha256=hashlib.sha256(plan.content).hexdigest(),
        plan_size=len(plan.content),
        model=f"{bundle.name} {bundle.version}",
        model_sha256=bundle.model_sha256,
        onnx=onnx_file.name,
        onnx_sha256=onnx_sha256,
        precision=precision,
        layers=plan.layers,
        profile=str(profile),
        library=chosen.name,
        library_version=chosen.version,
        compute_capability=target,
        system=machine.system,
        gpu=machine.gpu if built_for_here else None,
        driver=machine.driver if built_for_here else None,
        workspace=workspace,
        build_seconds=round(plan.seconds, 3),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        magsd_version=__version__,
        parity=parity,
        warnings=plan.messages.warnings()[:20],
    )
    return Engine(_write(folder, passport, plan, cache_file), passport, plan)


def measure_parity(
    bundle: Bundle, library: Library, content: bytes, precision: str, profile: Profile
) -> dict[str, Any]:
    """Run a plan on this GPU and compare its outputs, on golden and hostile inputs, with float32 on the CPU.

    Without ONNX Runtime, with the golden outputs that are in the bundle.

    Raises
    ------
    VerificationError
        If they differ by more than ``precision`` may.
    MagsdError
        If the plan does not run.
    """
    from ..backends import CheckedBackend, open_backend
    from ..backends.tensorrt_engine import TensorRTBackend

    size = bundle.preprocessing.size
    golden, wanted = _golden(bundle)
    hostile: dict[str, NDArray[np.float32]] = {}
    with contextlib.ExitStack() as stack:
        try:
            reference = stack.enter_context(open_backend(bundle, "cpu")).run
        except (MissingExtraError, BackendUnavailableError):
            reference, what = _from_golden(wanted), "the bundle's golden outputs (no ONNX Runtime here)"
        else:
            what = "ONNX, float32, CPU"
            hostile = {name: image for name, image in hostile_inputs(size).items() if name not in BEYOND_RANGE}
        inner = TensorRTBackend(content, library, precision=precision, size=size, profile=profile)
        backend = stack.enter_context(CheckedBackend(inner, bundle, "the engine just built"))
        report = compare(
            reference, backend.run, size=size, real=golden, hostile=hostile, tolerances=TOLERANCES_OF[precision],
            facts={"source": "golden inputs of the bundle"},
        )  # fmt: skip
    report = replace(report, reference=what)
    try:
        report.raise_if_failed()
    except VerificationError as error:
        raise VerificationError(f"the engine is not kept: {error}") from error
    return {"status": "passed", **report.to_dict()}


def _target(library: Library, asked: str | None, machine: Machine) -> str:
    if asked is not None and not (asked.count(".") == 1 and asked.replace(".", "").isdecimal()):
        raise UsageError(f"--compute-capability is {asked!r}: {_CAPABILITY}")
    if not library.is_rtx:
        if machine.gpu is None:
            raise BackendUnavailableError(
                f"{library.title} builds only on the GPU that will run the engine, and {machine.problem}; TensorRT-RTX "
                "builds without one: pip install 'magsd[tensorrt-rtx]', then --trt rtx --compute-capability 8.6"
            )
        if asked not in (None, machine.compute_capability):
            raise UsageError(
                f"--compute-capability {asked}: {library.title} builds for the GPU that is here, {machine.gpu} "
                f"({machine.compute_capability}); --trt rtx builds for others"
            )
    if asked is None and machine.compute_capability is None:
        raise UsageError(
            f"{machine.problem}: name the GPU that will run the engine by --compute-capability, such as 8.6 (its "
            "magsd doctor says it)"
        )
    return asked or str(machine.compute_capability)


def _write(folder: Path, passport: Passport, plan: Plan, cache_file: Path) -> Path:
    """The plan first: one without a passport is never opened."""
    path = folder / passport.plan
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(plan.content)
        passport.save(folder)
        if plan.timing_cache:
            with replacing(cache_file) as temporary:
                temporary.write_bytes(plan.timing_cache)
    except OSError as error:
        raise UsageError(
            f"{folder}: an engine cannot be written there ({error.strerror or error}): copy the bundle to a folder of "
            "your own first"
        ) from error
    return path


def _read_cache(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _golden(bundle: Bundle) -> tuple[list[tuple[str, NDArray[np.float32]]], dict[bytes, Outputs]]:
    """The golden inputs, preprocessed, and the outputs that the bundle expects for each of them."""
    from ..verification import golden_input, read_expected

    expected, arrays = read_expected(bundle)
    images: list[tuple[str, NDArray[np.float32]]] = []
    wanted: dict[bytes, Outputs] = {}
    for name in expected:
        image = golden_input(bundle, name)
        images.append((f"golden input {name}", image))
        outputs = {key.partition("/")[2]: values for key, values in arrays.items() if key.partition("/")[0] == name}
        wanted[image.tobytes()] = outputs
    return images, wanted


def _from_golden(wanted: dict[bytes, Outputs]) -> Network:
    """A network that knows the golden inputs by heart."""

    def run(images: NDArray[np.float32]) -> Outputs:
        if len(images) != 1 or images[0].tobytes() not in wanted:
            raise MagsdError("the bundle has no expected outputs for this input")
        outputs = wanted[images[0].tobytes()]
        # with the batch axis, or without it
        return {name: values if values.ndim == _RANKS[name] else values[None] for name, values in outputs.items()}

    return run


_RANKS = {"logits": 2, "attention": 4, "evidence": 3, "embedding": 2}
