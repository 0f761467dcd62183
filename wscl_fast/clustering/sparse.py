"""Sparse rows in plain torch, and their leading singular directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_OVERSAMPLING = 16
_POWER_ITERATIONS = 2


@dataclass(frozen=True)
class SparseRows:
    """A matrix of which each row stores its entries that are not zero (CSR)."""

    offsets: Tensor  # int64 [n + 1]
    columns: Tensor  # int64 [entries]
    values: Tensor  # float [entries]
    n_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.offsets) - 1, self.n_columns

    @property
    def lengths(self) -> Tensor:
        """Entries per row, int64 [n]."""
        return self.offsets.diff()

    def matmul(self, dense: Tensor) -> Tensor:
        """The product with a dense matrix [n_columns, k]."""
        # A bag of embeddings is a sparse row times a dense matrix; unlike torch.sparse, out of beta.
        return embedding_bag(
            self.columns,
            dense,
            self.offsets,
            mode="sum",
            per_sample_weights=self.values,
            include_last_offset=True,
        )

    def transposed(self) -> SparseRows:
        """The transpose, by rows again."""
        rows = torch.repeat_interleave(torch.arange(self.shape[0]), self.lengths)
        order = torch.argsort(self.columns, stable=True)
        counts = torch.bincount(self.columns, minlength=self.n_columns)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(dim=0)])
        return SparseRows(offsets, rows[order], self.values[order], self.shape[0])


def truncated_svd(x: SparseRows, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The largest singular values of x and their right vectors, by a randomised range finder.

    Equals `_, s, vt = torch.linalg.svd(x, full_matrices=False); s[:rank], vt[:rank].T`: exactly when
    min(x.shape) is at most `rank` + 16, otherwise nearly so.

    Source: Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1.

    Returns:
        Singular values, descending [r], and right singular vectors [columns, r], r = min(rank, *x.shape).
    """
    width = min(rank + _OVERSAMPLING, *x.shape)
    across = x.transposed()
    start = torch.randn(x.n_columns, width, generator=generator, dtype=x.values.dtype)
    basis = torch.linalg.qr(x.matmul(start))[0]  # [n, width]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(x.matmul(torch.linalg.qr(across.matmul(basis))[0]))[0]
    right, values, _ = torch.linalg.svd(across.matmul(basis), full_matrices=False)
    return values[:rank], right[:, :rank]
