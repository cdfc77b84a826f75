"""magsd infer, verify and doctor: what they print, write and return."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_bundle
from magsd.cli import main
from magsd_runtime import doctor as doctor_module
from magsd_runtime import hardware, inferring_commands, shipped
from magsd_runtime.bundle import load_bundle
from magsd_runtime.errors import BundleError, UsageError
from magsd_runtime.naming import OutputNames
from magsd_runtime.verifying_commands import verify

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "export", ROOT / "runtime"])),
    "OMP_NUM_THREADS": "1",
}
ENVIRONMENT.pop("MAGSD_BUNDLE", None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle.build(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(autouse=True)
def _no_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAGSD_BUNDLE", raising=False)


@pytest.fixture
def films(tmp_path: Path, radiograph_pixels: np.ndarray) -> Path:
    """a/x.png and b/x.png (two different films), flat.png (no contrast), broken.png."""
    folder = tmp_path / "films"
    for name, pixels in (
        ("a/x.png", radiograph_pixels),
        ("b/x.png", radiograph_pixels[::-1]),
        ("flat.png", np.full((80, 80), 7, np.uint8)),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), pixels)
    (folder / "broken.png").write_bytes((folder / "a/x.png").read_bytes()[:500])
    return folder


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# --- infer ---------------------------------------------------------------------------------------


def test_json_gives_one_record_a_line_and_nothing_else(
    bundle: Path, films: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(films.rglob("*"))
    assert inferring_commands.infer([str(films), "--bundle", str(bundle), "--json"]) == 3
    lines = records(capsys.readouterr().out)
    assert [(Path(line["path"]).relative_to(films).as_posix(), line["status"]) for line in lines] == [
        ("a/x.png", "ok"),
        ("b/x.png", "ok"),
        ("broken.png", "error"),
        ("flat.png", "rejected"),
    ]
    assert all(line["research_use_only"] is True and line["files"] == {} for line in lines)
    assert lines[3]["probabilities"] is None
    assert lines[3]["reasons"][0]["code"] == "no_contrast"
    assert sorted(films.rglob("*")) == before  # without --out nothing is written


def test_people_get_an_aligned_line_a_file(bundle: Path, films: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inferring_commands.infer([str(films), "--bundle", str(bundle)]) == 3
    captured = capsys.readouterr()
    model, research, header, *rows = captured.out.splitlines()
    assert "tiny 1 on cpu" in model
    assert research == "Research use only. Not for clinical use."
    assert len(rows) == 4
    column = header.index("label")
    for row in rows[:2]:
        assert any(row[column:].startswith(name) for name in tiny_bundle.CLASSES)
        assert row.rstrip().endswith("ok")
    assert header.index("status") == rows[2].index("error: ") == rows[3].index("rejected: ")
    assert "one grey value" in rows[3]
    assert "4 images: 1 error, 2 ok, 1 rejected" in captured.err


def test_all_good_is_exit_0(bundle: Path, films: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inferring_commands.infer([str(films / "a/x.png"), "--bundle", str(bundle), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(records(captured.out)) == 1


def test_out_holds_an_overlay_and_a_record_for_each_image(
    bundle: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    arguments = [str(films), "--bundle", str(bundle), "--out", str(out), "--json"]
    assert inferring_commands.infer(arguments) == 3
    lines = records(capsys.readouterr().out)
    written = {path.name for path in out.iterdir()}
    assert len(written) == 4 + 3  # a file that cannot be read has no overlay
    assert {"broken.json", "flat.json", "flat_overlay.jpg"} <= written
    for line in lines:
        stored = json.loads(Path(line["files"]["json"]).read_text())
        assert stored == line
        if line["status"] == "ok":
            picture = cv2.imread(line["files"]["overlay"])
            assert picture is not None
            assert picture.shape[2] == 3
        assert ("overlay" in line["files"]) is (line["status"] != "error")
    # the same stems, told apart, and the same names again when only the order changes
    colliding = {line["path"]: line["files"]["json"] for line in lines if Path(line["path"]).stem == "x"}
    assert len(set(colliding.values())) == 2
    swapped = [str(films / "b" / "x.png"), str(films / "a" / "x.png"), *arguments[1:]]
    assert inferring_commands.infer(swapped) == 0
    again = {line["path"]: line["files"]["json"] for line in records(capsys.readouterr().out)}
    assert again == colliding
    assert {path.name for path in out.iterdir()} == written


def test_no_overlay_writes_records_only(bundle: Path, films: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    inferring_commands.infer([str(films / "a"), "--bundle", str(bundle), "--out", str(out), "--no-overlay"])
    assert [path.name for path in out.iterdir()] == ["x.json"]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1), max_size=6))
def test_output_names_are_unique_and_independent_of_order(stems: list[str]) -> None:
    images = list(dict.fromkeys(Path(f"{index % 2}") / f"{stem}.png" for index, stem in enumerate(stems)))
    names = dict(zip(images, OutputNames(images)))
    assert len({name.stem.casefold() for name in names.values()}) == len(images)
    assert dict(zip(images[::-1], OutputNames(images[::-1]))) == names
    assert all(len(os.fsencode(name.stem)) < 200 for name in names.values())


def test_a_very_long_name_still_has_its_files(bundle: Path, films: Path, tmp_path: Path) -> None:
    long = films / ("ü" * 125 + ".png")
    shutil.copy(films / "a" / "x.png", long)
    out = tmp_path / "out"
    assert inferring_commands.infer([str(long), "--bundle", str(bundle), "--out", str(out)]) == 0
    assert len(list(out.iterdir())) == 2


def test_an_input_is_never_overwritten(bundle: Path, films: Path) -> None:
    shutil.copy(films / "a" / "x.png", films / "a" / "x_overlay.jpg")
    content = (films / "a" / "x_overlay.jpg").read_bytes()
    with pytest.raises(UsageError, match=r"x_overlay\.jpg there is one of the images"):
        inferring_commands.infer([str(films / "a"), "--bundle", str(bundle), "--out", str(films / "b" / ".." / "a")])
    assert (films / "a" / "x_overlay.jpg").read_bytes() == content


def test_an_overlay_that_fails_stops_no_answer(
    bundle: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from magsd_runtime import overlay

    def fail(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(overlay, "save_overlay", fail)
    monkeypatch.delenv("MAGSD_TRACEBACK", raising=False)
    arguments = [str(films / "a"), str(films / "b"), "--bundle", str(bundle), "--json"]
    assert inferring_commands.infer([*arguments, "--out", str(tmp_path / "out")]) == 1
    lines = records(capsys.readouterr().out)
    assert [line["status"] for line in lines] == ["ok", "ok"]
    kept = [json.loads(Path(line["files"]["json"]).read_text()) for line in lines]
    assert {record["reasons"][0]["code"] for record in kept} == {"overlay_failed"}


def test_a_folder_that_cannot_be_written_is_one_line(bundle: Path, films: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="no folder can be made there"):
            inferring_commands.infer([str(films), "--bundle", str(bundle), "--out", str(out)])


def test_the_bundle_comes_from_the_environment_or_the_line_says_how_to_make_one(
    bundle: Path, films: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shipped, "SHIPPED", films / "none")
    for verb in (["infer", str(films / "a")], ["verify"]):
        assert main(verb) == 2
        error = capsys.readouterr().err
        assert "--bundle" in error
        assert "magsd export" in error
        assert error.count("\n") == 1
    monkeypatch.setenv("MAGSD_BUNDLE", str(bundle))
    assert main(["infer", str(films / "a")]) == 0
    assert main(["verify"]) == 0
    monkeypatch.delenv("MAGSD_BUNDLE")
    monkeypatch.setattr(shipped, "SHIPPED", bundle)
    capsys.readouterr()
    assert main(["infer", str(films / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == load_bundle(bundle).name


@pytest.mark.parametrize("arguments", [[], ["--threads", "0", "x.png"], ["--backend", "tpu", "x.png"]])
def test_wrong_arguments_are_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        inferring_commands.infer(arguments)
    assert caught.value.code == 2


def test_no_images_is_exit_2_with_a_line(
    bundle: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("x")
    assert main(["infer", str(empty), "--bundle", str(bundle)]) == 2
    assert "holds no DICOM, PNG, JPEG or TIFF image" in capsys.readouterr().err
    assert main(["infer", str(empty), str(empty), "--bundle", str(bundle)]) == 2
    capsys.readouterr()
    # beside another path it is only said
    assert main(["infer", str(empty), str(films / "a"), "--bundle", str(bundle), "--json"]) == 0
    captured = capsys.readouterr()
    assert "holds no DICOM, PNG" in captured.err
    assert len(records(captured.out)) == 1
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert main(["infer", "-", "--bundle", str(bundle)]) == 2
    assert "the list on stdin is empty" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_an_error_result_among_others(
    bundle: Path, films: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(films / "gone.png"), str(films / "a" / "x.png")]
    assert inferring_commands.infer([*paths, "--bundle", str(bundle), "--json"]) == 3
    assert [line["status"] for line in records(capsys.readouterr().out)] == ["error", "ok"]


def test_a_line_break_in_a_name_does_not_break_the_table(
    bundle: Path, films: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = films / "two\nlines\udce9.png"
    shutil.copy(films / "a" / "x.png", odd)
    assert inferring_commands.infer([str(odd), "--bundle", str(bundle)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_damaged_bundle_is_exit_4_and_a_missing_backend_6(
    bundle: Path, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    damaged = Path(shutil.copytree(bundle, tmp_path / "b"))
    content = bytearray((damaged / "model.onnx").read_bytes())
    content[100] ^= 1
    (damaged / "model.onnx").write_bytes(content)
    assert main(["infer", str(films / "a"), "--bundle", str(damaged)]) == 4
    assert "model.onnx: was altered" in capsys.readouterr().err
    assert main(["verify", str(damaged)]) == 4
    assert "model.onnx: was altered" in capsys.readouterr().err
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert main(["infer", str(films / "a"), "--bundle", str(bundle), "--backend", "cuda"]) == 6
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1


# --- as a process: pipes, signals, terminals ---------------------------------------------------------


def magsd(*arguments: str, stdin: int | None = None, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "magsd.cli", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        stdin=stdin,
        # a shell's background job ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def many(films: Path, count: int) -> bytes:
    """A list for stdin that names the same film under ``count`` paths."""
    for index in range(count):
        os.link(films / "a" / "x.png", films / f"film{index:04}.png")
    return b"".join(os.fsencode(films / f"film{index:04}.png") + b"\n" for index in range(count))


def test_each_result_is_out_before_the_next_image_is_read(
    bundle: Path, films: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from magsd_runtime.pipeline import Pipeline

    predict = Pipeline.predict
    printed: list[str] = []

    def watched(self: Pipeline, path: Path, **options: Any) -> Any:
        printed.append(capsys.readouterr().out)
        return predict(self, path, **options)

    monkeypatch.setattr(Pipeline, "predict", watched)
    inferring_commands.infer([str(films), "--bundle", str(bundle), "--json", "--jobs", "1"])
    assert [text.count("\n") for text in printed] == [0, 1, 1, 1]


def test_a_list_comes_from_stdin(bundle: Path, films: Path) -> None:
    names = many(films, 12)
    process = magsd("infer", "-", "--bundle", str(bundle), "--json", stdin=subprocess.PIPE)
    out, errors = process.communicate(names, timeout=60)
    assert process.returncode == 0
    assert [os.fsencode(line["path"]) for line in records(out.decode())] == names.splitlines()
    assert errors == b"12 images: 12 ok\n"


def test_a_closed_pipe_is_quiet(bundle: Path, films: Path) -> None:
    many(films, 200)
    process = magsd("infer", str(films), "--bundle", str(bundle), "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) == 0
    assert errors == b""


def test_ctrl_c_is_one_line_and_130(bundle: Path, films: Path) -> None:
    many(films, 600)
    process = magsd("infer", str(films), "--bundle", str(bundle), "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    reader = threading.Thread(target=process.stdout.read)
    reader.start()
    errors = process.stderr.read()
    reader.join()
    assert process.wait(60) == 130
    assert errors == b"magsd infer: interrupted\n"


@pytest.mark.parametrize(("count", "bar"), [(1, False), (3, True)])
def test_a_bar_shows_for_several_files_on_a_terminal_only(bundle: Path, films: Path, count: int, bar: bool) -> None:
    many(films, count)
    paths = [str(films / f"film{index:04}.png") for index in range(count)]
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = magsd("infer", *paths, "--bundle", str(bundle), "--json", stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            block = os.read(leader, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not block:
            break
        shown += block
    os.close(leader)
    assert process.stdout is not None
    assert len(records(process.stdout.read().decode())) == count
    assert process.wait(60) == 0
    assert (b"image/s" in shown or b"s/image" in shown or b"0/3" in shown) is bar


def test_threads_limits_opencv_too(bundle: Path, films: Path) -> None:
    code = (
        "import sys, cv2\nfrom magsd_runtime.inferring_commands import infer\n"
        "assert cv2.getNumThreads() != 3\nassert infer(sys.argv[1:]) == 0\nassert cv2.getNumThreads() == 3"
    )
    arguments = [str(films / "a"), "--bundle", str(bundle), "--threads", "3"]
    subprocess.run([sys.executable, "-c", code, *arguments], env=ENVIRONMENT, check=True, timeout=60)


# --- verify ----------------------------------------------------------------------------------------


def test_verify_passes_and_reports(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle)]) == 0
    text = capsys.readouterr().out
    assert "PASSED" in text
    assert "Research use only" in text
    assert main(["verify", str(bundle), "--json", "--backend", "cpu"]) == 0
    (record,) = records(capsys.readouterr().out)
    assert record["passed"] is True
    assert set(record["worst_differences"]) == {"logits", "attention", "evidence", "embedding"}


def test_verify_of_a_network_that_computes_something_else_is_exit_5(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another network, its checksum right: only the golden values can tell."""
    from magsd_runtime.preprocessing import PreprocessingSpec

    other = Path(shutil.copytree(bundle, tmp_path / "b"))
    tiny_bundle.write_network(other / "model.onnx", len(tiny_bundle.CLASSES), 224, seed=1)
    tiny_bundle.write_manifest(
        other, tiny_bundle.CLASSES, PreprocessingSpec(), 1.0, {"map": "attention", "threshold": 0.5}
    )
    assert main(["verify", str(other)]) == 5
    assert "TOO LARGE" in capsys.readouterr().out
    assert main(["verify", str(other), "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_verify_of_nothing_is_exit_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "none")]) == 4
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(BundleError):
        verify([str(tmp_path)])


# --- doctor ----------------------------------------------------------------------------------------


def test_doctor_reports_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    (report,) = records(capsys.readouterr().out)
    assert report["cpu"]["cores"] == os.cpu_count()
    assert report["python"]["version"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert report["libraries"]["numpy"] == np.__version__
    assert report["backend"]["name"] in ("cpu", "cuda")
    assert "CPUExecutionProvider" in report["onnxruntime"]["providers"]
    total, available = report["memory"]["total"], report["memory"]["available"]
    if total is not None and available is not None:
        assert 0 < available <= total
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "ONNX Runtime" in text
    assert "Research use only" in text


def test_doctor_without_onnx_runtime_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    version = doctor_module._version
    monkeypatch.setattr(
        doctor_module,
        "_version",
        lambda *names: None if {"onnxruntime", "torch"} & set(names) else version(*names),
    )
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "backend" in text
    assert "pip install 'magsd[cpu]'" in text
    assert "missing: torch, needed for training" in text
    assert "pip install 'magsd[train]'" in text


class FakeCuda:
    """Stands in for libcuda: the calls that hardware.py makes, with the driver API's conventions."""

    def __init__(self, code: int = 0, names: tuple[bytes, ...] = (b"NVIDIA H100 80GB HBM3",)) -> None:
        self.code, self.names = code, names

    def cuDriverGetVersion(self, pointer: Any) -> int:
        pointer._obj.value = 12080
        return 0

    def cuInit(self, flags: int) -> int:
        return self.code

    def cuDeviceGetCount(self, pointer: Any) -> int:
        pointer._obj.value = len(self.names)
        return 0

    def cuDeviceGet(self, pointer: Any, index: int) -> int:
        pointer._obj.value = index
        return 0

    def cuDeviceGetName(self, text: Any, size: int, device: Any) -> int:
        text.value = self.names[device.value]
        return 0

    def cuDeviceGetAttribute(self, pointer: Any, attribute: int, device: Any) -> int:
        pointer._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def cuDeviceTotalMem_v2(self, pointer: Any, device: Any) -> int:
        pointer._obj.value = 80 << 30
        return 0


def test_doctor_with_a_gpu_but_no_cuda_provider_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: FakeCuda())
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3 (compute capability 9.0, 80.0 GiB)" in text
    assert "CUDA 12.8" in text
    assert "pip uninstall -y onnxruntime && pip install 'magsd[gpu]'" in text


@pytest.mark.parametrize(
    ("library", "problem"),
    [
        (FakeCuda(code=100), "finds no GPU"),
        (FakeCuda(code=803), "CUDA error 803"),
        (FakeCuda(names=()), "finds no GPU"),
        (object(), "cannot be asked"),
    ],
)
def test_a_driver_that_fails_is_a_problem_and_no_crash(
    monkeypatch: pytest.MonkeyPatch, library: Any, problem: str
) -> None:
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: library)
    driver = hardware.cuda_driver()
    assert problem in driver["problem"]
    assert driver["devices"] == []


def test_a_container_limit_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal:       8388608 kB\nMemAvailable:   4194304 kB\n",
        "/sys/fs/cgroup/memory.max": "2147483648\n",
        "/sys/fs/cgroup/memory.current": "1073741824\n",
    }
    monkeypatch.setattr(hardware, "_read", files.get)
    assert hardware.memory() == {"total": 2 << 30, "available": 1 << 30}
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert hardware.memory() == {"total": 8 << 30, "available": 4 << 30}


def test_an_unknown_machine_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_read", lambda path: None)
    monkeypatch.setattr(hardware, "_sysctl", lambda name: None)
    report = doctor_module.examine()
    assert report["cpu"]["instruction_sets"] is None
    assert report["memory"] == {"total": None, "available": None}
    assert "unknown" in doctor_module.format_report(report)
