"""MA-Net against the paper's shapes and against its equations written with loops over maps and positions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magsd.config import resolve
from magsd.models import MANet, build_model
from magsd.models.ma_net import MultiscaleAttention, attention_pooling, map_evidence
from magsd_runtime.errors import UsageError


def slow_attention_pooling(features, attention):
    """Eq. (1), global average pooling, signed square root, L2 norm times 100, for one image in float64."""
    d, h, w = features.shape
    matrix = np.zeros((len(attention), d))
    for j, attention_map in enumerate(attention):
        part_feature_map = features * attention_map  # PF_j = A_j * f3, (D, h, w)
        for channel in range(d):
            mean = sum(part_feature_map[channel, y, x] for y in range(h) for x in range(w)) / (h * w)
            matrix[j, channel] = math.copysign(math.sqrt(abs(mean) + 1e-12), mean) if mean != 0 else 0.0
    norm = math.sqrt(sum(value * value for value in matrix.ravel()))
    return matrix / max(norm, 1e-12) * 100


def slow_attention(features, branches):
    """1x1 convolution, batch norm with running statistics, ReLU, average pooling, sum; one image."""
    grid = features[-1].shape[1]
    total: np.ndarray | float = 0.0
    for feature, (convolution, norm, _) in zip(features, branches):
        weight = convolution.weight.detach().double().numpy()[:, :, 0, 0]
        scale = norm.weight.detach().double() / (norm.running_var.double() + 1e-3).sqrt()
        shift = norm.bias.detach().double() - norm.running_mean.double() * scale
        maps = np.zeros((len(weight), grid, grid))
        ratio = feature.shape[1] // grid
        for m in range(len(weight)):
            for y in range(feature.shape[1]):
                for x in range(feature.shape[2]):
                    value = float(weight[m] @ feature[:, y, x]) * float(scale[m]) + float(shift[m])
                    maps[m, y // ratio, x // ratio] += max(value, 0.0) / ratio**2
        total = total + maps
    return total


@pytest.fixture(scope="module")
def resnet50() -> MANet:
    torch.manual_seed(0)
    return MANet("resnet50", num_classes=4, attention_scales=3).eval()


def small(**options) -> MANet:
    torch.manual_seed(0)
    return MANet("resnet18", **{"num_classes": 3, "num_attention_maps": 5, **options})


def unsettle_batch_norm(model):
    """Statistics and weights that a fresh batch norm does not have."""
    generator = torch.Generator().manual_seed(4)
    for branch in model.attention_generator.branches:
        norm = branch[1]
        ranges = {
            norm.weight: (0.5, 1.5),
            norm.bias: (-0.5, 0.5),
            norm.running_mean: (-1, 1),
            norm.running_var: (0.2, 2),
        }
        for values, (low, high) in ranges.items():
            values.data = low + (high - low) * torch.rand(values.shape, generator=generator)


@st.composite
def pooling_inputs(draw):
    n, m, d = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    h, w = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    features = torch.randn((n, d, h, w), generator=generator) * scale
    if draw(st.booleans()):
        features = features.relu()
    attention = torch.randn((n, m, h, w), generator=generator).relu() * draw(st.sampled_from([0.0, 0.1, 30.0]))
    return features, attention


@given(pooling_inputs())
@settings(max_examples=120, deadline=None)
def test_attention_pooling_is_equation_1(inputs):
    features, attention = inputs
    result = attention_pooling(features, attention)
    for single, feature, maps in zip(result, features.double().numpy(), attention.double().numpy()):
        np.testing.assert_allclose(single, slow_attention_pooling(feature, maps), rtol=1e-3, atol=2e-3)


@given(pooling_inputs(), st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_evidence_is_what_each_map_adds_to_the_linear_layer(inputs, num_classes):
    parts = attention_pooling(*inputs)
    n, m, d = parts.shape
    weight = torch.randn((num_classes, m * d), generator=torch.Generator().manual_seed(n * m * d))
    evidence = map_evidence(parts, weight)
    assert evidence.shape == (n, num_classes, m)
    for image in range(n):
        for c in range(num_classes):
            for j in range(m):
                share = sum(float(parts[image, j, k]) * float(weight[c, j * d + k]) for k in range(d))
                assert float(evidence[image, c, j]) == pytest.approx(share, abs=1e-3)
    torch.testing.assert_close(evidence.sum(2), parts.reshape(n, m * d) @ weight.T, atol=1e-3, rtol=1e-4)


def test_the_shapes_of_the_paper(resnet50):
    image = torch.randn(1, 1, 224, 224)
    with torch.no_grad():
        features = resnet50.backbone(image)
        output = resnet50(image)
    shapes = [tuple(features[tap].shape[1:]) for tap in resnet50.taps]
    assert shapes == [(512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    assert output.attention.shape == (1, 32, 7, 7)
    assert resnet50.classifier.in_features == 65_536
    assert resnet50.classifier.bias is None
    assert output.logits.shape == (1, 4)
    assert output.evidence.shape == (1, 4, 32)
    assert output.embedding.shape == (1, 2048)
    assert [branch[0].in_channels for branch in resnet50.attention_generator.branches] == [512, 1024, 2048]
    assert resnet50.attention_generator.ratios == (4, 2, 1)


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_the_network_is_the_equations_on_its_feature_maps(scales):
    model = small(attention_scales=scales).eval()
    unsettle_batch_norm(model)
    image = torch.randn(2, 1, 96, 96)
    with torch.no_grad():
        output = model(image)
        features = model.backbone(image)
    for number in range(2):
        maps = [features[tap][number].double().numpy() for tap in model.taps][-scales:]
        attention = slow_attention(maps, model.attention_generator.branches)
        assert attention.shape == (5, 3, 3)
        np.testing.assert_allclose(output.attention[number], attention, rtol=1e-4, atol=1e-4)
        parts = slow_attention_pooling(maps[-1], attention)
        weight = model.classifier.weight.detach().double().numpy()
        np.testing.assert_allclose(output.logits[number], weight @ parts.ravel(), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(output.embedding[number], maps[-1].mean((1, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.evidence.sum(2), output.logits)


def test_training_mode_uses_the_statistics_of_the_batch():
    generator = MultiscaleAttention((3, 4), (16, 32), 2)
    features = [torch.randn(6, 3, 4, 4), torch.randn(6, 4, 2, 2)]
    result = generator(features)
    expected = torch.zeros(6, 2, 2, 2)
    for feature, (convolution, _, _) in zip(features, generator.branches):
        maps = torch.einsum("md,ndyx->nmyx", convolution.weight[:, :, 0, 0], feature)
        mean, variance = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), unbiased=False, keepdim=True)
        maps = ((maps - mean) / (variance + 1e-3).sqrt()).relu()
        ratio = maps.shape[2] // 2
        expected += maps.reshape(6, 2, 2, ratio, 2, ratio).mean((3, 5))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["gap", "gmp"])
def test_plain_pooling(pooling):
    model = small(pooling=pooling).eval()
    image = torch.randn(2, 1, 64, 64)
    output = model(image)
    f3 = model.backbone(image)[model.taps[-1]]  # (2, 512, 2, 2)
    columns = f3.reshape(2, 512, 4)
    pooled = columns.mean(2) if pooling == "gap" else columns.max(2).values
    assert model.classifier.weight.shape == (3, 512)
    torch.testing.assert_close(output.logits, pooled @ model.classifier.weight.T)
    torch.testing.assert_close(output.evidence, (output.logits / 5)[:, :, None].expand(2, 3, 5))
    assert output.attention.shape == (2, 5, 2, 2)
    assert not any(parameter.requires_grad for parameter in model.attention_generator.parameters())
    output.logits.sum().backward()
    # every parameter that is trained has a gradient: several processes need that
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_every_parameter_is_trained():
    model = small(attention_scales=3).train()
    model(torch.randn(2, 1, 64, 64)).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-8, 1e15])
def test_extreme_attention_gives_finite_values_and_gradients(value):
    features = torch.randn(2, 6, 3, 3, requires_grad=True)
    attention = torch.full((2, 4, 3, 3), value, requires_grad=True)
    parts = attention_pooling(features, attention)
    parts.square().sum().add(parts.sum()).backward()
    for tensor in (parts, features.grad, attention.grad):
        assert tensor is not None
        assert torch.isfinite(tensor).all()
    length = parts.detach().square().sum((1, 2)).sqrt()
    torch.testing.assert_close(length, torch.full((2,), 0.0 if value == 0 else 100.0), rtol=1e-5, atol=0)


def test_contraction_divides_first():
    # 49 positions of 150 * 150 are 1.1 million before the division, 22,500 after: float16 ends at 65,504
    parts = attention_pooling(torch.full((1, 2, 7, 7), 150.0).half(), torch.full((1, 1, 7, 7), 150.0).half())
    torch.testing.assert_close(parts.float(), torch.full((1, 1, 2), 100 / math.sqrt(2)), rtol=2e-3, atol=0)


def test_the_head_is_float32_under_autocast():
    model = small().eval()
    image = torch.randn(2, 1, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model(image)
        features = model.backbone(image)
    assert all(value.dtype == torch.float32 for value in output)
    assert features[-1].dtype == torch.bfloat16
    scales = [features[tap].float() for tap in model.taps]
    with torch.no_grad():
        attention = model.attention_generator(scales[-2:])
        evidence = map_evidence(attention_pooling(scales[-1], attention), model.classifier.weight)
    assert torch.equal(output.attention, attention)
    assert torch.equal(output.logits, evidence.sum(2))


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto"])
def test_other_backbones(backbone):
    model = MANet(backbone, num_classes=2).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 1, 96, 96))
    assert output.attention.shape == (1, 32, 3, 3)
    assert output.evidence.shape == (1, 2, 32)
    assert output.embedding.shape == (1, model.feature_channels)


def test_a_backbone_with_channels_last_features():
    model = MANet("swin_tiny_patch4_window7_224", num_classes=2, attention_scales=3).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 1, 224, 224))
    assert output.attention.shape == (1, 32, 7, 7)
    assert output.embedding.shape == (1, 768)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet5000"}, "'resnet5000' is not known to timm"),
        ({"backbone": "vit_tiny_patch16_224"}, r"strides \[16, 16, 16\], not at \[8, 32\]"),
        ({"attention_scales": 4}, "expected 1, 2 or 3"),
        ({"num_attention_maps": 0}, "at least 1"),
        ({"num_classes": 1}, "at least 2"),
        ({"pooling": "sum"}, "expected attention, gap or gmp"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        MANet(**{"backbone": "resnet18", "num_classes": 2, **options})


def test_build_model_takes_the_configuration():
    config = resolve({"backbone": "resnet18", "attention_scales": 3, "num_attention_maps": 7, "model": "magsd"})
    model = build_model(config, num_classes=3)
    assert (model.backbone_name, model.attention_scales, model.num_attention_maps) == ("resnet18", 3, 7)
    plain = build_model(resolve({"backbone": "resnet18", "model": "plain"}), num_classes=3)
    assert plain.pooling == "gap"


@pytest.mark.parametrize("pooling", ["attention", "gap"])
def test_torch_export_gives_the_same_outputs_for_another_batch_size(pooling):
    model = small(pooling=pooling).eval()
    batch = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (torch.randn(2, 1, 64, 64),), dynamic_shapes=(batch,)).module()
    image = torch.randn(3, 1, 64, 64)
    with torch.no_grad():
        for name, ours, theirs in zip(model(image)._fields, model(image), exported(image)):
            torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_the_onnx_exporter_takes_the_network(tmp_path):
    import onnxruntime

    model = MANet("tf_efficientnet_lite0", num_classes=2).eval()
    program = torch.onnx.export(
        model, (torch.randn(2, 1, 64, 64),), dynamo=True, opset_version=18, input_names=["image"],
        output_names=["logits", "attention", "evidence", "embedding"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False,
    )  # fmt: skip
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    image = torch.randn(3, 1, 64, 64)
    results = session.run(None, {"image": image.numpy()})
    with torch.no_grad():
        for result, expected in zip(results, model(image)):
            np.testing.assert_allclose(result, expected.numpy(), atol=2e-4, rtol=1e-4)
