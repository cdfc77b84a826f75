"""One film through PyTorch, as a program of its own: what most people's code for this does.

    python through_torch.py --make BUNDLE WEIGHTS.pt      the bundle's network with random weights
    python through_torch.py WEIGHTS.pt IMAGE              read, standardize, run, print the class

The preprocessing is magsd's own, so that only the way of running the network differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def network(architecture: dict[str, Any], classes: int) -> Any:
    """The network that ``bundle.json`` describes, in evaluation mode, its weights as they come.

    Raises
    ------
    DataError
        If it is no MA-Net.
    """
    from magsd.models import MANet
    from magsd_runtime.errors import DataError

    if architecture.get("network") != "MA-Net":
        raise DataError(f"the bundle's network is {architecture.get('network')!r}: only MA-Net is built here")
    return MANet(
        architecture["backbone"], num_classes=classes, attention_scales=architecture["attention_scales"],
        num_attention_maps=architecture["num_attention_maps"], pooling=architecture["pooling"],
    ).eval()  # fmt: skip


def make(bundle: Path, weights: Path) -> None:
    import torch

    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    architecture, classes = manifest["model"]["architecture"], manifest["classes"]
    torch.manual_seed(0)
    state = network(architecture, len(classes)).state_dict()
    content = {"architecture": architecture, "classes": classes, "spec": manifest["preprocessing"], "state": state}
    torch.save(content, weights)


def judge(weights: Path, image: Path) -> None:
    import torch

    from magsd_runtime.images import read_radiograph
    from magsd_runtime.preprocessing import PreprocessingSpec, preprocess

    content = torch.load(weights, weights_only=True)
    model = network(content["architecture"], len(content["classes"]))
    model.load_state_dict(content["state"])
    pixels = preprocess(read_radiograph(image).pixels, PreprocessingSpec.from_dict(content["spec"]))
    with torch.inference_mode():
        probabilities = model(torch.from_numpy(pixels)[None]).logits.softmax(1)[0]
    best = int(probabilities.argmax())
    print(json.dumps({"label": content["classes"][best], "probability": float(probabilities[best])}))


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        make(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        judge(Path(sys.argv[1]), Path(sys.argv[2]))
