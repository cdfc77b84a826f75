"""From a file to a prediction: read, standardize, run the network, say what and where.

with Pipeline.open("bundle") as pipeline:
    result = pipeline.predict("film.png")
    print(result.prediction.label, result.prediction.probability)
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .acceptance import combined
from .backends import CheckedBackend, open_backend
from .bundle import Bundle, load_bundle
from .calibration import probabilities
from .dicom.rules import judge as judge_header
from .errors import ImageError, MagsdError
from .files import path_text
from .images import Radiograph, read_radiograph
from .localization import findings, localization_map, square_heat, to_original
from .prediction import Finding, Prediction, Reason
from .preprocessing import frame, normalize, standardize
from .site_rules import SiteRules
from .uncertainty import judge as judge_uncertainty


@dataclass(frozen=True, eq=False)
class Result:
    """A prediction, and what an overlay is drawn from.

    ``heat`` is float32 (H, W), 0 to 1, in the original image's pixels. ``heat`` is None when the image
    was not judged or the heat not asked for; ``radiograph`` when the file could not be read. ``logits``
    float32 (C,), None when the image was not judged.
    """

    prediction: Prediction
    heat: NDArray[np.float32] | None
    radiograph: Radiograph | None
    logits: NDArray[np.floating] | None = None


class Pipeline:
    """A bundle on a backend, ready for any number of files, one after the other."""

    def __init__(self, bundle: Bundle, backend: CheckedBackend, *, rules: SiteRules | None = None) -> None:
        """``rules``: what header and pixels of a film may be like (default: ``SiteRules()``)."""
        self.bundle = bundle
        self.backend = backend
        self.rules = rules or SiteRules()
        used = ("logits", "attention", "evidence", "embedding")  # an embedding that nobody uses may be anything
        self._must_be_finite = used if bundle.acceptance is not None else used[:3]
        # of every prediction
        self.facts: dict[str, Any] = {
            "model": {"name": bundle.name, "version": bundle.version, "sha256": bundle.model_sha256},
            "preprocessing_sha256": bundle.preprocessing.sha256(),
            "rules_sha256": self.rules.sha256(),
            "backend": {"name": backend.name, "device": backend.device, "precision": backend.precision},
        }

    @classmethod
    def open(
        cls,
        bundle_path: str | os.PathLike[str],
        backend: str = "auto",
        *,
        threads: int | None = None,
        rules: SiteRules | None = None,
    ) -> Pipeline:
        """Check the bundle, every file of it, and open its network. Raises as ``load_bundle`` and
        ``open_backend`` do."""
        bundle = load_bundle(bundle_path)
        return cls(bundle, open_backend(bundle, backend, threads=threads), rules=rules)

    def close(self) -> None:
        self.backend.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def predict(self, path: str | os.PathLike[str], *, with_heat: bool = True) -> Result:
        """Judge one file. Nothing is raised for any file: what is wrong becomes status and reasons.

        Codes: ``unreadable`` (error), ``no_contrast``, ``no_lungs`` (rejected), ``unlike_training`` (review,
        further out rejected), those of ``dicom.rules`` and ``pixel_rules`` (review or rejected), ``near_threshold``,
        ``unsure`` (review; all as ``site_rules`` say), ``out_of_memory``, ``not_finite`` and ``fault`` (error; a fault
        of magsd or of the machine, not of the image).
        """
        clock = _Clock()
        radiograph: Radiograph | None = None
        try:
            radiograph = read_radiograph(path)
            clock.lap("decode")
            return self._judge(path, radiograph, clock, with_heat)
        except ImageError as error:
            reason = Reason("unreadable", _without_path(str(error), path))
        except MemoryError:
            reason = Reason("out_of_memory", "not enough memory to judge this image: close other programs")
        except Exception as error:  # one image must never stop the others
            if os.environ.get("MAGSD_TRACEBACK"):
                raise
            # Only our own messages are sure to quote nothing of a header and to name no file
            message = f": {' '.join(str(error).split())}" if isinstance(error, MagsdError) else ""
            reason = Reason("fault", f"{type(error).__name__}{message} (MAGSD_TRACEBACK=1 shows where)")
        return self._not_judged(path, radiograph, clock, "error", reason)

    def _judge(self, path: str | os.PathLike[str], radiograph: Radiograph, clock: _Clock, with_heat: bool) -> Result:
        bundle, spec = self.bundle, self.bundle.preprocessing
        judgement = judge_header(radiograph.source.get("dicom"), self.rules.header)
        if judgement.status == "rejected":
            return self._not_judged(path, radiograph, clock, "rejected", *judgement.reasons)
        framing = frame(radiograph.pixels, spec)
        standardized = standardize(radiograph.pixels, spec, framing)
        image = normalize(standardized)
        clock.lap("preprocess")
        of_pixels, explained = self.rules.judge_film(radiograph, framing, standardized)
        judgement = combined(judgement, of_pixels)
        clock.lap("rules")
        if judgement.status == "rejected":
            return self._not_judged(path, radiograph, clock, "rejected", *judgement.reasons)

        outputs = self.backend.run(image[np.newaxis])
        clock.lap("inference")
        if not all(np.isfinite(outputs[name]).all() for name in self._must_be_finite):
            reason = Reason(
                "not_finite",
                f"the network gave infinities or no numbers on {self.backend.device}: see magsd verify",
            )
            return self._not_judged(path, radiograph, clock, "error", reason)
        accepted = None
        if bundle.acceptance is not None:
            likeness = bundle.acceptance.judge(standardized, framing.lungs, outputs["embedding"][0])
            accepted = bundle.acceptance.record(likeness)
            judgement = combined(judgement, self.rules.judge_likeness(likeness, explained=explained))
            clock.lap("acceptance")
            if judgement.status == "rejected":
                return self._not_judged(path, radiograph, clock, "rejected", *judgement.reasons, acceptance=accepted)
        probability = probabilities(outputs["logits"], bundle.temperature)[0]
        best = int(outputs["logits"][0].argmax())

        shown = bundle.localization["map"]
        coarse = localization_map(shown, outputs["attention"][0], outputs["evidence"][0], best)
        square = square_heat(shown, coarse, framing, spec)
        size = (radiograph.width, radiograph.height)
        threshold = float(bundle.localization["threshold"])
        found = findings(square, threshold, *size, spec, framing.region, bundle.minimum_score)
        heat = to_original(square, *size, spec, framing.region) if with_heat else None
        clock.lap("localize")

        by_class = {name: float(value) for name, value in zip(bundle.classes, probability)}
        decision, possible = bundle.calibration.decide(by_class), bundle.calibration.set_of(by_class)
        sure = judge_uncertainty(
            bundle.calibration, self.rules.uncertainty, label=bundle.classes[best], decision=decision,
            prediction_set=possible,
        )  # fmt: skip
        judgement = combined(judgement, sure)
        prediction = Prediction(
            path=path_text(path),
            status=judgement.status,
            reasons=judgement.reasons,
            acceptance=accepted,
            label=bundle.classes[best],
            probability=float(probability[best]),
            probabilities=by_class,
            decision=decision,
            prediction_set=possible,
            findings=tuple(_rounded(finding) for finding in found),
            image=dict(radiograph.source),
            timings_ms=clock.finish(),
            **self.facts,
        )
        return Result(prediction, heat, radiograph, outputs["logits"][0])

    def _not_judged(
        self,
        path: str | os.PathLike[str],
        radiograph: Radiograph | None,
        clock: _Clock,
        status: Any,
        *reasons: Reason,
        acceptance: dict[str, Any] | None = None,
    ) -> Result:
        prediction = Prediction(
            path=path_text(path),
            status=status,
            reasons=reasons,
            acceptance=acceptance,
            image={} if radiograph is None else dict(radiograph.source),
            timings_ms=clock.finish(),
            **self.facts,
        )
        return Result(prediction, None, radiograph)


class _Clock:
    """Milliseconds of each step, and in all."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = round(1000 * (now - self._last), 3)
        self._last = now

    def finish(self) -> dict[str, float]:
        return {**self._laps, "total": round(1000 * (time.perf_counter() - self._start), 3)}


def _rounded(finding: Finding) -> Finding:
    return Finding(finding.box, round(finding.score, 6), round(finding.area_fraction, 6))


def _without_path(message: str, path: str | os.PathLike[str]) -> str:
    """The reason alone; the record holds the path beside it."""
    text = os.fspath(path)
    return message.removeprefix(f"{text if text.isprintable() else ascii(text)}: ")
