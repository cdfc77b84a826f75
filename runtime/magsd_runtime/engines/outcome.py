"""What ``magsd verify --compare`` found of an engine goes into its passport: ``auto`` takes none that failed."""

from __future__ import annotations

from datetime import datetime, timezone

from ..bundle import Bundle
from ..decision_report import DecisionReport
from ..errors import EngineError
from .passport import FOLDER, Passport, passport_path, read_passport, with_parity

REFERENCE = "fp32"
"""The only side whose comparison is kept: the bundle's own network, by its hash, on the CPU. Against INT8, or against a
checkpoint that somebody named, a difference may be the other side's."""


def record_outcome(bundle: Bundle, passport: Passport, report: DecisionReport) -> str | None:
    """Keep the outcome of comparing the engine of ``passport`` as ``decisions`` in its passport on disk.

    A failure withdraws ``passed``; only building the engine again gives it back. Returns why nothing was kept, or None.
    """
    others = [side["side"] for side in report.sides if side["side"] != "engine"]
    if others != [REFERENCE]:
        return f"{passport.plan}: the outcome is not kept, only that of --compare {REFERENCE},engine is"
    if not report.films.labelled:
        return f"{passport.plan}: the outcome is not kept, for no film was judged"
    folder = bundle.path / FOLDER
    outcome = {
        "status": "passed" if report.passed else "failed",
        "against": REFERENCE,
        "films": report.films.films,
        "judged_by_both": report.films.judged,
        "failures": report.failures[:5],
        "rules_sha256": report.rules_sha256,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    try:
        # Hours may have passed: another comparison may have failed it, or the engine may have been built again
        now = read_passport(passport_path(folder / passport.plan))
        if now.plan_sha256 != passport.plan_sha256:
            return f"{passport.plan}: the outcome is not kept, the engine was built again meanwhile"
        # A pass does not make up for parity that was never measured: that was judged in every batch size
        status = now.parity.get("status") if report.passed else "failed"
        with_parity(now, {**now.parity, "status": status, "decisions": outcome}).save(folder)
    except EngineError as error:
        return f"the outcome is not kept: {error}"
    except OSError as error:
        risk = "" if report.passed else ": auto may choose this engine, copy the bundle to a folder of your own"
        return f"{folder}: the outcome cannot be kept there ({error.strerror or error}){risk}"
    return None
