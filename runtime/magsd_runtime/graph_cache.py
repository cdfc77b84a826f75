"""ONNX Runtime's optimised graph, kept for the next start: opening a network is then reading a file.

Optimising and packing weights is most of opening a session, and gives the same on the same machine each time. What
ONNX Runtime made is kept under the user's cache folder, keyed by everything that it depends on:

    KEY/graph.onnx, KEY/weights.bin    ONNX Runtime's own files; the weights are packed for this processor, and mapped
    KEY/facts.json                     what it was made from, and size and SHA-256 of both

Made by :func:`prepare` alone, which ``magsd verify`` calls, never while somebody waits for an answer; and kept only if
it gives the golden inputs' outputs to the last bit. Whatever is not as it should be is as if it was not there: nothing
depends on it but time. ``MAGSD_CACHE=off`` turns it off, ``MAGSD_CACHE=DIR`` puts it elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .files import replacing_directory, sha256_file, write_json

FORM = "1"
"""Part of every key: raise it when what is kept, or the session's options, change."""
GRAPH, WEIGHTS, FACTS = "graph.onnx", "weights.bin", "facts.json"


def cache_folder() -> Path | None:
    """Where graphs are kept; None if that is turned off, or the folder is not this user's alone."""
    chosen = os.environ.get("MAGSD_CACHE")
    if chosen and chosen.lower() in ("off", "0", "no", "none"):
        return None
    if chosen:
        folder = Path(chosen)
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "magsd" / "graphs"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "magsd" / "graphs"
    return folder if is_ours(folder) else None


def is_ours(folder: Path) -> bool:
    """Whether nobody else can write there. A folder that does not exist yet will be made so."""
    if sys.platform == "win32":
        return True  # the profile's own access rules
    try:
        status = os.lstat(folder)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def key_of(onnx_sha256: str, ort_version: str) -> str:
    """Everything that ONNX Runtime's result depends on: the network, its version and this processor."""
    parts = [FORM, onnx_sha256, ort_version, sys.platform, *_processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


_TELLING = ("model", "cpu family", "stepping", "flags", "Features", "CPU part", "CPU implementer")


def _processor() -> list[str]:
    """Model and instruction sets, as the system names them; read anew at each start, so without any search in it.

    Empty where they are not known (macOS says no more than "arm"): then nothing is kept, for weights that were packed
    for one processor may come to another, with a home folder on the network.
    """
    lines: list[str] = []
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    break  # the first processor is enough
                if line.startswith(_TELLING):
                    lines.append(line.strip())
    except OSError:
        if sys.platform == "win32":
            import platform

            lines = [platform.machine(), platform.processor()]
    return lines


def find(onnx_sha256: str, ort_version: str) -> Path | None:
    """The optimised graph of that network, checked to be as it was written; None if there is none to be used."""
    folder = cache_folder()
    if folder is None or not _processor():
        return None
    kept = folder / key_of(onnx_sha256, ort_version)
    try:
        if not is_ours(kept):
            return None
        facts = json.loads((kept / FACTS).read_text(encoding="utf-8"))
        for name in (GRAPH, WEIGHTS):
            expected = facts["files"][name]
            if (kept / name).stat().st_size != expected["size"] or sha256_file(kept / name) != expected["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept / GRAPH


def kept_of(onnx_sha256: str) -> list[Path]:
    """The files of what was last kept of that network, by whatever version: no promise that they are of any use."""
    folder = cache_folder()
    found = [] if folder is None else sorted(folder.glob(f"*/{FACTS}"), key=_changed, reverse=True)
    for facts in found:
        with contextlib.suppress(OSError, ValueError):
            if f'"{onnx_sha256}"' in facts.read_text(encoding="utf-8"):
                return [facts.with_name(WEIGHTS), facts.with_name(GRAPH)]
    return []


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def write(
    onnx_sha256: str, ort_version: str, make: Callable[[Path, str], object], check: Callable[[Path], bool]
) -> Path | None:
    """Keep what ``make(graph_path, weights_name)`` writes, if ``check(graph_path)`` is true of it.

    Returns the graph's path; None where nothing may or can be kept, or the check failed. Two processes may do this at
    once: one of the two results stays.
    """
    folder = cache_folder()
    if folder is None or not _processor():
        return None
    kept = folder / key_of(onnx_sha256, ort_version)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_ours(folder):
            return None
        _sweep(folder)
        shutil.rmtree(kept, ignore_errors=True)  # of no use, or it would not be made again
        with replacing_directory(kept) as temporary:
            temporary.chmod(0o700)
            make(temporary / GRAPH, WEIGHTS)
            if not (temporary / WEIGHTS).exists():  # a network too small to have its weights outside
                (temporary / WEIGHTS).write_bytes(b"")
            files = {
                name: {"size": (temporary / name).stat().st_size, "sha256": sha256_file(temporary / name)}
                for name in (GRAPH, WEIGHTS)
            }
            write_json(temporary / FACTS, {"onnx_sha256": onnx_sha256, "onnxruntime": ort_version, "files": files})
            if not check(temporary / GRAPH):
                raise _NotTheSame
    except (_NotTheSame, OSError):
        return None
    return kept / GRAPH


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed left unfinished: hidden, and older than any that is being made."""
    for left in folder.glob(".*"):
        with contextlib.suppress(FileNotFoundError):  # its process has just finished it
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)


class _NotTheSame(Exception):
    """The optimised graph gives other outputs."""
