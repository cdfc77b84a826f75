"""TensorRT or TensorRT-RTX: finding one that is installed, and hearing what it says.

TensorRT (10.3 to below 12) runs on every NVIDIA GPU and builds only on the GPU that will run the plan.
TensorRT-RTX runs on RTX GPUs and builds anywhere, without a GPU too.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import deque
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

from ..errors import BackendUnavailableError, EngineBuildError, MissingExtraError, UsageError

LIBRARIES = ("auto", "tensorrt", "rtx")
# Choice: module, name for people, pip extra, lowest version and the first that is too new
_KNOWN = {
    "tensorrt": ("tensorrt", "TensorRT", "tensorrt", (10, 3), (12,)),
    "rtx": ("tensorrt_rtx", "TensorRT-RTX", "tensorrt-rtx", (1, 2), (2,)),
}
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
    "tensorrt_rtx": (
        "tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12",
        "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings",
    ),
}  # fmt: skip
_KEPT_MESSAGES = 50_000


@dataclass(frozen=True)
class Library:
    """An imported library. ``name``: tensorrt or tensorrt_rtx, as it is imported."""

    name: str
    version: str
    module: Any

    @property
    def is_rtx(self) -> bool:
        return self.name == "tensorrt_rtx"

    @property
    def title(self) -> str:
        return f"{'TensorRT-RTX' if self.is_rtx else 'TensorRT'} {self.version}"


def find_library(choice: str = "auto", *, gpu: bool) -> Library:
    """Import the library that ``choice`` (auto, tensorrt, rtx) names; auto prefers TensorRT where there is a ``gpu``.

    Raises
    ------
    UsageError
        If there is no choice of that name.
    MissingExtraError
        If it, or with auto each of them, is not installed.
    BackendUnavailableError
        If it is installed and cannot be loaded, or is of a version that is not supported.
    """
    if choice not in LIBRARIES:
        raise UsageError(f"--trt is {choice!r}: expected one of {', '.join(LIBRARIES)}")
    if choice != "auto":
        found = _load(choice)
        if isinstance(found, Library):
            return found
        if found is None:
            _, title, extra, _, _ = _KNOWN[choice]
            raise MissingExtraError(f"{title} is not installed: pip install 'magsd[{extra}]'{_jetson(choice)}")
        raise BackendUnavailableError(found)
    problems = []
    for candidate in ("tensorrt", "rtx") if gpu else ("rtx", "tensorrt"):
        found = _load(candidate)
        if isinstance(found, Library):
            return found
        if found is not None:
            problems.append(found)
    if problems:
        raise BackendUnavailableError("; ".join(problems))
    raise MissingExtraError(
        "an engine needs TensorRT or TensorRT-RTX, and neither is installed: pip install 'magsd[tensorrt]' on the "
        "GPU that will run it, or 'magsd[tensorrt-rtx]' for RTX GPUs (builds without a GPU too)" + _jetson("tensorrt")
    )


def installed_version(name: str) -> str | None:
    """Version of the library ``name`` (tensorrt, tensorrt_rtx), None where it is not there or cannot be used.

    From its package's facts, without importing it; only one that came without such facts, unpacked into a folder, is
    imported and asked.
    """
    for distribution in _DISTRIBUTIONS.get(name, ()):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    choice = next((choice for choice, known in _KNOWN.items() if known[0] == name), None)
    if choice is None or (name not in sys.modules and importlib.util.find_spec(name) is None):
        return None
    found = _load(choice)
    return found.version if isinstance(found, Library) else None


def version_numbers(version: str) -> tuple[int, ...]:
    """``"10.3.0.26"`` -> (10, 3, 0, 26); stops at the first part that is no number."""
    numbers = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


class Messages:
    """What a library said, in order, the last 50,000 messages of it; :attr:`logger` is what it is given.

    Every call of TensorRT tells of a failure by None or False and a message here, so whoever calls it raises with
    these. A library's own logger would print to stdout, where the results of a command belong.
    """

    def __init__(self, library: Library) -> None:
        self.said: deque[tuple[str, str]] = deque(maxlen=_KEPT_MESSAGES)
        said = self.said

        class Logger(library.module.ILogger):
            def __init__(self) -> None:
                library.module.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:  # called with these names
                said.append((str(severity).rpartition(".")[2], " ".join(str(msg).split())))

        self.logger = Logger()

    def lines(self, *, verbose: bool = False) -> tuple[str, ...]:
        """``SEVERITY: text`` of each message; those of severity VERBOSE only if ``verbose``."""
        return tuple(f"{severity}: {text}" for severity, text in self.said if verbose or severity != "VERBOSE")

    def first_error(self) -> str:
        """The first error's text, where most often the cause is, or what stands in for it."""
        errors = [text for severity, text in self.said if "ERROR" in severity]
        return errors[0] if errors else "the library gave no reason"

    def warnings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text for severity, text in self.said if severity == "WARNING"))

    def build_error(self, message: str) -> EngineBuildError:
        return EngineBuildError(message, self.lines())


def _load(choice: str) -> Library | str | None:
    """The library; None where it is not installed; else the reason why it cannot be used."""
    name, title, extra, lowest, above = _KNOWN[choice]
    try:
        module: ModuleType = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        return f"{title} is installed incompletely ({error}): pip install --force-reinstall 'magsd[{extra}]'"
    except Exception as error:  # a missing library, an unfit driver: whatever its import raises
        reason = " ".join(str(error).split())[:200]
        return f"{title} is installed and cannot be loaded ({reason}): pip install --force-reinstall 'magsd[{extra}]'"
    version = str(getattr(module, "__version__", ""))
    numbers = version_numbers(version)
    if not hasattr(module, "Builder") or not numbers:
        return f"{title} is installed incompletely: pip install --force-reinstall 'magsd[{extra}]'"
    if not lowest <= numbers < above:
        wanted = f"{'.'.join(map(str, lowest))} or newer, below {'.'.join(map(str, above))}"
        return f"{title} {version} is installed, and {wanted} is supported: pip install 'magsd[{extra}]'"
    return Library(name, version, module)


def _jetson(choice: str) -> str:
    if choice != "tensorrt":
        return ""
    return "; on a Jetson it comes with JetPack: make the virtual environment with --system-site-packages"
