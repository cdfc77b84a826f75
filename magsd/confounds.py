"""What a class can be guessed from without looking at the film: its source.

Where one hospital sent all films of one class, a network can score well by recognising the hospital.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .data import Record
from .metrics import classification_scores

SUSPICIOUS = 0.1
"""Balanced accuracy above chance from which a source is called a confound."""
_FEW = 5  # patients, below which a source is not one of its own


class Film(Protocol):
    """What is asked of a film here."""

    @property
    def label(self) -> str: ...
    @property
    def patient(self) -> str: ...
    @property
    def source(self) -> str: ...


def told_by_source(records: Sequence[Film]) -> dict[str, float]:
    """By class: the balanced accuracy of telling it from the others by the source alone, 0.5 to 1.

    The best rule there is on these films: a source stands for the class if it has a larger part of the class's films
    than of the others'. Sources of fewer than ``_FEW`` patients count as one, since a rule that knows patients is none
    about sources. Where two other classes are equally common in their sources, this tells more about the third than
    guessing all classes at once.
    """
    patients: dict[str, set[str]] = defaultdict(set)
    for record in records:
        patients[record.source].add(record.patient)
    seen = Counter((record.source if len(patients[record.source]) >= _FEW else "", record.label) for record in records)
    total = Counter(record.label for record in records)
    told = {}
    for label in sorted(total):
        others = sum(total.values()) - total[label]
        if not others:
            continue
        of_source: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for (source, its_label), count in seen.items():
            of_source[source][its_label != label] += count
        told[label] = sum(max(mine / total[label], rest / others) for mine, rest in of_source.values()) / 2
    return told


def source_confound(records: Sequence[Record]) -> dict[str, Any] | None:
    """How well the source alone predicts the label; None with one source or one label.

    Each image is given the commonest label among the *other patients'* images of its source (among all other
    patients' images where the source has no other patient), so a source with one patient explains nothing.
    ``sensitivity`` is the balanced accuracy, ``chance`` that of guessing; ``told``: each class against the others, as
    :func:`told_by_source`. ``suspicious``: whether one of them is ``SUSPICIOUS`` above chance.
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
    told = told_by_source(records)
    return {
        "sources": len(sources),
        "accuracy": scores["accuracy"],
        "sensitivity": sensitivity,
        "chance": chance,
        "told": told,
        "suspicious": sensitivity > chance + SUSPICIOUS or max(told.values()) > 0.5 + SUSPICIOUS,
    }


def _commonest(labels: Counter[str], overall: Counter[str]) -> str:
    return max(sorted(labels), key=lambda name: (labels[name], overall[name]))
