"""The tables as Markdown, LaTeX and JSON. Both texts are made of the same grids of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magsd.data import read_manifest
from magsd_runtime.errors import RESEARCH_USE, UsageError
from magsd_runtime.files import write_json, write_text

from .cells import Cell, collect
from .plan import Plan
from .tables import PUBLISHED_SCORES, build, data_facts

SHORT = {"accuracy": "ACC", "sensitivity": "SEN", "specificity": "SPC", "f1": "F1", "auc": "AUC"}
END = "<!-- end -->"
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "*": r"$\times$", "|": r"\textbar{}", '"': r"\textquotedbl{}",
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """One printed table: every row has as many cells as ``head``."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def write_tables(
    plan: Plan, cells: Sequence[Cell], out: Path, markdown: Path | None, latex: Path | None, json: Path | None
) -> str:
    """Make the tables of what is done, write the files asked for, and return the Markdown.

    Raises
    ------
    UsageError
        If ``markdown`` is a text without a place for the tables: nothing of it is overwritten.
    """
    facts = {cell.data: read_manifest(cell.manifest) for cell in {cell.data: cell for cell in cells}.values()}
    data = {name: data_facts(name, manifest.records) for name, manifest in facts.items()}
    report = build(plan, cells, collect(list(cells), out), data, out)
    text = to_markdown(report)
    if markdown is not None:
        old = markdown.read_text(encoding="utf-8") if markdown.is_file() else None
        write_text(markdown, text if old is None else placed(old, plan.name, text, markdown))
    if latex is not None:
        write_text(latex, to_latex(report))
    if json is not None:
        write_json(json, report)
    return text


def placed(old: str, name: str, text: str, path: Path, what: str = "tables") -> str:
    """``old`` with ``text`` between ``<!-- tables: NAME -->`` (or another ``what``) and ``<!-- end -->``.

    Raises
    ------
    UsageError
        If ``old`` has no such place.
    """
    begin = f"<!-- {what}: {name} -->"
    before, found, rest = old.partition(begin)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise UsageError(f"{path} exists and has no place for the {what}: expected lines '{begin}' and '{END}'")
    return f"{before}{begin}\n{text}{END}{after}"


def grids(report: Mapping[str, Any]) -> list[Grid]:
    """All tables, data set by data set, each with its differences; what is missing is there, as a dash."""
    found = [_data_grid(report["data"])]
    for table in report["tables"]:
        for name, part in table["data"].items():
            title = f"Table {table['number']}, data set {name}: {table['title']}"
            head = ("", *(f"{SHORT[each]} (%)" for each in SHORT), "cells",
                    *(f"paper {SHORT[each]} (%)" for each in PUBLISHED_SCORES))  # fmt: skip
            found.append(Grid(title, head, tuple(map(_row, part["rows"]))))
            if part["comparisons"]:
                texts = {row["variant"]: row["text"] for row in part["rows"]}
                head = ("difference, points", "folds", "ACC (95 %)", "p corrected t", "p paired t", "p sign flip",
                        "AUC (95 %)", "p corrected t", "paper ACC")  # fmt: skip
                rows = tuple(_difference(each, texts) for each in part["comparisons"])
                found.append(Grid(f"Table {table['number']}, data set {name}: differences by fold", head, rows))
    return found


def to_markdown(report: Mapping[str, Any]) -> str:
    """All tables and the notes."""
    done, planned = report["cells"]["done"], report["cells"]["planned"]
    lines = [f"Plan {report['plan']['name']}: {done} of {planned} cells done. {RESEARCH_USE}", ""]
    for grid in grids(report):
        body = [grid.head, ("---",) * len(grid.head), *grid.rows]
        lines += [f"**{grid.title}**", ""]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body]
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in report["notes"]), ""])


def to_latex(report: Mapping[str, Any]) -> str:
    """The same as LaTeX table environments, to be read by ``\\input``; they need the package booktabs."""
    done, planned = report["cells"]["done"], report["cells"]["planned"]
    lines = [
        f"% Plan {report['plan']['name']}: {done} of {planned} cells done. {RESEARCH_USE}",
        r"% \usepackage{booktabs}",
    ]
    for grid in grids(report):
        lines += [
            r"\begin{table}[htbp]", r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{escaped(grid.title)}}}", rf"\begin{{tabular}}{{l{'r' * (len(grid.head) - 1)}}}", r"\toprule",
            _latex_row(grid.head), r"\midrule", *map(_latex_row, grid.rows),
            r"\bottomrule", r"\end{tabular}", r"\end{table}",
        ]  # fmt: skip
    lines += [r"\begin{itemize}", *(rf"\item {escaped(note)}" for note in report["notes"]), r"\end{itemize}"]
    return "\n".join([*lines, ""])


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is; line ends become spaces, other characters of control vanish."""
    text = " ".join(text.split())
    return "".join(_LATEX.get(character, character) for character in text if character.isprintable())


def _latex_row(row: Sequence[str]) -> str:
    return " & ".join(map(escaped, row)) + r" \\"


def _data_grid(data: Mapping[str, Any]) -> Grid:
    rows: list[tuple[str, ...]] = []
    for name, facts in data.items():
        for label, each in facts["classes"].items():
            rows.append((name, "ours", label, str(each["images"]), str(each["patients"])))
        rows.append((name, "ours", "total", str(facts["images"]), str(facts["patients"])))
        for label, images in facts["published"].items():
            rows.append((name, "paper", label, str(images), "-"))
        if facts["published"]:
            rows.append((name, "paper", "total", str(sum(facts["published"].values())), "-"))
    return Grid("Table 1: Datasets details", ("data set", "whose", "class", "images", "patients"), tuple(rows))


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    cells = f"{row['done']} of {row['planned']}" if row["planned"] else "not planned"
    if row["failed"]:
        cells += f", {row['failed']} failed"
    ours = (_mean_deviation(row["scores"][score]["value"], row["scores"][score]["std"], 100) for score in SHORT)
    theirs = ("-",) * len(PUBLISHED_SCORES)
    if row["published"] is not None:
        printed = (row["published"][score] for score in PUBLISHED_SCORES)
        theirs = tuple(_mean_deviation(each["mean"], each["std"], 1) for each in printed)
    return (row["text"] + (" (not in the paper)" if row["extra"] else ""), *ours, cells, *theirs)


def _difference(found: Mapping[str, Any], texts: Mapping[str, str]) -> tuple[str, ...]:
    accuracy, auc = found["scores"]["accuracy"], found["scores"]["auc"]
    printed = found["published_difference"]
    return (
        f"{texts[found['variant']]} - {texts[found['against']]}", str(accuracy["n"]),
        _interval(accuracy), _p(accuracy["p_corrected_t"]), _p(accuracy["p_paired_t"]), _p(accuracy["p_sign_flip"]),
        _interval(auc), _p(auc["p_corrected_t"]),
        "-" if printed is None else f"{printed['accuracy']:+.2f}",
    )  # fmt: skip


def _mean_deviation(mean: float | None, deviation: float | None, factor: float) -> str:
    if mean is None:
        return "-"
    return f"{factor * mean:.2f}" + ("" if deviation is None else f"±{factor * deviation:.2f}")


def _interval(score: Mapping[str, Any]) -> str:
    if score["mean"] is None:
        return "-"
    bounds = score["ci95_corrected"]
    inside = "" if bounds is None else f" ({100 * bounds[0]:+.2f} to {100 * bounds[1]:+.2f})"
    return f"{100 * score['mean']:+.2f}{inside}"


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"
