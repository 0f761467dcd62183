"""Encoders: shapes, sizes, names, seeds."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wscl_fast.train.config import ModelConfig
from wscl_fast.train.model import BasicBlock, Bottleneck, Conv2d, make_encoder, make_head, make_model


@pytest.mark.parametrize(
    ("name", "features", "millions"),
    [("resnet18", 512, 11.17), ("resnet34", 512, 21.28), ("resnet50", 2048, 23.5)],
)
def test_the_standard_depths_have_the_known_sizes(name: str, features: int, millions: float) -> None:
    with torch.device("meta"):
        encoder, size = make_encoder(ModelConfig(encoder=name), 32)
    assert size == features
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.02)


@pytest.mark.parametrize(
    ("image_size", "stem", "positions"),
    [(32, "3x3", 32), (64, "auto", 32), (224, "auto", 56), (32, "3x3/4", 8)],
)
def test_the_stem_follows_the_image_size(image_size: int, stem: str, positions: int) -> None:
    encoder, _ = make_encoder(ModelConfig(encoder="resnet18", widths=(4, 4, 4, 4), stem=stem), image_size)  # type: ignore[arg-type]
    assert encoder.stem(torch.zeros(1, 3, image_size, image_size)).shape[-1] == positions  # type: ignore[operator]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (3, 3), (1, 7), (5, 2), (4, 4), (6, 5)])
def test_a_convolution_of_few_positions_is_a_convolution(
    height: int, width: int, size: int, stride: int
) -> None:
    conv = Conv2d(3, 5, size, stride).double().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, height, width, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(x, conv.weight, None, stride, size // 2)
    slope = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, (x, conv.weight), slope)

    actual = conv(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, (x, conv.weight), slope), grads)


def test_gradients_of_few_positions_have_the_same_bits_each_time() -> None:
    conv = Conv2d(128, 128, 3).to(memory_format=torch.channels_last)
    x = torch.randn(64, 128, 2, 2)
    slope = torch.randn(64, 128, 2, 2)
    first, *others = [torch.autograd.grad(conv(x), conv.weight, slope)[0] for _ in range(20)]
    assert all(torch.equal(first, other) for other in others)


def test_few_positions_go_through_one_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def convolve(*args: object) -> None:
        raise AssertionError("convolved")

    monkeypatch.setattr(nn.Conv2d, "forward", convolve)
    conv = Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(torch.randn(8, 4, 3, 3))
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(AssertionError, match="convolved"):
        conv(torch.randn(8, 4, 3, 4))


@pytest.mark.parametrize(
    ("image_size", "stem", "positions"), [(33, "3x3", 9), (32, "3x3/2", 4), (30, "3x3/4", 2)]
)
def test_features_of_parts_of_the_image(image_size: int, stem: str, positions: int) -> None:
    """They are the averages over n × n parts, and there are no more parts than positions."""
    widths = {"widths": (4, 4, 4), "depths": (1, 1, 1), "stem": stem}
    whole, size = make_encoder(ModelConfig(**widths), image_size)  # type: ignore[arg-type]
    parts, more = make_encoder(ModelConfig(**widths, pool=2), image_size)  # type: ignore[arg-type]
    parts.load_state_dict(whole.state_dict())
    images = torch.rand(3, 3, image_size, image_size)
    features = parts(images)
    assert (size, more) == (4, 16)
    assert features.shape == (3, 16)
    if positions % 2 == 0:  # parts of one size: their mean is that of the whole
        torch.testing.assert_close(features.view(3, 4, 4).mean(2), whole(images))
    make_encoder(ModelConfig(**widths, pool=positions), image_size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"model.pool must be at most {positions}, .* got {positions + 1}"):
        make_encoder(ModelConfig(**widths, pool=positions + 1), image_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(("inputs", "stride"), [(8, 1), (8, 2), (32, 1)])
def test_a_fresh_block_is_its_shortcut(
    block: type[BasicBlock | Bottleneck], inputs: int, stride: int
) -> None:
    module = block(inputs, 8, stride).eval()
    x = torch.rand(2, inputs, 6, 6)
    torch.testing.assert_close(module(x), module.shortcut(x).relu())


def test_model_projects_and_keeps_the_encoder_apart() -> None:
    config = ModelConfig(widths=(4, 8), depths=(1, 2), head_hidden=16, head_layers=3, head_dim=5)
    model = make_model(config, 16, seed=3)
    assert model(torch.rand(4, 3, 16, 16)).shape == (4, 5)
    assert model.encoder(torch.rand(4, 3, 16, 16)).shape == (4, 8)
    assert sum(isinstance(m, nn.Linear) for m in model.head.modules()) == 3
    assert len(make_head(8, ModelConfig(head_layers=0))) == 0  # type: ignore[arg-type]
    conv = model.encoder.stem[0].weight  # type: ignore[index,union-attr]
    assert conv.is_contiguous(memory_format=torch.channels_last)


def test_weights_follow_from_the_seed_alone() -> None:
    config = ModelConfig(widths=(4,), depths=(1,))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, other = (make_model(config, 8, seed=s).state_dict() for s in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ModelConfig(encoder="resnet-smal"),
            "unknown model.encoder 'resnet-smal': did you mean 'resnet-small'?",
        ),
        (ModelConfig(encoder="vit"), "choose from resnet-small, resnet18"),
        (ModelConfig(widths=(4, 8)), "one entry per stage, got 3 and 2"),
        (ModelConfig(widths=(4, 0, 8)), "must be positive"),
        (ModelConfig(encoder="keras:resnet50"), "unknown library 'keras'"),
        (ModelConfig(encoder="timm:resnet18", depths=(1,)), "our own ResNets, not for 'timm:resnet18'"),
    ],
)
def test_bad_encoders_are_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=r"model\.(encoder|depths|widths)") as caught:
        make_encoder(config, 32)
    assert message in str(caught.value)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_missing_library_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=f"needs {library}: pip install {library}"):
        make_encoder(ModelConfig(encoder=f"{library}:resnet18"), 32)


class _Net(nn.Module):
    """Shaped like a torchvision model: a body and a classifier."""

    num_features = 6

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 6))
        self.fc = nn.Linear(6, classes) if classes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))  # type: ignore[no-any-return]


def test_foreign_encoders_lose_their_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision, timm = types.ModuleType("torchvision.models"), types.ModuleType("timm")
    torchvision.list_models = timm.list_models = lambda: ["net18", "net50"]  # type: ignore[attr-defined]
    torchvision.get_model = lambda name, weights: _Net(1000)  # type: ignore[attr-defined]
    timm.create_model = lambda name, pretrained, num_classes: _Net(num_classes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision.models", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "timm", timm)
    for library in ("torchvision", "timm"):
        encoder, size = make_encoder(ModelConfig(encoder=f"{library}:net18"), 32)
        assert size == 6
        assert encoder(torch.rand(2, 3, 8, 8)).shape == (2, 6)
        with pytest.raises(ValueError, match=f"did you mean '{library}:net50'"):
            make_encoder(ModelConfig(encoder=f"{library}:net51"), 32)
