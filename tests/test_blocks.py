"""Losses over more keys than are taken at once: the same numbers, in memory that does not grow with them."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import FUSED, LOSSES, ROWWISE, problem, values
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wscl_fast.affinity import Affinity
from wscl_fast.functional import _passes, _requests, _terms, _trips, clustered_infonce, soft_infonce

pytestmark = pytest.mark.skipif(not FUSED, reason="the extension is not built")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every problem's keys are too many to be taken at once; the lengths of the blocks that were."""
    lengths: list[int] = []
    unpacked = _trips.Luggage.unpacked

    def counted(self: Any, queries: Tensor, travelling: list[Tensor], first: int) -> Any:
        lengths.append(len(travelling[0]))
        return unpacked(self, queries, travelling, first)

    monkeypatch.setattr(_passes, "MOST", 0)
    monkeypatch.setattr(_trips, "LEAST_ROWS", 7)
    monkeypatch.setattr(_trips, "BLOCK", 1)
    monkeypatch.setattr(_trips.Luggage, "unpacked", counted)
    monkeypatch.setattr(_requests.Request, "most", 1)
    monkeypatch.setattr(_terms, "LEAST_QUERIES", 5)
    return lengths


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ROWWISE},
    "other, in": ("other", {"positives": "in"}),
    "decoupled, in": ("decoupled", {"positives": "in"}),
    "all, hard": ("out", {"hardness": 0.5}),
    "all, prior": ("in", {"prior": 0.1}),
    "levels, in": ("hierarchical", {"positives": "in"}),
    "levels, by pair": ("hierarchical", {"constraint": "pair"}),
    "jaccard, in": ("jaccard", {"positives": "in"}),
}
PLAIN = {"out", "in"}  # which have a kernel for all keys


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_blocks_give_what_the_definition_gives(name: str, own: bool, small_blocks: list[int]) -> None:
    loss, options = CASES[name]
    case = problem(13, 40, 5, seed=7)
    options = {"temperature": 0.4, **options}
    if own:
        if loss == "siglip":
            pytest.skip("which knows no own keys")
        options["exclude_self"] = torch.randint(-1, 40, (13,))
    got = values(loss, case, torch.float64, impl="fused", **options)
    assert bool(small_blocks) == (name not in PLAIN)
    assert set(small_blocks) <= {7, 40 % 7}
    want = values(loss, case, torch.float64, impl="reference", **options)
    for here, there in zip(got, want, strict=True):
        torch.testing.assert_close(here, there)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_in_blocks_has_one_gradient(name: str, small_blocks: list[int]) -> None:
    """Queries that are keys: one gradient of both roles, and the temperature's."""
    loss, options = CASES[name][0], dict(CASES[name][1])
    if loss == "siglip":
        pytest.skip("which has two sides")
    x, _, ids, _ = problem(23, 1, 5, seed=3)
    results = []
    for impl in ("fused", "reference"):
        leaves = [x.clone().requires_grad_(), torch.tensor(0.4, dtype=x.dtype, requires_grad=True)]
        options |= {"temperature": leaves[1], "impl": impl, "reduction": "none"}
        rows = LOSSES[loss](leaves[0], None, ids, None, **options)
        upstream = torch.linspace(0.5, 1.5, len(rows), dtype=x.dtype)
        results.append([rows.detach(), *torch.autograd.grad((rows * upstream).sum(), leaves)])
    assert bool(small_blocks) == (name not in PLAIN)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_keys_of_another_dtype_are_converted_block_by_block(
    name: str, dtype: torch.dtype, small_blocks: list[int]
) -> None:
    """Wide queries and a narrow queue, the plain loss among them; gradients have their rows' dtype."""
    loss, options = CASES[name]
    q, k, qc, kc = problem(13, 40, 5, seed=7)
    k = k.to(dtype)
    results = []
    for impl, leaves in (("fused", (q, k)), ("reference", (q, k.double()))):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        rows = LOSSES[loss](*leaves, qc, kc, temperature=0.4, impl=impl, reduction="none", **options)
        results.append([rows.detach(), *torch.autograd.grad(rows.sum(), leaves)])
    assert small_blocks
    (rows, of_q, of_k), (want_rows, want_q, want_k) = results
    assert of_k.dtype == dtype
    torch.testing.assert_close(rows, want_rows)
    torch.testing.assert_close(of_q, want_q)
    torch.testing.assert_close(
        of_k.double(), want_k, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
    )


def test_temperatures_weights_and_statistics(small_blocks: list[int]) -> None:
    q, k, qc, kc = problem(13, 40, 5, seed=7)
    each = torch.linspace(0.2, 0.9, 13, dtype=torch.float64)
    one = torch.tensor(0.4, dtype=torch.float64)
    for temperature, options in ((each, {}), (one, {"denominator": "other"}), (one, {"hardness": 0.3})):
        results = []
        for impl in ("fused", "reference"):
            leaves = [x.clone().requires_grad_() for x in (q, k, temperature)]
            loss, stats = clustered_infonce(
                *leaves[:2],
                query_clusters=qc,
                key_clusters=kc,
                temperature=leaves[2],
                weights=torch.linspace(1, 2, 13),
                impl=impl,
                return_stats=True,
                **options,
            )
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves), *stats])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)
    assert small_blocks


def test_gradients_once_more_and_no_further(small_blocks: list[int]) -> None:
    """A graph that is kept gives its gradient again; there is no second derivative, and it says so."""
    q, k, qc, kc = problem(9, 30, 4, seed=2)
    for name in ("other", "hierarchical", "siglip"):
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        options = {"constraint": "pair"} if name == "hierarchical" else {}
        value = LOSSES[name](*leaves, qc, kc, impl="fused", **options)
        first, second = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert a.equal(b)
        graph = torch.autograd.grad(value, leaves, create_graph=True)
        for a, b in zip(first, graph, strict=True):
            assert a.equal(b)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            sum(g.square().sum() for g in graph).backward()
        with torch.no_grad():
            torch.testing.assert_close(LOSSES[name](*leaves, qc, kc, impl="fused", **options), value)
        only = LOSSES[name](q, leaves[1], qc, kc, impl="fused", **options)
        torch.testing.assert_close(torch.autograd.grad(only, leaves[1])[0], first[1])
    assert small_blocks


@pytest.mark.parametrize("name", [name for name in ROWWISE if name not in PLAIN])
def test_no_keys_at_all(name: str, small_blocks: list[int]) -> None:
    q, _, qc, _ = problem(9, 4, 5, seed=3)
    q.requires_grad_()
    loss = LOSSES[name](q, q.new_empty(0, 5), qc, qc[:0], impl="fused")
    want = LOSSES[name](q, q.new_empty(0, 5), qc, qc[:0], impl="reference")
    torch.testing.assert_close(loss, want)
    assert not torch.autograd.grad(loss, q)[0].any()
    assert small_blocks


@pytest.mark.parametrize("name", ["other", "siglip"])
def test_under_a_checkpoint_of_the_user(name: str, small_blocks: list[int]) -> None:
    q, k, qc, kc = problem(9, 30, 4, seed=2)
    gradients = []
    for through in (lambda loss, *x: loss(*x), partial(checkpoint, use_reentrant=False)):
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        value = through(lambda q, k: LOSSES[name](q, k, qc, kc, impl="fused"), *leaves)
        gradients.append(torch.autograd.grad(value, leaves))
    for plain, again in zip(*gradients, strict=True):
        assert plain.equal(again)
    assert small_blocks


@pytest.mark.parametrize("name", ["other", "siglip", "clip"])
def test_ids_that_change_before_the_backward_pass_are_refused(name: str, small_blocks: list[int]) -> None:
    q, k, qc, kc = problem(9, 30, 4, seed=2)
    for ids in (qc, kc):
        loss = LOSSES[name](q.requires_grad_(), k.requires_grad_(), qc, kc, impl="fused")
        ids.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("positives", ["out", "in"])
def test_one_large_side_twice(positives: str, small_blocks: list[int]) -> None:
    """One tensor on both sides, with and without a graph of its gradient."""
    x, _, ids, _ = problem(13, 4, 5, seed=1)
    x.requires_grad_()
    options = {"temperature": 0.4, "positives": positives}
    (want,) = torch.autograd.grad(LOSSES["clip"](x, x, ids, ids, impl="reference", **options), x)
    for graph in (False, True):
        value = LOSSES["clip"](x, x, ids, ids, impl="fused", **options)
        torch.testing.assert_close(torch.autograd.grad(value, x, create_graph=graph)[0].detach(), want)


@pytest.mark.parametrize("positives", ["out", "in"])
def test_two_large_sides(positives: str, small_blocks: list[int]) -> None:
    """Each side's gradients in one tensor, and a temperature's; nothing further."""
    x, y, x_ids, y_ids = problem(13, 29, 5, seed=1)
    results = []
    for impl in ("fused", "reference"):
        leaves = [v.clone().requires_grad_() for v in (x, y, torch.tensor(0.4, dtype=x.dtype))]
        options = {"temperature": leaves[2], "positives": positives, "impl": impl, "reduction": "none"}
        rows = LOSSES["clip"](*leaves[:2], x_ids, y_ids, **options)
        value = (rows * torch.linspace(0.5, 1.5, len(rows), dtype=x.dtype)).sum()
        first, second = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
        graph = torch.autograd.grad(value, leaves, create_graph=True)
        results.append([rows.detach(), *first, *second, *(g.detach() for g in graph)])
        if impl == "fused":
            with pytest.raises(NotImplementedError, match="no second derivative"):
                sum(g.square().sum() for g in graph).backward()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("affinity", ["count", "cosine", "kernel", "jaccard"])
@pytest.mark.parametrize("bad", [0.0, torch.nan])
def test_soft_positives_whose_keys_are_not_all_there(
    affinity: Affinity, bad: float, small_blocks: list[int]
) -> None:
    """Keys without an id, own keys, and one of these that is not finite, in the first block and in others."""
    q, k, _, _ = problem(13, 40, 5, seed=7)
    known = torch.rand(53, 6, dtype=q.dtype), torch.randint(1, 1 << 40, (53,))
    auxiliary = known[0] if affinity == "kernel" else known[1]
    own = torch.arange(13) * 3
    own[5] = -1
    valid = torch.arange(40) % 7 != 2
    k[own[4]] = bad
    results = []
    for impl in ("fused", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, torch.tensor(0.4, dtype=q.dtype))]
        rows = soft_infonce(
            leaves[0],
            leaves[1],
            query_auxiliary=auxiliary[:13],
            key_auxiliary=auxiliary[13:],
            key_valid=valid,
            affinity=affinity,
            exclude_self=own,
            temperature=leaves[2],
            reduction="none",
            impl=impl,
        )
        results.append([rows.detach(), *torch.autograd.grad(rows.sum(), leaves)])
    got, want = results
    if bad == 0:
        torch.testing.assert_close(got, want)
    else:  # the query whose own key it is has its loss, and no other
        torch.testing.assert_close(got[0][4], want[0][4])
        assert got[0].isfinite().sum() == 1
    assert small_blocks


def test_the_tags_of_an_empty_queue(small_blocks: list[int]) -> None:
    q, tags = torch.randn(4, 3, requires_grad=True), torch.ones(4, dtype=torch.int64)
    loss = soft_infonce(
        q,
        torch.full((20, 3), torch.nan),
        query_auxiliary=tags,
        key_auxiliary=torch.zeros(20, dtype=torch.int64),
        key_valid=torch.zeros(20, dtype=torch.bool),
        affinity="jaccard",
    )
    loss.backward()
    assert loss == 0
    assert (q.grad == 0).all()
    assert small_blocks


# Gradients of queries and keys; where `detached` is said, of the queries alone.
MEMORY = """
import ctypes, gc, sys, torch
from loss_cases import LOSSES
from wscl_fast import _C
torch.set_num_threads(2)
N, M, D = 128, 1 << 18, 128

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

def step(loss, q, k, options):
    m = len(k)
    qc, kc = torch.arange(len(q)) % 50, torch.arange(m) % 50
    LOSSES[loss](q, k, qc, kc, temperature=0.5, impl="fused", **options).backward()

def rows(n, dtype, wants):
    x = torch.empty(n, D, dtype=dtype)
    for part in x.split(1 << 14):
        part.copy_(torch.randn(len(part), D) / D**0.5)
    return x.requires_grad_(wants)

for line in sys.stdin:
    name, loss, of_q, of_k, wants, options = eval(line)
    of_q, of_k = getattr(torch, of_q), getattr(torch, of_k)
    if options.pop("own", False):
        options["exclude_self"] = torch.arange(N)
    step(loss, rows(N, of_q, True), rows(1000, of_k, wants), options)
    q, k = rows(N, of_q, True), rows(M, of_k, wants)
    gc.collect()
    _C.empty_reserve()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = resident("VmRSS")
    step(loss, q, k, options)
    grown = resident("VmHWM") - before
    grown -= sum(x.grad.nbytes for x in (q, k) if x.grad is not None) / 2**20
    print(f"{name}|{grown:.1f}", flush=True)
"""


def memory_cases() -> list[tuple[str, str, str, str, bool, dict[str, Any]]]:
    plain: list[tuple[str, dict[str, Any]]] = [
        ("out", {}),
        ("in", {}),
        ("out", {"own": True}),
        ("in", {"own": True}),
    ]
    rest = [(loss, options) for name, (loss, options) in CASES.items() if name not in PLAIN]
    cases = []
    for loss, options in [*plain, *rest]:
        for of_q, of_k in (
            ("float32", "float32"),
            ("bfloat16", "bfloat16"),
            ("float32", "bfloat16"),
            ("float16", "float16"),
        ):
            for wants in (True, False):
                name = f"{loss} {options} {of_q} {of_k} {'' if wants else 'detached'}"
                cases.append((name, loss, of_q, of_k, wants, options))
    return cases


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.usefixtures("memory_given_back")
def test_memory_does_not_grow_with_the_keys() -> None:
    """2¹⁸ keys of 128, 128 MiB in float32: above inputs and gradients a step takes 64 at most."""
    cases = memory_cases()
    if not os.environ.get("WSCL_ALL_MEMORY"):  # all of them take minutes
        narrow, wide = ("out", "in", "other", "hard"), ("other", "hard", "hierarchical", "jaccard", "siglip")
        chosen = {("bfloat16", "bfloat16"): narrow, ("float32", "float32"): wide}
        cases = [c for c in cases if c[4] and c[1] in chosen.get((c[2], c[3]), ()) and set(c[5]) <= {"own"}]
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        input="".join(f"{case!r}\n" for case in cases),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{here.parent}:{here}"},
    )
    assert done.returncode == 0, done.stderr
    grown = {name: float(mib) for name, mib in (line.split("|") for line in done.stdout.splitlines())}
    assert len(grown) == len(cases)
    print(done.stdout)
    assert {name: mib for name, mib in grown.items() if mib > 64} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("own", [False, True])
def test_narrow_gradients_are_summed_wide_block_by_block(
    positives: str, own: bool, dtype: torch.dtype
) -> None:
    """More keys than a block of the kernel's own has, 2²² numbers: each is rounded once."""
    q, k, qc, kc = problem(20, 9000, 512, seed=5)
    q, k = q.to(dtype), k.to(dtype)
    options: dict[str, Any] = {"positives": positives, "temperature": 0.3}
    if own:
        options["exclude_self"] = torch.randint(0, 9000, (20,))
        kc[options["exclude_self"]] = qc.clamp(min=0)
    got = values("out", (q, k, qc, kc), dtype, impl="fused", **options)
    want = values("out", (q, k, qc, kc), torch.float64, impl="reference", **options)
    size = float(want[2].abs().max())
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-5)
    # Weights are rounded to bfloat16 for its dot instruction.
    torch.testing.assert_close(got[2].double(), want[2], rtol=0, atol=torch.finfo(dtype).eps * size)
