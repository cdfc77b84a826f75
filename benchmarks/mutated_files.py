"""Read and judge thousands of damaged files, and count what is not a result or a clean rejection.

    python benchmarks/mutated_files.py [--count 10000] [--seed 0] [--json FILE] [--keep DIR] [--quick]
    python benchmarks/mutated_files.py --one INDEX [--seed 0] --keep DIR
    python benchmarks/mutated_files.py --explore 4000 [--seed 1]

Each file is a small valid one (mutation_seeds.py), or one that was kept because it reached lines of the readers that
none before it had reached (mutated_files.json, which --explore extends), changed by mutations.py. Seed and index make
a file again. A process of its own reads it (`read_radiograph`) and judges it with the shipped bundle
(`Pipeline.predict`; of the unreadable ones every tenth), one file after the other, as `magsd watch` does; another one
watches that process.

crash: the process ended, or an exception that is none of the documented ones, or a message of several lines or without
the file's name, or a status of a fault, or a record that is no strict JSON. hang: reading, or reading and judging, took
more than 5 s of the clock. memory: the highest resident memory while the file was read and judged (VmHWM of
/proc/self/status, set back before each file) was more than 1 GB (10^9 bytes) above the resident memory before it. The
process may have 4 GiB more address space than at its start; a file that runs into that counts as memory too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mutation_seeds import seeds
from mutations import mutated

ROOT = Path(__file__).resolve().parents[1]
CORPUS = Path(__file__).with_suffix(".json")
SECONDS, BYTES, ADDRESS_SPACE = 5.0, 10**9, 4 << 30
SHARES = {"dicom": 0.5, "png": 0.2, "jpeg": 0.17, "tiff": 0.1, "gif": 0.015, "bmp": 0.015}
QUICK = 300

Lineage = tuple[str, tuple[tuple[int, int], ...]]
"""The name of a seed, and the (seed, index) of each mutation of it, one after the other."""


# --- which file ---


@cache
def corpus() -> tuple[Lineage, ...]:
    found = json.loads(CORPUS.read_text()) if CORPUS.is_file() else []
    return tuple((name, tuple((a, b) for a, b in steps)) for name, steps in found)


def family(name: str) -> str:
    return name.partition("-")[0]


def lineage(seed: int, index: int, kept: tuple[Lineage, ...]) -> Lineage:
    """What the file ``index`` is made of: a seed as it is, or one of ``kept``, and one mutation."""
    rng = np.random.default_rng([seed, index, 0])
    kind = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    names = [name for name in seeds() if family(name) == kind]
    grown = [one for one in kept if family(one[0]) == kind]
    if grown and rng.random() < 0.5:
        name, steps = grown[int(rng.integers(len(grown)))]
    else:
        name, steps = names[int(rng.integers(len(names)))], ()
    return name, (*steps, (seed, index))


def content(made_of: Lineage) -> bytes:
    name, steps = made_of
    data = seeds()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, index in steps:
            data = mutated(data, family(name), np.random.default_rng([seed, index, 1]))
    return data


# --- the process that reads ---


def memory(field_name: str) -> int:
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field_name + ":"))


class Tracer:
    """Lines that were reached for the first time, of our readers and of the libraries' Python parts."""

    parts = ("magsd_runtime/images.py", "magsd_runtime/dicom/", "magsd_runtime/limits.py", "/pydicom/", "/PIL/")

    def __init__(self) -> None:
        self.seen: set[tuple[str, int, int]] = set()
        self.wanted: dict[str, bool] = {}
        self.new = 0

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in self.wanted:
            self.wanted[name] = any(part in name for part in self.parts)
        if not self.wanted[name]:
            return None
        ours, last = "magsd_runtime" in name, 0

        def local(frame: Any, event: str, _: Any) -> Any:
            nonlocal last
            if event == "line":
                key = (name, last if ours else 0, frame.f_lineno)
                if key not in self.seen:
                    self.seen.add(key)
                    self.new += 1
                last = frame.f_lineno
            return local

        return local


def worker(trace: bool) -> None:
    """A path a line in, one JSON object a line out; whatever a library prints goes nowhere."""
    replies = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    from magsd_runtime.images import read_radiograph
    from magsd_runtime.pipeline import Pipeline
    from magsd_runtime.shipped import SHIPPED

    pipeline = Pipeline.open(SHIPPED, "cpu", threads=1)
    with tempfile.TemporaryDirectory() as folder:  # what is imported when it is first needed is no cost of a file
        for name, data in seeds().items():
            path = Path(folder, name)
            path.write_bytes(data)
            pipeline.predict(path)
    space = memory("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    tracer = Tracer()
    print(json.dumps({"ready": memory("VmRSS")}), file=replies, flush=True)
    for number, line in enumerate(sys.stdin):
        path = line.rstrip("\n")
        gc.collect()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        tracer.new = 0
        started = time.perf_counter()
        if trace:
            sys.settrace(tracer)
        outcome = read_one(read_radiograph, path)
        sys.settrace(None)
        seconds = time.perf_counter() - started
        # What cannot be read would only be read again: one in ten is enough to see what the pipeline says of it
        if not outcome.get("crash") and (outcome["outcome"] == "read" or number % 10 == 0):
            outcome.update(judge_one(pipeline, path, outcome["outcome"]))
        judged = time.perf_counter() - started - seconds
        outcome.update(seconds=max(seconds, judged), bytes=memory("VmHWM") - before, resident=before, new=tracer.new)
        print(json.dumps(outcome), file=replies, flush=True)


def read_one(read: Any, path: str) -> dict[str, Any]:
    from magsd_runtime.errors import ImageError

    try:
        film = read(path)
    except ImageError as error:
        message = str(error)
        if "\n" in message or not message.startswith(f"{path}: "):
            return {"outcome": "unreadable", "crash": f"message: {message!r}"}
        out_of_memory = {"over": True} if "MemoryError" in message else {}  # which images.py takes for damage
        return {"outcome": "unreadable", "message": message.removeprefix(f"{path}: "), **out_of_memory}
    except MemoryError:
        return {"outcome": "memory", "over": True}
    except BaseException:
        return {"outcome": "crash", "crash": traceback.format_exc()}
    good = film.pixels.dtype == np.uint8 and film.pixels.ndim == 2 and min(film.pixels.shape) >= 64
    return {"outcome": "read"} if good else {"outcome": "crash", "crash": f"pixels {film.pixels.shape}"}


def judge_one(pipeline: Any, path: str, expected: str) -> dict[str, Any]:
    os.environ.pop("MAGSD_TRACEBACK", None)
    try:
        prediction = pipeline.predict(path).prediction
        json.dumps(prediction.to_dict(), allow_nan=False)
        codes = [reason.code for reason in prediction.reasons]
        if "fault" in codes:
            os.environ["MAGSD_TRACEBACK"] = "1"
            pipeline.predict(path)
    except BaseException:
        return {"crash": traceback.format_exc()}
    if "out_of_memory" in codes:
        return {"over": True}
    if ("unreadable" in codes) != (expected == "unreadable") or "not_finite" in codes or "fault" in codes:
        return {"crash": f"read_radiograph: {expected}, predict: {prediction.status} {codes}"}
    if expected == "unreadable":
        return {}
    refused = prediction.status == "rejected"
    return {"outcome": prediction.status, "message": f"rejected: {', '.join(codes)}" if refused else None}


# --- the process that watches ---


class Watched:
    """The reading process; started again when it ended or was killed."""

    def __init__(self, trace: bool = False) -> None:
        self.trace, self.process, self.starts = trace, None, 0

    def start(self) -> subprocess.Popen[str]:
        places = [str(ROOT), str(ROOT / "runtime"), str(ROOT / "tests"), str(ROOT / "benchmarks")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-X", "faulthandler", __file__, "--worker", *(["--trace"] if self.trace else [])]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        self.starts += 1
        if (reply := self.reply(120)) is None or "ready" not in reply:
            raise SystemExit(f"the reading process does not start: {self.said()}")
        return self.process

    def reply(self, seconds: float) -> dict[str, Any] | None:
        assert self.process is not None
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return {"outcome": "hang", "seconds": seconds, "bytes": 0}
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")[-3000:]

    def judge(self, path: Path) -> dict[str, Any]:
        process = self.process or self.start()
        assert process.stdin is not None
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        found = self.reply(4 * SECONDS)
        if found is not None and found["outcome"] != "hang":
            return found
        if found is not None:
            process.send_signal(signal.SIGABRT)  # faulthandler says where it hangs
            process.wait()
            self.process = None
            return {**found, "where": self.said()}
        code = process.wait()
        self.process = None
        why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"outcome": "crash", "crash": f"{why}: {self.said()}", "seconds": 0.0, "bytes": 0}

    def stop(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()


@dataclass
class Count:
    """``kinds``: by family, how often each outcome; ``messages``: rejections, numbers left out."""

    files: int = 0
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    messages: Counter[str] = field(default_factory=Counter)
    offenders: list[dict[str, Any]] = field(default_factory=list)
    longest: float = 0.0
    largest: int = 0
    resident: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def of(self, problem: str) -> int:
        return sum(problem in one["problems"] for one in self.offenders)

    @property
    def good(self) -> bool:
        return self.files > 0 and not self.offenders

    def record(self) -> dict[str, Any]:
        return {
            "files": self.files,
            "crashes": self.of("crash"), "hangs": self.of("hang"), "over_memory": self.of("memory"),
            "longest_s": round(self.longest, 3), "largest_mb": round(self.largest / 1e6, 1),
            "resident_mb_first_and_last": [round(one / 1e6, 1) for one in self.resident[:1] + self.resident[-1:]],
            "kinds": {kind: dict(sorted(counts.items())) for kind, counts in sorted(self.kinds.items())},
            "messages": dict(self.messages.most_common()),
            "offenders": self.offenders,
            "seconds": round(self.seconds, 1),
        }  # fmt: skip


def problems(found: dict[str, Any]) -> list[str]:
    tests = {
        "crash": "crash" in found,
        "hang": found["outcome"] == "hang" or found["seconds"] > SECONDS,
        "memory": bool(found.get("over")) or found["bytes"] > BYTES,
    }
    return [name for name, failed in tests.items() if failed]


def run(
    indices: range, seed: int, *, keep: Path | None = None, explore: list[Lineage] | None = None, quiet: bool = False
) -> Count:
    """Make and judge the files ``indices``; ``explore``: kept ones to start from, to which new ones are added."""
    count, started = Count(), time.monotonic()
    watched = Watched(trace=explore is not None)
    with tempfile.TemporaryDirectory() as folder:
        for index in indices:
            made_of = lineage(seed, index, corpus() if explore is None else tuple(explore))
            path = Path(folder, "mutant")
            data = content(made_of)
            path.write_bytes(data)
            found = watched.judge(path)
            kind = family(made_of[0])
            count.files += 1
            count.kinds.setdefault(kind, Counter())[found["outcome"]] += 1
            count.longest, count.largest = max(count.longest, found["seconds"]), max(count.largest, found["bytes"])
            count.resident += [found["resident"]] if "resident" in found else []
            if found.get("message"):
                count.messages[re.sub(r"[0-9][0-9,.]*", "N", found["message"])] += 1
            if wrong := problems(found):
                count.offenders.append({"index": index, "lineage": made_of, "problems": wrong, **found})
                if not quiet:
                    print(json.dumps(count.offenders[-1], indent=1), file=sys.stderr, flush=True)
            if keep is not None and (wrong or len(indices) == 1):
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{seed}-{index}-{made_of[0]}").write_bytes(data)
            if explore is not None and found.get("new") and len(data) < 1 << 20:
                explore.append(made_of)
            if not quiet and count.files % 500 == 0:
                print(f"{count.files} files, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    watched.stop()
    count.seconds = time.monotonic() - started
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="where offending files are written")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} files")
    parser.add_argument("--one", type=int, metavar="INDEX", help="this file alone")
    parser.add_argument("--explore", type=int, metavar="N", help="look for files that reach new lines, and keep them")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.trace)
        return
    sys.path[:0] = [str(ROOT), str(ROOT / "runtime"), str(ROOT / "tests")]
    grown = list(corpus()) if arguments.explore else None
    indices = range(arguments.explore or (QUICK if arguments.quick else arguments.count))
    if arguments.one is not None:
        indices = range(arguments.one, arguments.one + 1)
    count = run(indices, arguments.seed, keep=arguments.keep, explore=grown)
    record = {**count.record(), "seed": arguments.seed, "kept_mutants": len(corpus())}
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if grown is not None:
        CORPUS.write_text("[\n" + ",\n".join(json.dumps(one) for one in grown) + "\n]\n")
        record["kept_mutants"] = len(grown)
    for kind, counts in record.pop("kinds").items():
        print(f"{kind:6} {sum(counts.values()):6}  {counts}")
    for message, times in record.pop("messages").items():
        print(f"{times:6}  {message}")
    print(json.dumps({**record, "offenders": len(record["offenders"])}))
    sys.exit(0 if count.good else 1)


if __name__ == "__main__":
    main()
