"""The fused loss in a trainer of your own: two views of a batch, cluster ids from anywhere.

Run: python examples/plain_pytorch.py
"""

from __future__ import annotations

import torch

from wscl_fast import ClusteredInfoNCE


def main(steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    prototypes = torch.randn(10, 32)  # ten clusters of noisy vectors stand in for images and their hashtags
    encoder = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    loss_fn = ClusteredInfoNCE(temperature=0.1)
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        clusters = torch.randint(10, (256,))
        views = prototypes[clusters][:, None] + torch.randn(256, 2, 32)  # [B, V, ...]
        loss = loss_fn(encoder(views), clusters)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
