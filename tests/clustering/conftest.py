"""What several tests of clusterings look at."""

import pytest
import torch

from wscl_fast.clustering.bounds import Bounds


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each pass with bounds had to search, pass after pass."""
    numbers: list[int] = []
    search = Bounds.search

    def counted(self: Bounds, centroids: torch.Tensor) -> int:
        changed = search(self, centroids)
        numbers.append(self.searched)
        return changed

    monkeypatch.setattr(Bounds, "search", counted)
    return numbers
