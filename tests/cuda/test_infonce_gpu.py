"""Clustered InfoNCE on a GPU: the simulator's cases through the operators, and what only a GPU can show."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from simulated_infonce import Results
from test_far_simulated import Case as FarCase
from test_far_simulated import cases as far_cases
from test_far_simulated import check as check_finite
from test_far_simulated import infonce as far_infonce
from test_infonce_simulated import Case, arguments, deviations, every_case, special_cases
from torch import Tensor

from wscl_fast import _ops, functional

GPU = torch.device("cuda")
gpu = pytest.mark.gpu


@pytest.fixture
def _served() -> None:
    if not _ops.serves(GPU):
        pytest.skip(f"no CUDA kernels: {_ops.load_error or 'the extension was built without CUDA'}")


def operate(
    given: tuple[Tensor | None, ...],
    upstream: Tensor,
    device: torch.device,
    *,
    scale: float,
    exclude_self: bool,
    inner: bool,
) -> Results:
    """Forward and backward by the operators, on a device; results on the CPU."""
    queries, keys, zq, zk, own = (None if each is None else each.to(device) for each in given)
    assert queries is not None
    assert zq is not None
    x = queries.requires_grad_()
    y = None if keys is None else keys.requires_grad_()
    factor = torch.tensor(float(scale), device=device, requires_grad=True)
    loss, count = _ops.clustered_infonce(
        x, y, zq, zk, own, factor, exclude_self=exclude_self, inner=inner, ignore_index=-1
    )
    loss.backward(upstream.to(device))
    assert x.grad is not None
    assert factor.grad is not None
    return Results(
        loss.detach().cpu(),
        count.cpu(),
        x.grad.cpu(),
        None if y is None or y.grad is None else y.grad.cpu(),
        factor.grad[None].cpu(),
        [],
    )


def through_operators(case: Case, device: torch.device) -> Results:
    *given, upstream = arguments(case)
    exclude_self = case.m is None and case.exclude_self
    return operate(
        tuple(given), upstream, device, scale=case.scale, exclude_self=exclude_self, inner=case.inner
    )


def check_far(case: FarCase, inner: bool, in_batch: bool, device: torch.device) -> None:
    *given, upstream, wanted = far_infonce(case, inner, in_batch)
    got = operate((*given, None), upstream, device, scale=case.scale, exclude_self=in_batch, inner=inner)
    check_finite(vars(got), wanted)


def check(case: Case, device: torch.device) -> None:
    for name, found in deviations(case, through_operators(case, device)).items():
        assert found.error <= found.most, (name, found)


CASES = [case for case in every_case() if case.arch == "90" and not case.fast]
HARD = [case for case in special_cases() if not case.fast]
FAR = pytest.mark.parametrize(
    ("case", "inner", "in_batch"),
    [
        pytest.param(
            case, inner, in_batch, id=f"{case}-{'in' if inner else 'out'}-{'batch' if in_batch else 'keys'}"
        )
        for case, inner, in_batch in itertools.product(far_cases(), (False, True), (False, True))
        if not case.fast
    ],
)


@pytest.mark.parametrize(
    "case", [*HARD, *(c for c in CASES if (c.n, c.d) in ((65, 40), (129, 128)))], ids=str
)
def test_the_way_through_the_operators(case: Case, extension: object) -> None:
    """What the tests below do on a GPU, on the CPU: the code of the tests is right."""
    check(case, torch.device("cpu"))


@FAR
def test_far_logits_on_the_cpu(case: FarCase, inner: bool, in_batch: bool, extension: object) -> None:
    check_far(case, inner, in_batch, torch.device("cpu"))


@gpu
@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case) -> None:
    check(case, GPU)


@gpu
@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize("case", HARD, ids=str)
def test_hard_numbers(case: Case) -> None:
    check(case, GPU)


@gpu
@pytest.mark.usefixtures("_served")
@FAR
def test_far_logits(case: FarCase, inner: bool, in_batch: bool) -> None:
    check_far(case, inner, in_batch, GPU)


@gpu
@pytest.mark.usefixtures("_served")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", [*HARD, *(c for c in CASES if c.n in (1, 65, 300))], ids=str)
def test_reduced(case: Case, reduction: _ops.Reduction) -> None:
    """The rows' mean or sum, and their gradients to the bit."""
    queries, keys, zq, zk, own, _ = (None if x is None else x.to(GPU) for x in arguments(case))
    assert queries is not None
    assert zq is not None
    found = []
    for asked in (reduction, "none"):
        x = queries.clone().requires_grad_()
        y = None if keys is None else keys.clone().requires_grad_()
        scale = torch.tensor(float(case.scale), device=GPU, requires_grad=True)
        loss, count = _ops.clustered_infonce(
            x, y, zq, zk, own, scale,
            exclude_self=keys is None and case.exclude_self,
            inner=case.inner, ignore_index=-1, reduction=asked,
        )  # fmt: skip
        anchors = int((count > 0).sum()) if reduction == "mean" else 1
        share = torch.tensor(1 / max(anchors, 1), device=GPU)
        assert loss.ndim == (asked == "none")
        loss.backward(None if asked == reduction else share.expand(len(loss)))
        total = loss.detach() if asked == reduction else loss.detach().double().sum() / max(anchors, 1)
        found.append((total.float(), count, x.grad, None if y is None else y.grad, scale.grad))
    (got, *gradients), (want, *wanted) = found
    torch.testing.assert_close(got, want, rtol=2**-22, atol=0)
    for one, other in zip(gradients, wanted, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def problem(n: int = 2048, m: int = 4096, d: int = 128) -> dict[str, torch.Tensor]:
    return {
        "queries": torch.nn.functional.normalize(torch.randn(n, d), dim=1).to(GPU, torch.bfloat16),
        "keys": torch.nn.functional.normalize(torch.randn(m, d), dim=1).to(GPU, torch.bfloat16),
        "query_clusters": torch.randint(50, (n,)).to(GPU),
        "key_clusters": torch.randint(50, (m,)).to(GPU),
    }


def gradients(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    leaves = [tensors[name].detach().requires_grad_() for name in ("queries", "keys")]
    given = {**tensors, "queries": leaves[0], "keys": leaves[1]}
    loss = functional.clustered_infonce(**given, impl="fused")
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@gpu
@pytest.mark.usefixtures("_served")
def test_the_same_bits_every_time() -> None:
    tensors = problem()
    for one, other in zip(gradients(tensors), gradients(tensors), strict=True):
        assert torch.equal(one, other)


@gpu
@pytest.mark.usefixtures("_served")
def test_the_host_never_waits() -> None:
    tensors = problem()
    gradients(tensors)  # what is done once is done
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.usefixtures("_served")
def test_the_current_stream_is_used() -> None:
    """A stream that first has to do something else: work on another one would see the old values."""
    tensors = problem()
    want = gradients(tensors)
    changed = {**tensors, "queries": torch.zeros_like(tensors["queries"])}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        changed["queries"].copy_(tensors["queries"])
        got = gradients(changed)
    stream.synchronize()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@gpu
@pytest.mark.usefixtures("_served")
def test_a_cuda_graph_captures_forward_and_backward() -> None:
    tensors = problem()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(tensors)
    tensors["queries"].copy_(tensors["queries"].flip(0))
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(captured, gradients(tensors), strict=True):
        assert torch.equal(one, other)


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    """What no one writes, between the parts of what a forward pass keeps, is the same every time."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@gpu
@pytest.mark.usefixtures("_served")
def test_opcheck() -> None:
    tensors = problem(65, 130, 40)
    given = (*tensors.values(), None, torch.tensor(10.0, device=GPU), False, False, -1, True)
    torch.library.opcheck(torch.ops.wscl_fast.infonce_forward.default, given)
    for scale in (None, given[5]):
        reduced = (*given[:5], scale, 10.0, False, False, -1, True, True, False)
        with filled_memory():
            torch.library.opcheck(torch.ops.wscl_fast.infonce_reduced_forward.default, reduced)


@gpu
@pytest.mark.usefixtures("_served")
def test_memory_is_linear() -> None:
    """Far from N × M: above inputs and gradients a bounded workspace."""
    tensors = problem(16384, 65536, 128)
    gradients(problem(64, 64, 128))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(tensors)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 16384 * 65536 * 2 / 4


@gpu
@pytest.mark.usefixtures("_served")
def test_offsets_beyond_32_bits() -> None:
    rows, d = (1 << 25) + 100, 64  # 2^31 numbers and more
    if torch.cuda.mem_get_info()[0] < 5 * rows * d * 2:
        pytest.skip("needs 22 GB of free memory")
    keys = torch.zeros(rows, d, dtype=torch.bfloat16, device=GPU)
    keys[-1] = 1
    queries = torch.ones(3, d, dtype=torch.bfloat16, device=GPU) / d
    ids = torch.zeros(rows, dtype=torch.int64, device=GPU)
    ids[-1] = 1
    loss = functional.clustered_infonce(
        queries,
        keys,
        query_clusters=torch.ones_like(ids[:3]),
        key_clusters=ids,
        temperature=0.05,
        impl="fused",
    )
    # All logits are 0 but that of the only positive, 20: without the last row the loss would be another.
    assert float(loss) == pytest.approx(math.log(rows - 1 + math.exp(20)) - 20, abs=1e-3)


@gpu
@pytest.mark.usefixtures("_served")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used() -> None:
    second = {name: x.to("cuda:1") for name, x in problem().items()}
    loss = functional.clustered_infonce(**second, impl="fused")
    assert loss.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
