"""What the rules on pixels say of real films (false alarms), and of films that were spoiled on purpose (detection).

    python benchmarks/pixel_rules.py --data train.csv [--originals FOLDER] [--changed 100] [--json FILE]

False alarms: every film of the table by the default rules; apart for the films that limits and template were chosen
on (half of the patients of the sources that are not left out), for other patients, and for each source. Detection: a
hundred films of other patients, the sources in turn, spoiled in each way and judged by the whole pipeline, once
with all rules on pixels switched off (what the statistics of the bundle catch by themselves) and once with them; and
the images of non_films.py. Cost: processor time of measuring and judging a film of 2000 x 2000 pixels.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from acceptance import Judge
from layout_template import chosen_on, read_rows
from magsd_runtime import pixel_rules
from magsd_runtime.errors import RESEARCH_USE, MagsdError
from magsd_runtime.images import Radiograph, find_images, read_radiograph
from magsd_runtime.pipeline import Pipeline
from magsd_runtime.pixel_rules import DEFAULT_SEVERITIES, PixelRules
from magsd_runtime.preprocessing import PreprocessingSpec, frame
from magsd_runtime.shipped import choose_bundle
from magsd_runtime.site_rules import SiteRules
from magsd_runtime.uncertainty import UncertaintyRules
from non_films import CHANGES, PHOTOGRAPHS, mirrored, non_films
from timing import describe, machine, save

Pixels = NDArray[np.uint8]
SURE = UncertaintyRules("ok", "ok")  # an unsure answer is no fault of the film
ON = SiteRules(uncertainty=SURE)
OFF = SiteRules(pixels=PixelRules(severity=dict.fromkeys(DEFAULT_SEVERITIES, "ok")), uncertainty=SURE)


def levels(film: Pixels, spread: float) -> Pixels:
    """The film with percentiles 5 and 95 ``spread`` grey levels apart, if they were further."""
    low, high = np.quantile(film, (0.05, 0.95))
    factor = min(1.0, spread / max(1.0, float(high - low)))
    return np.clip(np.rint(120 + (film.astype(np.float64) - (low + high) / 2) * factor), 0, 255).astype(np.uint8)


def smaller(film: Pixels, side: int) -> Pixels:
    """Its shorter side ``side`` pixels long, or as it is."""
    factor = side / min(film.shape)
    return film if factor >= 1 else np.asarray(cv2.resize(film, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), np.uint8)  # fmt: skip  # noqa: E501


def empty(film: Pixels) -> Pixels:
    """A frame with nothing before the detector: one grey and a little noise."""
    noise = np.random.default_rng(film.size).normal(0, 1.5, film.shape)
    return np.clip(np.rint(200 + noise), 0, 255).astype(np.uint8)


def part(top: float, bottom: float, left: float, right: float) -> Callable[[Pixels], Pixels]:
    """What lies between these fractions of height and width."""

    def cut(film: Pixels) -> Pixels:
        height, width = film.shape
        rows, columns = slice(int(top * height), int(bottom * height)), slice(int(left * width), int(right * width))
        return np.ascontiguousarray(film[rows, columns])

    return cut


def gain(film: Pixels, factor: float) -> Pixels:
    return np.clip(np.rint(film.astype(np.float64) * factor), 0, 255).astype(np.uint8)


# kind: (change, the codes that name it)
SPOILED: dict[str, tuple[Callable[[Pixels], Pixels], tuple[str, ...]]] = {
    "as it is": (lambda film: film, ()),
    "grey, saved as RGB": (lambda film: np.dstack([film] * 3), ()),
    "in false colours": (
        lambda film: np.asarray(cv2.applyColorMap(film, cv2.COLORMAP_JET), np.uint8),
        ("colour_photograph",),
    ),
    "empty frame": (empty, ("blank",)),
    "contrast of 6 levels": (lambda film: levels(film, 6), ("blank",)),
    "contrast of 20 levels": (lambda film: levels(film, 20), ("low_contrast",)),
    "contrast of 40 levels": (lambda film: levels(film, 40), ("low_contrast",)),
    "twice too bright": (lambda film: gain(film, 2), ("saturated",)),
    "twice too dark": (lambda film: 255 - gain(255 - film, 2), ("saturated",)),
    "128 pixels": (lambda film: smaller(film, 128), ("tiny",)),
    "160 pixels": (lambda film: smaller(film, 160), ("tiny",)),
    "left half": (part(0, 1, 0, 0.5), ("cropped",)),
    "right half": (part(0, 1, 0.5, 1), ("cropped",)),
    "left two thirds": (part(0, 1, 0, 0.67), ("cropped",)),
    "right two thirds": (part(0, 1, 0.33, 1), ("cropped",)),
    "upper half": (part(0, 0.5, 0, 1), ("cropped",)),
    "lower half": (part(0.5, 1, 0, 1), ("cropped",)),
    "middle quarter": (part(0.25, 0.75, 0.25, 0.75), ("cropped",)),
    "inverted": (CHANGES["film inverted"], ("inverted",)),
    "turned by 90": (CHANGES["film turned by 90"], ("turned",)),
    "turned by 270": (CHANGES["film turned by 270"], ("turned",)),
    "turned by 180": (CHANGES["film turned by 180"], ("upside_down",)),
    "upside down": (CHANGES["film upside down"], ("upside_down",)),
    "inverted, turned by 90": (lambda film: CHANGES["film turned by 90"](255 - film), ("inverted", "turned")),
    "mirrored": (mirrored, ()),
}


@dataclass
class Row:
    """Counts of one kind of image."""

    images: int = 0
    before: Counter[str] = field(default_factory=Counter)
    after: Counter[str] = field(default_factory=Counter)
    named: int = 0
    codes: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        return {"images": self.images, "without_rules": dict(self.before), "with_rules": dict(self.after),
                "named": self.named, "codes": dict(self.codes)}  # fmt: skip


def false_alarms(rows: Sequence[Mapping[str, str]], spec: PreprocessingSpec) -> dict[str, Any]:
    """By group of films: how many films, of how many patients, and how many each code flags."""
    groups: dict[str, dict[str, Any]] = {}
    mirror: dict[str, list[float]] = {}
    for row in rows:
        radiograph = read_radiograph(row["path"])
        facts = pixel_rules.measure(radiograph, frame(radiograph.pixels, spec))
        codes = [reason.code for reason in pixel_rules.judge(facts).reasons]
        name = f"{row['source']}, {'chosen on' if chosen_on(row) else 'not looked at'}"
        group = groups.setdefault(name, {"films": 0, "patients": set(), "any": 0, "codes": Counter(), "flagged": []})
        group["films"] += 1
        group["patients"].add(row["patient"])
        group["codes"].update(codes)
        if codes:
            group["any"] += 1
            group["flagged"].append([Path(row["path"]).name, *codes])
        mirror.setdefault(name, []).append(facts.layout[6] - facts.layout[0])
    limit = float(np.quantile(np.concatenate([m for name, m in mirror.items() if name.endswith("chosen on")]), 0.99))
    for name, group in groups.items():
        group["patients"] = len(group["patients"])
        # What a rule on mirrored films would do whose limit lets 99 % of the films it was chosen on pass
        values = np.array(mirror[name])
        group["mirror_rule"] = {"limit": limit, "false_alarms": float((values > limit).mean()),
                                "detected": float((-values > limit).mean())}  # fmt: skip
    return groups


def detection(rows: Sequence[Mapping[str, str]], pipeline: Pipeline, folder: Path) -> dict[str, Row]:
    """Each film spoiled in each way of :data:`SPOILED`, and the images of non_films.py's half ``report``."""
    plain = Judge(Pipeline(pipeline.bundle, pipeline.backend, rules=OFF), folder)
    ruled = Judge(pipeline, folder)
    found: dict[str, Row] = {}

    def one(kind: str, pixels: Pixels, expected: Sequence[str]) -> None:
        row = found.setdefault(kind, Row())
        row.images += 1
        row.before[plain.pixels(pixels).status] += 1
        after = ruled.pixels(pixels)
        row.after[after.status] += 1
        codes = [reason.code for reason in after.reasons]
        row.codes.update(codes)
        row.named += bool(expected) and set(expected) <= set(codes)

    for film in rows:
        pixels = read_radiograph(film["path"]).pixels
        for kind, (change, expected) in SPOILED.items():
            one(kind, change(pixels), expected)
    for name in PHOTOGRAPHS["report"]:
        import skimage

        picture = cv2.imread(str(Path(skimage.__file__).parent / "data" / name), cv2.IMREAD_COLOR)
        if picture is not None and float((picture.max(axis=2) - picture.min(axis=2)).mean()) > 1:
            one("colour photograph", np.asarray(picture, np.uint8), ("colour_photograph",))
    for kind, _, pixels in non_films("report"):
        one(f"no film: {kind}", pixels, ())
    return found


def cost(rows: Sequence[Mapping[str, str]], spec: PreprocessingSpec) -> dict[str, float]:
    """Milliseconds of processor time to measure and judge a film enlarged to 2000 x 2000, the framing not counted."""
    times = []
    for row in rows:
        pixels = cv2.resize(read_radiograph(row["path"]).pixels, (2000, 2000), interpolation=cv2.INTER_CUBIC)
        radiograph = Radiograph(np.asarray(pixels, np.uint8), {})
        framing = frame(radiograph.pixels, spec)
        started = time.process_time()
        pixel_rules.judge(pixel_rules.measure(radiograph, framing))
        times.append(1e3 * (time.process_time() - started))
    return {"films": len(times), "median": float(np.median(times)), "p90": float(np.quantile(times, 0.9))}


def spread(rows: Sequence[dict[str, str]], count: int) -> list[dict[str, str]]:
    """``count`` films of patients that nothing was chosen on, the sources in turn."""
    by_source: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if not chosen_on(row):
            by_source.setdefault(row["source"], []).append(row)
    rng = np.random.default_rng(6)
    mixed = [[films[at] for at in rng.permutation(len(films))] for _, films in sorted(by_source.items())]
    longest = max(map(len, mixed), default=0)
    return [films[turn] for turn in range(longest) for films in mixed if turn < len(films)][:count]


def alarm_table(groups: Mapping[str, Any]) -> str:
    codes = [code for code in DEFAULT_SEVERITIES if any(group["codes"][code] for group in groups.values())]
    lines = [f"{'films that a rule flags':28}{'films':>7}{'patients':>10}{'any':>6}   by code"]
    for name, group in sorted(groups.items()):
        by = ", ".join(f"{code} {group['codes'][code]}" for code in codes if group["codes"][code]) or "-"
        lines.append(f"{name:28}{group['films']:7}{group['patients']:10}{group['any']:6}   {by}")
    return "\n".join(lines)


def detection_table(found: Mapping[str, Row]) -> str:
    lines = [f"{'in %':28}{'images':>7} |{'review':>7}{'reject':>7} |{'review':>7}{'reject':>7}{'named':>7}   codes",
             f"{'':28}{'':7} |{'without rules':>14} |{'with rules':>14}"]  # fmt: skip
    for kind, row in found.items():
        cells = [100 * table[status] / row.images for table in (row.before, row.after) for status in ("review", "rejected")]  # fmt: skip  # noqa: E501
        named = f"{100 * row.named / row.images:7.1f}" if SPOILED.get(kind, (0, (1,)))[1] else f"{'':7}"
        named = f"{'':7}" if kind.startswith("no film") else named
        codes = ", ".join(f"{code} {count}" for code, count in row.codes.most_common(4))
        lines.append(f"{kind:28}{row.images:7} |{cells[0]:7.1f}{cells[1]:7.1f} |{cells[2]:7.1f}{cells[3]:7.1f}{named}   {codes}")  # fmt: skip  # noqa: E501
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], epilog=RESEARCH_USE)
    parser.add_argument("--data", required=True, type=Path, metavar="M.csv", help="real films, with patient and source")
    parser.add_argument("--bundle", metavar="DIR", help="default: the one in the box")
    parser.add_argument("--originals", type=Path, metavar="FOLDER", help="files to judge one by one")
    parser.add_argument("--changed", type=int, default=100, metavar="N", help="films to spoil (default: 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    options = parser.parse_args(argv)
    cv2.setNumThreads(1)
    started = time.perf_counter()
    try:
        rows = read_rows(options.data)
        with Pipeline.open(choose_bundle(options.bundle), "cpu", threads=1, rules=ON) as pipeline:
            spec = pipeline.bundle.preprocessing
            groups = false_alarms(rows, spec)
            chosen = spread(rows, options.changed)
            with tempfile.TemporaryDirectory() as folder:
                found = detection(chosen, pipeline, Path(folder))
            milliseconds = cost(chosen[:30], spec)
            files = find_images([str(options.originals)]) if options.originals is not None else []
            judged = [(path.name, pipeline.predict(path, with_heat=False).prediction) for path in files]
    except MagsdError as error:
        print(f"pixel_rules: {error}", file=sys.stderr)
        return error.exit_code
    results: dict[str, Any] = {
        "machine": machine("numpy", "opencv-python-headless", "onnxruntime", "scikit-image"),
        "data": str(options.data),
        "rules_sha256": SiteRules().sha256(),
        "rules": PixelRules().to_dict(),
        "false_alarms": groups,
        "detection": {kind: row.to_dict() for kind, row in found.items()},
        "milliseconds": milliseconds,
        "originals": {name: [p.status, *(reason.code for reason in p.reasons)] for name, p in judged},
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(f"{describe(results['machine'])}\n{options.data}\n\n{alarm_table(groups)}\n")
    for name, group in sorted(groups.items()):
        rule = group["mirror_rule"]
        print(f"a rule on mirrored films, {name}: {100 * rule['false_alarms']:.1f} % false alarms, "
              f"{100 * rule['detected']:.0f} % detected")  # fmt: skip
    print(f"\n{detection_table(found)}\n")
    for name, verdict in results["originals"].items():
        print(f"{name}: {', '.join(verdict)}")
    print(f"rules: {milliseconds['median']:.2f} ms a film of 2000 x 2000 (median of {milliseconds['films']}; "
          f"90 % below {milliseconds['p90']:.2f} ms)")  # fmt: skip
    save(options.json, results)
    print(RESEARCH_USE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
