"""The temperature of the loss modules: a number, or a parameter."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wscl_fast.functional._checks import check_positive


class WithTemperature(nn.Module):
    """A module with a temperature.

    Where it is learnt, the parameter is ``log_scale = log(1 / temperature)``, as CLIP has it.
    """

    def __init__(self, temperature: float, learnable: bool, least: float) -> None:
        super().__init__()
        temperature = self._temperature = check_positive("temperature", temperature)
        least = self.min_temperature = check_positive("min_temperature", least)
        if learnable and temperature < least:
            raise ValueError(f"temperature: expected at least min_temperature={least}, got {temperature}")
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable else None

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a number, or a tensor with a gradient where it is learnt."""
        return self._temperature if self.log_scale is None else torch.exp(-self.log_scale)

    def clamped_temperature(self) -> float | Tensor:
        """The same, in training after the parameter was brought back into its bounds."""
        if self.log_scale is not None and self.training:
            # The parameter itself is clamped: a clamped output would have no gradient to come back by.
            with torch.no_grad():
                self.log_scale.clamp_(max=-math.log(self.min_temperature))
        return self.temperature

    def describe_temperature(self) -> str:
        """For ``extra_repr``."""
        learnt = ", learnable_temperature=True" if self.log_scale is not None else ""
        return f"temperature={shown(self.temperature)}{learnt}"


def shown(value: float | Tensor) -> str:
    """A setting or a parameter for ``extra_repr``; on the meta device a parameter has no number yet."""
    if not isinstance(value, Tensor):
        return f"{value:g}"
    return "?" if value.is_meta else f"{value.item():g}"
