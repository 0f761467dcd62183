"""A memory queue of labelled keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wscl_fast.distributed import gather as gather_rows
from wscl_fast.distributed.collectives import Group
from wscl_fast.distributed.grouped import Grouped
from wscl_fast.functional._checks import FLOATING, check_id

__all__ = ["ClusterQueue"]

NO_SAMPLE = -1
NO_CLUSTER = -1  # in a clustering, whatever the queue's `ignore_index`


class ClusterQueue(Grouped, nn.Module):
    """The last ``size`` keys with their cluster ids, as negatives and positives of later batches.

    In plain PyTorch: ``keys = torch.cat([keys, batch])[-size:]``, and the same for ids and sample indices;
    here the oldest slots of a ring are written over. Slots that were never written have ``ignore_index`` for
    a cluster id, which makes them no one's positive or negative, so a queue can be used from the first step
    on::

        loss = loss_fn(features, clusters, keys=queue.keys, key_clusters=queue.clusters)
        loss.backward()
        queue.enqueue(momentum_features, clusters, samples)

    Slots are written over in place: enqueue before the loss or after its backward pass, which PyTorch refuses
    (``modified by an inplace operation``) if what it reads has changed in between.

    A queue outlives a clustering: when the clusters are computed anew, the ids in it still name the old
    ones. Give :meth:`enqueue` the sample indices and call :meth:`refresh` with every new clustering.

    Everything is a buffer and moves with ``.to(device)``. A checkpoint restores the queue, keys in the dtype
    of the queue that takes them; one of another size or ``ignore_index`` is refused and changes nothing.

    Args:
        size: number of slots.
        dim: dimensions of a key.
        dtype: of the stored keys: float32, float64, bfloat16 or float16.
        ignore_index: the cluster id that says "no cluster", as the loss has it; empty slots carry it.
        gather: ``"all"`` enqueues the keys of all ranks, in rank order, on every rank, so that all queues
            stay the same; ``"none"`` keeps a queue for each rank.
        group: the process group of ``gather="all"``; by default all processes.

    Shape:
        ``keys`` ``[size, dim]``; ``clusters`` and ``samples`` ``[size]`` int64, ``ignore_index`` and −1 where
        unknown.

    Note:
        DistributedDataParallel copies rank 0's buffers to all ranks at every forward pass. With
        ``gather="none"`` keep the queue outside the wrapped module, or pass ``broadcast_buffers=False``.

    Example:
        >>> queue = ClusterQueue(4096, 128)
        >>> queue.enqueue(torch.randn(256, 128), torch.arange(256) % 40, torch.arange(256))
        >>> queue.filled
        256

    Source: He et al., *Momentum Contrast for Unsupervised Visual Representation Learning*, CVPR 2020,
    arXiv 1911.05722 (the queue); the cluster ids are those of Tsai et al., ICLR 2022.
    """

    keys: Tensor
    clusters: Tensor
    samples: Tensor
    written: Tensor  # how many keys were ever enqueued: the next slot is this modulo the size

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        ignore_index: int = -1,
        gather: Literal["none", "all"] = "none",
        group: Group = None,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if check_id(name, value) < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
        if dtype not in FLOATING:  # the losses would refuse the keys
            raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
        if not isinstance(gather, str) or gather not in ("none", "all"):
            raise ValueError(f"gather: expected 'none' or 'all', got {gather!r}")
        self.size, self.dim = size, dim = int(size), int(dim)
        self.ignore_index = ignore_index = check_id("ignore_index", ignore_index)
        self.gather, self.group = gather, group
        self.register_buffer("keys", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("clusters", torch.full((size,), ignore_index))
        self.register_buffer("samples", torch.full((size,), NO_SAMPLE))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    @property
    def filled(self) -> int:
        """How many slots hold a key."""
        return min(int(self.written), self.size)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, clusters: Tensor, samples: Tensor | None = None) -> None:
        """Put in ``keys [B, dim]`` with their ids ``clusters [B]``; the oldest give way.

        Each may lie on another device than the queue, a loader's sample numbers on the CPU say.

        Args:
            keys: any floating-point dtype; stored in the queue's, without their graph. Of a batch larger
                than the queue the last ``size`` stay.
            clusters: int64; ``ignore_index`` for a key that is to be no one's positive or negative.
            samples: ``[B]`` int64, the index of each key's sample, by which :meth:`refresh` finds its new
                cluster; −1 where there is none.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came. With ``gather="all"``
                an error on one rank alone leaves the others waiting.
        """
        if not isinstance(keys, Tensor):
            raise TypeError(f"keys: expected a tensor, got {type(keys).__name__}")
        if not keys.is_floating_point():
            raise TypeError(f"keys: expected a floating-point dtype, got {keys.dtype}")
        if keys.ndim != 2 or keys.shape[1] != self.dim:
            raise ValueError(f"keys: expected shape [B, {self.dim}], got {tuple(keys.shape)}")
        if samples is None:
            samples = torch.full((len(keys),), NO_SAMPLE, device=keys.device)
        for name, value in (("clusters", clusters), ("samples", samples)):
            _check_ids(name, value)
            if value.shape != keys.shape[:1]:
                raise ValueError(f"{name}: expected shape ({len(keys)},), got {tuple(value.shape)}")
        for name, value in (("keys", keys), ("clusters", clusters), ("samples", samples)):
            if value.device.type == "meta" != self.keys.device.type:
                raise ValueError(
                    f"{name}: expected numbers for a queue on {self.keys.device}, got device meta"
                )
        keys = keys.detach().to(self.keys)
        ids = torch.stack([numbers.to(self.clusters) for numbers in (clusters, samples)], 1)
        if self.gather == "all":
            keys, ids = gather_rows(keys, self.group), gather_rows(ids, self.group)
        # Slots come from the buffer on the device, so that nothing waits for a GPU.
        slots = (self.written + torch.arange(len(keys), device=self.keys.device)) % self.size
        slots = slots[-self.size :]
        self.keys[slots] = keys[-self.size :]
        self.clusters[slots], self.samples[slots] = ids[-self.size :].unbind(1)
        self.written += len(keys)

    @torch.no_grad()
    def refresh(self, clusters_of_samples: Tensor) -> None:
        """Give every key the cluster that its sample has now; call it whenever the clustering changes.

        In plain PyTorch: ``clusters = clusters_of_samples[samples]``. A key that was enqueued without its
        sample's index has no cluster any more (``ignore_index``): an id of the old clustering would be a
        wrong label.

        Args:
            clusters_of_samples: ``[number of samples]`` int64, the cluster id of every sample; −1, which
                clusterings give to a sample without a cluster, means ``ignore_index`` here.

        Raises:
            TypeError: not an int64 tensor.
            ValueError: not a vector, or too short for a sample in the queue.
        """
        _check_ids("clusters_of_samples", clusters_of_samples)
        if clusters_of_samples.ndim != 1:
            raise ValueError(
                "clusters_of_samples: expected a vector, one id a sample,"
                f" got shape {tuple(clusters_of_samples.shape)}"
            )
        largest = int(self.samples.max())
        if largest >= len(clusters_of_samples):
            raise ValueError(
                f"clusters_of_samples: expected an id for each sample up to index {largest}, which the queue"
                f" holds, got {len(clusters_of_samples)} ids"
            )
        known = self.samples >= 0
        clusters = clusters_of_samples.to(self.clusters)[self.samples[known]]
        self.clusters.fill_(self.ignore_index)
        self.clusters[known] = clusters.where(clusters != NO_CLUSTER, self.ignore_index)

    @torch.no_grad()
    def clear(self) -> None:
        """Empty every slot."""
        self.keys.zero_()
        self.clusters.fill_(self.ignore_index)
        self.samples.fill_(NO_SAMPLE)
        self.written.zero_()

    def get_extra_state(self) -> Tensor:
        """``ignore_index``, without which the ids of empty slots mean nothing."""
        return torch.tensor(self.ignore_index)

    def set_extra_state(self, state: Any) -> None:
        """Nothing: a state that comes with another ``ignore_index`` is refused as a whole."""

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # PyTorch takes buffer by buffer: what does not fit as a whole is to leave all of them alone.
        extra, own = f"{prefix}_extra_state", {prefix + name: own for name, own in self.named_buffers()}
        there = own.keys() & state_dict.keys()
        wrong = [
            f"{name}: expected shape {tuple(own[name].shape)}, got {tuple(state_dict[name].shape)}"
            for name in own
            if name in there and state_dict[name].shape != own[name].shape
        ]
        if there:
            wrong += [f"{name}: expected beside {min(there)}, got none" for name in own if name not in there]
        if extra in state_dict and int(state_dict[extra]) != self.ignore_index:
            wrong.append(f"{prefix}ignore_index: expected {self.ignore_index}, got {int(state_dict[extra])}")
        if wrong:
            error_msgs += wrong
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if extra in missing_keys:  # of a checkpoint from before it was there
            missing_keys.remove(extra)

    def extra_repr(self) -> str:
        """The settings, for ``print(module)``."""
        return f"size={self.size}, dim={self.dim}, dtype={self.keys.dtype}, gather={self.gather!r}"


def _check_ids(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
