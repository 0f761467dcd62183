"""The functions over arrays that are no tensors: numpy, anything with DLPack, CuPy on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wscl_fast import KMeans, functional


class Foreign:
    """An array of another library: all it shares is DLPack."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: object) -> object:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        return type("namespace", (), {"from_dlpack": staticmethod(lambda t: Foreign(torch.from_dlpack(t)))})


def as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.numpy()


def back(array: Any) -> Tensor:
    return array.tensor if isinstance(array, Foreign) else torch.as_tensor(array)


KINDS = pytest.mark.parametrize(("make", "kind"), [(as_numpy, np.ndarray), (Foreign, Foreign)])


def problem() -> dict[str, Tensor]:
    return {
        "queries": torch.randn(12, 5),
        "keys": torch.randn(20, 5),
        "query_clusters": torch.randint(4, (12,)),
        "key_clusters": torch.randint(4, (20,)),
    }


@KINDS
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_of_arrays(make: Any, kind: type, reduction: Any) -> None:
    tensors = problem()
    want = functional.clustered_infonce(**tensors, reduction=reduction)
    arrays = {name: make(x) for name, x in tensors.items()}
    got = functional.clustered_infonce(**arrays, reduction=reduction)
    by_position = functional.clustered_infonce(
        arrays.pop("queries"), arrays.pop("keys"), **arrays, reduction=reduction
    )
    for result in (got, by_position):
        assert isinstance(result, kind)
        assert back(result).dtype == torch.float32
        assert torch.equal(back(result), want)


@KINDS
def test_the_dtypes_stay(make: Any, kind: type) -> None:
    x, ids = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) // 2
    got = functional.clustered_infonce(make(x), query_clusters=make(ids))
    assert isinstance(got, kind)
    assert torch.equal(back(got), functional.clustered_infonce(x, query_clusters=ids))


@KINDS
def test_results_of_several_parts(make: Any, kind: type) -> None:
    x, centroids = torch.randn(30, 4), torch.randn(5, 4)
    got = functional.kmeans_update(make(x), make(centroids))
    assert isinstance(got, functional.Update)
    for part, want in zip(got, functional.kmeans_update(x, centroids), strict=True):
        assert isinstance(part, kind)
        assert torch.equal(back(part), want)
    nearest = functional.kmeans_assign(make(x), centroids=make(centroids))
    assert isinstance(nearest, functional.Nearest)
    assert torch.equal(back(nearest.assignment), got.assignment if kind is Tensor else back(got.assignment))


@KINDS
def test_potentials_of_arrays(make: Any, kind: type) -> None:
    x, nearest = torch.randn(30, 4), torch.full((30,), torch.inf)
    got = functional.kmeans_potentials(make(x), make(x[:2].clone()), make(nearest))
    for part, want in zip(got, functional.kmeans_potentials(x, x[:2], nearest), strict=True):
        assert isinstance(part, kind)
        assert torch.equal(back(part), want)


@KINDS
def test_the_other_losses(make: Any, kind: type) -> None:
    x, y, ids = torch.randn(9, 4), torch.randn(9, 4), torch.arange(9) // 3
    got = functional.clip_loss(make(x), make(y), x_clusters=make(ids))
    assert isinstance(got, kind)
    assert torch.equal(back(got), functional.clip_loss(x, y, x_clusters=ids))


def test_tensors_stay_tensors_and_keep_their_history() -> None:
    tensors = problem()
    queries = tensors["queries"].requires_grad_()
    loss = functional.clustered_infonce(
        queries,
        tensors["keys"].numpy(),
        query_clusters=tensors["query_clusters"].numpy(),
        key_clusters=tensors["key_clusters"],
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    assert queries.grad is not None


def test_the_order_of_keywords_says_nothing() -> None:
    """A tensor as the first argument has a tensor for its loss, whichever comes first in the call."""
    queries = torch.randn(8, 3, requires_grad=True)
    loss = functional.clustered_infonce(query_clusters=(torch.arange(8) // 2).numpy(), queries=queries)
    loss.backward()
    assert queries.grad is not None


def test_memory_is_shared() -> None:
    """A copy would not see what is written later."""
    from wscl_fast.arrays import as_tensor

    for array in (np.zeros((3, 2), np.float32), Foreign(torch.zeros(3, 2))):
        tensor, give = as_tensor(array, "x")
        tensor += 1
        assert back(array).sum() == 6
        assert isinstance(give(tensor), type(array))


def test_a_field_of_records() -> None:
    """Its rows are no whole number of elements apart."""
    from wscl_fast.arrays import as_tensor

    field = np.zeros(30, dtype=[("p", "i1"), ("b", "f4", (3,))])["b"]
    field[:] = np.arange(90).reshape(30, 3)
    assert as_tensor(field, "x")[0].tolist() == field.tolist()
    assert KMeans(2).fit(field).labels_.shape == (30,)


def test_bad_arrays_are_told_by_name() -> None:
    tensors = {name: x.numpy() for name, x in problem().items()}
    with pytest.raises(TypeError, match=r"query_clusters: expected int64, got torch\.int32"):
        functional.clustered_infonce(
            **{**tensors, "query_clusters": tensors["query_clusters"].astype(np.int32)}
        )
    with pytest.raises(ValueError, match="keys: Complex data not supported"):
        functional.clustered_infonce(**{**tensors, "keys": tensors["keys"].astype(np.complex64)})
    queries = tensors.pop("queries").astype(np.complex64)
    with pytest.raises(ValueError, match="queries: Complex data not supported"):
        functional.clustered_infonce(queries, **tensors)
    with pytest.raises(ValueError, match="queries: Complex data not supported"):
        functional.clustered_infonce(queries=queries, **tensors)
    with pytest.raises(TypeError, match="queries: expected a tensor, got list"):
        functional.clustered_infonce([[1.0]], query_clusters=torch.zeros(1, dtype=torch.int64))  # type: ignore[arg-type]


def test_what_is_said_of_a_function_stays() -> None:
    assert functional.clustered_infonce.__name__ == "clustered_infonce"
    assert "Source: Tsai" in (functional.clustered_infonce.__doc__ or "")


@pytest.mark.gpu
def test_cupy() -> None:
    cupy = pytest.importorskip("cupy", reason="the extra cupy is not installed")
    tensors = {name: x.cuda() for name, x in problem().items()}
    want = functional.clustered_infonce(**tensors)
    got = functional.clustered_infonce(**{name: cupy.from_dlpack(x) for name, x in tensors.items()})
    assert isinstance(got, cupy.ndarray)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    x = problem()["queries"].cuda()
    want = functional.kmeans_assign(x, x[:3])
    labels, distances = functional.kmeans_assign(cupy.from_dlpack(x), cupy.from_dlpack(x[:3]))
    assert isinstance(labels, cupy.ndarray)
    assert labels.tolist() == want.assignment.tolist()
    assert distances.tolist() == want.distance.tolist()
    model = KMeans(3).fit(cupy.from_dlpack(x))
    assert isinstance(model.labels_, cupy.ndarray)
    assert isinstance(model.cluster_centers_, cupy.ndarray)
    assert model.predict(cupy.from_dlpack(x)).tolist() == KMeans(3).fit(x).labels_.tolist()
