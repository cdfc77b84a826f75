"""``magsd data``: manifests of public collections, and the paper's data sets out of them. Parse, call, print."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from magsd_runtime.errors import RESEARCH_USE, DataError, UsageError

_COLLECTIONS = {
    "cohen": "covid-chestxray-dataset: metadata.csv, images/",
    "figure1": "Figure1-COVID-chestxray-dataset: metadata.csv, images/",
    "actualmed": "Actualmed-COVID-chestxray-dataset: metadata.csv, images/",
    "nih": "NIH ChestX-ray8/14: Data_Entry_2017*.csv, BBox_List_2017.csv, images anywhere below",
    "kermany": "pediatric pneumonia (chest_xray): files named personN_bacteria_M and the like",
    "rsna": "RSNA Pneumonia Detection Challenge: stage_2_*.csv, stage_2_train_images/",
    "v7": "V7 covid-19-xray-dataset: Darwin JSON annotations and images",
}


def data(argv: list[str]) -> int:
    """``magsd data``: a manifest of one collection, or a data set composed of several."""
    parser = argparse.ArgumentParser(
        prog="magsd data",
        description="Turn a public collection, as it lies on your disk, into a manifest; or compose data set A, B or C "
        f"of the paper's Table 1 out of such manifests, by patient. {RESEARCH_USE}",
        epilog="Where to get the collections, and under what terms: docs/datasets.md. "
        "Exit code 2: a table, a column or all images are missing, or a label is unknown.",
    )
    verbs = parser.add_subparsers(dest="what", required=True, metavar="COLLECTION|compose")
    for name, text in _COLLECTIONS.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("folder", type=Path, metavar="FOLDER", help="the collection")
        if name in ("nih", "rsna"):
            verb.add_argument("--boxed", action="store_true", help="only pneumonia with a box: for localization")
        if name == "v7":
            text = "covid-chestxray-dataset: its metadata.csv says which films are of one patient"
            verb.add_argument("--cohen", type=Path, metavar="FOLDER", help=text)
        _add_out(verb)
    verb = verbs.add_parser("compose", help="data set A, B or C, or the localization set, out of manifests")
    verb.add_argument("name", choices=("A", "B", "C", "localization"))
    verb.add_argument("manifests", nargs="+", type=Path, metavar="M.csv", help="as magsd data COLLECTION writes them")
    verb.add_argument("--seed", type=int, default=0, help="which patients, where there are more (default: 0)")
    verb.add_argument("--limit", type=int, metavar="N", help="at most N images a class, for a small one")
    text = "each class only from the collections that the paper names for it"
    verb.add_argument("--paper-sources", action="store_true", help=text)
    _add_out(verb)
    options = parser.parse_args(argv)
    if options.out.is_dir():
        raise UsageError(f"--out {options.out} is a folder, expected the name of a CSV file")
    if options.out.exists() and not options.force:
        raise UsageError(f"{options.out} exists: --force replaces it")
    if options.out.suffix.lower() != ".csv":
        raise UsageError(f"--out {options.out}: a CSV file is written, name it .csv")
    return _compose(options) if options.what == "compose" else _collect(options)


def _add_out(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--out", required=True, type=Path, metavar="M.csv", help="manifest to write")
    verb.add_argument("--force", action="store_true", help="replace --out")


def _collect(options: argparse.Namespace) -> int:
    from .datasets.collections import COLLECTIONS, WITH_BOXES
    from .datasets.rows import write_manifest

    more: dict[str, Any] = {"boxed": options.boxed} if options.what in WITH_BOXES else {}
    if options.what == "v7":
        more = {"cohen": options.cohen}
    found = COLLECTIONS[options.what](options.folder, **more)
    reasons = "; ".join(f"{count} {reason}" for reason, count in found.left_out.most_common())
    if not found.rows:
        raise DataError(f"{options.folder}: gives no image that can be used{': ' + reasons if reasons else ''}")
    write_manifest(options.out, found.rows)
    labels = Counter(row.label for row in found.rows)
    for label, count in sorted(labels.items()):
        patients = len({row.patient for row in found.rows if row.label == label})
        print(f"{label:<20}{count:>7} images  {patients:>6} patients")
    if boxed := sum(bool(row.boxes) for row in found.rows):
        print(f"{'with boxes':<20}{boxed:>7} images")
    _say(["left out: " + reasons] if reasons else [])
    if found.unknown:
        names = ", ".join(f"{name!r} ({count})" for name, count in found.unknown.most_common(5))
        _say([f"findings that are not known here: {names}" + (", and others" if len(found.unknown) > 5 else "")])
    _say(found.notes)
    print(options.out)
    return 0


def _compose(options: argparse.Namespace) -> int:
    from .datasets.composing import compose
    from .datasets.rows import read_rows, write_manifest

    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit is {options.limit}: expected 1 or more")
    rows = [row for manifest in options.manifests for row in read_rows(manifest)]
    more = {"limit": options.limit, "paper_sources": options.paper_sources}
    made = compose(options.name, rows, seed=options.seed, **more)
    write_manifest(options.out, made.rows)
    title = options.name if len(options.name) > 1 else f"data set {options.name}"
    print(f"{title:<22}{'here':>7}{'taken':>7}{'wanted':>8}{'patients':>10}  sources")
    for label, count in made.counts().items():
        mine = [row for row in made.rows if row.label == label]
        sources = ", ".join(f"{source or '?'} {n}" for source, n in Counter(row.source for row in mine).most_common())
        patients = len({row.patient for row in mine})
        print(f"{label:<22}{made.found[label]:>7}{count:>7}{made.wanted[label]:>8}{patients:>10}  {sources}")
    _say(made.warnings)
    print(options.out)
    return 0


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"magsd data: {line}", file=sys.stderr)
