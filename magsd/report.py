"""One self-contained HTML report of an evaluation: pictures inside, no script, nothing from a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from magsd_runtime.errors import RESEARCH_USE
from magsd_runtime.localization import IN_LUNGS

from .markup import STYLE, WARNING, data_uri, definitions, figure, interval, number, table, with_deviation
from .metrics import SCORES

NAMES = {
    "accuracy": "Accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "f1": "F1",
    "auc": "ROC AUC",
}
LOCALIZATION_COLUMNS = {
    "iou_mean": "Mean IoU",
    "iou_at_25": "Share with IoU ≥ 0.25",
    "pointing": "Peak inside",
    "energy_inside": "Attention inside",
    "mask_iou_mean": "IoU of masks",
    "box_iou_mean": "IoU of boxes",
    "regions_iou_mean": "IoU, a box a region",
}
BASELINE_NAMES = {
    "central_box": "fixed central box",
    "central_box_fitted": "central box of fitted size",
    "random_map": "random map",
}


def render_report(metrics: Mapping[str, Any], figures: Mapping[str, Path]) -> str:
    """The report of ``metrics`` (the content of metrics.json) with the PNG ``figures``, as one HTML text."""
    target, data = metrics["target"], metrics["data"]
    images = {name: data_uri(path) for name, path in figures.items()}
    what = "Run" if target["kind"] == "run" else "Bundle"
    title = f"Evaluation of {target['name']}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">{escape(what)} on {escape(Path(data["manifest"]).name)}: '
        f"{data['evaluated_images']} images of {data['evaluated_patients']} patients, "
        f"{len(target['classes'])} classes. {escape(metrics['created'][:10])}, magsd "
        f"{escape(metrics['magsd_version'])}.</p>",
        _notes(metrics["notes"]),
        _headline(metrics),
        _per_class(metrics, images),
        _calibration(metrics, images),
        _localization(metrics["localization"], images),
        _folds(metrics, images),
        _sources(metrics),
        _worst(metrics),
        _facts(metrics),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<div class="research" role="note">{escape(RESEARCH_USE)}</div>\n<main>\n'
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _notes(notes: Sequence[Mapping[str, str]]) -> str:
    ordered = sorted(notes, key=lambda note: note["level"] != "warning")
    items = "".join(
        f'<li class="warning">{WARNING}{escape(note["text"])}</li>'
        if note["level"] == "warning"
        else f"<li>{escape(note['text'])}</li>"
        for note in ordered
    )
    return f'<ul class="notes">{items}</ul>' if items else ""


def _headline(metrics: Mapping[str, Any]) -> str:
    folds = len(metrics["folds"])
    cards = []
    for name in SCORES:
        score = metrics["classification"][name]
        spread = f" ± {score['std']:.3f}" if score["std"] is not None else ""
        cards.append(
            f'<div class="card"><h3>{NAMES[name]}</h3><div class="value">{number(score["value"])}</div>'
            f'<div class="more">{spread.strip() or "&nbsp;"}</div>'
            f'<div class="more">95 %: {interval(score["ci95"])}</div></div>'
        )
    means = f"Values are means over {folds} folds, ± their standard deviation. " if folds > 1 else "One model. "
    return (
        "<h2>Classification</h2>"
        f'<div class="cards">{"".join(cards)}</div>'
        f'<p class="small">{means}Sensitivity, specificity, F1 and ROC AUC are macro means over the '
        "classes, one against "
        f"the rest. 95 % intervals: {metrics['bootstrap']['resamples']} bootstrap resamples of the "
        "patients, not of the "
        "images; they do not cover the chance of another training or another hospital.</p>"
    )


def _per_class(metrics: Mapping[str, Any], images: Mapping[str, str]) -> str:
    columns = ("sensitivity", "specificity", "f1", "auc")
    rows = [
        [name, str(row["images"]), *(with_deviation(row[column]) for column in columns)]
        for name, row in metrics["per_class"].items()
    ]
    shown = table(
        ["Class", "Images", *(NAMES[column] for column in columns)],
        rows,
        caption="Each class against the rest",
    )
    confusion = metrics["confusion"]
    cells = "; ".join(
        f"{name}: {', '.join(f'{count} as {other}' for other, count in zip(confusion['classes'], row) if count)}"
        for name, row in zip(confusion["classes"], confusion["counts"])
        if sum(row)
    )
    pooled = " All folds' predictions together." if len(metrics["folds"]) > 1 else ""
    pictures = figure(
        images, "confusion", f"Confusion matrix. True classes and their predictions: {cells}.",
        f"Share of the true class above, images below.{pooled}",
    )  # fmt: skip
    areas = ", ".join(
        f"{name} {number(row['auc']['value'])}"
        for name, row in metrics["per_class"].items()
        if row["auc"]["value"] is not None
    )
    pictures += figure(
        images, "roc", f"ROC curves of each class against the rest. Areas: {areas}.",
        f"Each class against the rest.{pooled}"
        + (" Their areas can differ from means over folds." if pooled else ""),
    )  # fmt: skip
    return f'{shown}<div class="figures">{pictures}</div>'


def _calibration(metrics: Mapping[str, Any], images: Mapping[str, str]) -> str:
    ece = metrics["calibration"]["ece"]
    picture = figure(
        images, "reliability",
        f"Reliability diagram with {len(metrics['calibration']['bins'])} bins; expected calibration error "
        f"{ece:.3f}.",
        "Bars above the diagonal: more often right than the network says. Below: overconfident.",
        kind="narrow",
    )  # fmt: skip
    return (
        "<h2>Calibration</h2>"
        f"<p>Expected calibration error <strong>{ece:.3f}</strong>: the mean gap between the probability of "
        "the predicted class and how often it is right "
        f"({len(metrics['calibration']['bins'])} bins of equal width).</p>{picture}"
    )


def _localization(localization: Mapping[str, Any] | None, images: Mapping[str, str]) -> str:
    if localization is None:
        return (
            "<h2>Localization</h2><p>Not evaluated: no evaluated image has a box or a mask in the manifest "
            "(columns <code>x,y,w,h</code> or <code>mask</code>).</p>"
        )
    rows, main = [], []
    maps = {"attention": "Mean attention map", "evidence": "Evidence map of the true class"}
    for name, row in localization["maps"].items():
        text = maps[name.removesuffix(IN_LUNGS)] + (", inside the lung fields" if name.endswith(IN_LUNGS) else "")
        rows.append((text, row, f"{row['threshold']:.2f}"))
        main.append(name == localization["map"])
    baselines = localization["baselines"]
    share = f"{100 * baselines['central_box']['side']:.0f} %"
    rows += [
        (f"Baseline: fixed central box, {share} of each side", baselines["central_box"], ""),
        ("Baseline: central box, size chosen like a threshold", baselines["central_box_fitted"], ""),
        (
            f"Baseline: random map, mean of {baselines['random_map']['draws']} draws",
            baselines["random_map"],
            "",
        ),
    ]
    shown = table(
        ["", *LOCALIZATION_COLUMNS.values(), "Threshold"],
        [[text, *(number(row[name]) for name in LOCALIZATION_COLUMNS), at] for text, row, at in rows],
        caption="Against what people drew, in pixels of the original image",
        main=[*main, False, False, False],
    )
    best = max(BASELINE_NAMES, key=lambda name: baselines[name]["iou_mean"])
    beyond = localization["beyond"][best]
    verdict = ""
    if localization["iou_mean"] <= baselines[best]["iou_mean"]:
        verdict = (
            f'<ul class="notes"><li class="warning">{WARNING}The map is no better than the baseline '
            f"“{BASELINE_NAMES[best]}”: it does not show that the network looks where people "
            "would.</li></ul>"
        )
    elif beyond["iou_mean_ci95"] is None or beyond["iou_mean_ci95"][0] <= 0:
        verdict = (
            f'<ul class="notes"><li class="warning">{WARNING}The map is better than the baseline '
            f"“{BASELINE_NAMES[best]}” by no more than another choice of patients could make of it.</li></ul>"
        )
    differences = "; ".join(
        f"{name} {number(localization['beyond'][key]['iou_mean'])} "
        f"({interval(localization['beyond'][key]['iou_mean_ci95'])})"
        for key, name in BASELINE_NAMES.items()
    )
    truth = ", ".join(f"{count} with {kind}" for kind, count in localization["ground_truth"].items())
    least = ""
    if localization["minimum_score"]:
        least = (
            f" A region of the heat counts only if its largest heat reaches {localization['minimum_score']:g} "
            "(minimum score; the strongest always counts), in the random maps too."
        )
    part = f" ({escape(localization['tuning_part'])} part)" if localization.get("tuning_part") else ""
    picture = figure(
        images, "localization",
        "Localization panel: images from the best to the worst IoU with heat map, thresholded region and "
        f"ground truth. Mean IoU {localization['iou_mean']:.3f}.",
        "Chosen evenly from the best to the worst IoU. The region is what the network attended to, "
        "not a finding of a radiologist.",
    ) + figure(
        images, "localization_curves",
        "Mean IoU by threshold, and share of images by IoU, of the network's maps and of the baselines.",
        "Left: what another threshold, the same for all images, would have given; the best is known in hindsight only. "
        "Right: the further up and right, the better.",
    )  # fmt: skip
    return (
        f"<h2>Localization</h2><p>Mean IoU <strong>{localization['iou_mean']:.3f}</strong> "
        f"(95 %: {interval(localization['iou_mean_ci95'])}), share of IoU ≥ 0.25 "
        f"<strong>{localization['iou_at_25']:.3f}</strong>, over {localization['images']} images of "
        f"{localization['patients']} patients ({localization['predictions']} predictions: {truth}). IoU is "
        "that of masks where a mask was drawn, of enclosing boxes where boxes were drawn. Threshold: "
        f"{escape(localization['chosen_on'])}{part}.{least}</p>{verdict}{shown}"
        f'<p class="small">What was drawn covers {100 * localization["drawn_share"]:.1f} % of the film, which is what '
        "even heat would have inside, and how often a random point would lie inside; the network sees "
        f"{100 * localization['drawn_and_seen']:.1f} % of it. Mean IoU minus a baseline's, image by image (95 %, by "
        f"patient): {differences}. Every image and method is in localization.csv.</p>"
        f"{_groups(localization, maps)}{picture}"
    )


def _groups(localization: Mapping[str, Any], maps: Mapping[str, str]) -> str:
    """Masks apart from boxes and class apart from class, where there is more than one."""
    rows = [
        [
            value, str(group["images"]), str(group["patients"]),
            maps.get(method, BASELINE_NAMES.get(method, method)), number(scores["iou_mean"]),
            interval(scores["iou_mean_ci95"]), number(scores["iou_at_25"]), number(scores["pointing"]),
            number(scores["energy_inside"]),
        ]
        for groups in localization["groups"].values()
        for value, group in groups.items()
        for method, scores in group["methods"].items()
    ]  # fmt: skip
    if not rows:
        return ""
    head = ["", "Images", "Patients", "Method", "Mean IoU", "95 %", *list(LOCALIZATION_COLUMNS.values())[1:4]]
    return table(head, rows, caption="By kind of ground truth, and by class", text_columns={3})


def _folds(metrics: Mapping[str, Any], images: Mapping[str, str]) -> str:
    folds = metrics["folds"]
    if folds[0]["fold"] is None:
        return ""
    shown = table(
        ["Fold", "Images", "Patients", *(NAMES[name] for name in SCORES), "ECE"],
        [
            [str(fold["fold"]), str(fold["images"]), str(fold["patients"])]
            + [number(fold[name]) for name in (*SCORES, "ece")]
            for fold in folds
        ],
    )
    picture = figure(
        images, "training", "Training curves: loss and validation score by epoch for each fold.",
        "Training: the dot is the epoch that the validation part chose.",
    )  # fmt: skip
    return f"<h2>Folds</h2>{shown}{picture}"


def _sources(metrics: Mapping[str, Any]) -> str:
    sources = metrics["by_source"]
    if not sources:
        return ""
    rows = [
        [
            name or "(not named)", str(row["images"]),
            ", ".join(f"{label} {count}" for label, count in row["images_per_class"].items()),
            number(row["accuracy"]), number(row["sensitivity"]), number(row["auc"]),
        ]
        for name, row in sources.items()
    ]  # fmt: skip
    shown = table(["Source", "Images", "Of them", "Accuracy", "Sensitivity", "ROC AUC"], rows, text_columns={2})
    return (
        "<h2>By source</h2><p>Within one source the network cannot gain by recognising it. "
        f"A source with one class has no ROC AUC.</p>{shown}"
    )


def _worst(metrics: Mapping[str, Any]) -> str:
    wrong = sum(sum(row) for row in metrics["confusion"]["counts"]) - sum(
        row[index] for index, row in enumerate(metrics["confusion"]["counts"])
    )
    if not wrong:
        return "<h2>Misclassified images</h2><p>None.</p>"
    rows = [
        [
            Path(row["path"]).name, row["patient"], row["label"], row["predicted"],
            number(row["probability"]), number(row["probability_of_label"]),
            "" if row["fold"] is None else str(row["fold"]),
        ]
        for row in metrics["worst"]
    ]  # fmt: skip
    shown = f"the {len(rows)} most confident" if wrong > len(rows) else "all, the most confident first"
    return f"<h2>Misclassified images</h2><p>{wrong} wrong predictions; here {shown}.</p>" + table(
        ["File", "Patient", "True class", "Predicted", "Its probability", "Of the true class", "Fold"],
        rows,
        text_columns={1, 2, 3},
    )


def _facts(metrics: Mapping[str, Any]) -> str:
    target, data = metrics["target"], metrics["data"]
    model = {name: value for name, value in target.items() if name != "kind"}
    facts = {name: value for name, value in data.items() if name != "source_confound"}
    parts = [
        f"<h2>What was evaluated</h2>{definitions({'kind': target['kind'], **model})}",
        f"<h2>Data</h2>{definitions(facts)}",
        f"<h2>Versions</h2>{definitions(metrics['versions'])}",
        f'<p class="small">{escape(RESEARCH_USE)} All numbers of this report are in metrics.json, '
        "every prediction is in predictions.csv.</p>",
    ]
    return "".join(parts)
