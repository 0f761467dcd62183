"""Several processes: the loss over the batch of all of them, keys travelling from one to the next.

The printed numbers do not depend on the number of processes, and three share a batch of 256 unevenly.

Run: python examples/ddp.py
     torchrun --nproc-per-node 3 examples/ddp.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wscl_fast import ClusteredInfoNCE


class Model(nn.Module):
    """Returns the loss, so that the learnable temperature is synchronised as the encoder is."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
        self.loss_fn = ClusteredInfoNCE(learnable_temperature=True, gather="ring", ddp=True)

    def forward(self, views: Tensor, clusters: Tensor) -> Tensor:
        return self.loss_fn(self.encoder(views), clusters)


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    prototypes = torch.randn(10, 32)
    model: nn.Module = Model()
    rank, size = 0, 1
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
        rank, size = dist.get_rank(), dist.get_world_size()
        model = DistributedDataParallel(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        clusters = torch.randint(10, (256,))  # the same on all ranks, of which each takes its part
        views = prototypes[clusters][:, None] + torch.randn(256, 2, 32)
        loss = model(views[rank::size], clusters[rank::size])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    if rank == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    if size > 1:
        # The wrapper holds the group. Were it the last to let go, gloo's threads would be joined under the
        # interpreter's lock, which they may be waiting for (PyTorch 2.13): it never ends.
        del model
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
