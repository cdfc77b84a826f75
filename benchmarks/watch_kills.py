"""Kill `magsd watch` again and again under load, and count what is lost and what is doubled.

    python benchmarks/watch_kills.py [--kills 500] [--dicom-out] [--bundle DIR] [--seed 0] [--folder DIR] [--json FILE]

A sender puts films into the inbox by turns: written slowly with pauses, under a temporary name and then renamed,
copied at once, the same content under a second name, and now and then a file that cannot be read. A collector takes
each result away the moment it shows, as a viewer would. `magsd watch` is killed by SIGKILL at a random moment after
its start and started again; after the last kill it may finish.

lost: a content without a result (or, where it cannot be read, without a place in quarantine). doubled: a content with
two results collected, or with two lines in the ledger. wrong: a result unlike that of an undisturbed `magsd infer`.
given_up: a content that was being judged at five kills and lies in quarantine for that reason, as docs/watch.md
promises: it has no result, and is not lost.
With --dicom-out the films are DICOM, and a second collector takes each DICOM result away; one that is missing counts as
lost, one that comes twice or that nobody expects as doubled, one that is not, but for its time, that of an undisturbed
run to the byte as wrong. Processes live longer then (--longest), for highdicom alone takes a second or two to load.
Without --bundle a network of a few hundred weights is made, so that kills fall between the steps and not into one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Count:
    """The outcome; ``kills`` by what the ledger's newest line and the staging folder showed after each."""

    kills: int = 0
    contents: int = 0
    unreadable: int = 0
    repeated: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    left_behind: int = 0
    recovered: int = 0
    given_up: int = 0
    dicom_objects: int = 0
    moments: dict[str, int] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return self.contents > 0 and not (self.lost or self.doubled or self.wrong or self.left_behind)


class Sender(threading.Thread):
    """Puts films into ``inbox`` until told to stop; ``contents``: hash to whether it can be read."""

    def __init__(self, inbox: Path, rng: random.Random, pause: float, dicom: bool) -> None:
        super().__init__(daemon=True)
        self.inbox, self.rng, self.pause, self.dicom = inbox, rng, pause, dicom
        self.contents: dict[str, bool] = {}
        self.repeated = 0
        self.stop = threading.Event()

    def run(self) -> None:
        number = 0
        while not self.stop.is_set():
            readable = self.rng.random() > 0.1
            data = (dicom_film if self.dicom else film)(self.rng.getrandbits(32), readable)
            self.contents[hashlib.sha256(data).hexdigest()] = readable
            self.send(data, f"PATIENT^{number:06d}")
            if self.rng.random() < 0.1:
                self.send(data, f"PATIENT^{number:06d} again")
                self.repeated += 1
            number += 1
            self.stop.wait(self.rng.uniform(0, 2 * self.pause))

    def send(self, data: bytes, name: str) -> None:
        way = self.rng.choice(["slow", "renamed", "copied"])
        target = self.inbox / f"{name}.{'dcm' if self.dicom else 'png'}"
        if way == "slow":
            with open(target, "wb") as file:
                third = len(data) // 3 + 1
                for start in range(0, len(data), third):
                    file.write(data[start : start + third])
                    file.flush()
                    time.sleep(self.rng.uniform(0, 0.05))
        elif way == "renamed":
            (self.inbox / f"{name}.part").write_bytes(data)
            os.rename(self.inbox / f"{name}.part", target)
        else:
            target.write_bytes(data)


class Collector(threading.Thread):
    """Moves each result out of ``results``, a folder of results or of DICOM objects, as soon as it shows."""

    def __init__(self, results: Path, collected: Path) -> None:
        super().__init__(daemon=True)
        self.results, self.collected = results, collected
        self.times: Counter[str] = Counter()
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            self.collect()
            time.sleep(0.01)

    def collect(self) -> None:
        for path in list(self.results.iterdir()) if self.results.is_dir() else []:
            if path.name.startswith("."):
                continue
            self.times[path.name] += 1
            os.rename(path, self.collected / f"{path.name}-{self.times[path.name]}")


def film(seed: int, readable: bool) -> bytes:
    """A small PNG with structure, or one that is cut short."""
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 256, (9, 8)).astype(np.uint8)
    encoded = cv2.imencode(".png", cv2.resize(rough, (96, 112), interpolation=cv2.INTER_CUBIC))[1].tobytes()
    return encoded if readable else encoded[: len(encoded) // 2] + seed.to_bytes(4, "big")


def dicom_film(seed: int, readable: bool) -> bytes:
    """The same as a DICOM file, of a made-up patient; cut short in its pixels."""
    module = importlib.import_module("dicom_film")
    rough = np.random.default_rng(seed).integers(0, 256, (9, 8)).astype(np.uint8)
    pixels = cv2.resize(rough, (module.COLUMNS, module.ROWS), interpolation=cv2.INTER_CUBIC).astype("<u2") << 4
    dataset = module.film(SOPInstanceUID=f"1.2.3.4.5.6.{seed}")
    dataset.PixelData = pixels.tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    encoded = buffer.getvalue()
    return encoded if readable else encoded[: len(encoded) // 2] + seed.to_bytes(4, "big")


def run(
    folder: Path, bundle: Path, kills: int, seed: int, *, longest: float = 1.2, pause: float = 0.1, dicom: bool = False
) -> Count:
    """The whole trial in ``folder``; ``longest``: seconds that a process lives at most before its kill."""
    rng = random.Random(seed)
    inbox, out, collected = folder / "in", folder / "out", folder / "collected"
    inbox.mkdir(parents=True)
    collected.mkdir()
    more = ("--dicom-out", str(folder / "dicom")) if dicom else ()
    (folder / "objects").mkdir()
    sender, collector = Sender(inbox, random.Random(seed + 1), pause, dicom), Collector(out / "results", collected)
    objects = Collector(folder / "dicom", folder / "objects")
    sender.start()
    collector.start()
    objects.start()
    count = Count()
    moments: Counter[str] = Counter()
    for _ in range(kills):
        process = start(inbox, out, bundle, *more)
        time.sleep(rng.uniform(0.25, longest))
        process.send_signal(signal.SIGKILL)
        process.wait()
        count.kills += 1
        moments[moment(out)] += 1
    sender.stop.set()
    sender.join()
    process = start(inbox, out, bundle, "--once", *more)
    if process.wait(timeout=600) not in (0, 3):
        raise SystemExit(f"magsd watch --once ended with {process.returncode}")
    status = json.loads((out / "status.json").read_text())
    for one in (collector, objects):
        one.stop.set()
        one.join()
        one.collect()
    count.moments = dict(moments)
    count.recovered = status["recovered"]
    judge(count, sender, collector, out, collected, bundle)
    if dicom:
        judge_objects(count, sender, objects, folder, bundle)
    return count


def start(inbox: Path, out: Path, bundle: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "magsd.cli", "watch", str(inbox), "--out", str(out), "--bundle", str(bundle)]
    times = ["--settle", "0.15", "--patience", "0.4", "--poll", "0.02", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "runtime"]))}
    return subprocess.Popen([*command, *times, *more], env=environment, stderr=subprocess.DEVNULL)


def moment(out: Path) -> str:
    """What the kill left: in which step it fell."""
    state = out / "state"
    if not (state / "ledger.jsonl").is_file():
        return "before the ledger"
    staged = {path.name for path in (state / "staging").iterdir()}
    if staged:
        lines = (state / "ledger.jsonl").read_bytes().splitlines()
        written = {json.loads(line)["content"] for line in lines[-3:] if line.endswith(b"}")}
        return "after the line, before the rename" if staged & written else "while a result was written"
    return "while judging" if any((state / "attempts").iterdir()) else "between films"


def judge(count: Count, sender: Sender, collector: Collector, out: Path, collected: Path, bundle: Path) -> None:
    """Fill in the counts from what is on the disk."""
    from magsd_runtime.pipeline import Pipeline

    lines = [json.loads(line) for line in (out / "state" / "ledger.jsonl").read_bytes().splitlines() if line]
    entries = Counter((line["content"], line["kind"]) for line in lines if line["kind"] in ("done", "quarantined"))
    count.contents = len(sender.contents)
    count.repeated = sender.repeated
    count.left_behind = sum(len(list((out / "state" / name).iterdir())) for name in ("staging", "attempts", "work"))
    count.left_behind += len(list(out.rglob(".*")))
    with Pipeline.open(bundle, "cpu", threads=1) as pipeline:
        for content, readable in sender.contents.items():
            if not readable:
                count.unreadable += 1
                held = list((out / "quarantine" / content).glob("input*"))
                count.lost += not (held and hashlib.sha256(held[0].read_bytes()).hexdigest() == content)
                count.doubled += entries[content, "quarantined"] > 1 or collector.times[content] > 0
                continue
            gave_up = is_given_up(out, content)
            count.given_up += gave_up
            count.lost += collector.times[content] == 0 and not gave_up
            count.doubled += collector.times[content] > 0 and gave_up
            count.doubled += collector.times[content] > 1 or entries[content, "done"] > 1
            if collector.times[content]:
                result = json.loads((collected / f"{content}-1" / "prediction.json").read_text())
                expected = pipeline.predict(input_of(out.parent / "in", content)).prediction.to_dict()
                same = all(result[name] == expected[name] for name in ("label", "probabilities", "findings"))
                count.wrong += not (same and (collected / f"{content}-1" / "overlay.jpg").is_file())


def is_given_up(out: Path, content: str) -> bool:
    """Whether a whole film is in quarantine because magsd was killed over it time and again."""
    reason, held = out / "quarantine" / content / "reason.json", list((out / "quarantine" / content).glob("input*"))
    if not reason.is_file() or json.loads(reason.read_text())["code"] != "stopped_magsd":
        return False
    return len(held) == 1 and hashlib.sha256(held[0].read_bytes()).hexdigest() == content


def judge_objects(count: Count, sender: Sender, objects: Collector, folder: Path, bundle: Path) -> None:
    """Add what is to be said of the DICOM results in ``folder``/objects."""
    import pydicom

    from magsd_runtime.dicom_results.writing import write_results
    from magsd_runtime.pipeline import Pipeline

    count.dicom_objects = sum(objects.times.values())
    count.left_behind += len(list((folder / "dicom").iterdir()))
    unexpected = set(objects.times)
    with Pipeline.open(bundle, "cpu", threads=1) as pipeline:
        for content, readable in sender.contents.items():
            if not readable or is_given_up(folder / "out", content):
                continue
            path = input_of(folder / "in", content)
            result = pipeline.predict(path)
            # The names do not depend on the time; what it was is in the object that was collected
            overlay = write_results(folder / "expected", path, result, pipeline.bundle)["secondary-capture"].name
            made = folder / "objects" / f"{overlay}-1"
            when = None
            if made.is_file():
                header = pydicom.dcmread(made, stop_before_pixels=True)
                when = datetime.strptime(header.InstanceCreationDate + header.InstanceCreationTime, "%Y%m%d%H%M%S")
            expected = write_results(folder / "expected", path, result, pipeline.bundle, when=when)
            for file in expected.values():
                count.lost += objects.times[file.name] == 0
                count.doubled += objects.times[file.name] > 1
                made = folder / "objects" / f"{file.name}-1"
                count.wrong += made.is_file() and made.read_bytes() != file.read_bytes()
            unexpected -= {file.name for file in expected.values()}
            shutil.rmtree(folder / "expected")
    count.doubled += len(unexpected)


_hashes: dict[Path, dict[str, Path]] = {}


def input_of(inbox: Path, content: str) -> Path:
    if inbox not in _hashes:
        _hashes[inbox] = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in inbox.iterdir()}
    return _hashes[inbox][content]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--dicom-out", action="store_true", help="DICOM films, with DICOM results")
    parser.add_argument("--longest", type=float, metavar="S", help="a process's life (default: 1.2, for DICOM 6)")
    parser.add_argument("--bundle", type=Path, help="default: a tiny one is made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT / "runtime"), str(ROOT / "tests")]
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        bundle = arguments.bundle
        if bundle is None:
            bundle = importlib.import_module("tiny_bundle").build(folder / "bundle")
        started = time.monotonic()
        longest = arguments.longest or (6.0 if arguments.dicom_out else 1.2)
        pause = 2.0 if arguments.dicom_out else 0.1  # no faster than they are judged, or the last run takes for ever
        count = run(
            folder, bundle, arguments.kills, arguments.seed, longest=longest, pause=pause, dicom=arguments.dicom_out
        )
        record = {**asdict(count), "seconds": round(time.monotonic() - started, 1), "seed": arguments.seed}
        for name, value in record.items():
            print(f"{name:12} {value}")
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    finally:
        shutil.rmtree(folder)
    sys.exit(0 if count.good else 1)


if __name__ == "__main__":
    main()
