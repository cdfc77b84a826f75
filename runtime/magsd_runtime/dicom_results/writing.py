"""All DICOM results of one film: built first, written after, so that a folder never holds half of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MagsdError, UsageError, require
from ..files import path_text, replacing
from ..prediction import Reason
from .case import KINDS, Case, Kind, make_case
from .source import now, quiet, read_source

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..pipeline import Result


def require_parts() -> None:
    """Say at the start, not after the first film, that something is not installed.

    Raises
    ------
    MissingExtraError
        If pydicom or highdicom is missing.
    """
    for module in ("pydicom", "highdicom"):
        require(module, feature="--dicom-out", extra="dicom")


def add_results(folder: str | os.PathLike[str], path: str | os.PathLike[str], result: Result, bundle: Bundle) -> Result:
    """:func:`write_results`, noted in the prediction: the files by kind, or a reason why there are none.

    The prediction stands either way. Codes: ``no_dicom_results`` (the file is not DICOM or its header does not
    do, or the folder cannot be written), ``dicom_failed`` (a fault of magsd).
    """
    prediction = result.prediction
    try:
        written = write_results(folder, path, result, bundle)
    except UsageError as error:
        reason = Reason("no_dicom_results", f"no DICOM results: {error}")
    except OSError as error:
        reason = Reason("no_dicom_results", f"no DICOM results: the folder cannot be written ({error.strerror})")
    except MagsdError as error:
        reason = Reason("dicom_failed", f"no DICOM results: {error}")
    except MemoryError:
        reason = Reason("dicom_failed", "no DICOM results: not enough memory, close other programs")
    else:
        names = {kind.replace("-", "_"): path_text(file) for kind, file in written.items()}
        return replace(result, prediction=replace(prediction, files={**prediction.files, **names}))
    return replace(result, prediction=replace(prediction, reasons=(*prediction.reasons, reason)))


def write_results(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    result: Result,
    bundle: Bundle,
    *,
    when: datetime | None = None,
) -> dict[Kind, Path]:
    """Write what there is to say about the DICOM film at ``path`` into ``folder``: file by kind.

    A judged film gets an overlay, a report, an attention map and, if it is grey and has regions, a presentation
    state; a rejected one the overlay alone, which says why. A result with status ``error`` gets nothing.
    Names hold the objects' own UIDs only. A rerun replaces its files, and removes those that it has no use for.

    Raises
    ------
    UsageError
        If the file is not DICOM, or its header does not do.
    MagsdError
        If an object could not be made: a fault of magsd. The line quotes nothing of the header.
    OSError
        If the folder cannot be written.
    """
    if result.prediction.status == "error" or result.radiograph is None:
        return {}
    source = read_source(path)
    with quiet(), _without_quotes("results"):
        case = make_case(source, result, bundle, when or now(source))
        datasets = build_results(case)
        return _write(Path(folder), case, datasets)


def build_results(case: Case) -> dict[Kind, Any]:
    """The objects in memory, by kind.

    Raises
    ------
    MagsdError
        As :func:`write_results`.
    """
    from .parametric_map import parametric_map
    from .presentation_state import presentation_state
    from .secondary_capture import secondary_capture
    from .structured_report import structured_report

    builders: dict[Kind, Callable[[Case], Any]] = {"secondary-capture": secondary_capture}
    if case.prediction.label is not None:
        builders["structured-report"] = structured_report
        builders["parametric-map"] = parametric_map
        if case.prediction.findings and case.source.is_monochrome():
            builders["presentation-state"] = presentation_state
    datasets = {}
    for kind, build in builders.items():
        with _without_quotes(kind):
            datasets[kind] = build(case)
    return datasets


@contextmanager
def _without_quotes(what: str) -> Iterator[None]:
    """The libraries' messages quote the header's values: of their errors only the type is told."""
    try:
        yield
    except (MagsdError, MemoryError, OSError):
        raise
    except Exception as error:
        if os.environ.get("MAGSD_TRACEBACK"):
            raise
        message = f"the {what} could not be made ({type(error).__name__}; MAGSD_TRACEBACK=1 shows where)"
        raise MagsdError(message) from None


def file_name(case: Case, kind: Kind) -> str:
    return f"{kind}-{case.origin.uid('instance', kind)}.dcm"


def _write(folder: Path, case: Case, datasets: dict[Kind, Any]) -> dict[Kind, Path]:
    written: dict[Kind, Path] = {kind: folder / file_name(case, kind) for kind in KINDS if kind in datasets}
    # All under temporary names first; they get their own one after the other when the last is complete
    with ExitStack() as stack:
        for kind, target in written.items():
            temporary = stack.enter_context(replacing(target))
            with _without_quotes(kind):
                datasets[kind].save_as(temporary, enforce_file_format=True)
    for kind in KINDS:
        if kind not in datasets:
            (folder / file_name(case, kind)).unlink(missing_ok=True)
    return written
