"""The command line as a process: help, exit codes, one line an error, and what it must not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from magsd import cli


def run(*arguments: str, **keywords: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "magsd.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **keywords)  # type: ignore[call-overload]


def test_help_names_every_verb_and_the_limits_of_use() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(f"  {verb} " in done.stdout for verb in cli.VERBS)
    assert "Research use only" in done.stdout


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_has_help_that_imports_nothing_heavy(verb: str) -> None:
    script = (
        "import sys; from magsd import cli\n"
        f"try:\n    cli.main([{verb!r}, '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'onnxruntime', 'matplotlib', 'sklearn', 'timm', 'scipy', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"magsd {verb}" in done.stdout


def test_infer_ends_at_once_and_says_all(tmp_path: Path) -> None:
    """``os._exit`` flushes nothing: the lines before it and the exit code must be out, into a pipe and a file."""
    (tmp_path / "no.png").write_bytes(b"no picture")
    (tmp_path / "no2.png").write_bytes(b"")
    done = run("infer", str(tmp_path), "--json")
    assert done.returncode == 3
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["error", "error"]
    assert done.stderr == "2 images: 2 error\n"
    with open(tmp_path / "out", "w") as out:
        again = subprocess.run([sys.executable, "-m", "magsd.cli", "infer", str(tmp_path), "--json"], stdout=out)
    assert again.returncode == 3
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["error", "error"]


def test_an_unknown_command_and_a_wrong_option_are_usage_errors() -> None:
    assert run("diagnose").returncode == 2
    assert "unknown command 'diagnose'" in run("diagnose").stderr
    assert run("train", "--nonsense").returncode == 2
    done = run("train", "--out", "x", "--epochs", "none", "--data", "d")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--epochs is 'none'" in done.stderr


def test_a_missing_extra_is_one_line_with_the_install_command() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from magsd import cli; sys.exit(cli.main(['train', '--data', 'x', '--out', 'y']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install 'magsd[train]'" in done.stderr


def test_a_fault_of_ours_is_one_line_and_exit_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(cli.VERBS, "break", ("builtins:int", "breaks"))
    assert cli.main(["break"]) == 1  # int([]) raises TypeError
    assert capsys.readouterr().err.startswith("magsd break: a fault of magsd: TypeError")


def test_a_manifest_that_is_missing(tmp_path: Path) -> None:
    done = run("train", "--data", str(tmp_path / "no.csv"), "--out", str(tmp_path / "run"), "--weights", "none")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no.csv" in done.stderr


def test_a_closed_pipe_is_quiet() -> None:
    done = subprocess.run(
        f"{sys.executable} -m magsd.cli --help | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
