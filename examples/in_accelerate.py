"""The loss in a training loop of Accelerate (needs the package ``accelerate``).

``accelerate launch`` starts it on several devices, wrapped by DistributedDataParallel, which averages
gradients: hence ``ddp=True``. In one process both arguments change nothing.

Run: python examples/in_accelerate.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wscl_fast import ClusteredInfoNCE


def main(epochs: int = 4, samples: int = 4096) -> list[float]:
    torch.manual_seed(0)
    clusters = torch.randint(10, (samples,))
    views = torch.randn(10, 32)[clusters][:, None] + torch.randn(samples, 2, 32)
    loader = DataLoader(TensorDataset(views, clusters), batch_size=256, shuffle=True)
    encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    loss_fn = ClusteredInfoNCE(temperature=0.1, gather="all", ddp=True)

    accelerator = Accelerator(cpu=True)
    encoder, optimiser, loader = accelerator.prepare(encoder, optimiser, loader)
    losses = []
    for _ in range(epochs):
        for batch, batch_clusters in loader:
            loss = loss_fn(encoder(batch), batch_clusters)
            optimiser.zero_grad()
            accelerator.backward(loss)
            optimiser.step()
            losses.append(loss.item())
    accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
