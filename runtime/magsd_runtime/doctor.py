"""What this machine has, which backend would be used and why, what is missing and how to get it."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__, hardware
from .dicom.codecs import decodable
from .errors import RESEARCH_USE, MagsdError, UsageError
from .shipped import choose_bundle

# Shown name: distributions that bring it. Versions come from package metadata: importing some of
# these takes seconds.
_LIBRARIES: dict[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "OpenCV": (
        "opencv-python-headless",
        "opencv-python",
        "opencv-contrib-python-headless",
        "opencv-contrib-python",
    ),
    "Pillow": ("pillow",),
    "pydicom": ("pydicom",),
    "highdicom": ("highdicom",),
    "ONNX Runtime": ("onnxruntime",),
    "ONNX Runtime GPU": ("onnxruntime-gpu",),
    "TensorRT": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "TensorRT RTX": ("tensorrt-rtx", "tensorrt_rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "OpenVINO": ("openvino",),
    "torch": ("torch",),
    "timm": ("timm",),
    "onnx": ("onnx",),
}

_TRAIN = ("torch", "timm", "torchvision", "scikit-learn", "matplotlib", "pyyaml", "onnx", "onnxscript")


def examine() -> dict[str, Any]:
    """The facts, JSON-able: magsd, python, os, cpu, memory, gpu, libraries, dicom, onnxruntime, backend, backends,
    bundle, engines, missing.

    ``dicom``: by kind of transfer syntax, whether it can be decoded. ``backend``: name (None when nothing can run)
    and reason. ``backends``: of each of ONNX Runtime's for GPUs, name, whether it is possible here, as far as that can
    be known without loading its provider, and reason. ``missing``: a list of what, why and command. Nothing is raised
    because of what a machine lacks.
    """
    libraries = {name: _version(*distributions) for name, distributions in _LIBRARIES.items()}
    gpu = hardware.cuda_driver()
    providers, backend = _backend()
    bundle = _bundle()
    engines = _engines(bundle)
    if proven := [engine for engine in engines if engine["proven"]]:
        backend = {"name": "tensorrt", "reason": str(proven[0]["reason"])}
    return {
        "schema": "magsd.doctor/1",
        "magsd": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "os": _operating_system(),
        "cpu": hardware.cpu(),
        "memory": hardware.memory(),
        "gpu": gpu,
        "libraries": libraries,
        "dicom": decodable(_version),
        "onnxruntime": {"providers": providers},
        "backend": backend,
        "backends": _backends(providers, gpu),
        "bundle": bundle,
        "engines": engines,
        "missing": _missing(libraries, gpu, providers),
    }


def format_report(report: dict[str, Any]) -> str:
    """The report of :func:`examine` for people, several lines."""
    cpu, gpu, memory = report["cpu"], report["gpu"], report["memory"]
    sets = cpu["instruction_sets"]
    rows = [
        ("magsd", report["magsd"]),
        ("Python", f"{report['python']['version']}  {report['python']['executable']}"),
        ("system", report["os"]),
        (
            "CPU",
            f"{cpu['model'] or 'unknown'} ({cpu['architecture']}), {cpu['usable_cores']} of {cpu['cores']} cores",
        ),
        ("", "instruction sets: " + ("unknown" if sets is None else ", ".join(sets) or "none that matter")),
        ("memory", f"{_gib(memory['total'])}, {_gib(memory['available'])} free"),
        *_gpu_rows(gpu),
        ("providers", ", ".join(report["onnxruntime"]["providers"]) or "none"),
    ]
    for name, version in report["libraries"].items():
        rows.append((name, version or "not installed"))
    able = [name for name, can in report["dicom"].items() if can]
    rows.append(("DICOM pixels", ", ".join(able) or "none that can be decoded"))
    backend = report["backend"]
    rows.append(("backend", f"{backend['name'] or 'none'}: {backend['reason']}"))
    reasons = dict.fromkeys(item["reason"] for item in report["backends"])  # without a GPU, one for all of them
    for reason in reasons:
        names = [item["name"] for item in report["backends"] if item["reason"] == reason]
        rows.append(("", f"{', '.join(names)}: {reason}"))
    rows.append(("bundle", report["bundle"] or "none in the box, none in MAGSD_BUNDLE; name one with --bundle"))
    rows.extend(("engine", engine["reason"]) for engine in report["engines"])
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    for item in report["missing"]:
        lines.append(f"missing: {item['what']}, needed for {item['why']}")
        lines.append(f"         {item['command']}")
    if not report["missing"]:
        lines.append("nothing is missing")
    lines.append(RESEARCH_USE)
    return "\n".join(lines)


def _gpu_rows(gpu: dict[str, Any]) -> list[tuple[str, str]]:
    if not gpu["details"]:
        return [("GPU", f"none that can be used: {gpu['problem']}")]
    rows = []
    for device in gpu["details"]:
        facts = f"compute capability {device['compute_capability']}, {_gib(device['memory'])}"
        rows.append(("GPU", f"{device['name']} ({facts})"))
    rows.append(("driver", f"{gpu['version'] or 'unknown version'}, CUDA {gpu['cuda_version'] or 'unknown'}"))
    if gpu["problem"]:
        rows.append(("", gpu["problem"]))
    return rows


def _backend() -> tuple[list[str], dict[str, str | None]]:
    from .backends import choose_backend, import_onnxruntime

    try:
        providers = list(import_onnxruntime().get_available_providers())
        choice = choose_backend()
    except MagsdError as error:
        return [], {"name": None, "reason": str(error)}
    except Exception as error:  # whatever a broken installation raises, the report goes on
        return [], {"name": None, "reason": f"ONNX Runtime fails: {' '.join(str(error).split())}"}
    return providers, {"name": choice.name, "reason": choice.reason}


def _backends(providers: list[str], gpu: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of ONNX Runtime's for GPUs says here; ``providers``: none where there is no ONNX Runtime to ask."""
    if not providers:
        return []
    from .backends import import_onnxruntime
    from .backends.onnx_runtime import why_not

    found = []
    for name in ("cuda", "ort-tensorrt", "ort-rtx"):
        error = why_not(import_onnxruntime(), name)
        if not gpu["devices"]:
            reason = f"not here, {gpu['problem']}"
        else:
            reason = "nothing known is in its way; opening it shows" if error is None else str(error)
        found.append({"name": name, "possible": error is None, "reason": reason.removeprefix(f"backend {name}: ")})
    return found


def _missing(libraries: dict[str, str | None], gpu: dict[str, Any], providers: list[str]) -> list[dict[str, str]]:
    missing = []
    plain, with_cuda = libraries["ONNX Runtime"], libraries["ONNX Runtime GPU"]
    if plain and with_cuda:
        missing.append(
            {
                "what": "a sound ONNX Runtime (onnxruntime and onnxruntime-gpu overwrite each other's files)",
                "why": "running a model",
                "command": "pip uninstall -y onnxruntime onnxruntime-gpu && pip install "
                + ("'magsd[gpu]'" if gpu["devices"] else "'magsd[cpu]'"),
            }
        )
    elif gpu["devices"] and "CUDAExecutionProvider" not in providers:
        missing.append(
            {
                "what": "ONNX Runtime with CUDA",
                "why": f"inference on {gpu['devices'][0]}",
                "command": "pip uninstall -y onnxruntime && pip install 'magsd[gpu]'",
            }
        )
    elif not providers:
        missing.append(
            {
                "what": "ONNX Runtime",
                "why": "running a model",
                "command": "pip install 'magsd[cpu]'" if not plain else "pip install --force-reinstall 'magsd[cpu]'",
            }
        )
    undecodable = [name for name, can in decodable(_version).items() if not can]
    if undecodable or libraries["highdicom"] is None:
        lacking = ", ".join([*undecodable, *(["the results of --dicom-out"] if libraries["highdicom"] is None else [])])
        missing.append({"what": "parts for DICOM", "why": lacking, "command": "pip install 'magsd[dicom]'"})
    absent = [name for name in _TRAIN if _version(name) is None]
    if absent:
        missing.append(
            {
                "what": ", ".join(absent),
                "why": "training, evaluation and export",
                "command": "pip install 'magsd[train]'",
            }
        )
    return missing


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _operating_system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform()
    return f"{name}, {platform.system()} {platform.release()}"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _bundle() -> str | None:
    """The bundle that `magsd infer` would use without --bundle."""
    try:
        return choose_bundle(None)
    except UsageError:
        return None


_PROOFS = {
    "passed": "compared on this GPU",
    "failed": "magsd verify --compare found it outside its limits, auto does not choose it",
}


def _engines(bundle: str | None) -> list[dict[str, Any]]:
    """Of each engine in that bundle: ``plan``, ``fits`` this machine, ``proven`` on it, and ``reason``, a line."""
    if bundle is None or not (Path(bundle) / "engines").is_dir():
        return []
    try:
        from .bundle import load_bundle
        from .engines.passport import check_engine, read_passports, this_machine

        loaded = load_bundle(bundle, check_files=False)
        passports, broken = read_passports(loaded.path / "engines")
        machine = this_machine()
    except (MagsdError, ImportError) as error:
        return [{"plan": None, "fits": False, "proven": False, "reason": str(error)}]
    found = [{"plan": None, "fits": False, "proven": False, "reason": str(error)} for error in broken]
    for passport in passports:
        proof = _PROOFS.get(str(passport.parity.get("status")), "never compared on a GPU, auto does not choose it")
        fits, reason = True, f"{passport.plan}: may run here ({passport.title}, {passport.precision}, {proof})"
        try:
            check_engine(loaded, passport, machine)
        except MagsdError as error:
            fits, reason = False, str(error)
        found.append({"plan": passport.plan, "fits": fits, "proven": fits and passport.proven, "reason": reason})
    return found
