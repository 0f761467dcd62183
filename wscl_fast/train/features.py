"""Features of a whole data set from a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Features = npt.NDArray[np.float32]


@torch.inference_mode()
def extract_features(
    encoder: nn.Module,
    images: npt.NDArray[np.uint8],
    normalise: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 512,
    device: torch.device | str = "cpu",
) -> Features:
    """`encoder(normalise(images))` in eval mode, batch by batch; the encoder's mode is put back after.

    Args:
        encoder: images float32 [B, 3, H, W] -> features [B, d].
        images: uint8 [n, 3, H, W], may be memory-mapped.
        normalise: uint8 batch -> float32 batch.
        batch_size: images in a forward pass.
        device: where the encoder is.

    Returns:
        float32 [n, d] on the host.
    """
    was_training = encoder.training
    encoder.eval()
    parts = []
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(np.array(images[start : start + batch_size])).to(device)
        batch = normalise(batch).contiguous(memory_format=torch.channels_last)
        parts.append(encoder(batch).float().cpu().numpy())
    encoder.train(was_training)
    return np.concatenate(parts)


def pixel_features(images: npt.NDArray[np.uint8], side: int = 16) -> Features:
    """The images themselves, averaged down to at most `side` × `side`: a baseline that learns nothing."""
    size = images.shape[-1]
    parts = []
    for start in range(0, len(images), 1024):
        batch = torch.from_numpy(np.array(images[start : start + 1024])).float().div_(255)
        if size > side:
            batch = torch.nn.functional.interpolate(batch, size=(side, side), mode="area")
        parts.append(batch.flatten(1).numpy())
    return np.concatenate(parts)
