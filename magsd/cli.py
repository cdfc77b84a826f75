"""The command line: a table from verb to function, and the one place that turns errors into exit codes.

``magsd --help`` and every verb pay only for what they use: the table holds names, and the module
behind a verb is imported when the verb is called. Each verb is ``function(argv) -> exit code``.

Exit codes: 0 done; 1 a fault of ours; 2 wrong usage or a missing optional part; 3 at least one input
was unreadable or rejected; 4 an artefact is damaged or incompatible; 5 verification failed; 6 the
backend asked for is not available; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import NoReturn

from magsd_runtime._version import __version__
from magsd_runtime.errors import RESEARCH_USE, MagsdError

# verb: (package.module:function, one line of help)
VERBS: dict[str, tuple[str, str]] = {
    "train": ("magsd.commands:train", "train MAG-SD on a manifest of chest X-rays, with cross-validation"),
    "evaluate": ("magsd.commands:evaluate", "metrics, figures and a report for a run or a bundle"),
    "train-lungs": ("magsd_export.commands:train_lungs", "train the small network that finds the lung fields"),
    "export": ("magsd_export.commands:export", "turn a trained run into a verified bundle"),
    "engine": (
        "magsd_runtime.engines.commands:engine",
        "build a TensorRT engine of a bundle on the GPU that will run it",
    ),
    "verify": (
        "magsd_runtime.verifying_commands:verify",
        "prove that a bundle computes here what it should, or compare two of its networks",
    ),
    "benchmark": ("magsd_runtime.benchmarking.commands:benchmark", "how fast a bundle answers here, on each backend"),
    "calibrate": ("magsd_runtime.commands:calibrate", "fit a bundle's probabilities and thresholds to a site's cases"),
    "infer": ("magsd_runtime.inferring_commands:infer", "class, probabilities and where the network looked, per image"),
    "watch": ("magsd_runtime.watching_commands:watch", "judge each file that is put into a folder, once"),
    "audit": ("magsd_runtime.auditing_commands:audit", "check or repair the log that infer --audit writes"),
    "replay": ("magsd_runtime.auditing_commands:replay", "repeat a logged result and say what differs and why"),
    "doctor": ("magsd_runtime.commands:doctor", "what this machine has, what would run, what is missing"),
    "data": ("magsd.data_commands:data", "manifests of public collections, and the paper's data sets out of them"),
    "phantoms": (
        "magsd.commands:phantoms",
        "make synthetic chest films with known opacities, to try magsd on",
    ),
}


def run() -> NoReturn:
    """The command ``magsd``: :func:`main`, and the end of the process.

    An answer's process ends at once, and no library takes itself apart object by object while somebody waits: what
    infer writes is whole and closed when :func:`main` returns.
    """
    answers = sys.argv[1:2] == ["infer"]
    if answers:
        gc.disable()  # what imports leave behind stays for good; infer turns it on again when it is ready
    code = main()
    # Interrupted twice: not even films that are being read are waited for; no file of theirs has its name yet
    if answers and (threading.active_count() == 1 or code == 130):
        with contextlib.suppress(OSError):  # a reader that has gone, which main has dealt with
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return its exit code. Errors raised on purpose become one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of our stdout has gone (head, a closed pager). Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help", "help"):
        print(_help())
        return 0
    if verb in ("-V", "--version"):
        print(f"magsd {__version__}")
        return 0
    if verb not in VERBS:
        print(f"magsd: unknown command {verb!r}: one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    if not sys.warnoptions:
        # what libraries warn about is for us; python -W default -m magsd.cli shows it
        warnings.simplefilter("ignore")
    module_name, _, function_name = VERBS[verb][0].partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)(arguments[1:])
    except MagsdError as error:
        print(f"magsd {verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"magsd {verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("MAGSD_TRACEBACK"):
            raise
        print(
            f"magsd {verb}: a fault of magsd: {type(error).__name__}: {' '.join(str(error).split())} "
            "(set MAGSD_TRACEBACK=1 to see where)",
            file=sys.stderr,
        )
        return 1


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb.ljust(width)}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: magsd COMMAND [options]",
            "",
            "Chest X-ray networks with attention, from research training to the point of care.",
            RESEARCH_USE,
            "",
            "commands:",
            *lines,
            "",
            "magsd COMMAND --help shows its options; magsd --version the version.",
        ]
    )


if __name__ == "__main__":
    run()
