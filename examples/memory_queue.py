"""Large negative sets: a momentum encoder fills a queue of labelled keys (MoCo, arXiv 1911.05722).

Keys get no gradient here: the loss is one pass of two matrix products, however long the queue. Halfway the
clustering changes, as it does with k-means on the features being learnt, and the queue's ids follow.

Run: python examples/memory_queue.py
"""

from __future__ import annotations

import copy

import torch

from wscl_fast import ClusteredInfoNCE, ClusterQueue


def main(steps: int = 120, queue_size: int = 8192, batch: int = 256) -> list[float]:
    torch.manual_seed(0)
    prototypes, samples_in_all = torch.randn(10, 32), 4096
    kinds = torch.randint(10, (samples_in_all,))  # what a sample shows
    clusters = kinds // 2  # what is known of it at first: pairs of kinds
    encoder = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
    optimiser = torch.optim.SGD(encoder.parameters(), lr=0.05, momentum=0.9)
    queue, loss_fn = ClusterQueue(queue_size, 16), ClusteredInfoNCE(temperature=0.1)
    losses = []
    for step in range(steps):
        if step == steps // 2:
            clusters = kinds
            queue.refresh(clusters)  # or the ids of the old clustering would be wrong labels
        samples = torch.randint(samples_in_all, (batch,))
        one, two = (prototypes[kinds[samples]] + torch.randn(batch, 32) for _ in range(2))
        with torch.no_grad():
            for slow, fast in zip(momentum_encoder.parameters(), encoder.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
            queue.enqueue(momentum_encoder(two), clusters[samples], samples)
        loss = loss_fn(encoder(one), clusters[samples], keys=queue.keys, key_clusters=queue.clusters)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    half = steps // 2
    print(f"queue of {queue.filled} keys: loss {losses[half - 1]:.3f}, new clusters {losses[half]:.3f}")
    print(f"and {steps - half} steps later {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
