"""What this machine is, asked of the operating system and the GPU driver.

What cannot be found out is None: an unknown machine must not stop anything.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Instruction sets that change how fast a network runs on a CPU, in the names of /proc/cpuinfo.
_INSTRUCTION_SETS = {
    "AVX2": "avx2",
    "FMA": "fma",
    "F16C": "f16c",
    "AVX-512": "avx512f",
    "AVX-512 VNNI": "avx512_vnni",
    "AVX VNNI": "avx_vnni",
    "AVX-512 BF16": "avx512_bf16",
    "AMX INT8": "amx_int8",
    "NEON": "asimd",
    "NEON dot product": "asimddp",
    "I8MM": "i8mm",
    "SVE": "sve",
}


def cpu() -> dict[str, Any]:
    """``model``, ``architecture``, ``cores`` (of the machine), ``usable_cores`` (by this process),
    ``instruction_sets`` (of those that matter here; None where unknown)."""
    text = _read("/proc/cpuinfo")
    flags: set[str] | None = None
    model = None
    if text is not None:
        match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
        flags = set(match.group(1).split()) if match else None
        match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.*)$", text, re.MULTILINE)
        model = match.group(1).strip() if match else None
    elif sys.platform == "darwin":
        model = _sysctl("machdep.cpu.brand_string")
    return {
        "model": model or platform.processor() or None,
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "instruction_sets": None
        if flags is None
        else [name for name, flag in _INSTRUCTION_SETS.items() if flag in flags],
    }


def usable_cores() -> int:
    """CPU cores that this process may use, at least 1: by its affinity, and by a container's quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, _cpu_quotas())]))


def memory() -> dict[str, int | None]:
    """``total`` and ``available`` bytes of main memory; a container's limit counts as the total."""
    total = available = None
    text = _read("/proc/meminfo")
    if text is not None:
        values = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
        total, available = values.get("MemTotal"), values.get("MemAvailable")
        limit, used = _container_memory()
        if limit is not None and total is not None and limit < total:
            total = limit
            if available is not None and used is not None:
                available = max(0, min(available, limit - used))
    elif sys.platform == "darwin":
        size = _sysctl("hw.memsize")
        total = int(size) if size and size.isdecimal() else None
    return {"total": total, "available": available}


def cuda_driver() -> dict[str, Any]:
    """The NVIDIA driver, asked through its own library, without creating a context on a GPU.

    ``version`` of the driver, ``cuda_version`` that it supports (major.minor), ``devices`` (names),
    ``details`` (per device: name, compute_capability, memory bytes), ``problem`` (one clause, None
    when all is well).
    """
    found: dict[str, Any] = {
        "version": _kernel_driver_version(),
        "cuda_version": None,
        "devices": [],
        "details": [],
        "problem": None,
    }
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError:
        found["problem"] = f"there is no NVIDIA driver ({name} was not found)"
        return found
    try:
        _ask_driver(library, found)
    except (AttributeError, ctypes.ArgumentError) as error:  # a library of that name that is not the driver's
        found["problem"] = f"the NVIDIA driver cannot be asked ({error})"
    return found


def _ask_driver(library: Any, found: dict[str, Any]) -> None:
    value = ctypes.c_int(0)
    if library.cuDriverGetVersion(ctypes.byref(value)) == 0 and value.value > 0:
        found["cuda_version"] = f"{value.value // 1000}.{value.value % 1000 // 10}"
    code = library.cuInit(0)
    if code == 0:
        code = library.cuDeviceGetCount(ctypes.byref(value))
    if code != 0:
        # 100: CUDA_ERROR_NO_DEVICE (also with CUDA_VISIBLE_DEVICES empty)
        reason = "finds no GPU" if code == 100 else f"cannot start (CUDA error {code})"
        found["problem"] = f"the NVIDIA driver {reason}"
        return
    count = value.value
    for index in range(count):
        device = ctypes.c_int(0)
        text = ctypes.create_string_buffer(256)
        size = ctypes.c_size_t(0)
        if library.cuDeviceGet(ctypes.byref(device), index) or library.cuDeviceGetName(text, 256, device):
            found["problem"] = f"the NVIDIA driver does not open GPU {index}"
            continue
        capability = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            capability.append(str(value.value))
        known = library.cuDeviceTotalMem_v2(ctypes.byref(size), device) == 0
        gpu = text.value.decode("utf-8", "replace")
        found["devices"].append(gpu)
        found["details"].append(
            {
                "name": gpu,
                "compute_capability": ".".join(capability),
                "memory": size.value if known else None,
            }
        )
    if count == 0:
        found["problem"] = "the NVIDIA driver finds no GPU"


def _kernel_driver_version() -> str | None:
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", _read("/proc/driver/nvidia/version") or "")
    return match.group(1) if match else None


def _container_memory() -> tuple[int | None, int | None]:
    """Limit and use of this container in bytes (cgroup 2, then 1)."""
    for limit_path, used_path in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, used = (_read(limit_path) or "").strip(), (_read(used_path) or "").strip()
        if limit.isdecimal():
            return int(limit), int(used) if used.isdecimal() else None
    return None, None


def _cpu_quotas(groups: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> Iterator[float]:
    """Cores' worth of time that each control group around this process allows, where it sets a limit (cgroup 1, 2)."""
    for line in (_read(groups) or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = Path(root, "cpu") if controllers else Path(root)
        folder = top / path.lstrip("/")
        # Within a container the path may be the host's: what is mounted at the top are then the container's own limits
        for place in (folder, *(parent for parent in folder.parents if parent.is_relative_to(top))):
            if controllers:
                text = f"{_read(f'{place}/cpu.cfs_quota_us') or ''} {_read(f'{place}/cpu.cfs_period_us') or ''}"
            else:
                text = _read(f"{place}/cpu.max") or ""
            if re.fullmatch(r"\d+\s+0*[1-9]\d*\s*", text):
                quota, period = map(int, text.split())
                yield quota / period


def _sysctl(name: str) -> str | None:
    import subprocess

    try:
        answer = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
