"""Every error that magsd raises on purpose, and the exit code the command line gives it.

MagsdError                        1  a fault of ours, if nothing below fits
├── UsageError                    2  wrong arguments or a wrong configuration
│   ├── DataError                 2  a manifest, class folder or fold file that cannot be used
│   │   └── CalibrationError      2  cases that probabilities cannot be calibrated on
│   └── MissingExtraError         2  an optional part is not installed
├── ImageError                    3  one input cannot be read as a radiograph
├── ArtefactError                 4  an artefact is damaged, incompatible or of a newer version
│   ├── BundleError               4
│   ├── CheckpointError           4
│   ├── EngineBuildError          4  a network that no engine can be built from
│   └── EngineError               4  an engine or its passport is missing, damaged or of another network
│       └── EngineMismatchError   4  an engine that was built for another machine than this
├── VerificationError             5  a check of outputs against their reference failed
└── BackendUnavailableError       6  the backend asked for cannot run here

A message is one line: what is wrong, what was found, what to do.
"""

from __future__ import annotations

import importlib
from types import ModuleType

RESEARCH_USE = "Research use only. Not for clinical use."


class MagsdError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(MagsdError):
    """The caller asked for something that cannot be done as asked."""

    exit_code = 2


class DataError(UsageError):
    """A manifest, class folder or fold file that training or evaluation cannot use."""


class CalibrationError(DataError):
    """Cases that probabilities cannot be calibrated on: too few, a class missing, or no temperature is best."""


class MissingExtraError(UsageError):
    """An optional dependency is not installed; the message names the install command."""


class ImageError(MagsdError):
    """A file that cannot be read as a radiograph."""

    exit_code = 3


class ArtefactError(MagsdError):
    """A bundle, checkpoint or engine that is damaged, incompatible or of a newer version."""

    exit_code = 4


class BundleError(ArtefactError):
    """A bundle that is incomplete, altered or made for another version."""


class CheckpointError(ArtefactError):
    """A checkpoint that cannot be loaded or does not fit the run."""


class EngineBuildError(ArtefactError):
    """No engine can be built from a network; ``log`` holds what the library said, a line each."""

    def __init__(self, message: str, log: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.log = log


class EngineError(ArtefactError):
    """An engine or its passport that is missing, damaged, or of another network than the bundle's."""


class EngineMismatchError(EngineError):
    """An engine that was built for another GPU, driver, library or platform than this machine's."""


class VerificationError(MagsdError):
    """Outputs differ from their reference by more than the tolerance."""

    exit_code = 5


class BackendUnavailableError(MagsdError):
    """The backend asked for by name cannot run on this machine."""

    exit_code = 6


def require(module: str, *, feature: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Raises
    ------
    MissingExtraError
        If ``module`` is not installed. A module that is installed but fails to import
        raises its own error: hiding it would hide the reason.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"{feature} needs {error.name}, which is not installed: pip install 'magsd[{extra}]'"
        ) from error
