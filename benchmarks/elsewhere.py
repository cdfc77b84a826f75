"""A stand-in for 'a hospital that is not in the training files', made of the chest films at hand.

    python benchmarks/elsewhere.py make --out DIR [--data-root CXR] [--json FILE]
    magsd train --data DIR/train-0.csv --out run0 --final --select last ...           and the same for side 1
    magsd export run0 --final --out bundle0
    magsd evaluate bundle0 --data DIR/test-0.csv --out eval0
    python benchmarks/elsewhere.py score eval0 eval1 [--json FILE]
    python benchmarks/elsewhere.py control DIR [--json FILE]        a control that sees no picture, in seconds

`make` copies no image. On each side, 0 and 1, half of the contributors of the cohen collection (the domains that
its films came from) and a fifth of the nih patients are kept from training; kermany, a third hospital, is never
trained on. A patient is never on both sides of a split.

`score` asks of the held-out films:
    o1  COVID-19 against all else within held-out cohen contributors: one kind of source, no source to recognise
    o2  COVID-19 of held-out contributors against kermany: neither source was seen in training
    o3  pneumonia against healthy within kermany, by 1 - p(healthy)
    o4  COVID-19 of held-out contributors against held-out nih: as inside, the source gives the class away
    o5  pneumonia against healthy within held-out nih, by 1 - p(healthy)
and calls the mean of o1, o2 and o3 "elsewhere". Values are ROC AUCs with 95 % intervals by resampling patients.
kermany's patients are children, those of the others mostly adults: o2 can be won by telling a child from an adult.

`control` fits the classifiers of shortcuts.py, part c, on train-S.csv and scores them on test-S.csv. They see aspect
ratio, size and a histogram of greys: what they reach in o4 and o5 is worth nothing, and a stand-in on which they
were good would be none.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from magsd.data import read_manifest
from magsd.predictors import BUNDLE_FOLD, Predictions
from magsd_runtime.errors import RESEARCH_USE, DataError, MagsdError
from magsd_runtime.files import write_text
from scores import COVID, HEALTHY, Task, auc, class_task, default_data_root, join, read_predictions, shown
from timing import save

SIDES = (0, 1)
GROUPS = (
    ("radiopaedia.org", "www.sciencedirect.com", "link.springer.com", "www.nejm.org"),
    ("www.eurorad.org", "pubs.rsna.org", "www.sirm.org", "github.com", "www.ncbi.nlm.nih.gov"),
)
"""Domains of the large contributors; every other domain goes to one of the two groups by its hash."""

LABELS = {"viral_pneumonia": "pneumonia", "bacterial_pneumonia": "pneumonia"}
"""Classes of dataset_c as classes of dataset_b."""

QUESTIONS = {
    "o1": "COVID-19 within held-out contributors",
    "o2": "COVID-19 of held-out contributors against kermany",
    "o3": "kermany, pneumonia against healthy",
    "o4": "COVID-19 of held-out contributors against held-out nih",
    "o5": "held-out nih, pneumonia against healthy",
}
ELSEWHERE = ("o1", "o2", "o3")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("make", help="write train-0.csv, test-0.csv, train-1.csv, test-1.csv")
    making.add_argument("--out", required=True, type=Path, metavar="DIR")
    making.add_argument("--data-root", type=Path, default=default_data_root(), metavar="CXR",
                        help="folder of dataset_b.csv (default: $MAGSD_DATA, or shared/data/cxr)")  # fmt: skip
    scoring = verbs.add_parser("score", help="score what `magsd evaluate` wrote on test-0.csv or test-1.csv")
    scoring.add_argument("evaluations", nargs="+", type=Path, metavar="DIR_OF_PREDICTIONS")
    scoring.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples (default: 1000)")
    control = verbs.add_parser("control", help="score classifiers that see no picture")
    control.add_argument("made", type=Path, metavar="DIR", help="--out of make")
    control.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples (default: 1000)")
    for verb in (making, scoring, control):
        verb.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        if arguments.verb == "make":
            result = make(arguments.data_root, arguments.out)
            print(counts_table(result))
        elif arguments.verb == "control":
            result = {
                name: score(named, resamples=arguments.bootstrap)
                for name, named in control_predictions(arguments.made).items()
            }
            print("\n\n".join(f"{name}\n{scores_table(scores)}" for name, scores in result.items()))
        else:
            named = {str(path): read_predictions(path) for path in arguments.evaluations}
            result = score(named, resamples=arguments.bootstrap)
            print(scores_table(result))
    except MagsdError as error:
        print(f"elsewhere: {error}", file=sys.stderr)
        return error.exit_code
    print(RESEARCH_USE)
    save(arguments.json, result)
    return 0


def make(data_root: Path, out: Path) -> dict[str, Any]:
    """Write the four manifests into ``out``, with absolute paths; return images and patients by class and source.

    Raises
    ------
    DataError
        If a file of ``data_root`` is missing, or has no url for an image of the cohen collection.
    """
    films = read_films(data_root)
    groups = contributor_groups(films)
    columns = list(films[0])
    result: dict[str, Any] = {}
    for side in SIDES:
        for part in ("train", "test"):
            rows = [film for film in films if part_of(film, side, groups) == part]
            name = f"{part}-{side}.csv"
            text = io.StringIO()
            table = csv.DictWriter(text, columns, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
            write_text(out / name, text.getvalue())
            images = Counter(f"{film['source']} {film['label']}" for film in rows)
            result[name] = {
                "images": dict(sorted(images.items())),
                "patients": len({film["patient"] for film in rows}),
                "domains": sorted({film["domain"] for film in rows if film["domain"]}),
            }
    return result


def read_films(data_root: Path) -> list[dict[str, str]]:
    """Rows of dataset_b and the kermany rows of dataset_c, labels of b, sorted by path; ``domain`` is new.

    ``path`` is absolute; ``domain`` is that of a cohen image's url, empty for other sources.
    """
    licences = {row["path"]: row for row in _rows(data_root / "cohen_licences.csv")}
    rows = _rows(data_root / "dataset_b.csv")
    rows += [row for row in _rows(data_root / "dataset_c.csv") if row["source"] == "kermany"]
    films = []
    for row in sorted(rows, key=lambda row: row["path"]):
        domain = ""
        if row["source"] == "cohen":
            domain = (urlsplit(licences.get(row["path"], {}).get("url", "")).hostname or "").lower()
            if not domain:
                raise DataError(f"{data_root / 'cohen_licences.csv'}: has no url for {row['path']}")
        label = LABELS.get(row["label"], row["label"])
        path = str((data_root / row["path"]).absolute())
        films.append({**row, "path": path, "label": label, "domain": domain})
    return films


def stable_number(text: str) -> int:
    """SHA-256 of the text as a number: the same everywhere."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def domain_group(domain: str) -> int:
    """0 or 1."""
    for group, domains in enumerate(GROUPS):
        if domain in domains:
            return group
    return stable_number(domain) % 2


def contributor_groups(films: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """The group of each cohen patient: that of its first film, so that no patient is split."""
    groups: dict[str, int] = {}
    for film in films:
        if film["source"] == "cohen":
            groups.setdefault(film["patient"], domain_group(film["domain"]))
    return groups


def part_of(film: Mapping[str, str], side: int, groups: Mapping[str, int]) -> str | None:
    """``train`` or ``test`` of a side; None for the kermany films that are in neither."""
    if film["source"] == "kermany":
        return "test" if stable_number(film["patient"]) % 3 == 0 else None
    if film["source"] == "cohen":
        return "test" if groups[film["patient"]] == side else "train"
    return "test" if stable_number(film["patient"]) % 5 == side else "train"


def questions(predictions: Predictions) -> dict[str, Task | None]:
    """The five tasks; None where the model lacks the class asked for."""
    source = np.array([record.source for record in predictions.records], dtype=object)
    covid = np.array([record.label == COVID for record in predictions.records], np.bool_)
    of = {name: source == name for name in ("cohen", "kermany", "nih")}
    held_out = of["cohen"] & covid
    return {
        "o1": class_task(predictions, COVID, of["cohen"]),
        "o2": class_task(predictions, COVID, held_out | of["kermany"]),
        "o3": _not_healthy(predictions.select(of["kermany"])),
        "o4": class_task(predictions, COVID, held_out | of["nih"]),
        "o5": _not_healthy(predictions.select(of["nih"])),
    }


def score(named: Mapping[str, Predictions], *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """AUCs of each evaluation and, with several, of all together; every model counts once in a mean.

    "elsewhere" is the mean of o1, o2 and o3, None unless all three have a value; its interval draws each patient
    for all of them at once.
    """
    of_each = {name: questions(predictions) for name, predictions in named.items()}
    result: dict[str, Any] = {
        "evaluations": {name: _scores([tasks], resamples, seed) for name, tasks in of_each.items()},
        "bootstrap": {"resamples": resamples, "seed": seed, "unit": "patient"},
    }
    if len(of_each) > 1:
        result["mean"] = _scores(list(of_each.values()), resamples, seed)
    return result


def control_predictions(made: Path) -> dict[str, dict[str, Predictions]]:
    """Predictions of each classifier of :mod:`controls` on each side's test films, fitted on its training films.

    Raises
    ------
    DataError, ImageError
        If ``made`` lacks a manifest of `make`, or a film cannot be read.
    """
    from controls import classifiers, facts_of

    result: dict[str, dict[str, Predictions]] = {name: {} for name in classifiers()}
    for side in SIDES:
        train, test = (read_manifest(made / f"{part}-{side}.csv") for part in ("train", "test"))
        facts, labels, asked = facts_of(train), train.label_indices(), facts_of(test)
        for name, make_classifier in classifiers().items():
            probabilities = make_classifier().fit(facts, labels).predict_proba(asked)
            models = np.full(len(test.records), BUNDLE_FOLD, np.int64)
            result[name][f"side {side}"] = Predictions(train.classes, test.records, models, probabilities)
    return result


def counts_table(result: Mapping[str, Any]) -> str:
    cells = sorted({cell for part in result.values() for cell in part["images"]})
    lines = [f"{'images':22}" + "".join(f"{name:>13}" for name in result)]
    for cell in cells:
        lines.append(f"{cell:22}" + "".join(f"{part['images'].get(cell, 0):13}" for part in result.values()))
    lines.append(f"{'patients':22}" + "".join(f"{part['patients']:13}" for part in result.values()))
    return "\n".join(lines)


def scores_table(result: Mapping[str, Any]) -> str:
    blocks = dict(result["evaluations"])
    if "mean" in result:
        blocks[f"mean of {len(blocks)}"] = result["mean"]
    lines = []
    for name, scores in blocks.items():
        lines.append(name)
        for question, text in QUESTIONS.items():
            entry = scores[question]
            counted = "" if entry is None else f": {entry['positive']} against {entry['negative']}"
            lines.append(f"  {question:10}{shown(entry):26}{text}{counted}")
        lines.append(f"  {'elsewhere':10}{shown(scores['elsewhere']):26}mean of o1, o2, o3")
    return "\n".join(lines)


def _scores(evaluations: Sequence[Mapping[str, Task | None]], resamples: int, seed: int) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for question in QUESTIONS:
        scores[question] = _joint([tasks[question] for tasks in evaluations], resamples, seed)
    elsewhere = [tasks[question] for tasks in evaluations for question in ELSEWHERE]
    return {**scores, "elsewhere": _joint(elsewhere, resamples, seed)}


def _joint(tasks: Sequence[Task | None], resamples: int, seed: int) -> dict[str, Any] | None:
    there = [task for task in tasks if task is not None and len(task.positive)]
    return auc(join(there), resamples=resamples, seed=seed) if len(there) == len(tasks) else None


def _not_healthy(predictions: Predictions) -> Task | None:
    task = class_task(predictions, HEALTHY)
    # log odds of 1 - p(healthy) are those of p(healthy), negated
    return task and Task(~task.positive, -task.scores, task.patients, task.models)


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as text:
            return list(csv.DictReader(text))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}): name the folder of the films by --data-root"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
