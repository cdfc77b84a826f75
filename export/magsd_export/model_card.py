"""MODEL_CARD.md: what a bundle's model is, for the person who decides whether to use it."""

from __future__ import annotations

from typing import Any

from magsd_runtime.calibration_record import Calibration
from magsd_runtime.calibration_text import calibration_section
from magsd_runtime.errors import RESEARCH_USE
from magsd_runtime.localization import IN_LUNGS

INTENDED_USE = (
    "Research on chest X-ray classification and attention maps. Not a medical device: not for diagnosis, "
    "triage or any decision about a patient."
)
LICENCE = (
    "The software is Apache-2.0. The weights are derived from the training images, and from pretrained weights "
    "where those were used: both have licences of their own, to be checked before the bundle is passed on."
)


def model_card(manifest: dict[str, Any]) -> str:
    """The card in Markdown, from the content of ``bundle.json`` (without ``files``) alone."""
    model, training = manifest["model"], manifest["training"]
    sections = [
        f"# {_text(model['name'])}, version {_text(model['version'])}",
        f"**{RESEARCH_USE}**",
        _what_it_is(manifest),
        "## Intended use",
        INTENDED_USE,
        "## Training data",
        _training_data(training),
        "## Results",
        _results(training),
        calibration_section(_calibration(manifest)),
        "## Input",
        _input(manifest["preprocessing"]),
        "## Where it looked",
        _localization(manifest),
        "## Exported and checked",
        _parity(manifest["verification"]),
        "## Limits",
        _limits(manifest),
        "## Licence",
        LICENCE,
    ]
    return "\n\n".join(sections) + "\n"


def _what_it_is(manifest: dict[str, Any]) -> str:
    architecture, training = manifest["model"]["architecture"], manifest["training"]
    settings = training["settings"]
    augmentation = ", ".join(settings["attention_augmentation"]) or "none"
    kind = "A MAG-SD network" if architecture["network"] == "MA-Net" else "A network"
    return "\n".join(
        [
            f"{kind} ({architecture['network']} on {architecture['backbone']}, "
            f"{architecture['parameters']:,} parameters) that assigns a frontal chest X-ray to one of "
            f"{len(manifest['classes'])} classes and shows where it looked.",
            "",
            f"- classes, in the order of the logits: {', '.join(_text(name) for name in manifest['classes'])}",
            f"- attention: {architecture['num_attention_maps']} maps from {architecture['attention_scales']} scales, "
            f"pooling {architecture['pooling']}"
            if architecture["num_attention_maps"]
            else "- attention: none",
            f"- training: loss {settings['loss']}, attention-guided augmentation {augmentation}, "
            f"weights at the start: {_text(settings['weights'])}",
            f"- fold {training['fold']} of {settings['folds']}, epoch {training['epoch']} of {settings['epochs']}, "
            f"seed {settings['seed']} (exported: {_text(training['chosen'])})",
            f"- magsd {manifest['magsd_version']}, exported {manifest['created']}, "
            f"git commit {manifest['git_commit'] or 'unknown'}",
        ]
    )


def _training_data(training: dict[str, Any]) -> str:
    data = training["data"]
    rows = [f"| {_text(name)} | {count} |" for name, count in (data.get("images_per_class") or {}).items()]
    return "\n".join(
        [
            f"{data.get('images', 'unknown')} images of {data.get('patients', 'unknown')} patients in the manifest; "
            "this fold trained on all of them but its test and validation parts, which share no patient with it.",
            "",
            "| class | images |",
            "|---|---|",
            *rows,
            "",
            f"Manifest digest: `{data.get('digest', 'unknown')}`",
        ]
    )


def _results(training: dict[str, Any]) -> str:
    validation = {name: value for name, value in training["validation"].items() if value is not None}
    lines = []
    if validation:
        scores = ", ".join(f"{name} {value:.4f}" for name, value in validation.items())
        lines += [f"Validation part, which chose the epoch and so flatters: {scores}."]
    evaluation = training["evaluation"]
    if evaluation is None:
        lines += ["", "No test results were given at export (`magsd export --evaluation`)."]
        return "\n".join(lines).strip()
    same = (
        "images of the run's own manifest, each judged by a model that never saw its patient"
        if evaluation["same_manifest_as_training"]
        else "another manifest than the training's"
    )
    folds = evaluation["folds"] or []
    lines += [
        "",
        f"`magsd evaluate`: {evaluation['images']} images of {evaluation['patients']} patients, {same}; mean over "
        f"{len(folds)} fold{'s' if len(folds) != 1 else ''}, of which this bundle is fold {training['fold']}.",
        "",
        "| score | mean | 95 % interval | this fold |",
        "|---|---|---|---|",
    ]
    own = evaluation["this_fold"] or {}
    for name, row in (evaluation["classification"] or {}).items():
        interval = " to ".join(map(_score, row["ci95"])) if row.get("ci95") else "-"
        lines.append(f"| {name} | {_score(row.get('value'))} | {interval} | {_score(own.get(name))} |")
    where = evaluation["localization"]
    if where:
        lines += [
            "",
            f"Localization ({where['map']} map{_minimum(where, ', regions that reach {:g}')}, "
            f"{where['images']} images with boxes or masks): mean IoU "
            f"{_score(where['iou_mean'])}, share above 0.25 {_score(where['iou_at_25'])}.",
        ]
    return "\n".join(lines).strip()


def _calibration(manifest: dict[str, Any]) -> Calibration:
    return Calibration.from_dict(
        manifest["calibration"], classes=manifest["classes"], model_sha256=manifest["model"]["sha256"]
    )


def _input(spec: dict[str, Any]) -> str:
    clahe = (
        f"CLAHE with clip limit {spec['clahe_clip']:g} on {spec['clahe_grid']} x {spec['clahe_grid']} tiles"
        if spec["clahe_clip"]
        else "no CLAHE"
    )
    return (
        f"One grey channel, 0 black to 255 white, {spec['fit']} to {spec['size']} x {spec['size']} pixels, {clahe}, "
        "z-score over the image's pixels. The preprocessing is not in the ONNX file: use `magsd_runtime`, whose "
        "steps the golden inputs check bit for bit."
    )


def _localization(manifest: dict[str, Any]) -> str:
    chosen = manifest["localization"]
    names = {"attention": "mean of the attention maps", "evidence": "evidence map of the predicted class"}
    shown = names[chosen["map"].removesuffix(IN_LUNGS)]
    where = ", inside the lung fields" if chosen["map"].endswith(IN_LUNGS) else ""
    return (
        f"Heat map: {shown}{where}; threshold {chosen['threshold']:g} ({_text(chosen['chosen_on'])})."
        f"{_minimum(chosen, ' A region whose largest heat stays below {:g} is left out, unless it is the strongest.')} "
        "A box is a region that the network attended to, not a radiologist's finding."
    )


def _minimum(holder: dict[str, Any], sentence: str) -> str:
    """``sentence`` with the minimum score, or nothing where there is none."""
    value = holder.get("minimum_score") or 0.0
    return sentence.format(value) if value else ""


def _parity(verification: dict[str, Any]) -> str:
    inputs = verification["inputs"]
    lines = [
        f"`model.onnx` (float32, opset 18) against PyTorch over {inputs['real']['images']} radiographs "
        f"({_text(inputs['real']['source'])}) and {len(inputs['synthetic'])} synthetic inputs, in batches of "
        f"{', '.join(map(str, verification['batch_sizes']))}; labels equal.",
        "",
        "| output | largest difference | relative to the output's largest value |",
        "|---|---|---|",
    ]
    for name, row in verification["worst_differences"].items():
        lines.append(f"| {name} | {row['absolute']:.1e} | {row['relative']:.1e} |")
    return "\n".join(lines)


def _limits(manifest: dict[str, Any]) -> str:
    limits = [
        "It knows its classes only: any other film, or picture, still gets one of them"
        + (", unless the statistics of its training films flag it." if manifest.get("acceptance") else "."),
        "Images of different classes that come from different sources differ in more than disease; a network "
        "learns that too. Results on other hospitals' films are likely to be worse.",
        "Probabilities are worth what their calibration is worth (above), and only on films like those of its cases.",
    ]
    if manifest["model"]["architecture"]["pooling"] != "attention":
        limits.append(
            "Its attention maps were not trained (plain pooling): heat maps and boxes say nothing about the image."
        )
    return "\n".join(f"- {limit}" for limit in limits)


def _score(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _text(value: Any) -> str:
    """Free text inside a Markdown line or table cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
