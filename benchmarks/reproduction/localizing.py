"""Where the models of a plan look, side by side: every model whose weights were kept, on the plan's boxes or masks.

Section 4.4.6 of the paper, with what it takes to read such figures: the class evidence map beside the mean attention
map, baselines that look at nothing, thresholds chosen on other patients, intervals, and differences film by film.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from magsd.data import Manifest, read_manifest
from magsd.judging import judge_bundle, judge_run
from magsd.localization_evaluation import Localization, evaluate_localization
from magsd.localization_metrics import Case
from magsd.predictors import open_target
from magsd.progress import no_bar
from magsd_runtime.bundle import Bundle
from magsd_runtime.errors import RESEARCH_USE, DataError, UsageError
from magsd_runtime.preprocessing import PreprocessingSpec

from .cells import Cell, collect, unique
from .output import Grid
from .plan import Plan
from .variants import REFERENCE, title_of

SCHEMA = "magsd.localization-comparison/1"
HARDEST = "central_box_fitted"
"""The baseline that the table's difference is to: it, too, has seen other boxes, and never the film."""
BASELINE_TEXTS = {
    "central_box": "fixed central box, half of each side",
    "central_box_fitted": "central box of fitted size",
    "random_map": "random map",
}


@dataclass(frozen=True)
class Compared:
    """One model: runs, with the fold to judge (None: all), or a bundle. ``asked``: named by --also."""

    title: str
    sources: tuple[tuple[Path, int | None], ...]
    asked: bool = False


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a model's folds said of the films that none of them was trained on."""

    model: Compared
    cases: tuple[Case, ...]
    spec: PreprocessingSpec
    classes: tuple[str, ...]
    found: Localization


def models_of(
    plan: Plan, cells: Sequence[Cell], out: Path, also: Sequence[str] = ()
) -> tuple[list[Compared], list[str]]:
    """The models whose weights are there, the plan's ``trained_on`` and MAG-SD first; and those done without weights.

    ``also``: further runs or bundles, each ``NAME=FOLDER`` or ``FOLDER``.

    Raises
    ------
    UsageError
        If a further folder is not there.
    """
    results = collect(list(cells), out)
    kept: dict[tuple[str, str], list[tuple[Path, int | None]]] = {}
    lost: dict[tuple[str, str], None] = {}
    for cell in unique(list(cells)):
        if cell.key not in results:
            continue
        run = cell.folder(out) / "run"
        if (run / f"fold{cell.fold}" / "best.pt").is_file():
            kept.setdefault((cell.data, cell.variant), []).append((run, cell.fold))
        else:
            lost[cell.data, cell.variant] = None
    first = plan.localization[1] if plan.localization is not None else ""
    order = sorted(kept, key=lambda row: (row[1] != REFERENCE, row[0] != first))
    models = [Compared(f"{title_of(variant)}, {data}", tuple(kept[data, variant])) for data, variant in order]
    for text in also:
        name, found, folder = text.rpartition("=")
        path = Path(folder)
        if not path.is_dir():
            raise UsageError(f"--also {text}: {path} is no folder; expected NAME=RUN or NAME=BUNDLE")
        models.append(Compared(name if found else path.resolve().name, ((path, None),), asked=True))
    return models, [f"{title_of(variant)} of {data}" for data, variant in lost if (data, variant) not in kept]


def judged(
    model: Compared, manifest: Manifest, *, device: str = "auto", minimum_score: float = 0.0, batch: int = 32,
    resamples: int = 1000,
) -> Judgement:  # fmt: skip
    """Every fold's model on the films of patients it has not met; each counts once a film.

    Thresholds are chosen as `magsd evaluate` does for a run: a bundle's own is not used, nor its minimum score, so that
    all are alike. ``minimum_score``: the heat, 0 to 1, that a region must reach somewhere to count; 0 is the paper's.

    Raises
    ------
    DataError
        If no film has a box or a mask, or the model has met all the patients.
    """
    cases: list[Case] = []
    tuning: dict[int, list[Case]] = {}
    spec, classes = None, ()
    for path, fold in model.sources:
        target = open_target(path)
        found = (
            judge_bundle(target, manifest, device, batch, no_bar)
            if isinstance(target, Bundle)
            else judge_run(target, manifest, fold, device, batch, no_bar)
        )
        # runs of several seeds have the same folds, and are several models
        first = max((case.fold for case in cases), default=-1) + 1
        numbers = {number: first + index for index, number in enumerate(sorted({case.fold for case in found.cases}))}
        cases += [replace(case, fold=numbers[case.fold]) for case in found.cases]
        tuning |= {numbers[number]: part for number, part in found.tuning.items() if number in numbers}
        if spec is not None and target.preprocessing != spec:
            raise DataError(f"{path} has another preprocessing than the other folds of {model.title}")
        spec, classes = target.preprocessing, target.classes
    if not cases or spec is None:
        raise DataError(f"{model.title}: no film of the manifest has a box or a mask")
    result = evaluate_localization(cases, tuning, spec, minimum_score=minimum_score, resamples=resamples)
    return Judgement(model, tuple(cases), spec, tuple(classes), result)


def compare(
    plan: Plan, cells: Sequence[Cell], out: Path, data_root: Path, say: Callable[[str], None], *,
    also: Sequence[str] = (), device: str = "auto", minimum_score: float = 0.0, batch: int = 32, resamples: int = 1000,
) -> tuple[dict[str, Any], list[Judgement]]:  # fmt: skip
    """The report of all models, for JSON and Markdown, and what they said of each film.

    Raises
    ------
    UsageError
        If the plan names no films with boxes or masks, no model's weights are there, or the minimum score is none.
    """
    if not 0 <= minimum_score <= 1:
        raise UsageError(f"--minimum-score is {minimum_score:g}: expected 0 to 1")
    if plan.localization is None:
        raise UsageError(f"{plan.path} has no line 'localization': name films with boxes or masks there")
    models, lost = models_of(plan, cells, out, also)
    if not models:
        raise UsageError(f"no finished cell of {out} has its weights: keep them (keep in the plan, or --keep)")
    manifest = read_manifest(data_root / plan.localization[0])
    judgements = []
    for model in models:
        say(f"{model.title} on {plan.localization[0]}")
        options: dict[str, Any] = {"device": device, "minimum_score": minimum_score, "batch": batch}
        judgements.append(judged(model, manifest, resamples=resamples, **options))
    report = {
        "schema": SCHEMA,
        "research_use_only": True,
        "plan": plan.name,
        "manifest": plan.localization[0],
        "minimum_score": minimum_score,
        "paper_trained_on": "B",
        "without_weights": lost,
        "models": [
            {
                "title": each.model.title,
                "sources": [str(path) for path, _ in each.model.sources],
                "models": len({case.fold for case in each.cases}),
                "classes": list(each.classes),
                "grid": list(next(iter(each.cases[0].heats.values())).shape),
                "localization": each.found.summary,
            }
            for each in judgements
        ],
    }
    return {**report, "notes": notes_of(report, judgements)}, judgements


def notes_of(report: Mapping[str, Any], judgements: Sequence[Judgement]) -> list[str]:
    """What the figures show and what they do not, as far as they themselves tell."""
    records = {case.record.path: case.record for each in judgements for case in each.cases}.values()
    sources = sorted({record.source for record in records if record.source})
    kinds = sorted({case.truth.kind for each in judgements for case in each.cases})
    notes = [
        f"{len(records)} films of {len({record.patient for record in records})} patients, ground truth: "
        f"{' and '.join(kinds)}"
        + (f", all of one source ({sources[0]})" if len(sources) == 1 else "")
        + ". Intervals: 95 %, patients resampled. They do not cover another training, other films or another hospital; "
        "the folds' models of a row judge the same films, which does not make these more.",
        "IoU as in section 4.4.6: of masks where a mask was drawn, of enclosing boxes where boxes were. Thresholds are "
        "chosen on other patients, for the fitted box too, never on the film itself.",
    ]
    if report["minimum_score"]:
        notes.append(
            f"Of the regions above the threshold those count that reach {report['minimum_score']:g}, and the "
            "strongest, in the random maps too; the paper has no such rule."
        )
    beyond, pointing, rows = [], [], 0
    for model in report["models"]:
        for name, row in model["localization"]["maps"].items():
            rows += 1
            for score, other, found in (("iou_mean", HARDEST, beyond), ("pointing", "random_map", pointing)):
                interval = row["beyond"][other][f"{score}_ci95"]
                if interval is not None and interval[0] > 0:
                    found.append(f"{model['title']} ({name})")
    notes.append(
        "Mean IoU beyond that of the central box of fitted size, interval above 0: "
        + (
            ", ".join(beyond)
            if beyond
            else "none: these films do not show any map to be better than a box that looks at nothing"
        )
        + f". Of {rows} rows, uncorrected for their number."
    )
    notes.append(
        "Peak inside more often than a random map's, interval above 0: "
        + (", ".join(pointing) if pointing else "none")
        + "."
    )
    labels = {record.label for record in records}
    unknown = [each.model.title for each in judgements if not labels <= set(each.classes)]
    if unknown:
        notes.append(
            f"Evidence maps are of the class that the manifest gives; of films whose class a model does not know "
            f"({', '.join(unknown)}), of the class it predicts."
        )
    if report["without_weights"]:
        notes.append(f"Done, but their weights were not kept (--keep all): {', '.join(report['without_weights'])}.")
    notes.append(
        "The paper trained on data set B, says that selected films have over 0.25 IoU and gives no mean: there is no "
        "published figure to hold these against."
    )
    return notes


def grid_of(report: Mapping[str, Any]) -> Grid:
    """A row for each model and map, then the baselines; a baseline that is the same for all is there once."""
    head = ("model", "map", "films", "patients", "models", "mean IoU (95 %)", "IoU >= 0.25 (95 %)",
            "peak inside (95 %)", "energy inside (95 %)", "IoU, a box a region", "IoU of masks", "threshold (range)",
            "mean IoU beyond the fitted box (95 %)")  # fmt: skip
    rows: list[tuple[str, ...]] = []
    baselines: dict[tuple[str, ...], list[str]] = {}
    for model in report["models"]:
        part = model["localization"]
        counts = (str(part["images"]), str(part["patients"]), str(model["models"]))
        for name, row in part["maps"].items():
            low, high = row["threshold_range"]
            used = f"{row['threshold']:.2f}" + (f" ({low:.2f} to {high:.2f})" if low != high else "")
            rows.append(
                (model["title"], name, *counts, *_scores(row), used, _score(row["beyond"][HARDEST], "iou_mean"))
            )
        for name, row in part["baselines"].items():
            text = BASELINE_TEXTS[name] + (f", {model['grid'][0]} x {model['grid'][1]}" if name == "random_map" else "")
            baselines.setdefault((text, *counts[:2], *_scores(row)), []).append(model["title"])
    often = [text for text, *_ in baselines]
    for (text, films, patients, *scores), titles in sorted(baselines.items(), key=lambda item: item[0][0]):
        of = f" (for {', '.join(titles)})" if often.count(text) > 1 else ""
        rows.append((f"baseline: {text}{of}", "-", films, patients, "-", *scores, "-", "-"))
    return Grid(f"Section 4.4.6: where the models look, {report['manifest']}", head, tuple(rows))


def to_markdown(report: Mapping[str, Any]) -> str:
    """The table and what it shows and does not."""
    grid = grid_of(report)
    lines = [f"Plan {report['plan']}, localization. {RESEARCH_USE}", "", f"**{grid.title}**", ""]
    body = (grid.head, ("---",) * len(grid.head), *grid.rows)
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body]
    return "\n".join([*lines, "", *(f"- {note}" for note in report["notes"]), ""])


def _scores(row: Mapping[str, Any]) -> tuple[str, ...]:
    with_interval = tuple(_score(row, name) for name in ("iou_mean", "iou_at_25", "pointing", "energy_inside"))
    return (*with_interval, f"{row['regions_iou_mean']:.3f}", f"{row['mask_iou_mean']:.3f}")


def _score(row: Mapping[str, Any], name: str) -> str:
    interval = row[f"{name}_ci95"]
    return f"{row[name]:.3f}" + ("" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})")
