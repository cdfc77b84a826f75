"""``magsd infer``: one image or a folder of them. Parse, judge, write, print."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from .commands import Progress, add_backend, positive_int, printable
from .errors import RESEARCH_USE, UsageError
from .files import path_text
from .rules_option import add_rules, chosen_rules
from .shipped import choose_bundle, hash_bundle_ahead

if TYPE_CHECKING:
    from .lines_file import LinesFile
    from .naming import OutputName, OutputNames
    from .pipeline import Pipeline, Result
    from .prediction import Prediction, Reason

_FAULTS = ("fault", "overlay_failed", "dicom_failed")  # of magsd, not of the image
_WIDEST_PATH = 48


def infer(argv: list[str]) -> int:
    """``magsd infer``: class, probabilities and where the network looked, for each image."""
    parser = argparse.ArgumentParser(
        prog="magsd infer",
        description="Class, probabilities and where the network looked, for each image. " + RESEARCH_USE,
        epilog="Exit code 3: at least one image was unreadable or rejected; the others were done.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image, folder or glob; - reads a list on stdin")
    parser.add_argument("--bundle", metavar="DIR", help="the model (default: $MAGSD_BUNDLE, or the one in the box)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write an overlay and a JSON file per image here")
    parser.add_argument("--no-overlay", action="store_true", help="with --out: JSON files only")
    parser.add_argument("--dicom-out", metavar="DIR", type=Path, help="write DICOM results of DICOM images here")
    parser.add_argument("--keep-names", action="store_true", help="with --out: files named as DICOM images are, too")
    parser.add_argument("--audit", metavar="FILE", type=Path, help="append a record of each result to this log")
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")
    parser.add_argument("--lines", metavar="FILE", type=Path, help="write what --json prints to FILE, too")
    parser.add_argument(
        "--jobs",
        type=positive_int,
        metavar="N",
        help="images at a time (default: as many as there are threads; with --audit 1, to keep the log in order)",
    )
    parser.add_argument("--unordered", action="store_true", help="each line as soon as it is there")
    parser.add_argument(
        "--resume", action="store_true", help="with --out, --lines: leave out what an earlier run of this has done"
    )
    add_rules(parser)
    add_backend(parser)
    options = parser.parse_args(argv)
    if options.resume and options.out is None and options.lines is None:
        raise UsageError("--resume goes with --out or --lines, where the records are that tell what is done")
    if "numpy" not in sys.modules:
        # Matrix products are tiny here, and starting a thread for each core delays the first answer
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    bundle = choose_bundle(options.bundle)
    hash_bundle_ahead(bundle)
    rules = chosen_rules(options)
    images = _find(options.paths)
    output: _Output | None = None
    if options.out is not None:
        from .naming import OutputNames

        output = _Output(options.out, OutputNames(images, keep_names=options.keep_names), not options.no_overlay)
        _prepare_output(output, images)
    if options.dicom_out is not None:
        from .dicom_results.writing import require_parts

        require_parts()
        _make_folder("--dicom-out", options.dicom_out)

    from .pipeline import Pipeline

    asked = 1 if options.audit is not None and options.jobs is None else options.jobs
    jobs, threads = _share(asked, options.threads, len(images))
    if threads is not None:
        import cv2

        cv2.setNumThreads(threads)
    with Pipeline.open(bundle, options.backend, threads=threads, rules=rules) as pipeline:
        if not gc.isenabled():  # see magsd.cli.run
            gc.freeze()
            gc.enable()
        if options.audit is not None:
            from .audit_record import AuditedPipeline

            pipeline = AuditedPipeline(pipeline, options.audit, threads=threads)
        show = _json_line if options.json else _Table(pipeline, images)
        lines: LinesFile | None = None
        if options.lines is not None:
            from .audit_record import bundle_facts
            from .lines_file import LinesFile

            facts = {**bundle_facts(pipeline.bundle), **pipeline.facts}
            lines = LinesFile(options.lines, facts, resume=options.resume)
        earlier = _earlier(
            output, lines, pipeline, images, resume=options.resume, dicom=options.dicom_out is not None
        )  # fmt: skip
        return _run(
            pipeline, images, show, output, lines, options.dicom_out,
            earlier=earlier, jobs=jobs, ordered=not options.unordered,
        )  # fmt: skip


def _find(paths: Sequence[str]) -> list[str]:
    from .images import find_names

    found: dict[str, None] = {}
    for path in paths:
        images = find_names([path])
        if not images:
            what = "the list on stdin is empty" if path == "-" else f"{path}: holds no DICOM, PNG, JPEG or TIFF image"
            if len(paths) == 1:
                raise UsageError(what)
            print(f"magsd infer: {what}", file=sys.stderr)
        found.update(dict.fromkeys(images))
    if not found:
        raise UsageError("no images: none of the paths holds a DICOM, PNG, JPEG or TIFF image")
    return list(found)


def _make_folder(option: str, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {out}: no folder can be made there ({error.strerror})") from error


def _prepare_output(output: _Output, images: Sequence[str]) -> None:
    _make_folder("--out", output.folder)
    there = os.path.realpath(output.folder)
    overlays = {
        os.path.basename(path)
        for path in images
        if path.endswith("_overlay.jpg") and os.path.realpath(os.path.dirname(path) or ".") == there
    }
    overwritten = overlays and overlays & {f"{name.stem}_overlay.jpg" for name in output.names}
    if overwritten:
        raise UsageError(f"--out {output.folder}: {min(overwritten)} there is one of the images, choose another folder")


def _share(jobs: int | None, threads: int | None, images: int) -> tuple[int, int | None]:
    """How many images at a time, and the threads of each; None: all cores."""
    if images == 1 or jobs == 1 or (jobs is None and threads == 1):
        return 1, threads
    from .hardware import usable_cores

    total = threads or usable_cores()
    jobs = min(jobs or total, images)
    return jobs, max(1, total // jobs)


def _earlier(
    output: _Output | None,
    lines: LinesFile | None,
    pipeline: Pipeline,
    images: Sequence[str],
    *,
    resume: bool,
    dicom: bool,
) -> Callable[[int], str | None] | None:
    """By number: the status of an image that an earlier run has done, None of others; None if no run has."""
    since = None if output is None else _settled(output.folder, pipeline, resume=resume)
    if not resume:
        return None
    from .resuming import earlier_status

    def status_of(number: int) -> str | None:
        path, status = images[number], None
        if lines is not None and (status := lines.earlier_status(path)) is None:
            return None
        if output is not None:
            assert since is not None
            name = output.names[number]
            status = earlier_status(output.folder, path, name, since, overlay=output.overlay, dicom=dicom)
        return status

    return status_of


def _settled(folder: Path, pipeline: Pipeline, *, resume: bool) -> int | None:
    from .resuming import MARK, settle

    mark = folder / MARK
    if not resume and not mark.exists():
        return None
    from .audit_record import bundle_facts

    try:
        return settle(mark, {**bundle_facts(pipeline.bundle), **pipeline.facts}, resume=resume)
    except OSError as error:
        raise UsageError(f"--out: {mark} cannot be written ({error.strerror or error})") from error


@dataclass(frozen=True)
class _Told:
    """Of one image: its status, and what is said of it; None where an earlier run has said it."""

    status: str
    prediction: Prediction | None


def _run(
    pipeline: Pipeline,
    images: Sequence[str],
    show: Callable[[Prediction], str],
    output: _Output | None,
    lines: LinesFile | None,
    dicom_out: Path | None = None,
    *,
    earlier: Callable[[int], str | None] | None,
    jobs: int,
    ordered: bool,
) -> int:
    """``jobs`` images at a time, each shown as soon as it is judged, and only then drawn and written to ``output``;
    nothing is kept of it but its status. ``earlier``: the statuses of those that need not be judged, by number."""
    if hasattr(sys.stdout, "reconfigure"):  # a class or file name that the terminal cannot show must not stop us
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    statuses = Counter[str]()
    fault, without_dicom, before = False, 0, 0
    with_heat = dicom_out is not None or (output is not None and output.overlay)

    def judge(number: int) -> Iterator[_Told]:
        if earlier is not None and (status := earlier(number)) is not None:
            yield _Told(status, None)
            return
        path = Path(images[number])
        result = pipeline.predict(path, with_heat=with_heat)
        if dicom_out is not None:
            from .dicom_results.writing import add_results

            result = add_results(dicom_out, path, result, pipeline.bundle)
        if output is None:
            yield _Told(result.prediction.status, result.prediction)
            return
        name = output.names[number]
        prediction = output.named(result, name)
        yield _Told(prediction.status, prediction)
        output.write(result, prediction, name)

    if jobs > 1:
        from .parallel import side_by_side

        told = side_by_side(judge, range(len(images)), jobs, ordered=ordered)
    else:
        told = chain.from_iterable(map(judge, range(len(images))))
    with closing(Progress(len(images))) as progress:
        if isinstance(show, _Table):
            progress.print(show.header())
        for each in told:
            statuses[each.status] += 1
            if (prediction := each.prediction) is None:
                before += 1
            else:
                fault = fault or any(reason.code in _FAULTS for reason in prediction.reasons)
                without_dicom += any(reason.code == "no_dicom_results" for reason in prediction.reasons)
                if lines is not None:
                    lines.add(_json_line(prediction), prediction.path)
                progress.print(show(prediction))
            progress.step()
    if lines is not None:
        lines.finish(images if ordered else None)
    if len(images) > 1:
        parts = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        print(f"{len(images)} images: {parts}{f'; {before} of them before' if before else ''}", file=sys.stderr)
    if without_dicom:
        print(f"magsd infer: --dicom-out: nothing written for {without_dicom} of {len(images)} images, "
              "see their reasons; the predictions stand", file=sys.stderr)  # fmt: skip
    if output is not None and output.not_drawn:
        fault = True
        print(f"magsd infer: no overlay of {len(output.not_drawn)} of {len(images)} images "
              f"({output.not_drawn[0]}); the predictions stand", file=sys.stderr)  # fmt: skip
    if fault:
        return 1
    if without_dicom:
        return UsageError.exit_code
    return 3 if statuses["rejected"] or statuses["error"] else 0


@dataclass(frozen=True)
class _Output:
    """The folder of --out. ``not_drawn``: why, of each overlay that could not be drawn."""

    folder: Path
    names: OutputNames
    overlay: bool
    not_drawn: list[str] = field(default_factory=list)

    def named(self, result: Result, name: OutputName) -> Prediction:
        """The prediction with the files that :meth:`write` will write."""
        files = dict(result.prediction.files)
        if self._is_drawn(result):
            files["overlay"] = path_text(self.folder / f"{name.stem}_overlay.jpg")
        return replace(result.prediction, files={**files, "json": path_text(self.folder / f"{name.stem}.json")})

    def write(self, result: Result, prediction: Prediction, name: OutputName) -> None:
        """Write the overlay and then the JSON file of one image, which calls the image as ``name`` says. Where drawing
        fails the JSON file says so, and the prediction stands."""
        from .files import write_json

        try:
            if self._is_drawn(result):
                reason = _draw(self.folder / f"{name.stem}_overlay.jpg", result)
                if reason is not None:
                    self.not_drawn.append(reason.message)
                    files = {kind: file for kind, file in prediction.files.items() if kind != "overlay"}
                    prediction = replace(prediction, reasons=(*prediction.reasons, reason), files=files)
            kept = prediction if name.shown is None else replace(prediction, path=name.shown)
            write_json(self.folder / f"{name.stem}.json", kept.to_dict())
        except OSError as error:
            raise UsageError(f"--out {self.folder}: cannot write there ({error.strerror or error})") from error

    def _is_drawn(self, result: Result) -> bool:
        return self.overlay and result.radiograph is not None and result.prediction.status != "error"


def _draw(target: Path, result: Result) -> Reason | None:
    from .overlay import save_overlay
    from .prediction import Reason

    assert result.radiograph is not None
    try:
        save_overlay(target, result.radiograph, result.heat, result.prediction)
    except OSError:
        raise
    except Exception as error:  # the answer stands without its picture, and the other images wait
        if os.environ.get("MAGSD_TRACEBACK"):
            raise
        return Reason("overlay_failed", f"the overlay could not be drawn ({type(error).__name__})")
    return None


def _json_line(prediction: Prediction) -> str:
    # ASCII: whatever reads the line, in whatever locale, gets the same text
    return json.dumps(prediction.to_dict(), allow_nan=False)


class _Table:
    """An aligned line per image; widths are known before the first, so that lines can stream."""

    def __init__(self, pipeline: Pipeline, images: Sequence[str]) -> None:
        self._path = min(_WIDEST_PATH, max(4, *(len(printable(path)) for path in images)))
        self._label = max(5, *map(len, pipeline.bundle.classes))
        backend, bundle = pipeline.backend, pipeline.bundle
        self._model = f"{bundle.name} {bundle.version} on {backend.device} ({backend.precision}; {backend.reason})"
        self._point, self._positive = bundle.calibration.point(), bundle.calibration.positive_class
        self._sets = bundle.calibration.sets

    def header(self) -> str:
        columns = self._row("file", "label", "probability", self._positive or "", "findings", "status")
        lines = [self._model, RESEARCH_USE, columns]
        if self._point is not None:
            lines.insert(
                1,
                f"positive: {self._positive} {self._point.threshold:.3f} or more, which found "
                f"{100 * self._point.sensitivity:.0f} % of it among the cases of the calibration ({self._point.name})",
            )
        if self._sets is not None:
            rate = f"{100 * self._sets.coverage:g} %"
            lines.insert(-2, f"not sure: names all classes that are possible at {rate} coverage (docs/calibration.md)")
        return "\n".join(lines)

    def __call__(self, prediction: Prediction) -> str:
        status = ": ".join([prediction.status, "; ".join(reason.message for reason in prediction.reasons)])
        value = prediction.probability
        # Never "1.000": a probability that rounds to certainty is none
        probability = "-" if value is None else f"{value:.3f}" if value < 0.9995 else ">0.999"
        findings = str(len(prediction.findings)) if prediction.label is not None else "-"
        decision = "-" if prediction.decision is None else "positive" if prediction.decision.positive else "negative"
        return self._row(
            printable(prediction.path), prediction.label or "-", probability, decision, findings, status.rstrip(": ")
        )

    def _row(self, path: str, label: str, probability: str, decision: str, findings: str, status: str) -> str:
        if len(path) > self._path:  # the end of a path tells more than its start
            path = "..." + path[3 - self._path :]
        decided = "" if self._positive is None else f"{decision:<{max(8, len(self._positive))}}  "
        return f"{path:<{self._path}}  {label:<{self._label}}  {probability:>11}  {decided}{findings:>8}  {status}"
