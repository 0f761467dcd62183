"""What every test can use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `problems`
ROOT = Path(__file__).resolve().parents[1]

# Where a change is judged, the same examples every time; elsewhere new ones are looked for.
hypothesis.settings.register_profile("judged", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("judged")


TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


# Files that take half a minute and more come first, the longest ahead: where files are run side by side, none
# is left for the end alone.
LONG = (
    "test_kmeans_ranks",
    "test_distributed",
    "test_robustness",
    "test_detectors_simulated",
    "test_infonce_simulated",
    "test_ops",
    "test_gpu_report",
    "test_soft",
    "test_kmeans_simulated",
    "test_compare",
    "test_kmeans_bounds",
    "test_counters_simulated",
    "test_cli",
    "test_denominators",
    "test_resume",
    "test_kmeans_detectors_simulated",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What this machine or this PyTorch cannot run is skipped, with the reason."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.name.startswith("test_compiles_without_a_graph_break") and TORCH < (2, 13):
            reason = "Dynamo before 2.13 takes no slice into an autograd.Function"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def extension():  # type: ignore[no-untyped-def]
    """The compiled extension; tests of it are skipped, with the reason, where it was not built."""
    from wscl_fast import _ops

    if _ops.extension is None:
        pytest.skip(f"the extension is not built: {_ops.load_error}")
    return _ops.extension


@pytest.fixture
def memory_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes give freed memory back at once, so that their peak is what was held at one time.

    glibc would keep up to 64 MiB of it or none, as the sizes that came before had it.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
