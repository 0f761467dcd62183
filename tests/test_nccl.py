"""One process in an NCCL group: collectives of the losses and of the clustering take tensors of a GPU.

One process alone says nothing to itself, so it is told that it is not alone: every message but those of a
ring, which has nobody to go round, goes through NCCL. What several processes say: ``tests/ranks.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

from wscl_fast import ClusterQueue, KMeans, distributed, functional
from wscl_fast.clustering import BalancedKMeans, points
from wscl_fast.distributed import collectives, gather, shared, two_way

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and dist.is_available() and dist.is_nccl_available()),
        reason="needs a CUDA device and NCCL",
    ),
    pytest.mark.usefixtures("_speaking"),
]


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("nccl") / "store"
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1, device_id=device)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=["alone", "speaking"])
def _speaking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "speaking":
        for module in (collectives, shared, two_way, points):
            monkeypatch.setattr(module, "alone", lambda group=None: False)


def rows(n: int, clusters: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return normalize(torch.randn(n, 16).cuda()).requires_grad_(), torch.randint(-1, clusters, (n,)).cuda()


@pytest.mark.parametrize("gathering", ["all", "ring", "count"])
@pytest.mark.parametrize("in_batch", [True, False])
def test_the_loss_is_that_of_one_process(gathering: str, in_batch: bool) -> None:
    (x, zx), (y, zy) = rows(70), rows(130)
    given = {"queries": x, "query_clusters": zx, "weights": torch.rand(70).cuda()}
    leaves = [x]
    if not in_batch:
        given |= {"keys": y, "key_clusters": zy}
        leaves.append(y)
    got = distributed.clustered_infonce(**given, gather=gathering)
    want = functional.clustered_infonce(**given)
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        ranks.close(one, other)


@pytest.mark.parametrize("gathering", ["all", "ring"])
@pytest.mark.parametrize("loss", ["clip_loss", "siglip_loss"])
def test_two_directions(gathering: str, loss: str) -> None:
    (x, zx), (y, _) = rows(70), rows(70)
    given = {"x": x, "y": y, "x_clusters": zx, "y_clusters": zx}
    got = getattr(distributed, loss)(**given, gather=gathering)
    torch.testing.assert_close(got, getattr(functional, loss)(**given))


def test_a_queue_takes_rows_of_all_ranks() -> None:
    queue = ClusterQueue(100, 16, gather="all").cuda()
    x, ids = rows(70)
    queue.enqueue(x.detach(), ids, torch.arange(70).cuda())
    assert torch.equal(queue.keys[:70], x.detach())


@pytest.mark.parametrize(
    "options",
    [{}, {"init": "k-means||", "algorithm": "hamerly"}, {"shard_centroids": True}, {"metric": "cosine"}],
    ids=str,
)
def test_kmeans_over_shards(options: dict[str, object]) -> None:
    middles = 5 * torch.randn(9, 16)
    x = (middles.repeat(100, 1) + torch.randn(900, 16)).cuda()
    alone = KMeans(9, **{**options, "shard_centroids": False}).fit(x)
    shared = KMeans(9, **options, sharded=True).fit(x)
    assert torch.equal(gather(shared.labels_), alone.labels_)
    assert shared.inertia_ == pytest.approx(alone.inertia_, rel=1e-6)


def test_balanced_kmeans_over_shards() -> None:
    x = torch.randn(400, 8).cuda()
    model = BalancedKMeans(8, cap=1.0, sharded=True, max_iter=3).fit(x)
    assert model.counts_.tolist() == [50] * 8
