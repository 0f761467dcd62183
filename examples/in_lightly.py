"""In place of lightly's NTXentLoss (needs the package ``lightly``): the two views, and now cluster ids.

    criterion = NTXentLoss(temperature=0.1)         loss = criterion(z0, z1)
    criterion = ClusteredInfoNCE(temperature=0.1)   loss = criterion(torch.stack([z0, z1], 1), clusters)

With ``clusters = torch.arange(len(z0))`` the two are the same number.

Run: python examples/in_lightly.py
"""

from __future__ import annotations

import torch
from lightly.models.modules import SimCLRProjectionHead
from torch import nn

from wscl_fast import ClusteredInfoNCE


def main(steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    prototypes = torch.randn(10, 32)  # ten clusters of noisy vectors stand in for images and their hashtags
    backbone = nn.Sequential(nn.Linear(32, 64), nn.ReLU())
    head = SimCLRProjectionHead(64, 64, 16)
    criterion = ClusteredInfoNCE(temperature=0.1)
    optimiser = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for _ in range(steps):
        clusters = torch.randint(10, (256,))
        x0, x1 = (prototypes[clusters] + torch.randn(256, 32) for _ in range(2))
        z0, z1 = head(backbone(x0)), head(backbone(x1))
        loss = criterion(torch.stack([z0, z1], 1), clusters)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
