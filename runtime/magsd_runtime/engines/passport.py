"""The passport: a JSON file beside each plan that says what it was built from, by what, and for which machine.

The plan stays as the library gave it, so that every other tool reads it. A plan is opened only after its passport was
compared with what is here: the standard library's call crashes the process where there is no driver, refuses a plan of
another version with a log line, and runs one of another GPU model of the same kind, slower and unproven.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .. import fields as checked
from ..bundle import Bundle
from ..errors import BackendUnavailableError, EngineError, EngineMismatchError, MissingExtraError
from ..files import sha256_file, write_json
from .library import installed_version

PASSPORT_SCHEMA = "magsd.engine/1"
FOLDER = "engines"
NOT_MEASURED = "not measured"

_TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


@dataclass(frozen=True)
class Machine:
    """What decides whether an engine runs here. ``gpu``, ``compute_capability``, ``driver``: None without a GPU."""

    system: str
    gpu: str | None
    compute_capability: str | None
    driver: str | None
    problem: str | None


@dataclass(frozen=True)
class Passport:
    """A plan's passport. ``gpu`` and ``driver`` are None where it was built without a GPU.

    ``library``: tensorrt or tensorrt_rtx. ``onnx_sha256``: of the file that it was built from, ``model_sha256`` of the
    bundle's ``model.onnx``. ``profile``: its batch sizes, as 1:8:32. ``layers``: how many layer outputs of each type
    the parsed network had. ``workspace``: bytes, None for the library's default. ``parity``: ``{"status": "passed" |
    "not measured", ...}``, what was measured on the GPU when it was built.
    """

    plan: str
    plan_sha256: str
    plan_size: int
    model: str
    model_sha256: str
    onnx: str
    onnx_sha256: str
    precision: str
    layers: dict[str, int]
    profile: str
    library: str
    library_version: str
    compute_capability: str
    system: str
    gpu: str | None
    driver: str | None
    workspace: int | None
    build_seconds: float
    created: str
    magsd_version: str
    parity: dict[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def proven(self) -> bool:
        """Whether its outputs were compared on the GPU that it was built for, and agreed."""
        return self.parity.get("status") == "passed"

    @property
    def title(self) -> str:
        return f"{_TITLES[self.library]} {self.library_version}"

    def to_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"schema": PASSPORT_SCHEMA}
        facts.update({field.name: getattr(self, field.name) for field in fields(self)})
        facts["warnings"] = list(self.warnings)
        facts["passport_sha256"] = _digest(facts)
        return facts

    def save(self, folder: Path) -> Path:
        """Write it beside the plan in ``folder``, and return its path."""
        path = passport_path(folder / self.plan)
        write_json(path, self.to_dict())
        return path


def passport_path(plan: Path) -> Path:
    return plan.with_suffix(".json")


def engine_name(machine_name: str | None, compute_capability: str, library: str, version: str, precision: str) -> str:
    """``nvidia-geforce-rtx-3060-sm86-rtx1.7.1.116-fp16.engine``; ``any`` where it was built without a GPU."""
    gpu = re.sub(r"[^a-z0-9]+", "-", (machine_name or "any").lower()).strip("-") or "gpu"
    short = "rtx" if library == "tensorrt_rtx" else "trt"
    return f"{gpu}-sm{compute_capability.replace('.', '')}-{short}{version}-{precision}.engine"


def read_passport(path: Path) -> Passport:
    """Read the passport at ``path``.

    Raises
    ------
    EngineError
        If it cannot be read, was altered, or is of a newer version.
    """
    remedy = "delete it and build the engine again (magsd engine)"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EngineError(f"{path}: there is no passport beside this plan: {remedy}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{path}: the engine's passport cannot be read ({error}): {remedy}") from error
    if not isinstance(facts, dict):
        raise EngineError(f"{path}: is no engine's passport: {remedy}")
    if facts.get("schema") != PASSPORT_SCHEMA:
        raise EngineError(f"{path}: schema is {facts.get('schema')!r}, expected {PASSPORT_SCHEMA!r}: {remedy}")
    given = facts.pop("passport_sha256", None)
    try:
        if given != _digest(facts):
            raise checked.Unusable("was altered: passport_sha256 is not its hash")
        return _parse(facts)
    except checked.Unusable as error:
        raise EngineError(f"{path}: {error}: {remedy}") from error


def read_passports(folder: Path) -> tuple[tuple[Passport, ...], tuple[EngineError, ...]]:
    """All passports in a bundle's ``engines`` folder by name, and what is wrong with those that cannot be read."""
    found, broken = [], []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            found.append(read_passport(path))
        except EngineError as error:
            broken.append(error)
    return tuple(found), tuple(broken)


def this_machine() -> Machine:
    """The first GPU that the driver shows, asked without a context and without loading any TensorRT."""
    from ..hardware import cuda_driver

    driver = cuda_driver()
    system = f"{platform.system()} {platform.machine()}"
    if not driver["details"]:
        return Machine(system, None, None, None, driver["problem"] or "the NVIDIA driver finds no GPU")
    first = driver["details"][0]
    # Jetsons name no driver version in /proc: there the CUDA version of the driver has to do
    version = driver["version"] or f"CUDA {driver['cuda_version']}"
    return Machine(system, first["name"], first["compute_capability"], version, None)


def rebuild_command(passport: Passport, bundle: Bundle) -> str:
    """The command that builds this engine anew for the machine it is typed on."""
    choice = "rtx" if passport.library == "tensorrt_rtx" else "tensorrt"
    return f"magsd engine {bundle.path} --precision {passport.precision} --batch {passport.profile} --trt {choice}"


def differences(passport: Passport, machine: Machine, version: str | None) -> tuple[str, ...]:
    """How this machine differs from the one of ``passport``, a clause each; ``version``: of its library, here."""
    found = []
    if version != passport.library_version:
        found.append(f"{_TITLES[passport.library]} {version} is here, it was built with {passport.library_version}")
    pairs = (
        ("the platform", passport.system, machine.system),
        ("the GPU's compute capability", passport.compute_capability, machine.compute_capability),
        ("the GPU", passport.gpu, machine.gpu),
        ("the driver", passport.driver, machine.driver),
    )
    # what was built without a GPU names none, and no driver
    found.extend(f"{what} is {here}, it was built for {then}" for what, then, here in pairs if then not in (None, here))
    return tuple(found)


def check_engine(bundle: Bundle, passport: Passport, machine: Machine | None = None) -> Path:
    """Everything that can be known before the plan is opened; returns the plan's path.

    Raises
    ------
    EngineError
        If the engine is of another network than the bundle's, or its plan is missing or damaged.
    MissingExtraError
        If its library is not installed.
    BackendUnavailableError
        If there is no driver or no GPU.
    EngineMismatchError
        If library, platform, GPU or driver are others than those of the passport; the line names all of them.
    """
    remedy = f"build it again: {rebuild_command(passport, bundle)}"
    plan = bundle.path / FOLDER / passport.plan
    _, onnx_sha256 = bundle.onnx_file(passport.precision)
    if (passport.onnx_sha256, passport.model_sha256) != (onnx_sha256, bundle.model_sha256):
        raise EngineError(f"{plan}: was built from another network than the bundle's {passport.onnx}: {remedy}")
    version = installed_version(passport.library)
    if version is None:
        raise MissingExtraError(
            f"{plan}: needs {passport.title}, which is not installed: pip install 'magsd[{_EXTRAS[passport.library]}]'"
        )
    machine = this_machine() if machine is None else machine
    if machine.gpu is None:
        raise BackendUnavailableError(
            f"{plan}: cannot run here, {machine.problem}: --backend cpu works without a GPU, magsd doctor says more"
        )
    if found := differences(passport, machine, version):
        raise EngineMismatchError(f"{plan}: is not for this machine ({'; '.join(found)}): {remedy}")
    try:
        if plan.stat().st_size != passport.plan_size or sha256_file(plan) != passport.plan_sha256:
            raise EngineError(f"{plan}: is damaged, its sha256 is not the one in its passport: {remedy}")
    except OSError as error:
        raise EngineError(f"{plan}: cannot be read ({error.strerror}): {remedy}") from error
    return plan


def with_parity(passport: Passport, parity: dict[str, Any]) -> Passport:
    return replace(passport, parity=parity)


def _parse(facts: dict[str, Any]) -> Passport:
    kinds: dict[str, Any] = {
        "build_seconds": (int, float), "layers": dict, "parity": dict, "plan_size": int, "warnings": list,
        "workspace": (int, type(None)), "gpu": (str, type(None)), "driver": (str, type(None)),
    }  # fmt: skip
    values = {field.name: checked.field(facts, field.name, kinds.get(field.name, str)) for field in fields(Passport)}
    for name in ("plan_sha256", "model_sha256", "onnx_sha256"):
        checked.sha256(values, name)
    if Path(values["plan"]).name != values["plan"] or not values["plan"].endswith(".engine"):
        raise checked.Unusable(f"plan is {values['plan']!r}, expected the name of an .engine file beside it")
    if values["library"] not in _TITLES:
        raise checked.Unusable(f"library is {values['library']!r}, expected one of {', '.join(_TITLES)}")
    _plain_texts(values["warnings"], "warnings")
    return Passport(**{**values, "warnings": tuple(values["warnings"])})


def _plain_texts(values: Sequence[Any], name: str) -> None:
    if not all(isinstance(value, str) for value in values):
        raise checked.Unusable(f"{name} holds something that is no text")


def _digest(facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
