"""The simulated library that CMake builds has the kernels that the other tests here run."""

from __future__ import annotations

from pathlib import Path

import pytest
import simulated_infonce
import simulated_kmeans
import torch
from simulator import CSRC, ROOT, ptxsim, with_headers

pytestmark = pytest.mark.simulated


def built() -> Path:
    """What make cuda made of the sources as they are."""
    library = ROOT / "build" / "simulator" / "libwscl_simulated.so"
    sources = with_headers([*(CSRC / "core").glob("*.cu"), *Path(__file__).parent.glob("*entry.cu")])
    newest = max(path.stat().st_mtime for path in sources)
    if not library.exists() or library.stat().st_mtime < newest:
        pytest.skip("no build/simulator/libwscl_simulated.so of these sources: make test builds it by CMake")
    return library


@pytest.mark.usefixtures("extension")  # whose schemas the library of k-means takes
def test_results_are_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = torch.randn(65, 40), torch.randn(130, 40)
    given = queries, keys, torch.randint(-1, 5, (65,)), torch.randint(-1, 5, (130,))

    def results() -> list[torch.Tensor]:
        loss = simulated_infonce.run(*given, grad_loss=torch.ones(65))
        update = simulated_kmeans.run(keys, queries, update=True)
        assert loss.grad_queries is not None
        assert loss.grad_keys is not None
        assert update.sums is not None
        assert loss.launches
        return [loss.loss, loss.grad_queries, loss.grad_keys, update.assignment, update.sums]

    sim, library = ptxsim(), built()
    want = results()
    loaded = sim.load(library)
    monkeypatch.setattr(simulated_infonce, "library", lambda arch: loaded)
    monkeypatch.setattr(simulated_kmeans, "library", lambda arch, csrc: loaded)
    for one, other in zip(results(), want, strict=True):
        assert torch.equal(one, other)
