"""``magsd export`` as a user types it: what it prints where, and its exit codes."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from magsd.cli import main
from magsd_export.commands import export
from magsd_runtime.bundle import load_bundle
from magsd_runtime.errors import RESEARCH_USE, BundleError, MissingExtraError
from tiny_export import write_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    scores = {0: {"loss": 0.5, "accuracy": 0.7, "auc": 0.8}, 2: {"loss": 0.4, "accuracy": 0.8, "auc": 0.9}}
    return write_run(folder / "run", folder / "data", scores)


@pytest.fixture(scope="module")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "bundle"
    assert export([str(run), "--out", str(out), "--images", "5"]) == 0
    return out


def test_people_get_a_table_on_stdout_and_progress_on_stderr(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "bundle"), "--fold", "0", "--images", "3"]) == 0
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == f"{run} -> {tmp_path / 'bundle'}"
    for output in ("logits", "attention", "evidence", "embedding"):
        assert any(line.startswith(output) for line in lines)
    assert any("labels equal over 3 real and 14 synthetic images" in line for line in lines)
    assert any("fold 0, as asked for" in line for line in lines)
    assert any("threshold 0.5 (default, not chosen on data)" in line for line in lines)
    assert lines[-1] == RESEARCH_USE
    assert "\x1b" not in captured.out + captured.err
    steps = [line.split()[0] for line in captured.err.splitlines()]
    assert steps == ["checkpoint", "exporting", "comparing", "acceptance", "verifying"]


def test_json_is_one_object_and_the_bundle_verifies_and_infers(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    arguments = [str(run), "--out", str(out), "--name", "tiny", "--model-version", "0.3", "--images", "0", "--json"]
    assert main(["export", *arguments]) == 0
    stdout = capfd.readouterr().out
    assert stdout.count("\n") == 1
    record = json.loads(stdout)
    assert record["bundle"] == str(out)
    assert (record["model"]["name"], record["model"]["version"]) == ("tiny", "0.3")
    assert record["fold"] == 2
    assert "best validation auc of 2 folds" in record["chosen"]
    assert record["parity"]["passed"]
    assert record["parity"]["inputs"]["real"]["images"] == 0
    assert record["golden"]["passed"]
    assert record["golden"]["inputs"]
    assert record["model_bytes"] == (out / "model.onnx").stat().st_size
    assert record["research_use_only"] is True

    assert main(["verify", str(out)]) == 0
    capfd.readouterr()
    golden = str(out / "golden" / f"{record['golden']['inputs'][0]}.png")
    assert main(["infer", golden, "--bundle", str(out), "--json"]) == 0
    prediction = json.loads(capfd.readouterr().out)
    assert prediction["status"] == "ok"
    assert prediction["model"]["sha256"] == record["model"]["sha256"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{tmp}/nowhere", "--out", "{tmp}/b"], 2, "no such run or checkpoint"),
        (["{tmp}", "--out", "{tmp}/b"], 2, "is not a run of magsd train"),
        (["{run}", "--out", "{bundle}"], 2, "exists: add --force"),
        (["{run}", "--out", "{tmp}", "--force"], 2, "is no bundle"),
        (["{run}", "--out", "{tmp}/b", "--fold", "1"], 2, "has fold 0, fold 2"),
        (["{run}", "--out", "{tmp}/b", "--name", "../x"], 2, "--name is"),
        (["{run}", "--out", "{tmp}/b", "--data", "{tmp}/none.csv"], 2, "none.csv"),
        (["{run}", "--out", "{tmp}/b", "--evaluation", "{tmp}"], 2, "no metrics.json there"),
        (["{tmp}/broken.pt", "--out", "{tmp}/b"], 4, "damaged"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    run: Path,
    bundle: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "broken.pt").write_bytes((run / "fold0" / "best.pt").read_bytes()[:3000])
    filled = [text.format(run=run, tmp=tmp_path, bundle=bundle) for text in arguments]
    assert main(["export", *filled]) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    assert message in captured.err
    last = captured.err.splitlines()[-1]
    assert last.startswith("magsd export: ")
    assert "Traceback" not in captured.err
    assert not (tmp_path / "b").exists()


def test_failed_parity_is_exit_5_without_a_bundle(
    run: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The ONNX file of another fold's network in place of this one's."""
    import magsd_export.bundling as bundling

    def other_network(_model: Any, _spec: Any, path: Path, _metadata: Any, **_: Any) -> None:
        shutil.copy(bundle / "model.onnx", path)

    monkeypatch.setattr(bundling, "export_onnx", other_network)
    assert main(["export", str(run), "--fold", "0", "--out", str(tmp_path / "b")]) == 5
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "parity failed: logits differs" in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["torch", "onnxscript", "onnxruntime"])
def test_a_missing_extra_names_the_install_command(
    missing: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingExtraError, match=rf"{missing}, .*pip install 'magsd\[train\]'"):
        export([str(run), "--out", str(tmp_path / "b")])


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom magsd.cli import main\n"
        "try:\n    main(['export', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'cv2', 'timm'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "export", "runtime"))
    process = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert "RUN|CHECKPOINT" in process.stdout
    assert "Research use only" in process.stdout


@pytest.mark.slow
@pytest.mark.data
def test_parity_over_real_radiographs(cxr: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        str(run),
        "--out",
        str(tmp_path / "b"),
        "--data",
        str(cxr / "dataset_a.csv"),
        "--images",
        "40",
        "--json",
    ]
    assert main(["export", *arguments]) == 0
    real = json.loads(capfd.readouterr().out)["parity"]["inputs"]["real"]
    assert real["images"] + real["skipped"] == 40
    assert real["skipped"] == 0
    assert real["source"] == "the manifest given (--data)"


# --precision fp16


@pytest.fixture(scope="module")
def halved(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half") / "bundle"
    assert export([str(bundle), "--out", str(out), "--precision", "fp16"]) == 0
    return out


def test_verify_compares_a_bundle_with_the_checkpoint_that_it_was_made_from(
    run: Path, bundle: Path, halved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(run.parent / "data" / "manifest.csv"), "--limit", "8", "--threads", "1", "--json"]
    arguments = ["verify", str(bundle), "--compare", "torch,fp32", *data, "--run"]
    assert main([*arguments, str(run / "fold2")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["first"] == {"side": "torch", "backend": "torch", "device": "cpu", "precision": "fp32"}
    assert record["films"]["judged_by_both"] > 0
    assert record["films"]["label_flips"] == 0
    assert main([*arguments, str(run / "fold0")]) == 5  # another fold's weights
    assert json.loads(capsys.readouterr().out)["failures"]
    assert main([*arguments, str(tmp_path / "none")]) == 2
    assert "no such run or checkpoint" in capsys.readouterr().err
    assert main(["verify", str(bundle), "--compare", "fp32,fp16-rounded"]) == 6
    assert "fp16-rounded: " in (message := capsys.readouterr().err)
    assert "has no network in fp16: magsd export" in message
    assert main(["verify", str(halved), "--compare", "fp32,fp16-rounded", *data]) == 0
    assert json.loads(capsys.readouterr().out)["films"]["label_flips"] == 0


def test_precision_fp16_adds_a_proven_network_to_a_run_s_bundle(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert main(["export", str(run), "--out", str(out), "--images", "4", "--precision", "fp16", "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    facts = record["precisions"]["fp16"]
    assert facts["model_sha256"] == record["model"]["sha256"]
    assert facts["file"] == "model.fp16.onnx"
    assert facts["verification"]["passed"]
    # the inputs of the float32 check
    assert facts["verification"]["inputs"]["real"] == record["parity"]["inputs"]["real"]
    assert facts["verification"]["inputs"]["real"]["images"] == 4
    manifest = json.loads((out / "bundle.json").read_text())
    assert manifest["precisions"] == record["precisions"]
    assert manifest["files"]["model.fp16.onnx"]["sha256"] == facts["sha256"]
    assert manifest["files"]["model.fp16.onnx"]["size"] < 0.75 * manifest["files"]["model.onnx"]["size"]
    path, sha256 = load_bundle(out).onnx_file("fp16")
    assert (path, sha256) == (out / "model.fp16.onnx", facts["sha256"])
    assert main(["verify", str(out)]) == 0


def test_a_bundle_gets_its_half_precision_network_and_keeps_the_rest(
    bundle: Path, halved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, after = (json.loads((folder / "bundle.json").read_text()) for folder in (bundle, halved))
    added = after["files"].pop("model.fp16.onnx")
    assert after.pop("precisions")["fp16"]["sha256"] == added["sha256"]
    assert after == before
    with pytest.raises(BundleError, match=r"no network in fp16: magsd export .* --precision fp16"):
        load_bundle(bundle).onnx_file("fp16")
    # its own bundle replaced by one with it
    assert main(["export", str(halved), "--out", str(halved), "--precision", "fp16", "--force"]) == 0
    out = capfd.readouterr().out
    assert "model.fp16.onnx" in out
    assert out.splitlines()[-1] == RESEARCH_USE
    assert load_bundle(halved).onnx_file("fp16")[1] == added["sha256"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{bundle}", "--out", "{tmp}/b"], "is a bundle already: --precision fp16 or int8 adds"),
        (["{bundle}", "--out", "{tmp}/b", "--precision", "fp16", "--fold", "1"], "--fold goes with a run"),
        (["{bundle}", "--out", "{bundle}", "--precision", "fp16"], "exists: add --force"),
        (["{bundle}", "--out", "{tmp}/b", "--precision", "fp16", "--data", "{tmp}/none.csv"], "none.csv"),
    ],
)
def test_what_a_bundle_cannot_be_exported_with(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["export", *(text.format(bundle=bundle, tmp=tmp_path) for text in arguments)]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "b").exists()


def test_half_precision_that_differs_leaves_no_bundle(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import magsd_export.precision as precision

    monkeypatch.setattr(
        precision, "FP16_TOLERANCES", {name: precision.FP16_TOLERANCES[name]._replace(absolute=1e-9, relative=1e-9)
                                       for name in precision.FP16_TOLERANCES},
    )  # fmt: skip
    assert main(["export", str(bundle), "--out", str(tmp_path / "b"), "--precision", "fp16"]) == 5
    assert "from ONNX for input" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda manifest: manifest.pop("precisions"), "name different networks"),
        (lambda manifest: manifest["files"].pop("model.fp16.onnx"), "name different networks"),
        (lambda manifest: manifest["precisions"]["fp16"].update(model_sha256="0" * 64), "not described as made from"),
        (lambda manifest: manifest["precisions"]["fp16"].update(sha256="0" * 64), "not described as made from"),
        (lambda manifest: manifest.update(precisions=[]), "name different networks"),
    ],
)
def test_a_half_precision_network_without_its_description_is_refused(
    halved: Path, tmp_path: Path, spoil: Any, message: str
) -> None:
    shutil.copytree(halved, tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "bundle.json").read_text())
    spoil(manifest)
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        load_bundle(tmp_path / "b")


def test_one_wrong_byte_of_the_half_precision_network_is_found(halved: Path, tmp_path: Path) -> None:
    shutil.copytree(halved, tmp_path / "b")
    content = bytearray((tmp_path / "b" / "model.fp16.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "b" / "model.fp16.onnx").write_bytes(bytes(content))
    with pytest.raises(BundleError, match=r"model\.fp16\.onnx: was altered"):
        load_bundle(tmp_path / "b")
