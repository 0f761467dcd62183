"""The encoder (a ResNet of ours, or torchvision's and timm's by name) and the projection head.

Ours follow He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, with the last
normalisation of each block starting at zero (Goyal et al., "Accurate, Large Minibatch SGD", 2017).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wscl_fast.train.config import ModelConfig


class Conv2d(nn.Conv2d):
    """A square convolution without bias, padded to keep the resolution; of few positions one matrix product.

    Where no more positions come in than the kernel has taps, a matrix from all positions to all positions
    takes no more multiplications than the convolution, and on a CPU a quarter of its time (bfloat16 without
    AMX: seven tenths): the convolution's loops run over positions.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        size: positions a side of the kernel, odd.
        stride: from one position that goes out to the next.
    """

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, size, stride, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        size, stride = self.kernel_size[0], self.stride[0]
        if x.device.type != "cpu" or not 0 < x.shape[-2] * x.shape[-1] <= size**2:
            return super().forward(x)
        height, width, taps = _taps(x.shape[-2], x.shape[-1], size, stride)
        weight = self.weight.permute(2, 3, 0, 1).flatten(0, 1)  # [taps, outputs, inputs]
        weight = F.pad(weight, (0, 0, 0, 0, 0, 1))  # and one of zeros
        # Not by an index: its gradient is added up by several threads in no order.
        weight = weight.index_select(0, taps.flatten()).view(*taps.shape, *weight.shape[1:])
        matrix = weight.transpose(1, 2).reshape(height * width * self.out_channels, -1)
        y = F.linear(x.permute(0, 2, 3, 1).reshape(len(x), -1), matrix)
        return y.view(len(x), height, width, -1).permute(0, 3, 1, 2)


def _taps(height: int, width: int, size: int, stride: int) -> tuple[int, int, Tensor]:
    """What a padded kernel makes of height × width positions.

    Returns:
        the height and the width of what comes out, and int64 [positions out, positions in]: the tap through
        which the one sees the other, size² where it does not.
    """
    down, right = _reach(height, size, stride), _reach(width, size, stride)
    seen = (down >= 0)[:, None, :, None] & (right >= 0)[None, :, None, :]
    taps = torch.where(seen, down[:, None, :, None] * size + right[None, :, None, :], size**2)
    return len(down), len(right), taps.flatten(2).flatten(0, 1)


def _reach(length: int, size: int, stride: int) -> Tensor:
    """[positions out, positions in] along one side: the kernel's place there, −1 where it does not reach."""
    places = torch.arange(length) - torch.arange(0, length, stride)[:, None] + size // 2
    return torch.where((places >= 0) & (places < size), places, -1)


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 (with the stride) and 1 × 1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = Conv2d(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = Conv2d(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.bn3.weight)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.shortcut(x), inplace=True)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def _stem(kind: str, width: int) -> nn.Sequential:
    def layer(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
        return [Conv2d(inputs, outputs, size, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    if kind == "7x7/4":
        return nn.Sequential(*layer(3, width, 7, 2), nn.MaxPool2d(3, 2, padding=1))
    if kind == "3x3/4":
        thin = max(width // 3, 4)
        return nn.Sequential(*layer(3, thin, 3, 2), *layer(thin, width, 3, 2))
    return nn.Sequential(*layer(3, width, 3, 2 if kind == "3x3/2" else 1))


class ResNet(nn.Module):
    """Images [B, 3, H, W] -> features [B, out_features]: stem, stages of blocks, averages over positions.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks in each stage; every stage but the first halves the resolution.
        widths: channels of each stage (times `block.expansion`).
        stem: "3x3" keeps the resolution, "3x3/2" halves it, "3x3/4" halves it twice with a thin first layer
            (cheap on a CPU), "7x7/4" is ImageNet's (a stride and a pooling).
        pool: the averages are over n × n parts of the image, one after another; 1: over all of it.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        stem: str,
        pool: int = 1,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.stem = _stem(stem, widths[0])
        stages: list[nn.Module] = []
        channels = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for position in range(depth):
                stages.append(block(channels, width, 2 if position == 0 and stage > 0 else 1))
                channels = width * block.expansion
        self.stages = nn.Sequential(*stages)
        self.out_features = channels * pool**2
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.stages(self.stem(images))
        if maps.shape[-2:] != (self.pool, self.pool):  # else each part is one position
            maps = F.adaptive_avg_pool2d(maps, self.pool)
        return maps.flatten(1)


@dataclass(frozen=True)
class _Variant:
    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, ...]
    widths: tuple[int, ...]


_STANDARD = (64, 128, 256, 512)
VARIANTS = {
    "resnet-small": _Variant(BasicBlock, (1, 1, 1), (48, 96, 256)),
    "resnet18": _Variant(BasicBlock, (2, 2, 2, 2), _STANDARD),
    "resnet34": _Variant(BasicBlock, (3, 4, 6, 3), _STANDARD),
    "resnet50": _Variant(Bottleneck, (3, 4, 6, 3), _STANDARD),
}


def make_encoder(config: ModelConfig, image_size: int) -> tuple[nn.Module, int]:
    """The encoder that `config` names, and the size of its features.

    Raises:
        ValueError: a name that does not exist; depths and widths that do not fit together.
        ImportError: torchvision or timm is asked for and not installed.
    """
    library, _, name = config.encoder.rpartition(":")
    if library:
        return _foreign_encoder(library, name, config)
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(VARIANTS)}"
        raise ValueError(f"unknown model.encoder '{name}': {hint}")
    variant = VARIANTS[name]
    depths, widths = config.depths or variant.depths, config.widths or variant.widths
    if len(depths) != len(widths):
        raise ValueError(
            f"model.depths and model.widths need one entry per stage, got {len(depths)} and {len(widths)}"
        )
    if min((*depths, *widths)) < 1:
        raise ValueError(f"model.depths and model.widths must be positive, got {depths} and {widths}")
    stem = _auto_stem(name, image_size) if config.stem == "auto" else config.stem
    positions = image_size
    for _ in range({"3x3": 0, "3x3/2": 1}.get(stem, 2) + len(depths) - 1):
        positions = -(-positions // 2)
    if config.pool > positions:
        raise ValueError(
            f"model.pool must be at most {positions}, the positions a side that '{name}' leaves of "
            f"{image_size} pixels, got {config.pool}"
        )
    encoder = ResNet(variant.block, depths, widths, stem, config.pool)
    return encoder, encoder.out_features


def _auto_stem(name: str, image_size: int) -> str:
    if image_size > 96:
        return "7x7/4"
    if name == "resnet-small":
        return "3x3/4" if image_size >= 24 else "3x3"
    return "3x3/2" if image_size > 48 else "3x3"


def _foreign_encoder(library: str, name: str, config: ModelConfig) -> tuple[nn.Module, int]:
    if library not in ("torchvision", "timm"):
        raise ValueError(f"unknown library '{library}' in model.encoder: choose from torchvision, timm")
    if config.depths or config.widths or config.stem != "auto":
        raise ValueError(f"model.depths, widths and stem are for our own ResNets, not for '{config.encoder}'")
    try:
        module = importlib.import_module("torchvision.models" if library == "torchvision" else library)
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another PyTorch
        raise ImportError(
            f"model.encoder '{config.encoder}' needs {library}: pip install {library} ({error})"
        ) from error
    known: list[str] = module.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f": did you mean '{library}:{near[0]}'?" if near else ""
        raise ValueError(f"{library} has no model '{name}'{hint}")
    if library == "timm":
        encoder = module.create_model(name, pretrained=False, num_classes=0)
        return encoder, int(encoder.num_features)
    encoder = module.get_model(name, weights=None)
    return encoder, _cut_classifier(encoder)


def _cut_classifier(model: nn.Module) -> int:
    """Replace the last linear layer, the classifier, by the identity; returns the width of its input."""
    linear = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear classifier to cut off")
    path, classifier = linear[-1]
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())
    return classifier.in_features


def make_head(inputs: int, config: ModelConfig) -> nn.Module:
    """The projection head: linear layers with batch normalisation and ReLU between them."""
    layers: list[nn.Module] = []
    for _ in range(config.head_layers - 1):
        layers += [
            nn.Linear(inputs, config.head_hidden, bias=False),
            nn.BatchNorm1d(config.head_hidden),
            nn.ReLU(inplace=True),
        ]
        inputs = config.head_hidden
    if config.head_layers:
        layers.append(nn.Linear(inputs, config.head_dim))
    return nn.Sequential(*layers)


class ContrastiveModel(nn.Module):
    """Encoder and head: images [B, 3, H, W] -> projected features [B, head_dim]."""

    def __init__(self, config: ModelConfig, image_size: int) -> None:
        super().__init__()
        self.encoder, self.feature_size = make_encoder(config, image_size)
        self.head = make_head(self.feature_size, config)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))  # type: ignore[no-any-return]


def make_model(config: ModelConfig, image_size: int, *, seed: int) -> ContrastiveModel:
    """A model whose initial weights follow from `seed` alone (the global generator is left as it was)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ContrastiveModel(config, image_size)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def weights_of(module: nn.Module) -> dict[str, Any]:
    """The state dict on the CPU, contiguous: what is written to encoder.safetensors."""
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
