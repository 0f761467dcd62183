"""Data sets, batch sampling and augmentation."""

from __future__ import annotations

from wscl_fast.data.augment import Augment, AugmentConfig
from wscl_fast.data.dataset import ImageDataset
from wscl_fast.data.folder import load_folder
from wscl_fast.data.openmoji import load_openmoji
from wscl_fast.data.sampler import ClusterBatchSampler, anchor_share

__all__ = [
    "Augment",
    "AugmentConfig",
    "ClusterBatchSampler",
    "ImageDataset",
    "anchor_share",
    "load_folder",
    "load_openmoji",
]
