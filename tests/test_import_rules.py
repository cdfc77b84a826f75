"""The runtime stays light: no torch, nothing of the layers above it, and nothing heavy in magsd --help.

Every check runs in a fresh process, because this one has imported nearly everything already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import tiny_bundle

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = ROOT / "runtime" / "magsd_runtime"
MODULES = sorted(
    ".".join(("magsd_runtime", *path.relative_to(RUNTIME).with_suffix("").parts)).removesuffix(".__init__")
    for path in RUNTIME.rglob("*.py")
)
FORBIDDEN = (
    "torch",
    "torchvision",
    "timm",
    "magsd_export",
    "sklearn",
    "matplotlib",
    "scipy",
    "pandas",
    "onnx",
)
HEAVY = ("numpy", "cv2", "PIL", "onnxruntime", "tqdm", "magsd.commands", "magsd_runtime.commands")


def loaded(code: str, *arguments: str) -> set[str]:
    """Names of all modules that a fresh process has loaded after ``code``."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "export", ROOT / "runtime"])),
    }
    environment.pop("MAGSD_BUNDLE", None)
    program = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    process = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    return set(json.loads(process.stderr.splitlines()[-1]))


def test_the_runtime_has_the_modules_that_the_rules_are_about() -> None:
    assert {"magsd_runtime.pipeline", "magsd_runtime.backends.onnx_runtime", "magsd_runtime"} <= set(MODULES)


def test_every_runtime_module_imports_without_the_layers_above_it() -> None:
    modules = loaded("import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)", *MODULES)
    assert not modules & {*FORBIDDEN, "magsd", "onnxruntime", "tensorrt", "tensorrt_rtx", "openvino", "pydicom"}
    assert set(MODULES) <= modules


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    modules = loaded("from magsd.cli import main\nassert main(sys.argv[1:]) == 0", *arguments)
    assert not modules & {*FORBIDDEN, *HEAVY}


@pytest.mark.parametrize("verb", ["infer", "verify", "calibrate", "doctor", "engine"])
def test_help_of_a_runtime_verb_loads_nothing_heavy(verb: str) -> None:
    code = """
from magsd.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code == 0
"""
    modules = loaded(code, verb, "--help")
    assert not modules & ({*FORBIDDEN, *HEAVY} - {"magsd_runtime.commands"})


def test_infer_and_verify_load_no_torch(tmp_path: Path, radiograph_pixels: np.ndarray) -> None:
    bundle = tiny_bundle.build(tmp_path / "bundle")
    film = tmp_path / "film.png"
    cv2.imwrite(str(film), radiograph_pixels)
    run = "from magsd.cli import main\nassert main(sys.argv[1:]) == 0"
    out = tmp_path / "out"
    modules = loaded(run, "infer", str(film), "--bundle", str(bundle), "--json", "--out", str(out))
    assert "onnxruntime" in modules
    assert not modules & {*FORBIDDEN, "magsd.commands", "magsd.training"}
    modules = loaded(run, "infer", str(film), "--bundle", str(bundle), "--json")
    assert not modules & {*FORBIDDEN, "tqdm", "magsd_runtime.overlay", "magsd_runtime.doctor", "pydicom"}
    # one PNG needs one of Pillow's plugins
    assert {name for name in modules if name.startswith("PIL.") and name.endswith("ImagePlugin")} == {
        "PIL.PngImagePlugin"
    }
    assert not loaded(run, "verify", str(bundle)) & set(FORBIDDEN)


def test_doctor_loads_no_library_that_it_only_reports() -> None:
    modules = loaded("from magsd.cli import main\nassert main(sys.argv[1:]) == 0", "doctor", "--json")
    assert not modules & {*FORBIDDEN, "cv2", "PIL", "tensorrt", "openvino", "pydicom"}
