"""The loss module: shapes, views, queues, learnable temperature, refusals."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.functional import normalize

from wscl_fast import ClusteredInfoNCE
from wscl_fast.functional import clustered_infonce


def test_views_are_rows_of_one_batch() -> None:
    features, clusters = torch.randn(6, 3, 8), torch.randint(0, 3, (6,))
    rows = normalize(features, dim=-1).flatten(0, 1)
    want = clustered_infonce(rows, query_clusters=clusters.repeat_interleave(3), temperature=0.2)
    torch.testing.assert_close(ClusteredInfoNCE(0.2)(features, clusters), want)
    flat = ClusteredInfoNCE(0.2)(features[:, 0], clusters)
    torch.testing.assert_close(flat, ClusteredInfoNCE(0.2)(features[:, :1], clusters))


def test_sample_ids_are_simclr() -> None:
    """NT-Xent: each view against the 2B − 1 others, its sample's other view the only positive."""
    features = torch.randn(10, 2, 8, dtype=torch.float64)
    x = normalize(features, dim=-1).transpose(0, 1).flatten(0, 1)
    logits = (x @ x.T / 0.5).fill_diagonal_(-torch.inf)
    nt_xent = torch.nn.functional.cross_entropy(logits, torch.arange(20).roll(10))
    torch.testing.assert_close(ClusteredInfoNCE(0.5)(features, torch.arange(10)), nt_xent)


def test_keys_reduction_and_weights() -> None:
    features, clusters = torch.randn(4, 2, 8), torch.tensor([0, 1, 2, -1])
    keys, key_clusters = torch.randn(9, 8), torch.tensor([0, 0, 1, 1, 1, 5, 5, -1, 2])
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rows = ClusteredInfoNCE(reduction="none")(features, clusters, keys, key_clusters, weights=weights)
    assert rows.shape == (4, 2)
    assert (rows[3] == 0).all()
    mean = ClusteredInfoNCE()(features, clusters, keys, key_clusters, weights=weights)
    torch.testing.assert_close(mean, rows.sum() / 12)
    raw = ClusteredInfoNCE(normalize=False)(features, clusters, keys, key_clusters)
    assert not torch.isclose(raw, ClusteredInfoNCE()(features, clusters, keys, key_clusters))


@pytest.mark.parametrize("denominator", ["all", "other", "decoupled"])
def test_every_option_of_the_function(denominator: str) -> None:
    features, clusters = torch.randn(8, 2, 6, dtype=torch.float64), torch.arange(8) // 2
    rows = normalize(features, dim=-1).flatten(0, 1)
    options = {"denominator": denominator, "hardness": 0.5, "prior": 0.05, "positives": "in"}
    want = clustered_infonce(rows, query_clusters=clusters.repeat_interleave(2), temperature=0.3, **options)
    torch.testing.assert_close(ClusteredInfoNCE(0.3, **options)(features, clusters), want)


def test_own_views_are_the_only_positives() -> None:
    features, clusters = torch.randn(8, 3, 6, dtype=torch.float64), torch.arange(8) // 2
    rows = normalize(features, dim=-1).flatten(0, 1)
    want = clustered_infonce(
        rows,
        query_clusters=clusters.repeat_interleave(3),
        query_samples=torch.arange(8).repeat_interleave(3),
        denominator="other",
    )
    loss_fn = ClusteredInfoNCE(denominator="other", own_views=True)
    torch.testing.assert_close(loss_fn(features, clusters), want)
    # The same views as keys of their own, found by the samples' indices.
    samples = torch.tensor([7, 5, 1, 0, 2, 3, 4, 6])
    keys, key_clusters = features.flatten(0, 1), clusters.repeat_interleave(3)
    got = loss_fn(
        features,
        clusters,
        keys,
        key_clusters,
        samples=samples,
        key_samples=samples.repeat_interleave(3),
        exclude_self=True,
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("own_views", [False, True])
def test_cross_views_meet_no_view_of_their_own_place(views: int, own_views: bool) -> None:
    features = torch.randn(7, views, 6, dtype=torch.float64, requires_grad=True)
    clusters = torch.tensor([0, 0, 1, 1, 2, 3, -1])
    weights = torch.rand(7, dtype=torch.float64)
    x = normalize(features, dim=-1).flatten(0, 1)
    place = torch.arange(7 * views) % views
    met = (place[:, None] != place) & (clusters != -1).repeat_interleave(views)
    ids = torch.arange(7) if own_views else clusters
    ids = ids.repeat_interleave(views)
    positive = met & (ids[:, None] == ids)
    logits = (x @ x.T / 0.2).masked_fill(~met, -torch.inf)
    rows = logits.logsumexp(1) - (logits.masked_fill(~positive, 0).sum(1) / positive.sum(1))
    valid = clusters.repeat_interleave(views) != -1
    each = weights.repeat_interleave(views) * valid
    total = (rows.masked_fill(~valid, 0) * each).sum()
    for reduction, want in (("mean", total / each.sum()), ("sum", total)):
        loss_fn = ClusteredInfoNCE(0.2, contrast="cross", own_views=own_views, reduction=reduction)
        got = loss_fn(features, clusters, weights=weights)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            *(torch.autograd.grad(value, features, retain_graph=True)[0] for value in (got, want))
        )
    each_view = ClusteredInfoNCE(0.2, contrast="cross", own_views=own_views, reduction="none")
    assert each_view(features, clusters).shape == (7, views)
    torch.testing.assert_close((each_view(features, clusters, weights=weights)).sum(), total)


def test_a_temperature_for_each_sample_or_cluster() -> None:
    features, clusters = torch.randn(6, 2, 8), torch.arange(6) // 2
    of_cluster = torch.tensor([0.1, 0.3, 0.9], requires_grad=True)
    loss_fn = ClusteredInfoNCE(reduction="none")
    rows = loss_fn(features, clusters, temperature=of_cluster[clusters])
    for cluster, t in enumerate(of_cluster.tolist()):
        mine = clusters == cluster
        torch.testing.assert_close(rows[mine], loss_fn(features, clusters, temperature=t)[mine])
    assert torch.autograd.grad(rows.sum(), of_cluster)[0].abs().min() > 0
    with pytest.raises(ValueError, match=r"temperature: expected shape \(\) or \(6,\), got \(3,\)"):
        loss_fn(features, clusters, temperature=of_cluster)
    with pytest.raises(ValueError, match="temperature: expected one number where base_temperature is given"):
        ClusteredInfoNCE(base_temperature=0.07)(features, clusters, temperature=of_cluster[clusters])


def test_options_that_do_not_go_together() -> None:
    features, clusters = torch.randn(4, 2, 3), torch.arange(4)
    cross = ClusteredInfoNCE(contrast="cross")
    with pytest.raises(ValueError, match=r"features: expected at least two views .* got 1"):
        cross(features[:, 0], clusters)
    with pytest.raises(ValueError, match="keys: expected None with contrast='cross'"):
        cross(features, clusters, torch.randn(5, 3), torch.arange(5))
    with pytest.raises(ValueError, match="contrast: expected one of 'all', 'cross', got 'some'"):
        ClusteredInfoNCE(contrast="some")
    with pytest.raises(ValueError, match="samples: expected None without own_views=True"):
        ClusteredInfoNCE()(features, clusters, samples=clusters)
    with pytest.raises(ValueError, match="key_samples: expected a tensor where keys is given with own_views"):
        ClusteredInfoNCE(own_views=True)(
            features, clusters, torch.randn(5, 3), torch.arange(5), samples=clusters
        )


def test_base_temperature_scales_as_the_authors_code_does() -> None:
    features, clusters = torch.randn(8, 2, 4), torch.arange(8) // 2
    scaled = ClusteredInfoNCE(0.1, base_temperature=0.07)(features, clusters)
    torch.testing.assert_close(scaled, ClusteredInfoNCE(0.1)(features, clusters) * 0.1 / 0.07)


def test_learnable_temperature_learns_and_stays_in_bounds() -> None:
    loss_fn = ClusteredInfoNCE(0.5, learnable_temperature=True, min_temperature=0.2)
    assert [name for name, _ in loss_fn.named_parameters()] == ["log_scale"]
    # Clusters that are already perfectly apart want an ever lower temperature.
    features = torch.eye(4).repeat_interleave(3, 0)
    clusters = torch.arange(12) // 3
    optimiser = torch.optim.SGD(loss_fn.parameters(), lr=1.0)
    for _ in range(200):
        optimiser.zero_grad()
        loss_fn(features, clusters).backward()
        optimiser.step()
    loss_fn(features, clusters)
    assert loss_fn.temperature.item() == pytest.approx(0.2)
    assert loss_fn.log_scale.grad.abs() > 0


def test_a_batch_without_positives_warns_once() -> None:
    loss_fn = ClusteredInfoNCE()
    features = torch.randn(5, 4, requires_grad=True)
    with pytest.warns(UserWarning, match="no query of this batch had a positive"):
        loss_fn(features, torch.arange(5)).backward()
    assert (features.grad == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(features, torch.arange(5))


def test_compiles_inside_a_model() -> None:
    model = torch.nn.Linear(6, 4)
    loss_fn = ClusteredInfoNCE(learnable_temperature=True)
    x, clusters = torch.randn(12, 6), torch.arange(12) % 3

    def step(x: torch.Tensor, clusters: torch.Tensor) -> torch.Tensor:
        return loss_fn(model(x), clusters)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, clusters), step(x, clusters))


def test_state_and_repr_round_trip() -> None:
    loss_fn = ClusteredInfoNCE(0.3, learnable_temperature=True)
    other = ClusteredInfoNCE(0.1, learnable_temperature=True)
    other.load_state_dict(loss_fn.state_dict())
    assert other.temperature.item() == pytest.approx(0.3)
    assert "temperature=0.3, learnable_temperature=True" in repr(loss_fn)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([[1.0]], torch.zeros(1)), TypeError, "features: expected a tensor, got list"),
        (
            lambda f: f(torch.randn(2, 3, 4, 5), torch.zeros(2)),
            ValueError,
            r"features: .* got shape \(2, 3, 4, 5\)",
        ),
        (
            lambda f: f(torch.randn(2, 3), torch.zeros(3)),
            ValueError,
            r"clusters: .* shape \(2,\), got \(3,\)",
        ),
        (lambda f: f(torch.randn(2, 3), [0, 1]), TypeError, "clusters: expected a tensor .* got list"),
        (lambda f: f(torch.randn(2, 3), torch.zeros(2)), TypeError, "^clusters: expected int64"),
        (
            lambda f: f(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64), torch.randn(2, 3)),
            ValueError,
            "key_clusters: expected a tensor where keys is given",
        ),
    ],
)
def test_refusals(call, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(ClusteredInfoNCE())


@pytest.mark.parametrize("name", ["temperature", "min_temperature", "base_temperature"])
def test_bad_temperatures_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a finite number above 0, got -1"):
        ClusteredInfoNCE(**{name: -1.0})
    with pytest.raises(ValueError, match="temperature: expected at least min_temperature"):
        ClusteredInfoNCE(0.001, learnable_temperature=True)
