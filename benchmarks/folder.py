"""A folder of films through `magsd infer`: rate against what the cores allow, first result, memory, and after a kill.

    python benchmarks/folder.py [--films 1000] [--more 100000] [--jobs 2] [--rounds 3] [--bundle DIR] [--json FILE]

Mixed films are made first, the same each time: drawn chests of 300 to 2,000 pixels as PNG and JPEG, 8 and 16 bit, and
as DICOM; one in fifty is no film. Of 200 different ones the folder holds hard links, so that 100,000 fit on a disk.

    rate        films a second of the whole process but for its start, one job and --jobs in turns, beside
                cores / (CPU seconds a film of one job): 1 would be every core busy with films alone, all the time
    first       seconds from the command to the first line, and to that of one film alone
    memory      in use, and its peak, after each tenth of the films
    resume      --lines, --out: killed twice in the middle and gone on with: lost, doubled, different from a run that
                was not, or in another order
    overlay     CPU milliseconds of drawing and writing one, film of 1,024 pixels, median; the same as a PNG
    more        the same folder grown to --more films: rate, CPU and memory again, and before and after it once more
                those of --films, so that a machine that has become slower meanwhile is seen

Without --more nothing is grown. Research use only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from magsd_runtime.files import write_json
from magsd_runtime.shipped import choose_bundle
from suite.films import write_dicom
from suite.processes import magsd
from timing import describe, machine

DIFFERENT = 200
SIDES = (300, 512, 1024, 1024, 2000)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--films", type=int, default=1000)
    parser.add_argument("--more", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bundle")
    parser.add_argument("--work", type=Path, help="make the folders here (default: where temporary files go)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bundle = choose_bundle(options.bundle)
    with TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        draw_films(folder / "films", DIFFERENT, seed=0)
        found: dict[str, Any] = {"machine": machine("onnxruntime", "opencv-python-headless"), "bundle": bundle}
        print(describe(found["machine"]))
        found["folder"] = rates(grown(folder, options.films), bundle, options.jobs, options.rounds)
        report(found["folder"])
        found["resume"] = resumed(folder / str(options.films), folder, bundle, options.jobs)
        print(f"resume   killed after {found['resume']['killed_after']} films: " + ", ".join(
            f"{found['resume'][key]} {key}" for key in ("lost", "doubled", "different", "out_of_order")))  # fmt: skip
        found["overlay"] = overlays(folder / "films", bundle)
        print(
            f"overlay  {found['overlay']['jpeg_ms']:.1f} ms of CPU, {found['overlay']['jpeg_bytes'] / 1e3:.0f} kB; "
            f"as a PNG {found['overlay']['png_ms']:.1f} ms, {found['overlay']['png_bytes'] / 1e3:.0f} kB"
        )
        if options.more:
            few = folder / str(options.films)
            beside = [rates(few, bundle, options.jobs, 1, alone=False)]
            found["more"] = rates(grown(folder, options.more), bundle, options.jobs, 1, alone=False)
            beside.append(rates(few, bundle, options.jobs, 1, alone=False))
            report(found["more"])
            for what, name in (("rate", "rate"), ("CPU a film", "cpu_s_a_film")):
                ratios = [found["more"][name] / each[name] for each in beside]
                found["more"][f"{name}_against_few"] = ratios
                print(f"         {what} of {options.more} films / that of {options.films}, run before it and after: "
                      + ", ".join(f"{ratio:.3f}" for ratio in ratios))  # fmt: skip
    if options.json is not None:
        write_json(options.json, found)


def draw_films(folder: Path, count: int, *, seed: int) -> None:
    """``count`` different mixed films in ``folder``."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        side = SIDES[number % len(SIDES)]
        pixels = chest(rng, round(side * rng.uniform(0.85, 1.0)), side)
        name = folder / f"{number:03}"
        kind = number % 10
        if number % 50 == 49:
            name.with_suffix(".png").write_bytes(b"no film")
        elif kind < 4:
            cv2.imwrite(f"{name}.png", pixels)
        elif kind < 8:
            cv2.imwrite(f"{name}.jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])
        elif kind < 9:
            cv2.imwrite(f"{name}.png", pixels.astype(np.uint16) * 257)
        else:
            write_dicom(name.with_suffix(".dcm"), pixels)


def chest(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Two dark lungs in a grey body with noise: uint8 (height, width)."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = y / height, x / width
    body = 150 * np.exp(-(((x - 0.5) / 0.42) ** 4)) + 20
    for centre in (0.31, 0.69):
        middle = centre + rng.normal(0, 0.01)
        body -= 95 * np.exp(-((((x - middle) / 0.13) ** 2 + ((y - 0.47) / 0.28) ** 2) ** 2))
    blob = np.exp(-((x - rng.uniform(0.25, 0.75)) ** 2 + (y - rng.uniform(0.3, 0.65)) ** 2) / 0.004)
    film = body + 60 * rng.uniform() * blob
    return np.clip(film + rng.normal(0, 4, film.shape), 0, 255).astype(np.uint8)


def grown(folder: Path, count: int) -> Path:
    """A folder of ``count`` hard links to the films in ``folder/films``, in a mixed order."""
    films = sorted((folder / "films").iterdir())
    out = folder / str(count)
    out.mkdir()
    order = random.Random(0)
    for number in range(count):
        film = films[number % len(films)] if number < len(films) else order.choice(films)
        os.link(film, out / f"{number:06}{film.suffix}")
    return out


def command(films: Path, bundle: str, *more: object) -> list[str]:
    return magsd("infer", films, "--bundle", bundle, "--json", *more)


def run(films: Path, bundle: str, count: int, *more: object) -> dict[str, Any]:
    """One run from the command to its end: seconds to the first line and between first and last, CPU, memory."""
    started = time.perf_counter()
    child = subprocess.Popen(
        command(films, bundle, *more), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert child.stdout is not None
    first = last = 0.0
    tenths = {max(1, count * tenth // 10) for tenth in range(1, 11)}
    points: list[dict[str, Any]] = []
    lines = 0
    for lines, _ in enumerate(child.stdout, 1):
        last = time.perf_counter()
        first = first or last
        if lines in tenths:
            points.append({"films": lines, "seconds": last - started, **memory_of(child.pid)})
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode not in (0, 3) or lines != count:
        sys.exit(f"magsd infer ended with {child.returncode} after {lines} of {count} lines")
    return {
        "first_s": first - started,
        "rate": (lines - 1) / (last - first) if lines > 1 else None,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1e3,
        "points": points,
    }


def memory_of(process: int) -> dict[str, float]:
    """Resident memory and its peak so far in MB; empty where the system does not say, or the process has ended."""
    names = {"VmRSS:": "mb", "VmHWM:": "peak_mb"}
    try:
        lines = [line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines()]
    except OSError:
        return {}
    return {names[line[0]]: int(line[1]) / 1e3 for line in lines if line and line[0] in names}


def rates(films: Path, bundle: str, jobs: int, rounds: int, *, alone: bool = True) -> dict[str, Any]:
    """One job and ``jobs`` in turns; medians."""
    count = sum(1 for _ in films.iterdir())
    one = sorted(films.iterdir())[0]
    many, single, film = [], [], []
    for _ in range(rounds):
        film.append(run(one, bundle, 1))
        many.append(run(films, bundle, count, "--jobs", jobs))
        if alone:
            single.append(run(films, bundle, count, "--jobs", 1, "--threads", 1))
    found: dict[str, Any] = {
        "films": count, "jobs": jobs, "rounds": rounds,
        "rate": median(each["rate"] for each in many),
        "cpu_s_a_film": median(each["cpu_s"] for each in many) / count,
        "first_s": median(each["first_s"] for each in many),
        "first_of_one_s": median(each["first_s"] for each in film),
        "peak_mb": max(each["peak_mb"] for each in many),
        "runs": {"many": many, "alone": single},
    }  # fmt: skip
    if alone:
        bare = median(each["cpu_s"] for each in single) / count
        found |= {"rate_alone": median(each["rate"] for each in single), "cpu_s_a_film_alone": bare,
                  "share_of_the_cores": found["rate"] * bare / jobs}  # fmt: skip
    return found


def report(found: dict[str, Any]) -> None:
    print(f"{found['films']} films, {found['jobs']} jobs, {found['rounds']} rounds")
    line = f"rate     {found['rate']:.1f} films/s, {1e3 * found['cpu_s_a_film']:.1f} ms of CPU a film"
    if "share_of_the_cores" in found:
        line += (
            f"; one job {found['rate_alone']:.1f}, {1e3 * found['cpu_s_a_film_alone']:.1f} ms; "
            f"{found['share_of_the_cores']:.2f} of cores / (CPU seconds a film)"
        )
    print(line)
    print(f"first    {found['first_s']:.2f} s; of one film alone {found['first_of_one_s']:.2f} s")
    points = [point for point in found["runs"]["many"][-1]["points"] if "mb" in point]
    for what, name in (("memory  ", "mb"), ("  (peak)", "peak_mb")):
        shown = "  ".join(f"{point['films']}: {point[name]:.0f}" for point in points)
        print(f"{what} MB by films done  {shown}")


def resumed(films: Path, folder: Path, bundle: str, jobs: int) -> dict[str, Any]:
    """Two SIGKILLs in the middle, then to the end, against a run that was left alone."""
    count = sum(1 for _ in films.iterdir())

    def made(place: Path) -> list[str]:
        return command(films, bundle, "--out", place, "--lines", place / "lines.jsonl", "--no-overlay", "--resume",
                       "--jobs", jobs)  # fmt: skip

    stopped, whole = folder / "stopped", folder / "whole"
    killed_after = []
    for share in (0.2, 0.3):
        child = subprocess.Popen(made(stopped), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout is not None
        for _ in range(max(1, int(share * count))):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.communicate()
        killed_after.append((stopped / "lines.jsonl").read_bytes().count(b"\n"))
    for place in (stopped, whole):
        subprocess.run(made(place), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = [{path.name: plain(path.read_text()) for path in place.glob("[!.]*.json")} for place in (stopped, whole)]
    lines = [list(map(plain, (place / "lines.jsonl").read_text().splitlines())) for place in (stopped, whole)]
    paths = [[line["path"] for line in each] for each in lines]
    by_path = {line["path"]: line for line in lines[0]}
    return {
        "killed_after": killed_after,
        "lost": len(set(paths[1]) - set(paths[0])) + len(records[1].keys() - records[0].keys()),
        "doubled": len(paths[0]) - len(set(paths[0])),
        "different": sum(by_path.get(line["path"]) != line for line in lines[1])
        + sum(records[0].get(name) != record for name, record in records[1].items()),
        "out_of_order": sum(one != other for one, other in zip(*paths)),
        "films": count,
    }


def plain(text: str) -> dict[str, Any]:
    return {name: value for name, value in json.loads(text).items() if name not in ("timings_ms", "files")}


def overlays(films: Path, bundle: str) -> dict[str, float]:
    """CPU time of one overlay, the films one after the other as in a folder."""
    from magsd_runtime import overlay
    from magsd_runtime.pipeline import Pipeline

    cv2.setNumThreads(1)
    rng = np.random.default_rng(1)
    taken: dict[str, list[float]] = {"jpeg": [], "png": []}
    sizes: dict[str, list[int]] = {"jpeg": [], "png": []}
    with Pipeline.open(bundle, threads=1) as pipeline, TemporaryDirectory() as folder:
        for number in range(30):
            path = Path(folder) / f"{number}.png"
            cv2.imwrite(str(path), chest(rng, 1024, 1024))
            result = pipeline.predict(path)
            assert result.radiograph is not None
            target = Path(folder) / "overlay.jpg"
            started = time.process_time()
            overlay.save_overlay(target, result.radiograph, result.heat, result.prediction)
            taken["jpeg"].append(time.process_time() - started)
            sizes["jpeg"].append(target.stat().st_size)
            started = time.process_time()
            drawn = overlay.draw_overlay(result.radiograph, result.heat, result.prediction)
            _, encoded = cv2.imencode(".png", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
            taken["png"].append(time.process_time() - started)
            sizes["png"].append(len(encoded))
    return {
        **{f"{name}_ms": 1e3 * median(times) for name, times in taken.items()},
        **{f"{name}_bytes": median(each) for name, each in sizes.items()},
    }


if __name__ == "__main__":
    main()
