"""Optimisers, their parameter groups, and the learning rate as a pure function of the progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from wscl_fast.train.config import OptimConfig


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, layer by layer, by the size of the weights.

        g = g + weight_decay · w
        v = momentum · v + lr · trust · ‖w‖ / ‖g‖ · g
        w = w − v

    You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017 (arXiv 1708.03888),
    with the decay inside the norm, as SimCLR and LARS's later uses have it.

    Args:
        params: parameters or groups; a group with `adapt=False` (biases, normalisation) takes plain steps.
        lr: learning rate.
        momentum: of the scaled steps.
        weight_decay: L2 penalty, added to the gradient.
        trust: the trust coefficient η.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                step = weight.grad.add(weight, alpha=group["weight_decay"])
                if group["adapt"]:
                    size, slope = weight.norm(), step.norm()
                    scale = group["trust"] * size / slope
                    step = step * torch.where((size > 0) & (slope > 0), scale, 1.0)
                state = self.state[weight]
                if not state:
                    state["velocity"] = torch.zeros_like(weight)
                velocity = state["velocity"]
                velocity.mul_(group["momentum"]).add_(step, alpha=group["lr"])
                weight.sub_(velocity)
        return loss


def make_optimizer(modules: Iterable[nn.Module], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of `config` over all parameters; vectors and scalars are not decayed.

    Vectors and scalars are the biases, the normalisations and a learnable temperature.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": config.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    for group, adapt in zip(groups, (True, False), strict=False):
        group["adapt"] = adapt
    return LARS(groups, lr=config.lr, momentum=config.momentum)


def learning_rate(config: OptimConfig, epoch: float, epochs: int) -> float:
    """Linear from 0 over the warm-up, then half a cosine to 0; `epoch` counts fractions too."""
    warmup = min(config.warmup_epochs, float(epochs))
    if epoch < warmup:
        return config.lr * epoch / warmup
    progress = (epoch - warmup) / max(epochs - warmup, 1e-9)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
