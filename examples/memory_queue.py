"""Large negative sets: a momentum encoder fills a queue of labelled keys (MoCo, arXiv 1911.05722).

Keys get no gradient here: the loss is one pass of two matrix products, however long the queue.

Run: python examples/memory_queue.py
"""

from __future__ import annotations

import copy

import torch
from torch.nn.functional import normalize

from wscl_fast import clustered_infonce


def main(steps: int = 120, queue: int = 8192, batch: int = 256) -> list[float]:
    torch.manual_seed(0)
    prototypes = torch.randn(10, 32)
    encoder = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
    optimiser = torch.optim.SGD(encoder.parameters(), lr=0.05, momentum=0.9)
    keys = torch.zeros(queue, 16)
    key_clusters = torch.full((queue,), -1)  # −1: an empty slot, no one's positive or negative
    losses = []
    for step in range(steps):
        clusters = torch.randint(10, (batch,))
        one, two = (prototypes[clusters] + torch.randn(batch, 32) for _ in range(2))
        slots = (torch.arange(batch) + step * batch) % queue
        with torch.no_grad():
            for slow, fast in zip(momentum_encoder.parameters(), encoder.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
            keys[slots], key_clusters[slots] = normalize(momentum_encoder(two), dim=1), clusters
        loss = clustered_infonce(
            normalize(encoder(one), dim=1),
            keys,
            query_clusters=clusters,
            key_clusters=key_clusters,
            temperature=0.1,
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    full = queue // batch  # until then the loss grows with the number of keys in the denominator
    print(f"queue full at step {full}: loss {losses[full]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
