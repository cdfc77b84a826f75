"""What ``magsd verify --compare fp32,engine`` leaves in an engine's passport, on a machine of stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from engine_trial import A_GPU, an_engine, bundle, halved, on_the_gpu
from magsd_runtime.backends import CheckedBackend, open_backend, tensorrt_engine
from magsd_runtime.bundle import Bundle
from magsd_runtime.decision_parity import ALLOWED, Totals
from magsd_runtime.decision_report import DecisionReport
from magsd_runtime.engines import outcome
from magsd_runtime.engines.outcome import record_outcome
from magsd_runtime.engines.passport import Passport, passport_path, read_passport, with_parity

__all__ = ["an_engine", "bundle", "halved", "on_the_gpu"]  # fixtures


def report(first: str = "fp32", *, flips: int = 0, labelled: int = 50) -> DecisionReport:
    """50 films, of which the label of ``flips`` differs."""
    sides = [{"side": name, "backend": name, "device": "x", "precision": "fp32"} for name in (first, "engine")]
    totals = Totals(films=50, judged=labelled, labelled=labelled, flips=flips)
    return DecisionReport(
        bundle="a bundle", model_sha256="0" * 64, rules_sha256="1" * 64, sides=(sides[0], sides[1]),
        allowed=ALLOWED["fp16"], source="films.csv", films=totals, files=Totals(), inputs=(),
    )  # fmt: skip


def kept(bundle: Bundle, engine: Passport) -> Passport:
    return read_passport(passport_path(bundle.path / "engines" / engine.plan))


@pytest.fixture
def auto(bundle: Bundle, on_the_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """The name of the backend that ``auto`` opens; an engine that may run is opened by a stand-in."""
    monkeypatch.setattr(tensorrt_engine, "this_machine", lambda: A_GPU)

    class Opened:
        name, device, precision = "tensorrt", "cuda:0", "fp16"

        def close(self) -> None: ...

    monkeypatch.setattr(tensorrt_engine, "open_engine", lambda *_: cast(Any, Opened()))

    def chosen() -> str:
        backend: CheckedBackend
        with open_backend(bundle, "auto", threads=1) as backend:
            return backend.name

    return chosen


def test_auto_does_not_choose_an_engine_that_failed(
    bundle: Bundle, an_engine: Passport, auto: Callable[[], str]
) -> None:
    assert auto() == "tensorrt"
    assert record_outcome(bundle, an_engine, report()) is None
    decisions = kept(bundle, an_engine).parity["decisions"]
    assert (decisions["status"], decisions["against"], decisions["films"]) == ("passed", "fp32", 50)
    assert auto() == "tensorrt"
    assert record_outcome(bundle, an_engine, report(flips=5)) is None
    failed = kept(bundle, an_engine)
    assert failed.parity["status"] == failed.parity["decisions"]["status"] == "failed"
    assert failed.parity["decisions"]["failures"] == ["labels agree on 0.9000 of 50 films, 0.99 is needed"]
    assert auto() == "cpu"
    # a later pass, by one who read the passport before it failed, takes nothing back
    assert record_outcome(bundle, an_engine, report()) is None
    assert auto() == "cpu"


@pytest.mark.parametrize("other", ["int8", "torch", "fp16", "cuda"])
def test_what_may_be_the_other_side_s_fault_is_not_held_against_the_engine(
    bundle: Bundle, an_engine: Passport, auto: Callable[[], str], other: str
) -> None:
    note = record_outcome(bundle, an_engine, report(other, flips=50))
    assert note == f"{an_engine.plan}: the outcome is not kept, only that of --compare fp32,engine is"
    assert kept(bundle, an_engine) == an_engine
    assert auto() == "tensorrt"


def test_where_no_film_was_judged_nothing_is_kept(bundle: Bundle, an_engine: Passport) -> None:
    nothing = report(labelled=0)
    assert not nothing.passed
    assert "no film was judged" in str(record_outcome(bundle, an_engine, nothing))
    assert kept(bundle, an_engine) == an_engine


def test_a_pass_does_not_make_up_for_parity_that_was_never_measured(bundle: Bundle, an_engine: Passport) -> None:
    never = with_parity(an_engine, {"status": "not measured"})
    never.save(bundle.path / "engines")
    assert record_outcome(bundle, never, report()) is None
    assert kept(bundle, an_engine).parity["decisions"]["status"] == "passed"
    assert not kept(bundle, an_engine).proven


def test_an_engine_that_was_built_again_meanwhile_keeps_its_passport(bundle: Bundle, an_engine: Passport) -> None:
    newer = replace(an_engine, plan_sha256="2" * 64)
    newer.save(bundle.path / "engines")
    assert "was built again meanwhile" in str(record_outcome(bundle, an_engine, report(flips=5)))
    assert kept(bundle, an_engine) == newer


def test_a_passport_that_cannot_be_written_is_a_line_and_stays_as_it_was(
    bundle: Bundle, an_engine: Passport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Passport, folder: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outcome.Passport, "save", full)
    note = str(record_outcome(bundle, an_engine, report(flips=5)))
    assert "cannot be kept there (No space left on device): auto may choose this engine" in note
    assert "auto may choose" not in str(record_outcome(bundle, an_engine, report()))
    assert kept(bundle, an_engine) == an_engine
    passport_path(bundle.path / "engines" / an_engine.plan).write_text("{}")
    assert "the outcome is not kept: " in str(record_outcome(bundle, an_engine, report()))
