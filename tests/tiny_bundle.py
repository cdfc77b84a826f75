"""A bundle with a network of a few hundred weights, made with onnx.helper: no torch, milliseconds.

The network has the outputs of the real one, and ``logits == evidence.sum(-1)``:

    blocks    = average pool to 7 x 7 of |image| and of image            (N, 2, 7, 7)
    attention = relu(A . blocks + a)                                      (N, M, 7, 7)
    features  = relu(F . blocks + f)                                      (N, K, 7, 7)
    parts     = einsum(nmhw, nkhw -> nmk) / 49                            (N, M, K)
    evidence  = einsum(nmk, cmk -> ncm);  logits = sum over m
    embedding = mean of features over 7 x 7                               (N, K)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from magsd_runtime.bundle import BUNDLE_SCHEMA
from magsd_runtime.files import sha256_file
from magsd_runtime.preprocessing import PreprocessingSpec, preprocess
from magsd_runtime.verification import preprocessed_sha256

MAPS, FEATURES = 4, 6
CLASSES = ("covid-19", "normal", "pneumonia")
GOLDEN = ("noise", "ramp")


def weights(n_classes: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The network's constants, float32."""
    rng = np.random.default_rng(seed)
    return {
        "A": rng.normal(0, 1, (MAPS, 2, 1, 1)).astype(np.float32),
        "a": rng.normal(0.2, 0.2, MAPS).astype(np.float32),
        "F": rng.normal(0, 1, (FEATURES, 2, 1, 1)).astype(np.float32),
        "f": rng.normal(0.2, 0.2, FEATURES).astype(np.float32),
        "W": rng.normal(0, 3, (n_classes, MAPS, FEATURES)).astype(np.float32),
    }


def write_network(path: Path, n_classes: int, size: int, seed: int = 0) -> None:
    """Write the ONNX file: opset 18, dynamic batch."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    block = size // 7
    constants = {**weights(n_classes, seed), "nine": np.float32(49), "last": np.array([-1], np.int64)}
    nodes = [
        helper.make_node("Abs", ["image"], ["magnitude"]),
        helper.make_node("Concat", ["magnitude", "image"], ["both"], axis=1),
        helper.make_node("AveragePool", ["both"], ["blocks"], kernel_shape=[block, block], strides=[block, block]),
        helper.make_node("Conv", ["blocks", "A", "a"], ["raw_attention"]),
        helper.make_node("Relu", ["raw_attention"], ["attention"]),
        helper.make_node("Conv", ["blocks", "F", "f"], ["raw_features"]),
        helper.make_node("Relu", ["raw_features"], ["features"]),
        helper.make_node("Einsum", ["attention", "features"], ["sums"], equation="nmhw,nkhw->nmk"),
        helper.make_node("Div", ["sums", "nine"], ["parts"]),
        helper.make_node("Einsum", ["parts", "W"], ["evidence"], equation="nmk,cmk->ncm"),
        helper.make_node("ReduceSum", ["evidence", "last"], ["logits"], keepdims=0),
        helper.make_node("GlobalAveragePool", ["features"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
    ]
    shapes: dict[str, list[Any]] = {
        "logits": ["N", n_classes],
        "attention": ["N", MAPS, 7, 7],
        "evidence": ["N", n_classes, MAPS],
        "embedding": ["N", FEATURES],
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, size, size])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def golden_pixels(name: str) -> np.ndarray:
    """The synthetic image of that name, uint8 (150, 130)."""
    rng = np.random.default_rng(5)
    if name == "noise":
        return rng.integers(0, 256, (150, 130)).astype(np.uint8)
    y, x = np.mgrid[0:150, 0:130]
    return ((x * 200 / 130 + 40 * (y > 90)).clip(0, 255)).astype(np.uint8)


def build(
    folder: Path,
    *,
    classes: tuple[str, ...] = CLASSES,
    spec: PreprocessingSpec | None = None,
    temperature: float = 1.0,
    localization: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write a whole bundle into ``folder`` (made here) and return it."""
    import onnxruntime

    spec = spec or PreprocessingSpec()
    (folder / "golden").mkdir(parents=True)
    write_network(folder / "model.onnx", len(classes), spec.size, seed)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    arrays, expected = {}, {}
    names = ["logits", "attention", "evidence", "embedding"]
    for golden in GOLDEN:
        pixels = golden_pixels(golden)
        cv2.imwrite(str(folder / "golden" / f"{golden}.png"), pixels)
        image = preprocess(pixels, spec)
        outputs: Any = session.run(names, {"image": image[np.newaxis]})
        arrays.update({f"{golden}/{name}": value[0] for name, value in zip(names, outputs)})
        expected[golden] = {
            "preprocessed_sha256": preprocessed_sha256(image),
            "label": classes[int(outputs[0][0].argmax())],
        }
    np.savez(folder / "golden" / "expected.npz", **arrays)
    (folder / "golden" / "expected.json").write_text(json.dumps(expected))
    write_manifest(folder, classes, spec, temperature, localization or {"map": "attention", "threshold": 0.5})
    return folder


def write_manifest(
    folder: Path,
    classes: tuple[str, ...],
    spec: PreprocessingSpec,
    temperature: float,
    localization: dict[str, Any],
) -> None:
    """Write bundle.json for the files that are there."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "bundle.json"
    }
    shapes = {
        "logits": ["N", len(classes)],
        "attention": ["N", MAPS, 7, 7],
        "evidence": ["N", len(classes), MAPS],
        "embedding": ["N", FEATURES],
    }
    manifest = {
        "schema": BUNDLE_SCHEMA,
        "magsd_version": "0.1.0",
        "created": "2026-01-01T00:00:00Z",
        "model": {
            "name": "tiny",
            "version": "1",
            "architecture": {"kind": "test"},
            "sha256": files["model.onnx"]["sha256"],
        },
        "classes": list(classes),
        "preprocessing": spec.to_dict(),
        "preprocessing_sha256": spec.sha256(),
        "inputs": [{"name": "image", "dtype": "float32", "shape": ["N", 1, spec.size, spec.size]}],
        "outputs": [{"name": name, "dtype": "float32", "shape": shape} for name, shape in shapes.items()],
        "calibration": {"temperature": temperature, "fitted": False, "operating_points": {}},
        "localization": localization,
        "files": files,
    }
    (folder / "bundle.json").write_text(json.dumps(manifest))
