"""The other loss modules: views, levels, tags, two sides; what they learn, refuse and warn of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from wscl_fast import (
    CLIPLoss,
    ClusteredInfoNCE,
    HierarchicalInfoNCE,
    SigLIPLoss,
    SoftInfoNCE,
    clip_loss,
    hierarchical_infonce,
    siglip_loss,
    soft_infonce,
)


def test_levels_of_views() -> None:
    features, leaves = torch.randn(8, 3, 5), torch.arange(8) // 2
    clusters = torch.stack([leaves // 2, leaves], 1)
    rows = normalize(features, dim=-1).flatten(0, 1)
    options = {"level_weights": [0.3, 1.0], "constraint": "level"}
    want = hierarchical_infonce(
        rows, query_clusters=clusters.repeat_interleave(3, 0), temperature=0.2, **options
    )
    torch.testing.assert_close(HierarchicalInfoNCE(0.2, **options)(features, clusters), want)
    keys, key_clusters = torch.randn(9, 5), torch.randint(0, 4, (9, 2))
    t, weights = torch.rand(8) + 0.1, torch.rand(8)
    want = hierarchical_infonce(
        rows,
        normalize(keys, dim=-1),
        query_clusters=clusters.repeat_interleave(3, 0),
        key_clusters=key_clusters,
        temperature=t.repeat_interleave(3),
        weights=weights.repeat_interleave(3),
    )
    got = HierarchicalInfoNCE()(features, clusters, keys, key_clusters, temperature=t, weights=weights)
    torch.testing.assert_close(got, want)


def test_tags_of_views() -> None:
    features, tags = torch.randn(6, 2, 5), torch.tensor([1, 3, 6, 12, 0, 8])
    rows = normalize(features, dim=-1).flatten(0, 1)
    for affinity in ("shared", "jaccard", "cosine"):
        want = soft_infonce(rows, query_auxiliary=tags.repeat_interleave(2), affinity=affinity)
        torch.testing.assert_close(SoftInfoNCE(affinity)(features, tags), want)
    per_row = SoftInfoNCE("jaccard", reduction="none")(features, tags)
    assert per_row.shape == (6, 2)
    assert (per_row[4] == 0).all()
    assert (per_row[:4] != 0).all()
    vectors = torch.rand(6, 3)
    keys, of_keys, valid = torch.randn(7, 5), torch.rand(7, 3), torch.arange(7) < 5
    want = soft_infonce(
        rows,
        normalize(keys, dim=-1),
        query_auxiliary=vectors.repeat_interleave(2, 0),
        key_auxiliary=of_keys,
        key_valid=valid,
        affinity="kernel",
    )
    got = SoftInfoNCE("kernel")(features, vectors, keys, of_keys, key_valid=valid)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("kind", ["levels", "tags"])
def test_views_across(kind: str, views: int) -> None:
    """A view meets no view of its own place, by the formulas of both losses."""
    features = torch.randn(6, views, 5, dtype=torch.float64, requires_grad=True)
    place = torch.arange(6 * views) % views
    met = place[:, None] != place
    x = normalize(features, dim=-1).flatten(0, 1)
    logits = (x @ x.T / 0.2).masked_fill(~met, -torch.inf)
    if kind == "levels":
        clusters = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 2], [1, 2], [1, 3]])
        module, known = partial(HierarchicalInfoNCE, 0.2), clusters
        rows = clusters.repeat_interleave(views, 0)
        weigh = torch.stack([(rows[:, None] == rows).double()[..., level] for level in (0, 1)]) * met
    else:
        tags = torch.tensor([0b1, 0b11, 0b110, 0b1100, 0, 0b1001])
        module, known = partial(SoftInfoNCE, "jaccard", 0.2), tags
        bits = (tags.repeat_interleave(views)[:, None] >> torch.arange(4)) & 1
        common = (bits @ bits.T).double()
        size = bits.sum(1)
        weigh = (common / (size[:, None] + size - common).clamp(min=1) * met)[None]
    valid = weigh.sum(2) > 0
    pulled = (weigh * logits.masked_fill(~met, 0)).sum(2) / weigh.sum(2).masked_fill(~valid, 1)
    want = (logits.logsumexp(1) - pulled).masked_fill(~valid, 0)
    weights = torch.rand(6, dtype=torch.float64)
    weighted = weights.repeat_interleave(views) * want / len(weigh)  # the levels' mean
    got = module(contrast="cross", reduction="none")(features, known, weights=weights)
    torch.testing.assert_close(got.flatten(), (weighted.T if kind == "levels" else weighted).flatten())
    whole = weighted.sum() / (weights.repeat_interleave(views) * valid[0]).sum()
    loss = module(contrast="cross")(features, known, weights=weights)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(*(torch.autograd.grad(value, features)[0] for value in (loss, whole)))
    summed = module(contrast="cross", reduction="sum")(features, known, weights=weights)
    torch.testing.assert_close(summed, weighted.sum())
    with pytest.raises(ValueError, match="keys: expected None with contrast='cross'"):
        module(contrast="cross")(features, known, torch.randn(4, 5, dtype=torch.float64), known[:4])
    with pytest.raises(ValueError, match=r"features: expected at least two views .* got 1"):
        module(contrast="cross")(features[:, 0], known)
    with pytest.raises(ValueError, match="contrast: expected one of 'all', 'cross', got 'some'"):
        module(contrast="some")


def test_two_sides() -> None:
    x, y = torch.randn(2, 8, 5)
    clusters = torch.arange(8) // 2
    a, b = normalize(x, dim=-1), normalize(y, dim=-1)
    for ids in (None, clusters):
        torch.testing.assert_close(CLIPLoss(0.2)(x, y, ids), clip_loss(a, b, x_clusters=ids, temperature=0.2))
        want = siglip_loss(a, b, x_clusters=ids, temperature=0.2, bias=-4)
        torch.testing.assert_close(SigLIPLoss(0.2, -4)(x, y, ids), want)
    assert CLIPLoss(reduction="none")(x, y).shape == (16,)
    assert SigLIPLoss(reduction="none")(x, y).shape == (8,)


def test_scale_and_bias_are_learnt() -> None:
    x, y = torch.randn(2, 8, 5)
    clip, siglip = CLIPLoss(), SigLIPLoss()
    assert [name for name, _ in clip.named_parameters()] == ["log_scale"]
    assert [name for name, _ in siglip.named_parameters()] == ["log_scale", "bias"]
    for module in (clip, siglip):
        module(x, y).backward()
        assert all(p.grad.abs() > 0 for p in module.parameters())
    assert not list(SigLIPLoss(learnable=False).parameters())
    with torch.no_grad():
        clip.log_scale.fill_(100)
    clip(x, y)
    assert clip.temperature.item() == pytest.approx(0.01)
    other = SigLIPLoss(0.5, -1)
    other.load_state_dict(siglip.state_dict())
    torch.testing.assert_close(other(x, y), siglip(x, y))
    assert "bias=-10" in repr(SigLIPLoss())


@pytest.mark.parametrize(
    "make", [CLIPLoss, SigLIPLoss, partial(ClusteredInfoNCE, learnable_temperature=True)]
)
def test_modules_without_numbers_yet_are_printed(make: Callable[..., torch.nn.Module]) -> None:
    with torch.device("meta"):
        assert "temperature=?" in repr(make())
    assert "temperature=0.1," in repr(make(temperature=0.1))


def test_a_learnable_temperature_of_every_module() -> None:
    features = torch.randn(4, 2, 5)
    for module, known in (
        (HierarchicalInfoNCE(0.3, True), torch.zeros(4, 2, dtype=torch.int64)),
        (SoftInfoNCE("shared", 0.3, True), torch.ones(4, dtype=torch.int64)),
    ):
        module(features, known).backward()
        assert module.log_scale.grad.abs() > 0


def flipped(module: torch.nn.Module, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A loss of two sides, as one of x alone."""
    return module(x, x.detach().flip(0), ids)


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (HierarchicalInfoNCE(), torch.arange(4)[:, None]),
        (SoftInfoNCE("jaccard"), torch.zeros(4, dtype=torch.int64)),
        (partial(flipped, CLIPLoss()), torch.full((4,), -1)),
    ],
)
def test_a_batch_without_positives_warns_once(module: Callable[..., Any], known: torch.Tensor) -> None:
    features = torch.randn(4, 5, requires_grad=True)
    with pytest.warns(UserWarning, match="no query of this batch had a positive key"):
        module(features, known).backward()
    assert (features.grad == 0).all()
    assert module(features, known) == 0


def test_pairs_without_ids_warn_too() -> None:
    with pytest.warns(UserWarning, match="SigLIPLoss: the loss is exactly 0, .* no row .* had an id"):
        assert SigLIPLoss()(*torch.randn(2, 4, 5), torch.full((4,), -1)) == 0


@pytest.mark.parametrize(
    ("make", "settings", "error", "message"),
    [
        (ClusteredInfoNCE, {"positives": "both"}, ValueError, "positives: expected one of 'out', 'in'"),
        (ClusteredInfoNCE, {"denominator": "some"}, ValueError, "denominator: expected one of 'all'"),
        (ClusteredInfoNCE, {"hardness": -1}, ValueError, "hardness: expected a number of at least 0"),
        (ClusteredInfoNCE, {"prior": "a"}, TypeError, "prior: expected a number, got str"),
        (ClusteredInfoNCE, {"base_temperature": "a"}, TypeError, "base_temperature: expected a number, got"),
        (ClusteredInfoNCE, {"temperature": None}, TypeError, "temperature: expected a number, got NoneType"),
        (ClusteredInfoNCE, {"min_temperature": 0}, ValueError, "min_temperature: expected a finite number"),
        (HierarchicalInfoNCE, {"constraint": "some"}, ValueError, "constraint: expected one of 'none'"),
        (HierarchicalInfoNCE, {"level_weights": 1.0}, TypeError, "level_weights: expected a sequence of"),
        (HierarchicalInfoNCE, {"level_weights": "ab"}, TypeError, "level_weights: expected a sequence of"),
        (
            HierarchicalInfoNCE,
            {"level_weights": [-1.0]},
            ValueError,
            "level_weights: expected a number",
        ),
        (HierarchicalInfoNCE, {"level_weights": torch.ones(2, 2)}, TypeError, "level_weights: .* vector"),
        (HierarchicalInfoNCE, {"level_weights": [1e300]}, ValueError, "level_weights: expected a number of"),
        (HierarchicalInfoNCE, {"level_weights": np.ones((2, 2))}, TypeError, "level_weights: .* got list"),
        (ClusteredInfoNCE, {"base_temperature": 1e-320}, ValueError, "base_temperature: expected at least"),
        (ClusteredInfoNCE, {"positives": np.array(["in"])}, ValueError, "positives: expected one of 'out'"),
        (SoftInfoNCE, {"affinity": "some"}, ValueError, "affinity: expected one of 'shared'"),
        (SoftInfoNCE, {"affinity": "count", "positives": "a"}, ValueError, "positives: expected one of"),
        (CLIPLoss, {"positives": "some"}, ValueError, "positives: expected one of 'out', 'in'"),
        (SigLIPLoss, {"bias": "a"}, TypeError, "bias: expected a number"),
        (SigLIPLoss, {"bias": float("nan")}, ValueError, "bias: expected a finite number, got nan"),
        (SigLIPLoss, {"bias": 1e300}, ValueError, r"bias: expected a finite number, got 1e\+300"),
        (SigLIPLoss, {"learnable": -10.0}, TypeError, "learnable: expected a bool, got float"),
        (ClusteredInfoNCE, {"own_views": "no"}, TypeError, "own_views: expected a bool, got str"),
        (ClusteredInfoNCE, {"learnable_temperature": 0.01}, TypeError, "learnable_temperature: expected a b"),
        *(
            (make, {setting: value}, TypeError, f"{setting}: expected a bool")
            for make in (ClusteredInfoNCE, HierarchicalInfoNCE, CLIPLoss, SigLIPLoss)
            for setting, value in (("normalize", "no"), ("ddp", torch.ones(2)))
        ),
        (ClusteredInfoNCE, {"gather": np.array(["all", "none"])}, ValueError, "gather: expected 'none'"),
        *(
            (make, {setting: "some"}, error, f"{setting}: expected")
            for make in (ClusteredInfoNCE, HierarchicalInfoNCE, CLIPLoss, SigLIPLoss)
            for setting, error in (
                ("reduction", ValueError),
                ("impl", ValueError),
                ("gather", ValueError),
                ("ignore_index", TypeError),
            )
        ),
    ],
)
def test_settings_are_refused_where_they_are_made(
    make: type, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**settings)


def test_numbers_of_numpy_are_numbers() -> None:
    features, ids = torch.randn(4, 2, 5), torch.tensor([0, 0, 1, 1])
    want = ClusteredInfoNCE(0.25, hardness=0.5)(features, ids)
    got = ClusteredInfoNCE(np.float32(0.25), hardness=np.float32(0.5))(features, ids)
    torch.testing.assert_close(got, want)
    levels = torch.stack([ids // 2, ids], 1)
    want = HierarchicalInfoNCE(level_weights=[0.5, 2.0])(features, levels)
    for weights in (np.array([0.5, 2.0]), np.float32([0.5, 2.0])):
        torch.testing.assert_close(HierarchicalInfoNCE(level_weights=weights)(features, levels), want)
    want = CLIPLoss(normalize=False, ignore_index=1)(*features.unbind(1), ids)
    got = CLIPLoss(normalize=np.bool_(False), ignore_index=np.int64(1))(*features.unbind(1), ids)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("ignore_index", [-1, 0, 2])
def test_a_sample_numbered_as_no_cluster_is_a_sample(ignore_index: int) -> None:
    views, clusters = torch.randn(4, 2, 8), torch.tensor([11, 12, 13, 14])
    rows = ClusteredInfoNCE(own_views=True, ignore_index=ignore_index, reduction="none")(views, clusters)
    assert (rows > 0).all()
    torch.testing.assert_close(rows, ClusteredInfoNCE(own_views=True, reduction="none")(views, clusters))


def test_zero_vectors_of_float16_have_no_direction() -> None:
    loss = ClusteredInfoNCE()(torch.zeros(2, 2, 4, dtype=torch.float16), torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(loss, torch.tensor(3.0).log())


@pytest.mark.parametrize(
    ("module", "known", "given"),
    [
        (ClusteredInfoNCE(contrast="cross"), torch.arange(4), "key_clusters"),
        (ClusteredInfoNCE(contrast="cross", own_views=True), torch.arange(4), "key_samples"),
        (HierarchicalInfoNCE(contrast="cross"), torch.zeros(4, 2, dtype=torch.int64), "key_clusters"),
        (SoftInfoNCE("shared", contrast="cross"), torch.ones(4, dtype=torch.int64), "key_auxiliary"),
    ],
)
def test_views_across_have_no_other_keys(module: torch.nn.Module, known: torch.Tensor, given: str) -> None:
    with pytest.raises(ValueError, match=f"{given}: expected None with contrast='cross'"):
        module(torch.randn(4, 2, 3), known, **{given: known})


def test_refusals() -> None:
    x = torch.randn(4, 3)
    for call, error, message in (
        (lambda: HierarchicalInfoNCE()(x, torch.zeros(4)), ValueError, r"clusters: expected .* \(4, ...\)"),
        (lambda: SoftInfoNCE("shared")(x, torch.zeros(3)), ValueError, r"auxiliary: expected .* got \(3,\)"),
        (lambda: SoftInfoNCE("shared")([1.0], torch.zeros(3)), TypeError, "features: expected a tensor"),
        (
            lambda: SoftInfoNCE("shared")(x, torch.arange(4), key_valid=torch.ones(4, dtype=torch.bool)),
            ValueError,
            "key_valid: expected None where keys is None",
        ),
        (
            lambda: HierarchicalInfoNCE()(x, torch.zeros(4, 2).long(), x),
            ValueError,
            "key_clusters: expected a tensor where keys is given, got None",
        ),
        (
            lambda: SoftInfoNCE("shared")(x, torch.arange(4), x),
            ValueError,
            "key_auxiliary: expected a tensor where keys is given, got None",
        ),
        (lambda: CLIPLoss()([1.0], x), TypeError, "x: expected a tensor, got list"),
        (lambda: CLIPLoss()(torch.tensor(1.0), x), ValueError, r"x: expected a matrix .* got shape \(\)"),
        (lambda: SigLIPLoss()(x, torch.tensor(1.0)), ValueError, r"y: expected a matrix .* got shape \(\)"),
        (lambda: ClusteredInfoNCE()(x, None), TypeError, "clusters: expected a tensor .* got NoneType"),
        (
            lambda: ClusteredInfoNCE(contrast="cross")(x[:, None].expand(4, 2, 3), None),
            TypeError,
            "clusters: expected a tensor .* got NoneType",
        ),
        (
            lambda: ClusteredInfoNCE()(x, torch.zeros(4).long(), return_stats="no"),
            TypeError,
            "return_stats: expected a bool, got str",
        ),
        (lambda: HierarchicalInfoNCE(0.1, [0.5, 0.5]), TypeError, "learnable_temperature: expected a bool"),
        (lambda: clip_loss(x, x.to("meta")), ValueError, "y: expected device cpu as x, got meta"),
        (
            lambda: clip_loss(x, x, y_weights=torch.full((4,), torch.inf)),
            ValueError,
            "y_weights: expected finite numbers",
        ),
        (
            lambda: siglip_loss(x, x, temperature=torch.ones((), device="meta")),
            ValueError,
            "temperature: expected device cpu as x, got meta",
        ),
        (
            lambda: siglip_loss(x, x, bias=torch.tensor(torch.nan)),
            ValueError,
            "bias: expected finite numbers",
        ),
        (lambda: siglip_loss(x, x, bias=10**400), ValueError, "bias: .* that a float holds, got an int of"),
        (lambda: SigLIPLoss()(x, x.long()), TypeError, "y: expected a floating-point dtype, got torch.int64"),
        (
            lambda: SoftInfoNCE("shared")(x, [1, 2, 3, 4]),
            TypeError,
            "auxiliary: .* got list",
        ),
        (
            lambda: SoftInfoNCE("shared")(x, torch.arange(4), [1.0], torch.arange(1)),
            TypeError,
            "keys: expected a tensor, got list",
        ),
        (lambda: CLIPLoss()(x.to_sparse(), x), TypeError, "x: expected a dense tensor, got torch.sparse_coo"),
        (
            lambda: soft_infonce(
                x,
                query_auxiliary=torch.arange(4),
                affinity="shared",
                key_valid=torch.ones(4, dtype=torch.bool, device="meta"),
            ),
            ValueError,
            "key_valid: expected device cpu as queries, got meta",
        ),
        (
            lambda: hierarchical_infonce(x, query_clusters=torch.zeros(4, 2).long(), ignore_index=None),
            TypeError,
            "ignore_index: expected an int, got NoneType",
        ),
        (lambda: siglip_loss(x, x, bias=float("inf")), ValueError, "bias: expected a finite number, got inf"),
        (lambda: CLIPLoss(gather="count"), ValueError, "gather: expected 'none', 'all' or 'ring'"),
        (lambda: SigLIPLoss(gather="count"), ValueError, "gather: expected 'none', 'all' or 'ring'"),
        (lambda: SigLIPLoss()(x, x[:3]), ValueError, "y: expected 4 rows as in x, got 3"),
        (lambda: CLIPLoss(gather="all")(x, x[:3]), ValueError, "y: expected 4 rows as in x, got 3"),
        (lambda: CLIPLoss(temperature=-1), ValueError, "temperature: expected a finite number above 0"),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("module", "known", "error", "message"),
    [
        *(
            (module, known, error, f"clusters: {message}")
            for module in (ClusteredInfoNCE(), ClusteredInfoNCE(contrast="cross"), CLIPLoss(), SigLIPLoss())
            for known, error, message in (
                (torch.zeros(4), TypeError, "expected int64, got torch.float32"),
                (torch.arange(4).to_sparse(), TypeError, "expected a dense tensor"),
                (torch.arange(4, device="meta"), ValueError, "expected device cpu as"),
            )
        ),
        (HierarchicalInfoNCE(), torch.zeros(4, 2), TypeError, "clusters: expected int64"),
        (HierarchicalInfoNCE(), torch.zeros(4, 0).long(), ValueError, "clusters: expected a matrix"),
        (
            HierarchicalInfoNCE(),
            torch.zeros(4, 2, device="meta").long(),
            ValueError,
            "clusters: .* device cpu",
        ),
        (SoftInfoNCE("shared"), torch.zeros(4), TypeError, "auxiliary: expected int64 bit masks"),
        (SoftInfoNCE("shared"), torch.zeros(4, 0).long(), ValueError, "auxiliary: expected shape"),
        (SoftInfoNCE("kernel"), torch.arange(4), TypeError, "auxiliary: expected a floating-point dtype"),
        (SoftInfoNCE("kernel"), torch.zeros(4), ValueError, "auxiliary: expected a matrix"),
        (
            SoftInfoNCE("kernel"),
            torch.zeros(4, 2, device="meta"),
            ValueError,
            "auxiliary: .* device cpu as fe",
        ),
    ],
)
def test_what_is_known_is_refused_by_its_name_in_the_module(
    module: torch.nn.Module, known: torch.Tensor, error: type[Exception], message: str
) -> None:
    features = torch.randn(4, 2, 3)
    sides = features.unbind(1) if isinstance(module, CLIPLoss | SigLIPLoss) else (features,)
    with pytest.raises(error, match=f"^{message}"):
        module(*sides, known)


def test_samples_are_refused_by_their_name_in_the_module() -> None:
    with pytest.raises(TypeError, match=r"^samples: expected int64"):
        ClusteredInfoNCE(own_views=True)(torch.randn(4, 2, 3), torch.arange(4), samples=torch.zeros(4))


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (ClusteredInfoNCE(0.3, True), 1),
        (ClusteredInfoNCE(denominator="other", own_views=True), 1),
        (ClusteredInfoNCE(contrast="cross"), 1),
        (HierarchicalInfoNCE(0.3, True, level_weights=[1.0, 2.0]), 2),
        (HierarchicalInfoNCE(constraint="pair"), 2),
        (SoftInfoNCE("jaccard", 0.3, True), 1),
        (SoftInfoNCE("cosine", positives="in"), 1),
        (CLIPLoss(), 0),
        (SigLIPLoss(), 0),
    ],
)
def test_compiles_without_a_graph_break(module: torch.nn.Module, known: int) -> None:
    """And for batches of any size: what is marked dynamic may not become a number of the graph."""
    torch._dynamo.reset()
    ids = torch.tensor([1, 1, 2, 2, 3, 1])
    features = torch.randn(6, 2, 5)
    results = []
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        x = features.clone().requires_grad_()
        of_samples = ids if known < 2 else torch.stack([ids // 2, ids], 1)
        arguments = (x, of_samples) if known else (*x.unbind(1), ids)
        for argument in arguments:
            torch._dynamo.mark_dynamic(argument, 0)
        loss = call(*arguments)
        parameters = list(module.parameters())
        results.append([loss.detach(), *torch.autograd.grad(loss, [x, *parameters])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
