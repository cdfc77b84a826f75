"""How many films a bundle accepts, and how many images that are no films it flags or refuses.

    python benchmarks/acceptance.py BUNDLE --data M.csv [--half development] [--changed 40] [--json FILE]

Each image goes through the runtime as a file would, from pixels on. Films are those of M.csv: they must be of patients
that the bundle was not trained on, or the share that is accepted means little. ``--changed`` of them, spread over the
sources, are also inverted, turned and laid upside down. The non-films are those of benchmarks/non_films.py: by default
of the half that nothing was chosen on. A mirrored film is shown apart: its pixels do not say that it is one.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from controls import plain_manifest
from magsd.data import Record
from magsd_runtime.errors import RESEARCH_USE, ImageError, MagsdError, UsageError
from magsd_runtime.images import read_radiograph
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.pixel_rules import DEFAULT_SEVERITIES, PixelRules
from magsd_runtime.prediction import Prediction
from magsd_runtime.site_rules import SiteRules
from magsd_runtime.uncertainty import UncertaintyRules
from non_films import CHANGES, Pixels, mirrored, non_films
from timing import describe, machine, save

STATUSES = ("ok", "review", "rejected", "error")
STATISTICS_ALONE = SiteRules(
    pixels=PixelRules(severity=dict.fromkeys(DEFAULT_SEVERITIES, "ok")), uncertainty=UncertaintyRules("ok", "ok")
)
"""benchmarks/pixel_rules.py measures what the rules on pixels add."""


class Judge:
    """The pipeline on pixels: PNG files in a folder that goes away, one after the other."""

    def __init__(self, pipeline: Pipeline, folder: Path) -> None:
        self._pipeline, self._path = pipeline, folder / "image.png"
        self.milliseconds: list[float] = []

    def pixels(self, pixels: Pixels) -> Prediction:
        if not cv2.imwrite(str(self._path), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
            raise UsageError(f"{self._path} cannot be written")
        return self.file(self._path)

    def file(self, path: Path) -> Prediction:
        prediction = self._pipeline.predict(path, with_heat=False).prediction
        if "acceptance" in prediction.timings_ms:
            self.milliseconds.append(prediction.timings_ms["acceptance"])
        return prediction


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    started = time.perf_counter()
    try:
        records = plain_manifest(arguments.data, arguments.limit).records
        with Pipeline.open(arguments.bundle, "cpu", threads=arguments.threads, rules=STATISTICS_ALONE) as pipeline:
            if pipeline.bundle.acceptance is None:
                raise UsageError(f"{arguments.bundle}: has no acceptance statistics (magsd export makes them)")
            cv2.setNumThreads(arguments.threads)
            with tempfile.TemporaryDirectory() as folder:
                judge = Judge(pipeline, Path(folder))
                films = [(f"films of {record.source or 'one source'}", judge.file(record.path)) for record in records]
                changed = list(_changed(judge, _spread(records, arguments.changed)))
                others = [(kind, judge.pixels(pixels)) for kind, _, pixels in non_films(arguments.half)]
            results: dict[str, Any] = {
                "machine": machine("numpy", "opencv-python-headless", "onnxruntime", "scikit-image"),
                "bundle": {"name": pipeline.bundle.name, "model_sha256": pipeline.bundle.model_sha256},
                "chosen": pipeline.bundle.manifest["acceptance"]["chosen"],
                "data": str(arguments.data),
                "half": arguments.half,
                "films": shares(films),
                "non_films": shares(others + [row for row in changed if row[0] != "film mirrored"]),
                "mirrored": shares([row for row in changed if row[0] == "film mirrored"]),
                "acceptance_ms": {
                    "median": float(np.median(judge.milliseconds)),
                    "p99": float(np.quantile(judge.milliseconds, 0.99)),
                    "images": len(judge.milliseconds),
                },
            }
    except MagsdError as error:
        print(f"acceptance: {error}", file=sys.stderr)
        return error.exit_code
    results["seconds"] = round(time.perf_counter() - started, 1)
    print(f"{describe(results['machine'])}\n{arguments.data}; non-films: half {arguments.half}\n")
    for title in ("films", "non_films", "mirrored"):
        if results[title]:
            print(table(title.replace("_", "-"), results[title]) + "\n")
    cost = results["acceptance_ms"]
    print(f"the statistics took {cost['median']:.2f} ms an image (median; 99 % below {cost['p99']:.2f} ms)")
    save(arguments.json, results)
    print(RESEARCH_USE)
    return 0


def shares(rows: Sequence[tuple[str, Prediction]]) -> dict[str, dict[str, Any]]:
    """Per kind, and for ``all``: how many images, how many of each status, and by which reasons."""
    found: dict[str, dict[str, Any]] = {}
    for kind, prediction in rows:
        for name in (kind, "all"):
            row = found.setdefault(name, {"images": 0, **dict.fromkeys(STATUSES, 0), "reasons": {}})
            row["images"] += 1
            row[prediction.status] += 1
            for reason in prediction.reasons:
                row["reasons"][reason.code] = row["reasons"].get(reason.code, 0) + 1
    if "all" in found:
        found["all"] = found.pop("all")  # last
    return found


def table(title: str, rows: dict[str, dict[str, Any]]) -> str:
    """One line a kind: images, and the share of each status in per cent."""
    lines = [f"{title:24}{'images':>8}" + "".join(f"{status + ' %':>12}" for status in STATUSES) + "   reasons"]
    for name, row in rows.items():
        parts = "".join(f"{100 * row[status] / row['images']:12.1f}" for status in STATUSES)
        why = ", ".join(f"{code} {count}" for code, count in sorted(row["reasons"].items()))
        lines.append(f"{name:24}{row['images']:8}{parts}   {why}")
    return "\n".join(lines)


def _changed(judge: Judge, records: Sequence[Record]) -> Iterator[tuple[str, Prediction]]:
    for record in records:
        try:
            film = read_radiograph(record.path).pixels
        except ImageError:
            continue
        for kind, change in {**CHANGES, "film mirrored": mirrored}.items():
            yield kind, judge.pixels(change(film))


def _spread(records: Sequence[Record], limit: int) -> list[Record]:
    """``limit`` of them, the sources in turn, in an order by the hash of their names."""
    by_source: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: hashlib.sha256(record.path.name.encode()).digest()):
        by_source.setdefault(record.source, []).append(record)
    longest = max((len(rows) for rows in by_source.values()), default=0)
    in_turn = [rows[turn] for turn in range(longest) for _, rows in sorted(by_source.items()) if turn < len(rows)]
    return in_turn[:limit]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], epilog=RESEARCH_USE)
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that magsd export wrote")
    parser.add_argument("--data", required=True, type=Path, metavar="M.csv", help="films that it was not trained on")
    parser.add_argument(
        "--half", choices=("report", "development"), default="report", help="which non-films (default: report)"
    )
    parser.add_argument("--changed", type=int, default=40, metavar="N", help="films to invert and turn (default: 40)")
    parser.add_argument("--limit", type=int, metavar="N", help="films to judge (default: all)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
