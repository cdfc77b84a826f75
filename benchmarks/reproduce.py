"""The paper's tables and figures on one's own data, from a plan file: resumable cells, estimates, paired tests.

    python benchmarks/reproduce.py run     configs/plans/quick.yaml --out RUNS [--minutes 30] [--dry-run]
    python benchmarks/reproduce.py tables  configs/plans/quick.yaml --out RUNS [--markdown F] [--latex F] [--json F]
    python benchmarks/reproduce.py figures configs/plans/quick.yaml --out RUNS --to DIR
    python benchmarks/reproduce.py localization configs/plans/quick.yaml --out RUNS [--markdown F] [--json F]
    python benchmarks/reproduce.py merge   configs/plans/quick.yaml --out RUNS OTHER_RUNS...

`run` may be stopped at any time and goes on where it was; several may work in one folder. docs/reproduce.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from magsd_runtime.errors import RESEARCH_USE, MagsdError, UsageError
from reproduction.cells import Cell, collect, expand, read_data, unique
from reproduction.estimate import Costs, duration, estimate, read_costs, with_work
from reproduction.plan import Plan, read_plan
from reproduction.running import Options, run
from scores import default_data_root


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    try:
        plan = read_plan(arguments.plan)
        cells = expand(plan, read_data(plan, arguments.data_root))
        verbs = {
            "run": _run, "tables": _tables, "figures": _figures, "localization": _localization, "merge": _merge
        }  # fmt: skip
        return verbs[arguments.verb](arguments, plan, cells)
    except MagsdError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("reproduce: stopped; the same command goes on", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace, plan: Plan, cells: list[Cell]) -> int:
    out: Path = arguments.out
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError(f"--threads is {arguments.threads}: expected 1 or more")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise UsageError(f"--minutes is {arguments.minutes:g}: expected more than 0")
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    results = collect(cells, out)
    measure = None if results or (arguments.dry_run and plan.assumed_rate) else cells[0]
    cache = out / "costs.json" if out.is_dir() or not arguments.dry_run else None
    costs = read_costs(cells, cache, measure=measure, threads=arguments.threads)
    if arguments.dry_run:
        print(_dry_run(plan, cells, costs, out))
        return 0

    def left(todo: Sequence[Cell]) -> str:
        found = estimate(todo, costs, with_work(cells, costs, collect(cells, out)), plan.assumed_rate)
        return f", about {duration(found.seconds)}"

    def least(cell: Cell) -> float:
        seconds, _ = costs.seconds(cell, with_work(cells, costs, collect(cells, out)), plan.assumed_rate)
        return min(seconds, 10 + seconds / cell.config.epochs)  # to the first checkpoint

    options = Options(
        out, arguments.keep or plan.keep, arguments.threads, arguments.device, arguments.batch, deadline
    )  # fmt: skip
    outcome = run(cells, options, _say, seconds=least, left=left)
    ended = "out of time" if outcome.stopped else "done" if not outcome.left else "ended"
    print(f"{ended}: {outcome.done} cells done, {outcome.failed} failed, {outcome.left} of {len(unique(cells))} left")
    print(RESEARCH_USE)
    return 1 if outcome.failed else 0


def _dry_run(plan: Plan, cells: list[Cell], costs: Costs, out: Path) -> str:
    """Every cell in order with its seconds, and the sum with what it rests on."""
    results = with_work(cells, costs, collect(cells, out))
    lines, planned = [], unique(cells)
    for cell in planned:
        if cell.key in results:
            lines.append(f"{cell.name:60} done")
        else:
            seconds, basis = costs.seconds(cell, results, plan.assumed_rate)
            lines.append(f"{cell.name:60} {duration(seconds):>12}  {_BASIS[basis]}")
    end, found = 0, estimate([], costs, results)
    for number, stage in enumerate(plan.stages, 1):
        end += len(stage.data) * len(stage.variants) * plan.folds * len(plan.seeds)
        before, found = found, estimate(cells[:end], costs, results, plan.assumed_rate)
        computed = " computed, not measured" if found.assumed > before.assumed else ""
        names = f"{', '.join(stage.data)}: {', '.join(stage.variants)}"
        lines.append(f"stage {number}, {names}: {duration(found.seconds - before.seconds)}{computed}")
    lines.append(
        f"{len(planned)} cells, {len(results)} done; the others one after the other: {duration(found.seconds)}"
    )
    if found.assumed:
        assert plan.assumed_rate is not None
        lines.append(
            f"COMPUTED, NOT MEASURED: {found.assumed} cells at an assumed "
            f"{plan.assumed_rate.multiply_adds_per_second:.3g} multiply-adds a second ({plan.assumed_rate.machine}), "
            "without augmentation, checkpoints and evaluation"
        )
    if found.step:
        lines.append(f"{found.step} cells from one step measured on this machine just now, which may be busy")
    if found.like or found.rate:
        lines.append(f"from measured cells: {found.like} by cells alike, {found.rate} by multiply-adds")
    return "\n".join(lines)


_BASIS = {
    "like": "as measured",
    "rate": "by multiply-adds",
    "step": "from one step",
    "assumed": "computed, not measured",
}


def _tables(arguments: argparse.Namespace, plan: Plan, cells: list[Cell]) -> int:
    from reproduction.output import write_tables

    print(write_tables(plan, cells, arguments.out, arguments.markdown, arguments.latex, arguments.json), end="")
    return 0


def _figures(arguments: argparse.Namespace, plan: Plan, cells: list[Cell]) -> int:
    from reproduction.drawing import draw

    for path in draw(
        plan, cells, arguments.out, arguments.to, arguments.data_root, _say,
        also=arguments.also, device=arguments.device,
    ):  # fmt: skip
        print(path)
    return 0


def _localization(arguments: argparse.Namespace, plan: Plan, cells: list[Cell]) -> int:
    from magsd_runtime.files import write_json, write_text
    from reproduction.localizing import compare, to_markdown
    from reproduction.output import placed

    report, _ = compare(
        plan, cells, arguments.out, arguments.data_root, _say,
        also=arguments.also, device=arguments.device, minimum_score=arguments.minimum_score,
    )  # fmt: skip
    text, markdown = to_markdown(report), arguments.markdown
    if markdown is not None:
        old = markdown.read_text(encoding="utf-8") if markdown.is_file() else None
        write_text(markdown, text if old is None else placed(old, plan.name, text, markdown, "localization"))
    if arguments.json is not None:
        write_json(arguments.json, report)
    print(text, end="")
    return 0


def _merge(arguments: argparse.Namespace, plan: Plan, cells: list[Cell]) -> int:
    from reproduction.merging import merge

    for line in merge(cells, arguments.out, arguments.sources):
        print(line)
    return 0


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="run|tables|figures|localization|merge")
    texts = {
        "run": "train and evaluate what is not done",
        "tables": "the paper's tables with what is done",
        "figures": "the paper's Figures 6, 7 and 8 with what is done",
        "localization": "where the kept models look, on the plan's films with boxes or masks",
        "merge": "take over finished cells of other folders",
    }
    made = {name: verbs.add_parser(name, help=text, description=text) for name, text in texts.items()}
    for each in made.values():
        each.add_argument("plan", type=Path, metavar="PLAN.yaml")
        each.add_argument("--out", type=Path, required=True, metavar="RUNS", help="folder of the cells")
        each.add_argument("--data-root", type=Path, default=default_data_root(), metavar="DIR",
                          help="what the plan's manifests are relative to (default: %(default)s)")  # fmt: skip
    made["run"].add_argument("--dry-run", action="store_true", help="list the cells and the time they need, and end")
    made["run"].add_argument("--minutes", type=float, metavar="N", help="end in time, checkpoints kept")
    made["run"].add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    made["run"].add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    made["run"].add_argument("--batch", type=int, default=32, metavar="N", help="images a step of the evaluation")
    made["run"].add_argument("--keep", choices=("all", "best", "reference", "none"),
                             help="whose weights stay after the evaluation (default: the plan's)")  # fmt: skip
    for name in ("markdown", "latex", "json"):
        text = "; between <!-- tables: NAME --> and <!-- end --> where the file has them" if name == "markdown" else ""
        made["tables"].add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write the tables there{text}")
    for name in ("figures", "localization"):
        made[name].add_argument("--also", action="append", default=[], metavar="NAME=FOLDER",
                                help="a further run or bundle to compare; may be given several times")  # fmt: skip
        made[name].add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    made["localization"].add_argument("--minimum-score", type=float, default=0.0, metavar="S",
                                      help="heat that a region must reach to count, for all (default: 0)")  # fmt: skip
    for name in ("markdown", "json"):
        where = "; between <!-- localization: NAME --> and <!-- end --> where the file has them"
        made["localization"].add_argument(
            f"--{name}", type=Path, metavar="FILE", help=f"write it there{where if name == 'markdown' else ''}"
        )
    made["figures"].add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    made["merge"].add_argument("sources", type=Path, nargs="+", metavar="OTHER_RUNS")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
