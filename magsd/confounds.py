"""What a class can be guessed from without looking at the film: its source.

Where one hospital sent all films of one class, a network can score well by recognising the hospital.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .data import Record
from .metrics import classification_scores

SUSPICIOUS = 0.1
"""Balanced accuracy above chance from which a source is called a confound."""


def source_confound(records: Sequence[Record]) -> dict[str, Any] | None:
    """How well the source alone predicts the label; None with one source or one label.

    Each image is given the commonest label among the *other patients'* images of its source (among all other
    patients' images where the source has no other patient), so a source with one patient explains nothing.
    ``sensitivity`` is the balanced accuracy, ``chance`` that of guessing, ``suspicious`` whether it is
    ``SUSPICIOUS`` above chance.
    """
    names = sorted({record.label for record in records})
    sources = {record.source for record in records}
    if len(names) < 2 or len(sources) < 2:
        return None
    overall: Counter[str] = Counter(record.label for record in records)
    of_source: dict[str, Counter[str]] = defaultdict(Counter)
    of_patient: dict[str, Counter[str]] = defaultdict(Counter)
    of_both: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for record in records:
        of_source[record.source][record.label] += 1
        of_patient[record.patient][record.label] += 1
        of_both[record.source, record.patient][record.label] += 1
    guesses = []
    for record in records:
        others = of_source[record.source] - of_both[record.source, record.patient]
        guesses.append(_commonest(others or overall - of_patient[record.patient] or overall, overall))
    index = {name: number for number, name in enumerate(names)}
    predicted = np.array([index[name] for name in guesses])
    scores = classification_scores(
        labels=np.array([index[record.label] for record in records]),
        predicted=predicted,
        probabilities=np.eye(len(names))[predicted],
    )
    chance = 1 / len(names)
    sensitivity = scores["sensitivity"] or 0.0
    return {
        "sources": len(sources),
        "accuracy": scores["accuracy"],
        "sensitivity": sensitivity,
        "chance": chance,
        "suspicious": sensitivity > chance + SUSPICIOUS,
    }


def _commonest(labels: Counter[str], overall: Counter[str]) -> str:
    return max(sorted(labels), key=lambda name: (labels[name], overall[name]))
