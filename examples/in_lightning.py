"""The loss in a LightningModule (needs the package ``lightning``).

With several devices Lightning wraps the module by DistributedDataParallel, which averages gradients: hence
``ddp=True``. In one process both arguments change nothing.

Run: python examples/in_lightning.py
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from wscl_fast import ClusteredInfoNCE


class Contrastive(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
        self.loss_fn = ClusteredInfoNCE(learnable_temperature=True, gather="all", ddp=True)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        views, clusters = batch  # [B, V, ...], [B]
        loss = self.loss_fn(self.encoder(views), clusters)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(epochs: int = 4, samples: int = 4096) -> list[float]:
    lightning.seed_everything(0, verbose=False)
    clusters = torch.randint(10, (samples,))
    views = torch.randn(10, 32)[clusters][:, None] + torch.randn(samples, 2, 32)
    loader = DataLoader(TensorDataset(views, clusters), batch_size=256, shuffle=True)
    model = Contrastive()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False
    )
    trainer.fit(model, loader)
    print(f"loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}")
    return model.losses


if __name__ == "__main__":
    main()
