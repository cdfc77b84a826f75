"""The optimised graph that ``magsd verify`` keeps for the next start: the same answers, or it is not used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tiny_bundle
from magsd.cli import main
from magsd_runtime import files, graph_cache, shipped
from magsd_runtime.backends import onnx_runtime, open_backend
from magsd_runtime.bundle import Bundle, load_bundle

ROOT = Path(__file__).resolve().parents[1]


def heavier(folder: Path) -> Path:
    """A tiny bundle whose network begins with a convolution that leaves the image as it is, so that there are weights
    worth keeping outside: 32 channels of a 5 x 5 filter, of which the first has a one in the middle."""
    tiny_bundle.build(folder)
    model = onnx.load(folder / "model.onnx")
    taps = np.zeros((32, 1, 5, 5), np.float32)
    taps[:, 0, 2, 2] = 1
    back = np.zeros((1, 32, 1, 1), np.float32)
    back[0, 0] = 1
    graph = model.graph
    graph.initializer.extend([numpy_helper.from_array(taps, "taps"), numpy_helper.from_array(back, "back")])
    for node in graph.node:
        node.input[:] = ["through" if name == "image" else name for name in node.input]
    first = [
        helper.make_node("Conv", ["image", "taps"], ["wide"], pads=[2, 2, 2, 2]),
        helper.make_node("Conv", ["wide", "back"], ["through"]),
    ]
    nodes = [*first, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    assert graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    onnx.save(model, folder / "model.onnx")
    tiny_bundle.write_manifest(
        folder, tiny_bundle.CLASSES, load_spec(), 1.0, {"map": "attention", "threshold": 0.5}
    )  # fmt: skip
    return folder


def load_spec() -> Any:
    from magsd_runtime.preprocessing import PreprocessingSpec

    return PreprocessingSpec()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return heavier(tmp_path_factory.mktemp("bundle") / "heavy")


@pytest.fixture
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAGSD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


IMAGES = np.random.default_rng(2).normal(size=(3, 1, 224, 224)).astype(np.float32)


def opened(bundle: Bundle) -> tuple[bool, dict[str, np.ndarray]]:
    """Whether the kept graph was used, and what the network gives."""
    with open_backend(bundle, "cpu", threads=1) as backend:
        return backend._inner.optimised, backend.run(IMAGES)  # type: ignore[attr-defined]


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


def test_verify_keeps_it_and_the_next_start_gives_the_same_bits(bundle: Bundle, cache: Path) -> None:
    used, plain = opened(bundle)
    assert not used
    assert not cache.exists()  # nothing is made while somebody waits
    assert main(["verify", str(bundle.path)]) == 0
    (kept,) = cache.iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["facts.json", "graph.onnx", "weights.bin"]
    assert (kept / "weights.bin").stat().st_size > 0
    used, outputs = opened(bundle)
    assert used
    assert_equal(plain, outputs)
    before = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert main(["verify", str(bundle.path)]) == 0  # from the kept graph, which is left as it is
    assert before == {path: path.stat().st_mtime_ns for path in kept.iterdir()}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: flip(kept / "weights.bin"),
        lambda kept: flip(kept / "graph.onnx"),
        lambda kept: (kept / "graph.onnx").unlink(),
        lambda kept: (kept / "facts.json").write_text("{"),
        lambda kept: (kept / "facts.json").write_text("[]"),
        lambda kept: (kept / "weights.bin").write_bytes(b""),
        lambda kept: kept.chmod(0o777),
    ],
)
def test_a_spoilt_one_is_not_used_and_made_anew(bundle: Bundle, cache: Path, spoil: Any) -> None:
    _, plain = opened(bundle)
    assert onnx_runtime.prepare(bundle, "cpu", lambda: IMAGES)
    (kept,) = cache.iterdir()
    spoil(kept)
    used, outputs = opened(bundle)
    assert not used
    assert_equal(plain, outputs)
    assert onnx_runtime.prepare(bundle, "cpu", lambda: IMAGES)
    assert opened(bundle)[0]


def test_one_whose_files_are_right_but_do_not_open_is_left_aside(bundle: Bundle, cache: Path) -> None:
    assert onnx_runtime.prepare(bundle, "cpu", lambda: IMAGES)
    (kept,) = cache.iterdir()
    (kept / "graph.onnx").write_bytes(b"no graph")
    facts = json.loads((kept / "facts.json").read_text())
    facts["files"]["graph.onnx"] = {"size": 8, "sha256": graph_cache.sha256_file(kept / "graph.onnx")}
    (kept / "facts.json").write_text(json.dumps(facts))
    assert graph_cache.find(bundle.model_sha256, __import__("onnxruntime").__version__) is not None
    assert not opened(bundle)[0]


def test_one_that_gives_other_outputs_is_not_kept(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnx_runtime._open_graph

    class Off:
        """A session whose last digit is another."""

        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, names: list[str], given: dict[str, np.ndarray]) -> list[np.ndarray]:
            values = self.session.run(names, given)
            values[0] = np.nextafter(values[0], np.float32(np.inf))
            return values

    monkeypatch.setattr(onnx_runtime, "_open_graph", lambda *arguments: Off(real(*arguments)))
    assert not onnx_runtime.prepare(bundle, "cpu", lambda: IMAGES)
    assert list(cache.iterdir()) == []


def test_another_version_processor_or_network_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {graph_cache.key_of("a" * 64, "1.32.0"), graph_cache.key_of("b" * 64, "1.32.0")}
    keys.add(graph_cache.key_of("a" * 64, "1.33.0"))
    monkeypatch.setattr(graph_cache, "_processor", lambda: ["model name: another"])
    keys.add(graph_cache.key_of("a" * 64, "1.32.0"))
    assert len(keys) == 4


def test_on_a_processor_that_is_not_known_nothing_is_kept(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert onnx_runtime.prepare(bundle, "cpu", lambda: IMAGES)
    monkeypatch.setattr(graph_cache, "_processor", list)
    assert not opened(bundle)[0]
    shutil.rmtree(cache)
    assert not onnx_runtime.prepare(bundle, "cpu", lambda: IMAGES)
    assert not cache.exists()


@pytest.mark.parametrize("value", ["off", "OFF", "0"])
def test_it_can_be_turned_off(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MAGSD_CACHE", value)
    assert graph_cache.cache_folder() is None
    assert not onnx_runtime.prepare(bundle, "cpu", lambda: IMAGES)
    assert not opened(bundle)[0]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_folder_that_others_may_write_to_is_not_trusted(bundle: Bundle, cache: Path) -> None:
    assert onnx_runtime.prepare(bundle, "cpu", lambda: IMAGES)
    assert cache.stat().st_mode & 0o077 == 0
    cache.chmod(0o770)
    assert not opened(bundle)[0]
    assert not onnx_runtime.prepare(bundle, "cpu", lambda: IMAGES)
    cache.chmod(0o700)
    moved = cache.with_name("elsewhere")
    cache.rename(moved)
    cache.symlink_to(moved)
    assert not opened(bundle)[0]


def test_a_place_that_cannot_be_written_is_no_error(bundle: Bundle, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MAGSD_CACHE", str(tmp_path / "file" / "cache"))
    assert not onnx_runtime.prepare(bundle, "cpu", lambda: IMAGES)
    assert main(["verify", str(bundle.path)]) == 0


def test_without_a_setting_it_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAGSD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform != "win32":
        assert graph_cache.cache_folder() == tmp_path / "magsd" / "graphs"


def test_several_processes_at_once_leave_one_whole(bundle: Bundle, cache: Path) -> None:
    program = (
        "import sys, numpy as np\n"
        "from magsd_runtime.backends.onnx_runtime import prepare\n"
        "from magsd_runtime.bundle import load_bundle\n"
        "images = np.random.default_rng(2).normal(size=(3, 1, 224, 224)).astype(np.float32)\n"
        "prepare(load_bundle(sys.argv[1]), 'cpu', lambda: images)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}
    running = [subprocess.Popen([sys.executable, "-c", program, str(bundle.path)], env=environment) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert len(list(cache.iterdir())) == 1
    assert opened(bundle)[0]


def test_a_killed_one_leaves_nothing_that_is_used(bundle: Bundle, cache: Path) -> None:
    assert onnx_runtime.prepare(bundle, "cpu", lambda: IMAGES)
    (kept,) = cache.iterdir()
    left, running = cache / f".{kept.name}.123456789abc", cache / f".{kept.name}.cba987654321"
    shutil.copytree(kept, left)  # as a kill before the rename leaves it
    shutil.copytree(kept, running)  # and another process that is at it
    yesterday = time.time() - 86400
    os.utime(left, (yesterday, yesterday))
    os.utime(running)
    shutil.rmtree(kept)
    assert not opened(bundle)[0]
    assert onnx_runtime.prepare(bundle, "cpu", lambda: IMAGES)
    assert opened(bundle)[0]
    assert {path.name for path in cache.iterdir()} == {kept.name, running.name}


def test_one_session_serves_several_threads(bundle: Bundle) -> None:
    with open_backend(bundle, "cpu", threads=1) as backend:
        expected = [backend.run(IMAGES[index : index + 1])["logits"] for index in range(3)]
        found: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}

        def ask(index: int) -> None:
            for _ in range(20):
                found[index].append(backend.run(IMAGES[index : index + 1])["logits"])

        threads = [threading.Thread(target=ask, args=(index,)) for index in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, values in found.items():
        assert len(values) == 20
        assert all(np.array_equal(value, expected[index]) for value in values)


def test_what_opening_hashes_is_hashed_ahead_once(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert onnx_runtime.prepare(bundle, "cpu", lambda: IMAGES)
    (kept,) = cache.iterdir()
    monkeypatch.setattr(shipped, "_WORTH_IT", 0)
    asked: list[Path] = []
    monkeypatch.setattr(files, "hash_ahead", lambda paths: asked.extend(paths))
    shipped.hash_bundle_ahead(str(bundle.path))
    listed = {bundle.path / name for name in bundle.manifest["files"]}
    assert set(asked) == {*listed, kept / "graph.onnx", kept / "weights.bin"}
    monkeypatch.undo()
    files.hash_ahead(asked)
    monkeypatch.setenv("MAGSD_CACHE", str(cache))
    used, _ = opened(bundle)
    assert used
    load_bundle(bundle.path)
    assert not files._AHEAD


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"files": {"a": {}}, "model": {}}'])
def test_of_no_bundle_nothing_is_hashed_ahead(tmp_path: Path, content: str) -> None:
    (tmp_path / "bundle.json").write_text(content)
    shipped.hash_bundle_ahead(str(tmp_path))
    shipped.hash_bundle_ahead(str(tmp_path / "missing"))
    assert not files._AHEAD
