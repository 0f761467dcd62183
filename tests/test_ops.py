"""The operators under PyTorch's own checks: opcheck, gradcheck, torch.compile, determinism, threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from problems import problems
from torch import Tensor

import wscl_fast
from wscl_fast import _ops, reference
from wscl_fast._ops import room
from wscl_fast.functional import clustered_infonce
from wscl_fast.pairs import Pairs

pytestmark = pytest.mark.usefixtures("extension")
SMALL = [
    (name, case)
    for name, case in problems()
    if name.split("-")[1] in ("1x1x4", "1x4", "2x3", "no", "empty", "1x300x33")
]


def forward_arguments(
    dtype: torch.dtype, *, in_batch: bool, inner: bool, gradient: bool
) -> tuple[object, ...]:
    q = torch.randn(13, 6, dtype=dtype, requires_grad=gradient)
    k = None if in_batch else torch.randn(17, 6, dtype=dtype, requires_grad=gradient)
    qc, kc = torch.randint(-1, 3, (13,)), None if in_batch else torch.randint(-1, 3, (17,))
    own = None if in_batch else torch.randint(-1, 17, (13,))
    scale = torch.tensor(2.0, dtype=dtype, requires_grad=gradient)
    return q, k, qc, kc, own, scale, in_batch, inner, -1, True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_opcheck(dtype: torch.dtype, in_batch: bool, inner: bool) -> None:
    for gradient in (False, True):
        arguments = forward_arguments(dtype, in_batch=in_batch, inner=inner, gradient=gradient)
        torch.library.opcheck(torch.ops.wscl_fast.infonce_forward.default, arguments)
    plain = forward_arguments(dtype, in_batch=in_batch, inner=inner, gradient=False)
    _, count, stats, direction = torch.ops.wscl_fast.infonce_forward(*plain)
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        backward = (torch.randn(13, dtype=dtype), *plain[:-1], count, stats, direction, *needs)
        torch.library.opcheck(torch.ops.wscl_fast.infonce_backward.default, backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("in_batch", "inner"), [(False, False), (False, True), (True, False), (True, True)])
def test_opcheck_reduced(dtype: torch.dtype, in_batch: bool, inner: bool) -> None:
    for gradient in (False, True):
        *arguments, _ = forward_arguments(torch.float32, in_batch=in_batch, inner=inner, gradient=gradient)
        for place in (0, 1):
            if isinstance(rows := arguments[place], Tensor):
                arguments[place] = rows.detach().to(dtype).requires_grad_(gradient and place == 0)
        if dtype == torch.float64:
            arguments[5] = torch.tensor(2.0, dtype=dtype, requires_grad=gradient)
        for need_keys in {False, not (in_batch or inner or dtype == torch.bfloat16)}:
            if need_keys:
                arguments[1].requires_grad_(gradient)
            for mean in (False, True):
                asked = (*arguments[:6], 1.0, *arguments[6:], mean, True, need_keys, True, 0)
                torch.library.opcheck(torch.ops.wscl_fast.infonce_reduced.default, asked)
    constant = [a.detach() if isinstance(a, Tensor) else a for a in arguments[:5]]
    for mean in (False, True):
        asked = (*constant, None, 2.0, *arguments[6:], mean, False, False, False, 0)
        torch.library.opcheck(torch.ops.wscl_fast.infonce_reduced.default, asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inner", [False, True])
def test_opcheck_in_batch(dtype: torch.dtype, inner: bool) -> None:
    for gradient in (False, True):
        x = torch.randn(13, 6, dtype=dtype, requires_grad=gradient)
        scale = torch.tensor(2.0, dtype=dtype, requires_grad=gradient)
        arguments = (x, torch.randint(-1, 3, (13,)), scale, True, inner, -1)
        # Room for no logits: what stands in the rest of a larger one is nobody's business.
        torch.library.opcheck(torch.ops.wscl_fast.infonce_forward_in_batch.default, (*arguments, 0))
    plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    _, count, stats, logits = torch.ops.wscl_fast.infonce_forward_in_batch(*plain, 4000)
    backward = (torch.randn(13, dtype=dtype), *plain, count, stats, logits)
    torch.library.opcheck(torch.ops.wscl_fast.infonce_backward_in_batch.default, backward)


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("positives", ["out", "in"])
@pytest.mark.parametrize("exclude", [True, False])
def test_gradcheck(in_batch: bool, positives: str, exclude: bool) -> None:
    q = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    k = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    qc, kc = torch.tensor([0, 0, 1, 1, 2, -1, 5]), torch.tensor([0, 1, 1, 2, 2, -1, 0, 3, 1])

    def loss(q: Tensor, k: Tensor, t: Tensor) -> Tensor:
        return clustered_infonce(
            q,
            None if in_batch else k,
            query_clusters=qc,
            key_clusters=None if in_batch else kc,
            temperature=t,
            positives=positives,
            exclude_self=exclude,
            reduction="none",
            impl="fused",
        )

    assert torch.autograd.gradcheck(loss, (q, k, t) if not in_batch else (q, k.detach(), t))


@pytest.mark.parametrize("impl", ["fused", "chunked", "reference"])
@pytest.mark.parametrize("in_batch", [False, True])
def test_compiles_without_a_graph_break(impl: str, in_batch: bool) -> None:
    q, k = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    qc, kc = torch.randint(-1, 4, (20,)), torch.randint(-1, 4, (30,))
    temperature = torch.tensor(0.3, requires_grad=True)

    def loss(q: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
        q = torch.nn.functional.normalize(q, dim=-1)
        keys = {} if in_batch else {"keys": k, "key_clusters": kc}
        return clustered_infonce(q, query_clusters=qc, temperature=temperature, impl=impl, **keys)

    leaves = (q, temperature) if in_batch else (q, k, temperature)
    want = loss(q, k, temperature)
    gradients = torch.autograd.grad(want, leaves)
    # aot_eager traces forward and backward through the fake kernels without needing a compiler at run time.
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(q, k, temperature)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), gradients)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    x, ids = torch.randn(32, 8, requires_grad=True), torch.randint(0, 4, (32,))

    @torch.compile(fullgraph=True)
    def loss(x: Tensor, ids: Tensor) -> Tensor:
        return clustered_infonce(torch.nn.functional.normalize(x, dim=-1) * 1.0, query_clusters=ids) * 2

    got = loss(x, ids)
    (gradient,) = torch.autograd.grad(got, x)
    want = 2 * clustered_infonce(torch.nn.functional.normalize(x, dim=-1), query_clusters=ids)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, x)[0])


@pytest.mark.parametrize("keys", [None, torch.linspace(-1, 1, 40).view(10, 4)])
def test_no_second_derivative_is_an_error_not_a_wrong_number(keys: Tensor | None) -> None:
    x = torch.randn(6, 4, requires_grad=True)
    leaves = [x] if keys is None else [x, keys.clone().requires_grad_()]
    ids = {"query_clusters": torch.arange(6) // 2}
    if keys is not None:
        ids["key_clusters"] = torch.arange(10) // 2
    loss = clustered_infonce(*leaves, **ids, impl="fused")
    for gradient in torch.autograd.grad(loss, leaves, create_graph=True):
        with pytest.raises(NotImplementedError, match="no second derivative; impl='chunked' and"):
            gradient.sum().backward(retain_graph=True)


def test_the_same_bits_every_time_and_from_every_thread() -> None:
    q, k = torch.randn(300, 64), torch.randn(2000, 64)
    qc, kc = torch.randint(0, 20, (300,)), torch.randint(0, 20, (2000,))

    def run() -> list[Tensor]:
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        loss = clustered_infonce(*leaves, query_clusters=qc, key_clusters=kc, impl="fused")
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    first = run()
    results: list[list[Tensor]] = []
    workers = [threading.Thread(target=lambda: results.extend([run() for _ in range(3)])) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 12
    for result in [run(), *results]:
        for got, want in zip(result, first, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)  # another thread may see another pool
    for got, want in zip(run(), first, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_few_rows_split_over_columns(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, k = torch.randn(5, 24, dtype=torch.float64), torch.randn(9000, 24, dtype=torch.float64)
        qc, kc = torch.randint(0, 5, (5,)), torch.randint(0, 5, (9000,))
        for positives in ("out", "in"):
            fused, definition = (
                clustered_infonce(q, k, query_clusters=qc, key_clusters=kc, positives=positives, impl=impl)
                for impl in ("fused", "reference")
            )
            torch.testing.assert_close(fused, definition)
    finally:
        torch.set_num_threads(before)


def test_every_instruction_set_agrees(extension) -> None:  # type: ignore[no-untyped-def]
    before = extension.instruction_set()
    x, ids = torch.randn(130, 50, dtype=torch.float64), torch.randint(0, 9, (130,))
    want = clustered_infonce(x, query_clusters=ids, impl="reference")
    try:
        for name in extension.supported_instruction_sets():
            extension.use_instruction_set(name)
            torch.testing.assert_close(clustered_infonce(x, query_clusters=ids, impl="fused"), want)
        with pytest.raises(ValueError, match=r"name: expected an instruction set .* got 'abacus'"):
            extension.use_instruction_set("abacus")
    finally:
        extension.use_instruction_set(before)


@pytest.mark.usefixtures("memory_given_back")
def test_memory_stays_linear() -> None:
    """The logits of this problem would take 2 GiB; the process may grow by 64 MiB."""
    script = """
import resource, torch
from wscl_fast import _ops, reference
from wscl_fast._ops import room
from wscl_fast.functional import clustered_infonce
def loss(n, m):
    q, k = torch.randn(n, 4, requires_grad=True), torch.randn(m, 4, requires_grad=True)
    ids = torch.arange(max(n, m)) % 100
    clustered_infonce(q, k, query_clusters=ids[:n], key_clusters=ids[:m], impl="fused").backward()
loss(64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss(8192, 65536)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_queries_have_the_same_gradient_with_and_without_their_graph(dtype: torch.dtype) -> None:
    """The last backward pass writes it in the place of the mean keys: the same bits, in the memory of one."""
    q, k = torch.randn(2050, 1024).to(dtype), torch.randn(64, 1024).to(dtype)
    qc, kc = torch.arange(2050) % 5 - 1, torch.arange(64) % 4
    q, t = (q / 32).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    weights = torch.linspace(0, 1, 2050)
    loss = clustered_infonce(
        q, k / 32, query_clusters=qc, key_clusters=kc, temperature=t, weights=weights, impl="fused"
    )
    kept = torch.autograd.grad(loss, (q, t), retain_graph=True)
    last = torch.autograd.grad(loss, (q, t))
    for a, b in zip(kept, last, strict=True):
        assert a.equal(b)
    assert (last[0][qc == -1] == 0).all()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, q)


@pytest.mark.parametrize("upstream", [1.0, -3.25, 0.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("n", "m", "d"), [(40, 300, 33), (150, 70_000, 32), (9, 1, 4)])
@pytest.mark.parametrize("keys", ["with gradient", "detached", "none"])
def test_gradients_made_along_with_the_loss(
    keys: str, n: int, m: int, d: int, reduction: str, upstream: float
) -> None:
    """They are of the mean; whatever upstream says, and however often, gradients are the definition's."""
    q, k = torch.randn(n, d, dtype=torch.float64) / 4, torch.randn(m, d, dtype=torch.float64) / 4
    qc, kc, own = torch.randint(-1, 6, (n,)), torch.randint(-1, 6, (m,)), torch.randint(-1, m, (n,))
    others: dict[str, Any] = {"key_clusters": kc, "exclude_self": own}

    def gradients(dtype: torch.dtype, impl: str) -> tuple[Tensor, ...]:
        leaves = [q.to(dtype).requires_grad_(), torch.tensor(0.3, dtype=dtype, requires_grad=True)]
        given = None if keys == "none" else k.to(dtype).requires_grad_(keys == "with gradient")
        if keys == "with gradient":
            leaves.append(given)
        loss = clustered_infonce(
            leaves[0],
            given,
            query_clusters=qc,
            temperature=leaves[1],
            reduction=reduction,
            impl=impl,
            **({} if keys == "none" else others),
        )
        kept = torch.autograd.grad(upstream * loss, leaves, retain_graph=True)
        last = torch.autograd.grad(upstream * loss, leaves)
        for a, b in zip(kept, last, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        return loss.detach(), *last

    want = gradients(torch.float64, "chunked")
    for dtype in (torch.float32, torch.float64):
        for got, exact in zip(gradients(dtype, "fused"), want, strict=True):
            size = float(exact.abs().max())
            torch.testing.assert_close(got.double(), exact.double(), rtol=1e-5, atol=1e-6 * max(1, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("change", ["nothing", "threads", "instruction set"])
def test_kept_logits_are_those_that_would_be_made_again(
    extension: Any, dtype: torch.dtype, change: str
) -> None:
    x = torch.nn.functional.normalize(torch.randn(700, 40), dim=1).to(dtype).requires_grad_()
    ids, weights = torch.randint(-1, 30, (700,)), torch.rand(700)
    scale = torch.tensor(9.0, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    options: dict[str, Any] = {"exclude_self": True, "inner": False, "ignore_index": -1}

    def gradients(**more: bool) -> tuple[Tensor, ...]:
        loss, _ = _ops.clustered_infonce(x, None, ids, None, None, scale, **options, **more)
        kept = "in_batch" in loss.grad_fn.name()
        assert kept != more.get("sparing", False)
        if kept and change == "threads":
            torch.set_num_threads(3)
        if kept and change == "instruction set":
            extension.use_instruction_set("portable")
        first = torch.autograd.grad((weights * loss).sum(), (x, scale), retain_graph=True)
        second = torch.autograd.grad((weights * loss).sum(), (x, scale))
        for a, b in zip(first, second, strict=True):
            assert a.equal(b)
        return second

    threads, instructions = torch.get_num_threads(), extension.instruction_set()
    try:
        got = gradients()
    finally:
        torch.set_num_threads(threads)
        extension.use_instruction_set(instructions)
    for a, b in zip(got, gradients(sparing=True), strict=True):
        if change == "nothing":
            assert a.equal(b)
        else:
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_logits_are_kept_where_half_of_them_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (torch.randn(64, 8, requires_grad=True) for _ in range(2))
    assert room.room_for_logits(x, x) >= 64 * 64
    assert room.room_for_logits(x, None) >= 64 * 64 // 2
    monkeypatch.setattr(room, "BYTES", 64 * 64 * 4 // 3)
    assert room.room_for_logits(x, y) == 0
    assert room.room_for_logits(x, None) == 64 * 64 // 3
    with torch.no_grad():
        assert room.room_for_logits(x, None) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_upstream_reaches_those_alone_who_take_part(dtype: torch.dtype) -> None:
    x, ids = torch.randn(9, 4).to(dtype).requires_grad_(), torch.tensor([0, 0, 1, 1, -1, 0, 2, -1, 1])
    for upstream in (torch.inf, torch.nan):
        loss = clustered_infonce(x, query_clusters=ids, impl="fused")
        (gradient,) = torch.autograd.grad(upstream * loss, x)
        assert not torch.isfinite(gradient[ids != -1]).any()
        assert (gradient[ids == -1] == 0).all()


def test_gradients_of_a_sum_are_made_along_with_it() -> None:
    q, k = torch.randn(12, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    qc, kc = torch.arange(12) % 4, torch.arange(40) % 4

    def made_along(keys: Tensor | None = k, **options: Any) -> bool:
        options |= {} if keys is None else {"keys": keys, "key_clusters": kc}
        loss = clustered_infonce(q, query_clusters=qc, impl="fused", **options)
        seen, names = [loss.grad_fn], ""
        while seen:
            node = seen.pop()
            names += f" {node.name()}"
            seen += [before for before, _ in node.next_functions if before is not None]
        assert "infonce_" in names
        return "infonce_reduced" in names

    assert made_along()
    assert made_along(reduction="sum", temperature=torch.tensor(0.2))
    assert not made_along(reduction="none")
    assert not made_along(weights=torch.ones(12))
    assert not made_along(positives="in")
    assert made_along(k.detach(), positives="in")
    assert made_along(None)
    q.requires_grad_(False)
    assert not made_along()


def test_a_large_gradient_keeps_its_memory_while_anyone_has_it(extension) -> None:  # type: ignore[no-untyped-def]
    """Memory of gradients is kept for the next one, once nobody reads it any more."""
    k = torch.randn(1 << 15, 64, requires_grad=True)  # 8 MiB

    def gradient() -> Tensor:
        k.grad = None
        q, ids = torch.randn(4, 64), torch.arange(4)
        clustered_infonce(q, k, query_clusters=ids, key_clusters=torch.arange(1 << 15) % 4).backward()
        assert k.grad is not None
        return k.grad

    seen = gradient().numpy()
    before = seen.copy()
    other = gradient()
    assert np.array_equal(seen, before)
    assert not np.array_equal(other.numpy(), before)
    wscl_fast.empty_reserve()
    assert np.array_equal(seen, before)


def test_wrong_direct_calls_are_refused() -> None:
    arguments = list(forward_arguments(torch.float32, in_batch=False, inner=False, gradient=False))
    for place, value, message in (
        (1, torch.randn(17, 5), "keys: expected 6 columns"),
        (2, torch.zeros(3, dtype=torch.int64), "query_clusters: expected a vector of length 13"),
        (5, torch.tensor(0.0), "scale: expected a number above 0"),
        (3, None, "keys and key_clusters go together"),
    ):
        wrong = [*arguments[:place], value, *arguments[place + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            torch.ops.wscl_fast.infonce_forward(*wrong)


def test_gradients_that_were_not_asked_for_are_refused() -> None:
    *arguments, _ = forward_arguments(torch.float32, in_batch=False, inner=False, gradient=True)
    arguments.insert(6, 1.0)
    for needs in ((True, False, True), (True, True, False), (False, False, False)):
        loss = torch.ops.wscl_fast.infonce_reduced(*arguments, True, *needs, 0)[0]
        with pytest.raises(RuntimeError, match="need_queries, need_keys, need_scale: expected True"):
            loss.backward()
    with pytest.raises(RuntimeError, match="need_queries: expected with other gradients"):
        torch.ops.wscl_fast.infonce_reduced(*arguments, True, False, True, False, 0)
    arguments[5:7] = None, 0.0
    with pytest.raises(RuntimeError, match="constant_scale: expected a number above 0, got 0"):
        torch.ops.wscl_fast.infonce_reduced(*arguments, True, False, False, False, 0)


def test_halves_are_exact_up_to_their_rounding(extension) -> None:  # type: ignore[no-untyped-def]
    """Held to float64 of the same rows; plain PyTorch in the same dtype is further away."""
    q64, k64 = (
        torch.nn.functional.normalize(torch.randn(n, 70, dtype=torch.float64), dim=1) for n in (90, 500)
    )
    qc, kc = torch.randint(0, 9, (90,)), torch.randint(-1, 9, (500,))

    def run(dtype: torch.dtype, impl: str, positives: str, half: torch.dtype) -> list[Tensor]:
        leaves = [x.to(half).to(dtype).requires_grad_() for x in (q64, k64)]
        q, k = leaves
        scale = torch.tensor(10.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        if impl == "fused":
            loss, _ = _ops.clustered_infonce(
                q, k, qc, kc, None, scale, exclude_self=False, inner=positives == "in", ignore_index=-1
            )
        else:
            pairs = Pairs(q, k, qc, kc, None, scale)
            loss, _ = reference.clustered_infonce(pairs, pairs, inner=positives == "in")
        gradients = torch.autograd.grad(loss.sum(), leaves)
        assert [g.dtype for g in gradients] == [dtype, dtype]
        return [loss.detach().double(), *(g.double() for g in gradients)]

    before = extension.instruction_set()
    try:
        for name in extension.supported_instruction_sets():
            extension.use_instruction_set(name)
            for half in (torch.bfloat16, torch.float16):
                for positives in ("out", "in"):
                    want = run(torch.float64, "reference", positives, half)
                    ours = run(half, "fused", positives, half)
                    plain = run(half, "reference", positives, half)
                    for exact, got, theirs in zip(want, ours, plain, strict=True):
                        error, allowed = (got - exact).norm(), (theirs - exact).norm()
                        assert error <= allowed + 1e-6, (name, half, positives)
    finally:
        extension.use_instruction_set(before)


@pytest.mark.parametrize("temperature", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("in_batch", [True, False])
def test_gradients_at_low_temperatures_are_as_exact_as_plain_pytorch(
    temperature: float, in_batch: bool, extension: object
) -> None:
    """Root mean squares over problems: a logit that two passes round in different ways would be seen."""

    def gradients(seed: int, dtype: torch.dtype, impl: Any) -> Tensor:
        torch.manual_seed(seed)
        x, y = (torch.nn.functional.normalize(torch.randn(rows, 64), dim=1) for rows in (129, 300))
        zx, zy, upstream = torch.randint(40, (129,)), torch.randint(40, (300,)), torch.randn(129)
        leaves = [v.to(dtype).requires_grad_() for v in ((x,) if in_batch else (x, y))]
        keys = {} if in_batch else {"keys": leaves[1], "key_clusters": zy}
        options = {"temperature": temperature, "reduction": "none", "impl": impl}
        loss = clustered_infonce(leaves[0], query_clusters=zx, **keys, **options)
        return torch.cat(torch.autograd.grad(loss, leaves, upstream.to(dtype))).double()

    squares = {"fused": 0.0, "reference": 0.0}
    for seed in range(8):
        exact = gradients(seed, torch.float64, "reference")
        for impl in squares:
            squares[impl] += float((gradients(seed, torch.float32, impl) - exact).square().mean())
    assert squares["fused"] <= 1.1 * squares["reference"]
