"""Clustering of samples in files: what memory would give, in bounded memory, and through a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from wscl_fast import KMeans
from wscl_fast.clustering import BalancedKMeans, BisectingKMeans, FeatureFiles, HierarchicalKMeans
from wscl_fast.clustering.minibatch import batches
from wscl_fast.clustering.streamed import StreamedPoints


def blobs(n: int, d: int, k: int, *, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(k, d))[rng.integers(k, size=n)] * 3 + rng.normal(size=(n, d))
    return x.astype(np.float32)


def written(folder: Path, kind: str, x: np.ndarray) -> FeatureFiles:
    """The rows in three shards, in blocks of 37 rows."""
    for number, shard in enumerate(np.split(x, [len(x) // 5, len(x) // 2])):
        file = folder / f"{number}.{kind.split('-')[0]}"
        if kind == "npy":
            np.save(file, shard)
        elif kind == "safetensors":
            save = pytest.importorskip("safetensors.numpy").save_file
            save({"features": shard, "other": shard[:, :1].copy()}, file)
        else:
            polars = pytest.importorskip("polars")
            if kind == "parquet-columns":
                frame = polars.DataFrame(shard, schema=[f"f{i}" for i in range(shard.shape[1])])
                frame = frame.with_columns(name=polars.lit("a"))
            else:
                frame = polars.DataFrame({"name": ["a"] * len(shard), "vector": shard})
                if kind == "parquet-lists":
                    frame = frame.with_columns(polars.col("vector").arr.to_list())
            frame.write_parquet(file, row_group_size=50)
    column = "features" if kind == "safetensors" else None
    return FeatureFiles(folder, memory=4 * 4 * x.shape[1] * 37, column=column)


KINDS = ["npy", "safetensors", "parquet-columns", "parquet-lists", "parquet-arrays"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_one_matrix(kind, tmp_path):
    x = blobs(500, 6, 5)
    files = written(tmp_path, kind, x)
    assert files.shape == (500, 6)
    blocks = [(rows, block) for rows, block in files.blocks()]
    assert {len(block) for _, block in blocks[:-1]} == {37}
    assert np.array_equal(torch.cat([block for _, block in blocks]).numpy(), x)
    some = [499, 98, 99, 100, 101, 0, 250, 250, 249]
    assert np.array_equal(files.take(torch.tensor(some)).numpy(), x[some])
    assert files.take(torch.empty(0, dtype=torch.int64)).shape == (0, 6)


@pytest.fixture
def spans(monkeypatch):
    """How many rows each read asks for."""
    seen, read = [], FeatureFiles.read

    def counted(self, start, stop):
        seen.append(stop - start)
        return read(self, start, stop)

    monkeypatch.setattr(FeatureFiles, "read", counted)
    return seen


@pytest.mark.parametrize("kind", ["npy", "parquet-arrays"])
def test_rows_that_are_taken_are_read_together(kind, tmp_path, spans):
    """A row of a Parquet file costs as much as its group, and a start takes thousands of rows."""
    x = blobs(500, 6, 5)
    index = torch.randint(500, (400,), generator=torch.Generator().manual_seed(0))
    assert np.array_equal(written(tmp_path, kind, x).take(index).numpy(), x[index])
    assert len(spans) <= 14  # blocks of 37 rows
    assert max(spans) <= 37


def test_what_lies_between_rows_is_passed_over_where_that_is_cheaper(tmp_path, spans):
    np.save(tmp_path / "x.npy", blobs(40_000, 4, 5))
    FeatureFiles(tmp_path).take(torch.tensor([30_000, 5, 10]))
    assert spans == [6, 1]


@pytest.mark.parametrize(("paths", "name"), [(None, "paths"), (3, "paths"), (["a.npy", 3], r"paths\[1\]")])
def test_what_is_no_path_is_told(paths, name):
    with pytest.raises(TypeError, match=f"^{name}: expected a path"):
        FeatureFiles(paths)


def parquet(file: Path, **columns: object) -> Path:
    pytest.importorskip("polars").DataFrame(columns).write_parquet(file)
    return file


def lists(values: list[list[float] | None]) -> object:
    polars = pytest.importorskip("polars")
    return polars.Series(values, dtype=polars.List(polars.Float32))


@pytest.mark.parametrize(
    ("rows", "start", "message"),
    [
        ([[1, 2], [3], [4, 5, 6]], 0, "lists of 2 numbers, got 1 in row 1"),
        ([[1, 2, 3], [9], [8]], 1, "lists of 3 numbers, got 1 in row 1"),
        ([[1, 2], [3, 4], []], 0, "lists of 2 numbers, got 0 in row 2"),
        ([[1], [2], None], 0, "lists of 1 numbers, got 0 in row 2"),
    ],
)
def test_lists_of_several_lengths_are_refused(rows, start, message, tmp_path):
    files = FeatureFiles(parquet(tmp_path / "x.parquet", x=lists(rows)))
    with pytest.raises(ValueError, match=rf"x\.parquet: expected {message}"):
        files.read(start, 3)


@pytest.mark.parametrize("first", [[], None])
def test_a_first_list_of_nothing_is_refused(first, tmp_path):
    with pytest.raises(ValueError, match=r"expected a matrix .* got an empty list in row 0"):
        FeatureFiles(parquet(tmp_path / "x.parquet", x=lists([first, [1.0]])))


def test_shards_of_no_lists(tmp_path):
    none = [parquet(tmp_path / f"{name}.parquet", x=lists([])) for name in "ac"]
    some = parquet(tmp_path / "b.parquet", x=lists([[1, 2], [3, 4]]))
    files = FeatureFiles([none[0], some, none[1]])
    assert files.shape == (2, 2)
    assert files.read(0, 2).tolist() == [[1, 2], [3, 4]]
    assert KMeans(2).fit(files).inertia_ == 0
    with pytest.raises(ValueError, match=r"a\.parquet: expected a matrix .* got lists of no numbers"):
        FeatureFiles(none)


def test_parquet_columns_of_integers_are_left_out(tmp_path):
    files = FeatureFiles(
        parquet(tmp_path / "x.parquet", sample=[7, 8], a=[1.0, 2.0], label=[0, 1], b=[3.0, 4.0])
    )
    assert files.read(0, 2).tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize("kind", ["npy", "parquet-arrays"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("init", ["k-means++", "k-means||"])
def test_the_clusters_are_those_of_memory(kind, metric, init, tmp_path):
    x = blobs(400, 6, 8)
    files = written(tmp_path, kind, x)
    memory = KMeans(8, metric=metric, init=init).fit(x)
    streamed = KMeans(8, metric=metric, init=init).fit(files)
    assert isinstance(streamed.labels_, np.ndarray)
    assert np.array_equal(streamed.labels_, memory.labels_)
    assert streamed.inertia_ == pytest.approx(memory.inertia_, rel=1e-6)
    assert np.array_equal(streamed.predict(files), memory.predict(x))
    ids, distance = streamed.nearest(files, 3)
    assert np.array_equal(ids, memory.nearest(x, 3)[0])
    np.testing.assert_allclose(distance, memory.nearest(x, 3)[1], rtol=1e-5)
    assert streamed.score(files) == pytest.approx(memory.score(x))


def same_as_memory(model, x: np.ndarray, files: FeatureFiles) -> None:
    """Whatever a model's `fit` finds in memory, it finds in files."""
    memory = type(model)(**model.get_params()).fit(x)
    streamed = model.fit(files)
    assert np.array_equal(streamed.labels_, memory.labels_)
    assert streamed.inertia_ == pytest.approx(memory.inertia_, rel=1e-6)
    np.testing.assert_allclose(streamed.cluster_centers_, memory.cluster_centers_, rtol=1e-6, atol=1e-6)
    assert np.array_equal(streamed.predict(files), memory.predict(x))


@pytest.mark.parametrize("offset", [0, 2.0**16])  # beside the origin, and seen from the mean
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    "model",
    [
        BalancedKMeans(6, max_iter=4),
        BisectingKMeans(9),
        BisectingKMeans(9, split="size"),
        HierarchicalKMeans((12, 4)),
        HierarchicalKMeans((12, 4), n_resampling=2, members=5),
    ],
    ids=lambda model: repr(model).partition("(")[0],
)
def test_every_kind_takes_files(model, metric, offset, tmp_path):
    x = (blobs(400, 6, 8) * 64).round() / 64 + np.float32(offset)
    same_as_memory(type(model)(**{**model.get_params(), "metric": metric}), x, written(tmp_path, "npy", x))


def test_levels_of_files_are_nested(tmp_path):
    x = blobs(500, 6, 20)
    model = HierarchicalKMeans((40, 10, 3)).fit(written(tmp_path, "parquet-arrays", x))
    assert [len(c) for c in model.levels_] == [40, 10, 3]
    fine, coarse = model.labels_of(0), model.labels_of(2)
    assert all(len(set(coarse[fine == k])) <= 1 for k in range(40))
    assert len(model.sample(100)) == 100


def test_bounds_spare_work_in_files_too(tmp_path, searched):
    x = blobs(2000, 8, 30)
    files = written(tmp_path, "npy", x)
    model = KMeans(30, init=x[:30], tol=0, algorithm="hamerly").fit(files)
    assert searched[0] == 2000
    assert min(searched) < 200
    plain = KMeans(30, init=x[:30], tol=0, algorithm="lloyd").fit(x)
    assert np.array_equal(model.labels_, plain.labels_)
    assert model.n_iter_ == plain.n_iter_
    assert model.inertia_history_ == pytest.approx(plain.inertia_history_, rel=1e-6)


def test_mini_batches_have_their_size_over_the_borders_of_blocks(tmp_path):
    files = written(tmp_path, "npy", blobs(500, 6, 5))
    points = StreamedPoints(files, weights=torch.arange(500.0, dtype=torch.float64))
    found = list(batches(points, 64, torch.Generator().manual_seed(0)))
    assert [batch.n for batch in found] == 7 * [64] + [52]
    order = torch.cat([batch.weights for batch in found]).long()
    assert torch.equal(order.sort().values, torch.arange(500))
    assert torch.equal(torch.cat([batch.x for batch in found]), files.take(order))


def test_half_precision_shards(tmp_path):
    torch_save = pytest.importorskip("safetensors.torch").save_file
    x = torch.from_numpy(blobs(300, 8, 5)).bfloat16()
    torch_save({"x": x}, tmp_path / "x.safetensors")
    files = FeatureFiles(tmp_path / "x.safetensors")
    assert files.dtype == torch.bfloat16
    assert np.array_equal(KMeans(5).fit(files).labels_, KMeans(5).fit(x).labels_.numpy())


CHILD = """
import resource, sys
import numpy as np, torch
torch.set_num_threads(1)
from wscl_fast import KMeans
from wscl_fast.clustering import FeatureFiles
small = np.random.default_rng(0).normal(size=(4000, 64)).astype(np.float32)
KMeans(16, init="k-means||", max_iter=3).fit(small)  # loads what a fit loads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
KMeans(16, init="k-means||", max_iter=3).fit(FeatureFiles(sys.argv[1], memory=8 << 20))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.usefixtures("memory_given_back")
def test_memory_is_bounded(tmp_path):
    rows, d = 400_000, 64  # 98 MiB
    out = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(rows, d))
    rng = np.random.default_rng(0)
    for start in range(0, rows, 20_000):
        out[start : start + 20_000] = rng.normal(size=(20_000, d))
    del out
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "x.npy"], capture_output=True, text=True, check=True
    )
    # 8 MiB of blocks, what is kept of each sample, the cache-sized temporaries of a pass: 16 in all.
    assert int(done.stdout) < 32


LONG = """
import sys
import torch
torch.set_num_threads(1)
from wscl_fast import KMeans
from wscl_fast.clustering import FeatureFiles
model = KMeans(40, init="k-means||", tol=0.0, max_iter=60, checkpoint=sys.argv[2], verbose=1)
model.fit(FeatureFiles(sys.argv[1], memory=1 << 20))
"""


def test_killed_and_resumed_equals_unbroken(tmp_path):
    x = np.random.default_rng(0).normal(size=(20_000, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    files = FeatureFiles(tmp_path / "x.npy", memory=1 << 20)
    parameters = {"n_clusters": 40, "init": "k-means||", "tol": 0.0, "max_iter": 60}
    whole = KMeans(**parameters).fit(files)
    state = tmp_path / "state.pt"
    child = subprocess.Popen(
        [sys.executable, "-c", LONG, tmp_path / "x.npy", state], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        if state.exists() and torch.load(state)["n_iter"] >= 5:
            break
        time.sleep(0.01)
    assert child.poll() is None, "the fit ended before it could be killed"
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    begun = torch.load(state)["n_iter"]
    assert 5 <= begun < whole.n_iter_

    model = KMeans(**parameters, checkpoint=state)
    lines: list[int] = []
    model._report = _counting(model._report, lines)
    model.fit(files)
    assert lines[0] == begun + 1  # what was done was not done again
    assert model.n_iter_ == whole.n_iter_
    assert np.array_equal(model.labels_, whole.labels_)
    assert np.array_equal(model.cluster_centers_, whole.cluster_centers_)
    assert model.inertia_history_ == pytest.approx(whole.inertia_history_)

    again = KMeans(**parameters, checkpoint=state).fit(files)  # all done: one pass for the labels
    assert np.array_equal(again.labels_, whole.labels_)
    with pytest.raises(ValueError, match="belongs to another fit, with other n_clusters"):
        KMeans(**{**parameters, "n_clusters": 41}, checkpoint=state).fit(files)
    state.write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read"):
        KMeans(**parameters, checkpoint=state).fit(files)


def test_another_column_is_another_fit(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    x = np.random.default_rng(0).normal(size=(2, 60, 3)).astype(np.float32)
    save_file({"a": x[0], "b": x[1]}, tmp_path / "x.safetensors")
    model = KMeans(3, checkpoint=tmp_path / "state")
    model.fit(FeatureFiles(tmp_path / "x.safetensors", column="a"))
    with pytest.raises(ValueError, match="belongs to another fit, with other samples"):
        model.fit(FeatureFiles(tmp_path / "x.safetensors", column="b"))
    weights = np.arange(60.0)
    weighted = KMeans(3, checkpoint=tmp_path / "weighted")
    weighted.fit(FeatureFiles(tmp_path / "x.safetensors", column="a"), sample_weight=weights)
    with pytest.raises(ValueError, match="belongs to another fit, with other samples"):
        weighted.fit(FeatureFiles(tmp_path / "x.safetensors", column="a"), sample_weight=weights[::-1])


def _counting(report, lines):  # type: ignore[no-untyped-def]
    def made(*arguments):  # type: ignore[no-untyped-def]
        tell = report(*arguments)

        def counted(centroids, done):  # type: ignore[no-untyped-def]
            lines.append(done.n_iter)
            tell(centroids, done)

        return counted

    return made


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", bytes(8), b"\2" + bytes(7) + b"[]"]
)
def test_another_kind_of_file_is_told_by_name(kind, content, tmp_path):
    if kind == "parquet":
        pytest.importorskip("polars")
    file = tmp_path / f"x.{kind}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.{kind}: cannot be read as a "):
        FeatureFiles(file)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3, 2]},
        {"dtype": "F32", "shape": [3, 2], "data_offsets": []},
        {"dtype": "F32", "shape": [3, 2], "data_offsets": [-8, 16]},
        {"dtype": "F32", "shape": [3, -2], "data_offsets": [0, 24]},
        {"dtype": ["F32"], "shape": [3, 2], "data_offsets": [0, 24]},
        5,
    ],
)
def test_a_tensor_that_its_file_does_not_describe_is_told(entry, tmp_path):
    header = json.dumps({"x": entry}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(
        ValueError, match=r"x\.safetensors: cannot be read as a .* data_offsets of tensor 'x'"
    ):
        FeatureFiles(file)


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        FeatureFiles(tmp_path / "x.npy")
    with pytest.raises(FileNotFoundError, match=r"no \.npy"):
        FeatureFiles(tmp_path)
    with pytest.raises(ValueError, match="at least one file"):
        FeatureFiles([])
    np.save(tmp_path / "i.npy", np.ones((3, 2), dtype=np.int64))
    with pytest.raises(TypeError, match="expected a float dtype"):
        FeatureFiles(tmp_path / "i.npy")
    np.save(tmp_path / "v.npy", np.ones(3))
    with pytest.raises(ValueError, match="expected a matrix"):
        FeatureFiles(tmp_path / "v.npy")
    np.save(tmp_path / "f.npy", np.asfortranarray(np.ones((3, 2))))
    with pytest.raises(ValueError, match="Fortran"):
        FeatureFiles(tmp_path / "f.npy")
    np.save(tmp_path / "a.npy", np.ones((3, 2)))
    np.save(tmp_path / "b.npy", np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"expected 2 columns of torch.float64 as in .*a\.npy, got 4"):
        FeatureFiles([tmp_path / "a.npy", tmp_path / "b.npy"])
    with pytest.raises(ValueError, match="memory: expected at least 64 bytes"):
        FeatureFiles(tmp_path / "a.npy", memory=10)
    with pytest.raises(TypeError, match="memory: expected an int, got float"):
        FeatureFiles(tmp_path / "a.npy", memory=1e9)
    np.save(tmp_path / "none.npy", np.ones((0, 2)))
    with pytest.raises(ValueError, match="X: expected at least one sample, got none"):
        KMeans(2).fit(FeatureFiles(tmp_path / "none.npy"))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut short"):
        FeatureFiles(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="n_init: expected 1 with a checkpoint, got 3"):
        KMeans(2, n_init=3, checkpoint=tmp_path / "state").fit(np.eye(3))
    with pytest.raises(TypeError, match="checkpoint: expected a file's path, got int"):
        KMeans(2, checkpoint=5).fit(np.eye(3))
    with pytest.raises(FileNotFoundError, match=r"checkpoint: there is no folder .*/missing"):
        KMeans(2, checkpoint=tmp_path / "missing" / "state").fit(np.eye(3))
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"expected one of \.npy"):
        FeatureFiles(tmp_path / "a.csv")
