"""A calibration for people: lines for a terminal, and the section of the model card."""

from __future__ import annotations

from .calibration_record import Calibration, OperatingPoint
from .prediction_sets import PredictionSets

CARD_HEADING = "## Calibration"


def format_calibration(calibration: Calibration) -> str:
    """Before and after, and the operating points, as an aligned table of several lines."""
    if not calibration.fitted or calibration.before is None or calibration.after is None or calibration.data is None:
        why = f" ({calibration.source})" if calibration.source else ""
        return f"calibration  none{why}: probabilities are as the network gives them"
    before, after, facts = calibration.before, calibration.after, calibration.data
    spread = ""
    if calibration.temperature_ci95 is not None:
        spread = "95 % interval " + _range(calibration.temperature_ci95)
    classes = ", ".join(f"{name} {number}" for name, number in facts.images_per_class.items())
    lines = [
        f"cases        {facts.images} images of {facts.patients} patients ({classes})",
        f"             {calibration.source}",
        f"{'':<13}{'before':>8}{'after':>8}",
        f"temperature  {before.temperature:>8.3f}{after.temperature:>8.3f}  {spread}".rstrip(),
        f"NLL          {before.nll:>8.4f}{after.nll:>8.4f}  on the cases of the fit",
        f"ECE          {before.ece:>8.4f}{after.ece:>8.4f}  on the cases of the fit, top label, 15 bins",
    ]
    if calibration.ece_cross_validated is not None:
        honest = calibration.ece_cross_validated
        lines.append(f"ECE          {'':>8}{honest:>8.4f}  cross-validated: each patient outside the fit")
    if calibration.operating_points:
        lines += ["", f"positive for {calibration.positive_class} where its probability is at least the threshold"]
        lines.append(f"{'':<16}{'threshold':>10}   {'sensitivity':<25}{'specificity'}")
        lines += [_point(point, point.name == calibration.default) for point in calibration.operating_points]
        lines.append("thresholds were chosen on these same cases: expect new ones to be missed slightly more often")
        if (margin := _margin(calibration)) is not None:
            lines.append(margin)
    if calibration.sets is not None:
        lines += ["", *_sets(calibration.sets)]
    return "\n".join(lines)


def calibration_section(calibration: Calibration) -> str:
    """The section of MODEL_CARD.md, heading and all, without a blank line at the end."""
    if not calibration.fitted or calibration.before is None or calibration.after is None or calibration.data is None:
        why = f" ({_plain(calibration.source)})" if calibration.source else ""
        return f"{CARD_HEADING}\n\nNone{why}: probabilities are as the network gives them."
    before, after, facts = calibration.before, calibration.after, calibration.data
    honest = calibration.ece_cross_validated
    lines = [
        CARD_HEADING,
        "",
        f"Temperature {calibration.temperature:.3f}, fitted on {facts.images} images of {facts.patients} patients: "
        f"{_plain(calibration.source)}. Expected calibration error (top label, 15 bins) {before.ece:.4f} before and "
        f"{after.ece:.4f} after on these cases"
        + ("." if honest is None else f", {honest:.4f} with each patient left out of the fit."),
    ]
    if calibration.operating_points:
        lines += [
            "",
            f"Positive for {_plain(str(calibration.positive_class))} where its probability is at least:",
            "",
            "| operating point | threshold | sensitivity | specificity | positive / negative images |",
            "|---|---|---|---|---|",
        ]
        for point in calibration.operating_points:
            name = f"{_plain(point.name)}{' (default)' if point.name == calibration.default else ''}"
            lines.append(
                f"| {name} | {point.threshold:.4f} | {_rate(point.sensitivity, point.sensitivity_ci95)} "
                f"| {_rate(point.specificity, point.specificity_ci95)} | {point.positives} / {point.negatives} |"
            )
        lines += ["", "Thresholds were chosen on these cases; on new ones slightly more will be missed."]
        if (margin := _margin(calibration)) is not None:
            lines += ["", f"A{_plain(margin)[1:]}."]
    if calibration.sets is not None:
        first, *rest = map(_plain, _sets(calibration.sets))
        lines += ["", f"A{first[1:]}" + "".join(f"; {line}" for line in rest) + "."]
    return "\n".join(lines)


def with_section(card: str, calibration: Calibration) -> str:
    """The model card with its calibration section replaced, or added at the end if it has none."""
    section = calibration_section(calibration)
    before, heading, after = card.partition(f"\n{CARD_HEADING}\n")
    if not heading:
        return card.rstrip("\n") + "\n\n" + section + "\n"
    _, next_heading, rest = after.partition("\n## ")
    return f"{before}\n{section}\n{next_heading}{rest}"


def _point(point: OperatingPoint, default: bool) -> str:
    sensitivity = _rate(point.sensitivity, point.sensitivity_ci95)
    specificity = _rate(point.specificity, point.specificity_ci95)
    mark = "default" if default else ""
    return f"{point.name:<16}{point.threshold:>10.4f}   {sensitivity:<25}{specificity:<25}{mark}".rstrip()


def _margin(calibration: Calibration) -> str | None:
    """Between which probabilities the default point's decision is flagged, in words."""
    point = calibration.point()
    if point is None or point.threshold_ci95 is None:
        return None
    low, high = point.threshold_ci95
    name = calibration.positive_class
    return f"a probability of {name} from {low:.4f} to {high:.4f} is near the default threshold: review"


def _sets(sets: PredictionSets) -> list[str]:
    """What the prediction sets are and how they did, in words; the first begins with an article."""
    minimums = ", ".join(f"{name} {value:.4f}" for name, value in sets.minimum_probability.items())
    rate = f"{100 * sets.coverage:g} %"
    lines = [f"a class is possible, at {rate} coverage, where its probability is at least: {minimums}"]
    if (scores := sets.cross_validated) is None:
        return lines
    each = ", ".join(f"{name} {100 * value:.1f} %" for name, value in scores.coverage_per_class.items())
    lines.append(
        f"cross-validated, each patient outside the fit: the right class was possible on {100 * scores.coverage:.1f} % "
        f"of {scores.images} images ({each})"
    )
    if scores.accuracy_alone is not None:
        lines.append(
            f"no class but the label was possible on {100 * scores.alone:.1f} %, "
            f"the label was right on {100 * scores.accuracy_alone:.1f} % of these"
        )
    if scores.accuracy_others is not None:
        lines.append(
            f"unsure, and so for review, were {100 - 100 * scores.alone:.1f} %, "
            f"the label was right on {100 * scores.accuracy_others:.1f} % of these"
        )
    return lines


def _rate(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} ({_range(interval)})"


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _plain(text: str) -> str:
    """Free text inside a Markdown line or table cell."""
    return " ".join(text.split()).replace("|", "\\|")
