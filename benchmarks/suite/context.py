"""What a part is given."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from magsd_runtime.hardware import usable_cores

from .films import Format, film
from .processes import Job, magsd, run


@dataclass(frozen=True)
class Context:
    """``work``: a folder for what is made on the way. ``bundles``: by name, the one in the box first. ``repeats``:
    rounds that count, in each of which every variant has its turn."""

    work: Path
    bundles: dict[str, Path]
    repeats: int
    quick: bool = False
    threads: int | None = None
    processor_time: bool = False

    @property
    def warmup(self) -> int:
        return 0 if self.quick else 1

    @property
    def used_threads(self) -> int:
        return self.threads or usable_cores()

    @property
    def shipped(self) -> Path:
        return next(iter(self.bundles.values()))

    def film(self, side: int, kind: Format = "png") -> Path:
        return film(self.work / "films", side, kind)

    def kept(self, bundle: Path) -> dict[str, str]:
        """The environment in which ONNX Runtime's optimised graph of ``bundle`` is kept (docs/backends.md)."""
        environment = {"MAGSD_CACHE": str(self.work / "graphs")}
        run(Job(magsd("verify", bundle), environment), self.work)
        return environment

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def one_epoch_bundle(work: Path, backbone: str) -> Path:
    """A bundle with the network that the paper's recipe makes of ``backbone``, trained for one epoch on a few phantoms
    from random weights: as fast as a good one, and of no other use."""
    films, trained, bundle = work / f"{backbone}-films", work / f"{backbone}-run", work / f"{backbone}-bundle"
    if not bundle.exists():
        commands = (
            magsd("phantoms", "--out", films, "--count", 8, "--size", 256),
            magsd("train", "--data", films / "manifest.csv", "--out", trained, "--backbone", backbone, "--weights",
                  "none", "--epochs", 1, "--folds", 2, "--fold", 0, "--batch-size", 4, "--quiet"),
            magsd("export", trained, "--out", bundle, "--images", 4, "--no-acceptance"),
        )  # fmt: skip
        for command in commands:
            run(Job(command), work)
    return bundle
