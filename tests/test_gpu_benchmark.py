"""``benchmarks/gpu.py``: without a GPU it says so, and its dry run executes all that a CPU can.

What else it does on a GPU runs here on the CPU or on a stand-in for the driver, so that no line of it is met first
where there is little time; what it then says is thrown away.
"""

from __future__ import annotations

import json
import math
import os
import tarfile
import textwrap
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

import gpu as benchmark
from engine_trial import A_GPU, GpuLibrary, bundle, gpu, halved, needs_rtx
from gpu_parts import engine, floors, half, training
from gpu_parts.bringing import bring
from gpu_parts.context import NOT_MEASURED, OUT_OF_TIME, Context, command, milliseconds, ratio, script, spread
from magsd.models import ImageNetClassifier, MANet
from magsd_runtime.bundle import Bundle, load_bundle
from magsd_runtime.engines.building import Profile
from magsd_runtime.engines.making import make_engine

__all__ = ["bundle", "gpu", "halved"]  # fixtures of engine_trial


def context(out: Path, seconds: float = 60, *, dry: bool = True, **settings: Any) -> Context:
    return Context(torch.device("cpu"), out, out / "m.csv", time.monotonic() + seconds, dry=dry, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 6
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_a_dry_run_calls_everything_once_and_takes_no_time(tmp_path: Path) -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    found = milliseconds(context(tmp_path), calls, pairs={"b over a": ("b", "a")})
    assert called == ["a", "b"]
    assert found == {"a": NOT_MEASURED, "b": NOT_MEASURED, "b over a": NOT_MEASURED}


def test_ratios_are_of_rounds_and_percentiles_of_calls(tmp_path: Path) -> None:
    assert ratio([2.0, 4.0, 30.0], [1.0, 1.0, 10.0]) == {"ratio": 3.0, "ratio_quartiles": [2.5, 3.5]}
    times = [float(value) for value in range(1, 201)]
    assert spread(times) == {"ms": 100.5, "p90_ms": 180.0, "p99_ms": 198.0, "calls": 200}
    assert "p99_ms" not in spread(times[:99])  # of fewer calls it would be the longest one
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    found = milliseconds(context(tmp_path, dry=False), calls, seconds=0.0, pairs={"pair": ("b", "a")}, warmup=1)
    assert called == ["a", "b"] * 11  # warmed up, then at least ten rounds of turns
    assert found["a"]["ratio"] == 1.0
    assert set(found["pair"]) == {"ratio", "ratio_quartiles"}


def test_an_attempt_that_fails_is_kept_beside_the_others(tmp_path: Path) -> None:
    used = context(tmp_path, result=tmp_path / "part.json")
    assert used.attempt(used.found, "first", lambda: {"value": math.inf})  # JSON knows no infinity
    assert not used.attempt(used.found, "second", lambda: 1 / 0)
    used.deadline = 0.0
    assert not used.attempt(used.found, "third", lambda: 1)
    assert json.loads((tmp_path / "part.json").read_text()) == {
        "first": {"value": "inf"},
        "second": {"failed": "ZeroDivisionError: division by zero"},
        "third": {"skipped": OUT_OF_TIME},
    }


def test_a_command_that_fails_says_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"magsd verify ended with 4: magsd verify: .*no such folder"):
        command("verify", tmp_path / "none")
    assert "usage: magsd" in command("--help")


def test_a_script_is_stopped_when_time_is_up() -> None:
    code, said = script(2, "-c", "import time; print('begun', flush=True); time.sleep(60)")
    assert (code, said.strip()) == (124, "begun")


def test_time_is_shared_out_by_importance() -> None:
    assert benchmark.schedule(["engine"], 100) == [("engine", 100)]
    ends = [end for _, end in benchmark.schedule(list(benchmark.PARTS), 540)]
    assert ends == sorted(ends)
    assert ends[-1] == pytest.approx(540)
    assert ends[0] == pytest.approx(540 * 0.38)


def test_a_part_that_crashes_or_hangs_leaves_what_it_had_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segmentation fault in a library, and a call that never returns: neither takes the others along."""
    program = tmp_path / "part.py"
    program.write_text(
        textwrap.dedent("""
        import json, os, signal, sys, time
        from pathlib import Path
        name, result = (sys.argv[sys.argv.index(option) + 1] for option in ("--part", "--result"))
        Path(result).write_text(json.dumps({"before": name}))
        if name == "engine":
            print("as if a library had crashed", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "ratios":
            (Path(result).parent / "pid").write_text(str(os.getpid()))
            time.sleep(600)
    """)
    )
    monkeypatch.setattr(benchmark, "__file__", str(program))
    monkeypatch.setattr(benchmark, "GRACE", 0.0)
    target = tmp_path / "gpu.json"
    (tmp_path / "m.csv").write_text("path,label,patient\n")
    arguments = ["--dry-run", "--out", str(tmp_path), "--data", str(tmp_path / "m.csv"), "--json", str(target)]
    assert benchmark.main([*arguments, "--only", "engine,step,ratios", "--minutes", "0.05"]) == 1
    results = json.loads(target.read_text())
    assert results["what"] == "a dry run: checks on a CPU, nothing is measured"
    assert results["gpu"] is None
    parts = results["parts"]
    assert parts["engine"] == {"before": "engine", "failed": "its process ended with -11: as if a library had crashed"}
    assert parts["step"] == {"before": "step"}  # and no seconds: a dry run has no figures
    assert parts["ratios"] == {"before": "ratios", "stopped": OUT_OF_TIME}
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    with pytest.raises(SystemExit):
        benchmark.main(["--dry-run", "--only", "nothing"])


def test_the_summary_names_what_failed_and_what_decides() -> None:
    parts = {"engine": {"resnet50": {"torch,engine": {"passed": True}}, "shipped": {"fp16": {"failed": "why"}}}}
    said = benchmark.summary({"dry_run": False, "what": "measured", "parts": {**parts, "step": {"x": NOT_MEASURED}}})
    assert said.splitlines() == [
        "engine    failed", "  shipped / fp16 / failed: why", "  resnet50 / torch,engine / passed: True",
        "step      done", f"1 figures {NOT_MEASURED}",
    ]  # fmt: skip


def test_what_is_brought_joins_to_one_archive(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    weights = {"w": torch.linspace(-1, 1, 5000), "count": torch.tensor([3])}
    for fold in ("fold0", "fold1"):
        (run / fold).mkdir(parents=True)
        save_file(weights, run / fold / "best.safetensors")
        (run / fold / "log.csv").write_text("epoch\n0\n")
        (run / fold / "last.pt").write_bytes(b"momentum")
    (out).mkdir()
    (out / "trained.tar.7").write_bytes(b"of another run")
    names = bring(run, out, part=4096, most=31_000)  # one fold's 10 kB fit beside the facts and the archive's own
    assert names == ["fold0/log.csv", "fold1/log.csv", "fold0/best.safetensors"]
    parts = sorted(out.glob("trained.tar.*"), key=lambda path: int(path.suffix[1:]))
    assert len(parts) > 1
    assert all(part.stat().st_size <= 4096 for part in parts)
    assert sum(part.stat().st_size for part in parts) <= 31_000
    with tarfile.open(fileobj=BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        member = archive.extractfile("fold0/best.safetensors")
        assert member is not None
        brought = load(member.read())
    assert brought["w"].dtype == torch.float16
    assert torch.allclose(brought["w"].float(), weights["w"], atol=1e-3)
    assert brought["count"].item() == 3
    assert bring(tmp_path / "none", out) == []


def test_a_half_trunk_is_half_and_its_head_is_not() -> None:
    torch.manual_seed(0)
    model = MANet("test_efficientnet", num_classes=3).eval()
    changed = half.half_trunk(model)
    assert {value.dtype for value in changed.backbone.parameters()} == {torch.float16}
    assert changed.classifier.weight.dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float32
    image = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        for found, expected in zip(changed(image), model(image)):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_floors_count_what_a_layer_by_layer_count_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = ImageNetClassifier("test_efficientnet", num_classes=3)
    counted = 0

    def count(module: Any, given: Any, result: torch.Tensor) -> None:
        nonlocal counted
        if isinstance(module, torch.nn.Conv2d):
            per_output = module.in_channels // module.groups * math.prod(module.kernel_size)
            counted += result.numel() * per_output
        elif isinstance(module, torch.nn.Linear):
            counted += result.numel() * module.in_features

    for module in network.modules():
        module.register_forward_hook(count)
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 1, 64, 64))
    assert floors.multiply_adds(ImageNetClassifier("test_efficientnet", num_classes=3), 64) == counted
    # 10^9 multiply-adds are 2 x 10^9 operations: 2 ms at 1 TFLOP/s; 10^9 bytes are 100 ms at 10 GB/s
    measured = {"fp16_tflops": 1.0, "copy_gb_per_s": 10.0}
    assert floors.least(3, 10**9, 10**6, measured) == {"sums_ms": 6.0, "bytes_ms": 0.1, "floor_ms": 6.0}
    assert floors.least(1, 10**3, 10**9, measured)["floor_ms"] == 100.0
    monkeypatch.setattr(floors, "SIDE", 64)
    monkeypatch.setattr(floors, "COPIED", 1 << 16)
    assert set(floors.rates(context(tmp_path, dry=False))) == {
        "fp16_tflops", "tf32_tflops", "fp32_tflops", "copy_gb_per_s",
    }  # fmt: skip


def test_the_step_in_a_loop_sees_the_same_images(tmp_path: Path) -> None:
    """The same draws, and the same four batches for the network; afterwards steps are vectorised again."""
    seen: list[list[torch.Tensor]] = []
    for how in ("__call__", "in_a_loop"):
        torch.manual_seed(0)
        one = training.Stepper(context(tmp_path), 4, backbone="test_efficientnet")
        seen.append([])
        one.model.register_forward_hook(lambda _, given, __: seen[-1].append(given[0].clone()))
        getattr(one, how)()
    assert [len(batches) for batches in seen] == [4, 4]
    for vectorised, looped in zip(*seen):
        torch.testing.assert_close(vectorised, looped, atol=1e-5, rtol=1e-5)
    assert not torch.equal(seen[0][0], seen[0][1])
    assert training.step_module.augment is not training.loop_augment
    with training.loops():
        assert training.step_module.augment is training.loop_augment


def test_what_a_step_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = milliseconds
    monkeypatch.setattr(training, "milliseconds", lambda *a, **k: fewer(*a, **{**k, "seconds": 0.0, "warmup": 1}))
    monkeypatch.setattr(Context, "size", 64)
    found = training.cost(context(tmp_path, dry=False, networks=("test_efficientnet",)), "fp32", False, 2)
    assert set(found) == {
        "MAG-SD step", "four passes", "in a loop", "plain step", "images_per_second", "plain_images_per_second",
        "outside_the_passes", "peak_memory_bytes",
    }  # fmt: skip
    assert found["images_per_second"] == pytest.approx(2e3 / found["MAG-SD step"]["ms"], abs=0.06)
    assert found["outside_the_passes"] == pytest.approx(1 - found["four passes"]["ratio"], abs=1e-4)


@needs_rtx
def test_latency_of_an_engine_with_and_without_graphs(
    bundle: Bundle,
    gpu: GpuLibrary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a stand-in for driver and runtime: both ways answer, are closed, and only one of them has graphs."""
    make_engine(bundle, precision="fp16", profile=Profile(1, 2, 4))
    quick = milliseconds
    monkeypatch.setattr(engine, "milliseconds", lambda *a, **k: quick(*a, **{**k, "seconds": 0.0, "warmup": 1}))
    monkeypatch.setattr(engine, "BATCHES", (1, 4))
    monkeypatch.setattr(engine, "this_machine", lambda: A_GPU)
    used = context(tmp_path, dry=False)
    opened: list[Any] = []
    real = engine.open_engine

    def remember(*arguments: Any, **options: Any) -> Any:
        opened.append((options["graphs"], real(*arguments, **options)))
        return opened[-1][1]

    captured: dict[bool, int] = {}

    def look(backend: Any, graphs: bool) -> None:
        captured[graphs] = sum(len(lane._captured) for lane in backend._free)

    monkeypatch.setattr(engine, "open_engine", remember)
    close = engine.CheckedBackend.close
    monkeypatch.setattr(
        engine.CheckedBackend, "close", lambda self: (look(self._inner, self._inner._graphs), close(self))[1]
    )
    found = engine.latency(used, bundle.path, "fp16")
    assert [graphs for graphs, _ in opened] == [True, False]
    assert captured == {True: 2, False: 0}
    assert set(found) == {"batch 1", "batch 4"}
    assert found["batch 4"]["graph"]["ratio"] == 1.0
    said = engine.refusals(used, bundle.path)
    assert set(said) == {"another GPU", "another driver", "a damaged plan"}
    assert "is not for this machine" in said["another driver"]
    assert "is damaged" in said["a damaged plan"]
    with pytest.raises(Exception, match="part 1 built none"):
        engine.passport_of(load_bundle(bundle.path), "fp32")


@needs_rtx
@pytest.mark.slow
def test_the_dry_run_builds_compares_and_trains(tmp_path: Path) -> None:
    """Also that TensorRT which was only unpacked, without a package's facts, is found."""
    target = tmp_path / "gpu.json"
    arguments = ["--dry-run", "--out", str(tmp_path), "--json", str(target), "--networks", "test_efficientnet"]
    assert benchmark.main([*arguments, "--only", "engine,ratios,step,training", "--bring", str(tmp_path / "to")]) == 0
    results = json.loads(target.read_text())
    assert results["dry_run"] is True
    found = results["parts"]["engine"]["test_efficientnet"]
    assert found["fp16"]["layers"]["HALF"] > 0
    assert "HALF" not in found["fp32"]["layers"]
    assert found["torch,fp32"]["passed"]
    assert found["fp32,fp16"]["passed"]
    assert found["PyTorch on this device"]["float16 trunk"]["passed"]
    assert "is not for this machine" in found["refusals"]["another GPU"]
    assert "sha256" in found["refusals"]["a damaged plan"]
    assert set(found["latency fp16"].values()) == {NOT_MEASURED}
    assert results["parts"]["training"]["epochs"] == {"fold0": 1}
    assert (tmp_path / "to" / "trained.tar.0").is_file()
    # No figure of a CPU under a GPU's name
    times = [path for path, value in benchmark.leaves(results["parts"]) if isinstance(value, (int, float))
             and ("ms" in path[-1].split("_") or "second" in path[-1] or path[-1] in ("ratio", "ms"))]  # fmt: skip
    assert times == []
    rows = results["parts"]["step"]["steps"]
    assert {row["images_per_second"] for row in rows.values()} == {NOT_MEASURED}
