"""LARS against a step computed by hand, decay groups, and the schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from wscl_fast import ClusteredInfoNCE
from wscl_fast.train.config import OptimConfig
from wscl_fast.train.optim import LARS, learning_rate, make_optimizer, set_learning_rate


def test_lars_takes_the_step_of_the_paper() -> None:
    w = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    lr, momentum, decay, trust = 0.5, 0.9, 0.1, 0.02
    optimizer = LARS([w], lr=lr, momentum=momentum, weight_decay=decay, trust=trust)

    w.grad = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    optimizer.step()
    # By hand: g + decay w = (0.6, 0), its norm 0.6; ‖w‖ = 5; the local rate is 0.02 · 5 / 0.6 = 1/6.
    v1 = torch.tensor([[lr * 0.6 / 6, 0.0]], dtype=torch.float64)
    w1 = torch.tensor([[3.0, 4.0]], dtype=torch.float64) - v1
    torch.testing.assert_close(w.data, w1)

    w.grad = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    g2 = torch.tensor([[1.0, 2.0]], dtype=torch.float64) + decay * w1
    v2 = momentum * v1 + lr * trust * w1.norm() / g2.norm() * g2
    optimizer.step()
    torch.testing.assert_close(w.data, w1 - v2)


def test_lars_leaves_zero_weights_and_unadapted_groups_to_plain_sgd() -> None:
    zero, bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = LARS([{"params": [zero]}, {"params": [bias], "adapt": False}], lr=0.1, momentum=0.0)
    zero.grad, bias.grad = torch.ones(2, 2), torch.full((2,), 3.0)
    optimizer.step()
    torch.testing.assert_close(zero.data, torch.full((2, 2), -0.1))
    torch.testing.assert_close(bias.data, torch.full((2,), 0.7))


def test_lars_skips_what_has_no_gradient_and_calls_the_closure() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = LARS([w], lr=0.1)
    assert optimizer.step(lambda: 3.0) == 3.0
    torch.testing.assert_close(w.data, torch.ones(2))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_biases_normalisation_and_temperature_are_not_decayed(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    loss = ClusteredInfoNCE(learnable_temperature=True)
    config = OptimConfig(name=name, weight_decay=0.5, lr=0.1)  # type: ignore[arg-type]
    optimizer = make_optimizer([model, loss], config)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    free = {id(p) for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    assert decayed == {id(model[0].weight), id(model[3].weight)}
    assert free == {id(p) for m in (model, loss) for p in m.parameters()} - decayed
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    set_learning_rate(optimizer, 0.25)
    assert all(g["lr"] == 0.25 for g in optimizer.param_groups)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = OptimConfig(lr=2.0, warmup_epochs=2.0)
    assert learning_rate(config, 0.0, 10) == 0.0
    assert learning_rate(config, 1.0, 10) == 1.0
    assert learning_rate(config, 2.0, 10) == 2.0
    assert learning_rate(config, 6.0, 10) == pytest.approx(1.0)
    assert learning_rate(config, 10.0, 10) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(OptimConfig(lr=2.0, warmup_epochs=0.0), 0.0, 10) == 2.0
    assert math.isfinite(learning_rate(OptimConfig(warmup_epochs=50.0), 3.0, 3))  # warm-up beyond the run
