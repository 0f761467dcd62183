"""What users hand over as samples: numpy, torch, or any array that speaks DLPack; and the same kind back."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wscl_fast.arrays import as_tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_SEED = 2**63 - 1  # that a tensor holds


class Samples(NamedTuple):
    """A matrix of samples as a tensor that shares its memory where it can, and the way back."""

    x: Tensor  # [n, d], floating point
    give: Callable[[Tensor], Any]  # a tensor as the kind of array that came in


def as_samples(array: Any, name: str, *, least: int = 1) -> Samples:
    """The samples that a user handed over, [n, d]; nothing is copied that need not be.

    Args:
        array: a torch tensor; a numpy array (memory-mapped too); an array with `__dlpack__` (CuPy, JAX);
            anything that `numpy.asarray` takes (lists, data frames).
        name: what to call it in errors.
        least: the least number of samples.

    Raises:
        TypeError: a sparse matrix.
        ValueError: not two-dimensional, complex, without values (meta), or empty.
    """
    sparse = isinstance(array, Tensor) and array.layout != torch.strided
    if sparse or type(array).__module__.startswith("scipy.sparse"):
        raise TypeError(f"{name}: a sparse matrix came where dense data is required; use {name}.toarray()")
    x, give = _with_values(array, name)
    if x.is_complex():
        raise ValueError(f"{name}: Complex data not supported, got {x.dtype}")
    if x.dtype not in FLOATS:
        x = x.double()
    if x.ndim != 2:
        raise ValueError(
            f"{name}: expected [samples, features], got shape {list(x.shape)}. Reshape your data: "
            f"{name}.reshape(-1, 1) for a single feature, {name}.reshape(1, -1) for a single sample"
        )
    if x.shape[1] == 0 or len(x) < least:
        what = "sample" if x.shape[1] else "feature"
        raise ValueError(f"{name}: 0 {what}(s) (shape={tuple(x.shape)}) while a minimum of 1 is required.")
    return Samples(x, give)


def _with_values(array: Any, name: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """`as_tensor`, but of the meta device."""
    x, give = as_tensor(array, name)
    if x.is_meta:
        raise ValueError(f"{name}: expected numbers, got a tensor on the meta device, which has none")
    return x, give


def as_weights(weights: Any, x: Any, name: str = "sample_weight", *, least: int = 1) -> Tensor | None:
    """Sample weights as float64 [n] on the device of x (samples of any sort); a number stands for all.

    Raises:
        ValueError: another shape, negative, not finite, or zero all over (unless `least` is 0).
    """
    if weights is None:
        return None
    if isinstance(weights, Real):
        weights = torch.full((len(x),), float(weights), dtype=torch.float64)
    w = _with_values(weights, name)[0].to(x.device, torch.float64, copy=True)
    if w.ndim != 1:
        raise ValueError(f"{name}: Sample weights must be 1D array or scalar, got {w.ndim} dimensions")
    if len(w) != len(x):
        raise ValueError(f"{name}.shape == {tuple(w.shape)}, expected {(len(x),)}!")
    bad = w[~(torch.isfinite(w) & (w >= 0))]
    if len(bad):
        raise ValueError(f"{name}: expected finite numbers of at least 0, got {float(bad[0])}")
    if least and len(w) and not bool((w > 0).any()):
        raise ValueError(f"{name}: Sample weights must contain at least one non-zero number.")
    return w


def as_drift(drift: Any, x: Tensor) -> Tensor:
    """How far each sample moved, float64 [n] on the device of x.

    Raises:
        ValueError: another shape, negative or NaN.
    """
    moved = _with_values(drift, "drift")[0].to(x.device, torch.float64)
    if moved.shape != x.shape[:1]:
        raise ValueError(f"drift: expected shape {(len(x),)}, got {tuple(moved.shape)}")
    if not bool((moved >= 0).all()):
        raise ValueError(f"drift: expected distances of at least 0, got {float(moved.min())}")
    return moved


def seed_of(random_state: Any) -> int:
    """The seed that a scikit-learn style `random_state` stands for; None draws a fresh one.

    Raises:
        TypeError: neither an int, None, nor a numpy generator.
        ValueError: a negative int, or one beyond 64 bits.
    """
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1)[0])
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31))
    if isinstance(random_state, bool) or not isinstance(random_state, int | np.integer):
        raise TypeError(
            f"random_state: expected an int, None or a numpy generator, got {type(random_state).__name__}"
        )
    if not 0 <= random_state <= MOST_SEED:
        raise ValueError(f"random_state: expected 0 to {MOST_SEED}, got {random_state}")
    return int(random_state)
