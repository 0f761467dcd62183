"""K-means as an estimator: scikit-learn's contract over our own kernels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wscl_fast.clustering.arrays import as_drift, as_samples, seed_of
from wscl_fast.clustering.base import (
    ClusterMethod,
    check_choice,
    check_count,
    check_enough,
    check_least,
)
from wscl_fast.clustering.bounds import Bounds, nearest
from wscl_fast.clustering.centroid_model import Array, WeightedModel
from wscl_fast.clustering.empty import EMPTY
from wscl_fast.clustering.inits import INITS, choose_start, given_start
from wscl_fast.clustering.lloyd import ALGORITHMS, Clustering, Progress, is_better, lloyd
from wscl_fast.clustering.minibatch import RunningMeans, minibatch
from wscl_fast.clustering.points import Frame, Points, Survey, check_metric, digest
from wscl_fast.clustering.resume import Checkpoint, check_file
from wscl_fast.clustering.shards import Shards
from wscl_fast.distributed.collectives import Group
from wscl_fast.functional._checks import check_bool

if TYPE_CHECKING:
    from typing_extensions import Self


class KMeans(WeightedModel, ClusterMethod[Array, Array]):
    """Exact k-means (Lloyd's algorithm), on any device, in memory linear in n + K beyond the data.

    Equals `sklearn.cluster.KMeans(n_clusters, init=…, n_init=…, algorithm="lloyd")`, from the same start
    the same clusters, and keeps scikit-learn's contract: numpy in gives numpy out, a torch tensor gives
    tensors on its device, an array with DLPack (CuPy) gives its kind. float32, float64, float16 and bfloat16
    are computed as they are, whatever their scale and distance from the origin; anything else as float64.

    Sources: Lloyd 1982; Arthur & Vassilvitskii 2007 and Bahmani et al. 2012 (starts); Hamerly 2010 (bounds);
    Dhillon & Modha 2001 (cosine).

    Args:
        n_clusters: K.
        metric: "euclidean", or "cosine" for spherical k-means: points and centroids scaled to length 1. A
            zero vector has no direction: it takes no part in the fit and belongs to cluster 0.
        init: "k-means++"; "k-means||", its scalable kin for large K; "random" samples; or the centroids to
            start from [K, d] (one run, whatever `n_init`).
        n_init: runs from different starts, of which the one of lowest inertia is kept, the first of equally
            good ones (to 2⁻³⁰); "auto" is 10 for "random" and 1 for the others.
        max_iter: most updates of the centroids in a run.
        tol: a run ends when the squared movement of the centroids is at most `tol` times the mean
            variance of the data's columns, or when no assignment changes.
        algorithm: "lloyd"; "hamerly", which skips with exact bounds what cannot have changed; or "auto",
            which takes bounds once they pay. The assignments are the same. Files with a checkpoint: none.
        empty: a cluster that lost its samples takes the sample "farthest" from its centroid (as
            scikit-learn's does), takes half of the heaviest cluster ("split") or stays where it was ("keep").
        warm_start: a second `fit` begins with the centroids of the last one, which keep their numbers.
        batch_size: None for full passes; else centroids move after every so many samples, and `max_iter`
            counts passes over all of them (Sculley 2010). No sample is left out.
        sharded: X of each process of `group` is its share of the data, perhaps none; every process gets the
            centroids that one process would find on all of it, and the labels of its share. Processes that
            disagree (parameters, features, float64) are all told; any other error on one of them alone, such
            as X of a wrong shape, leaves the others waiting.
        group: a process group of torch.distributed; by default all processes.
        shard_centroids: with `sharded`, each rank holds K / ranks of the centroids and of their sums while it
            fits, for K · d that a rank cannot hold several times; the result is the same, and whole on every
            rank. Samples in files are read once a pass and shown to all ranks, without bounds. No batches and
            no "split".
        checkpoint: a file to which the state is written after every pass; a `fit` that finds it there goes on
            from it. It stays when the fit is done: remove it to begin anew. Several ranks add their number to
            its name, and ".before" for the pass before: all go on from the last pass that all of them ended.
        random_state: an int (the same int gives the same clusters), a numpy generator, or None.
        verbose: print the inertia after every pass.

    Attributes:
        cluster_centers_: [K, d], of length 1 when cosine.
        labels_: int64 [n], the training samples' clusters.
        inertia_: weighted sum of squared distances from the centroids, of the unit vectors when cosine.
        inertia_history_: the inertia of each pass over the data of the run that was kept.
        counts_: samples in each cluster [K], or their weight.
        n_iter_: updates of the centroids in the run that was kept.
        n_clusters_: K.
        n_features_in_: d.
    """

    cluster_centers_: Array
    labels_: Array
    counts_: Array
    inertia_: float
    inertia_history_: list[float]
    n_iter_: int
    n_steps_: int

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        metric: str = "euclidean",
        init: str | Array = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        algorithm: str = "auto",
        empty: str = "farthest",
        warm_start: bool = False,
        batch_size: int | None = None,
        sharded: bool = False,
        group: Group = None,
        shard_centroids: bool = False,
        checkpoint: str | Path | None = None,
        random_state: Any = 0,
        verbose: int = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.metric = metric
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.algorithm = algorithm
        self.empty = empty
        self.warm_start = warm_start
        self.batch_size = batch_size
        self.sharded = sharded
        self.group = group
        self.shard_centroids = shard_centroids
        self.checkpoint = checkpoint
        self.random_state = random_state
        self.verbose = verbose

    @torch.no_grad()
    def fit(self, X: Array, y: Any = None, sample_weight: Any = None, *, drift: Any = None) -> Self:
        """Find the centroids.

        Args:
            X: samples [n, d].
            y: ignored; there for scikit-learn's pipelines.
            sample_weight: [n], at least 0.
            drift: with `warm_start`, how far each sample moved at most since the last `fit` on the same
                samples [n] (of the unit vectors when cosine). The last fit's bounds then serve this one.

        Raises:
            TypeError: a parameter or X of the wrong type; a sparse X.
            ValueError: not [n, d], NaN or infinity in it, fewer samples than clusters, or an `init` that
                does not fit.
        """
        self._check_parameters()
        warm = self.warm_start and hasattr(self, "cluster_centers_")
        points, give = self._points(X, sample_weight, warm_start=warm, drift=drift is not None)
        self._fit(points, give, drift)
        self._take_columns(X, points.dim)
        return self

    def _fit(self, points: Points, give: Any, drift: Any = None) -> None:
        survey = points.settle()
        self.__dict__.pop("_means", None)  # of batches before
        check_enough(self.n_clusters, points.n_all, survey.n_directionless)
        bounds = self._resumed(points, drift)
        shards = Shards(self.n_clusters, points.ranks) if self.shard_centroids else None
        checkpoint = self._checkpoint_of(points)
        saved = checkpoint.load() if checkpoint else None
        starts = [saved["centroids"].to(points.device)] if saved else self._starts(points, shards)
        if checkpoint and len(starts) > 1:
            raise ValueError(f"n_init: expected 1 with a checkpoint, got {len(starts)}")
        if checkpoint and not saved:
            checkpoint.begin(starts[0])
        # Bounds carry the rounding of their sums along; a fit of files that goes on repeats the very numbers.
        plain = checkpoint is not None and not points.all_in_memory
        best: Clustering | None = None
        for start in starts:
            if self.batch_size is not None:
                best = self._mini(points, start, survey, best)
                continue
            run = lloyd(
                points,
                start,
                max_iter=self.max_iter,
                tolerance=self.tol * survey.variance,
                empty=self.empty,
                algorithm="lloyd" if plain else self.algorithm,
                bounds=bounds,
                begin=Progress(saved["n_iter"], saved["history"], saved["ended"]) if saved else Progress(),
                shards=shards,
                report=self._report(points, checkpoint),
            )
            if is_better(run, best):
                best = run
        assert best is not None  # there is at least one start
        if shards is not None:
            best = best._replace(centroids=shards.whole(best.centroids))
        self._keep(best, points, survey.lost, give)

    def _mini(self, points: Points, start: Tensor, survey: Survey, best: Clustering | None) -> Clustering:
        """The better of `best` and a run over mini-batches."""
        seed = torch.tensor(seed_of(self.random_state), device=points.device)
        generator = torch.Generator().manual_seed(int(points.ranks.first(seed)) + points.ranks.rank)
        run = minibatch(
            points,
            start,
            batch_size=self.batch_size or 1,
            max_iter=self.max_iter,
            tolerance=self.tol * survey.variance,
            empty=self.empty,
            generator=generator,
            report=self._report(points, None),
        )
        return best if best is not None and not is_better(run, best) else run

    def _keep(self, run: Clustering, points: Points, lost: float, give: Any) -> None:
        n_empty = int((run.counts == 0).sum())
        if n_empty:
            warnings.warn(
                f"k-means left {n_empty} of {self.n_clusters} clusters empty: the data has too few distinct "
                f"samples, or max_iter={self.max_iter} is too small",
                UserWarning,
                stacklevel=4,
            )
        unsee = points.frame.unsee_square  # zero vectors sat out; each is at distance 1 of its cluster
        self.inertia_ = unsee(run.inertia) + lost
        self.inertia_history_ = [unsee(value) + lost for value in run.history]
        self.cluster_centers_ = give(points.frame.unsee(run.centroids))
        self.labels_, self.counts_ = give(run.assignment), give(run.counts)
        self.n_iter_ = run.n_iter
        self.n_clusters_ = self.n_clusters
        self._frame, self._seen = points.frame, run.centroids
        self._seen_as = self.cluster_centers_
        keep = self.warm_start and points.frame.plain and run.bounds is not None
        self._carried = run.bounds.carry() if keep and run.bounds is not None else None

    @torch.no_grad()
    def partial_fit(self, X: Array, y: Any = None, sample_weight: Any = None) -> Self:
        """One mini-batch more: the nearest centroids move to the mean of all samples they ever had.

        The first call chooses the start from its own batch, which has to hold K samples. Samples are seen as
        they are: for data far from the origin in float32, centre them first.

        Raises:
            TypeError, ValueError: as :meth:`fit` does; other columns, `n_clusters` or `metric` than before.
        """
        self._check_parameters()
        begun: RunningMeans | None = getattr(self, "_means", None)
        if begun is not None:
            begun.check(self.n_clusters, self.metric)
        points, give = self._points(X, sample_weight, n_steps_=self.n_steps_ if begun else 0)
        if begun is None or points.metric == "cosine":
            survey = points.settle()
            points.frame = Frame()
        elif self.sharded:
            points.largest()  # one rank's NaN is to stop all
        if begun is None:
            check_enough(self.n_clusters, points.n_all, survey.n_directionless)
            self._means = begun = RunningMeans(self._starts(points)[0], self.metric == "cosine")
            self._take_columns(X, points.dim)
            self.n_steps_ = 0
        else:
            self._check_columns(X, points.dim)
            begun.centroids = begun.centroids.to(points.device)
        begun.add(points)
        self.n_steps_ += 1
        self.n_clusters_, self._frame, self._seen = self.n_clusters, Frame(), begun.centroids
        self.cluster_centers_ = self._seen_as = give(begun.centroids)
        self.counts_ = give(begun.counts.clone())
        self.labels_ = give(nearest(points, begun.centroids))
        for name in ("inertia_", "inertia_history_", "n_iter_"):
            self.__dict__.pop(name, None)  # of a fit before
        return self

    def rename(self, names: Tensor) -> None:
        """As :meth:`CentroidModel.rename`; batches that come go on under the new numbers."""
        super().rename(names)
        begun: RunningMeans | None = getattr(self, "_means", None)
        if begun is not None:
            begun.rename(names.argsort())

    def state_dict(self) -> dict[str, Any]:
        """The centroids and how they were found; neither `init` nor the training samples' labels."""
        self._check_fitted()
        frame = self._frame
        return {
            "method": "KMeans",
            **{name: getattr(self, name) for name in _STATE},
            "random_state": _plain_seed(self.random_state),
            "centroids": self._centroids().cpu().numpy().copy(),
            "scale": frame.scale,
            "origin": None if frame.origin is None else frame.origin.cpu().numpy().copy(),
            "wild_lengths": frame.wild_lengths,
            "inertia": getattr(self, "inertia_", None),  # not of batches
            "n_iter": getattr(self, "n_iter_", None),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """The fitted method that `state_dict` described, its centroids as numpy."""
        cls._check_state(state)
        self = cls(**{name: state[name] for name in (*_STATE, "random_state")})
        origin = None if state["origin"] is None else torch.as_tensor(state["origin"])
        wild = bool(state.get("wild_lengths", False))  # older states have none
        self._frame = Frame(float(state["scale"]), origin, wild)
        self._seen = torch.tensor(np.asarray(state["centroids"]))
        self._seen_as = self.cluster_centers_ = self._frame.unsee(self._seen).numpy()
        if state["inertia"] is not None:
            self.inertia_, self.n_iter_ = float(state["inertia"]), int(state["n_iter"])
        self.n_clusters_, self.n_features_in_ = self._seen.shape
        return self

    def _check_parameters(self) -> None:
        """Parameters are checked here, not in `__init__`, so that `set_params` may change them one by one."""
        check_count(self.n_clusters, "n_clusters")
        check_metric(self.metric)
        check_count(self.max_iter, "max_iter")
        if not (isinstance(self.n_init, str) and self.n_init == "auto"):
            check_count(self.n_init, "n_init")
        check_least(self.tol, "tol", 0)
        check_choice(self.algorithm, "algorithm", ALGORITHMS)
        check_choice(self.empty, "empty", EMPTY)
        for name in ("warm_start", "sharded", "shard_centroids"):
            check_bool(name, getattr(self, name))
        if isinstance(self.init, str) and self.init not in INITS:
            raise ValueError(f"init: expected one of {INITS} or an array of centroids, got {self.init!r}")
        check_file(self.checkpoint)
        if self.batch_size is not None:
            check_count(self.batch_size, "batch_size")
            if self.checkpoint is not None:
                raise ValueError("batch_size: expected None with a checkpoint")
        if self.shard_centroids:
            for name, value, refused in (
                ("sharded", self.sharded, False),
                ("empty", self.empty, "split"),
            ):
                if value == refused:
                    raise ValueError(f"{name}: expected another value with shard_centroids, got {value!r}")
            if self.batch_size is not None:
                raise ValueError(f"batch_size: expected None with shard_centroids, got {self.batch_size}")

    def _starts(self, points: Points, shards: Shards | None = None) -> list[Tensor]:
        """The centroids that each run starts from, as the points' frame sees them, or this rank's shard."""
        warm = self.warm_start and hasattr(self, "cluster_centers_")
        if warm or not isinstance(self.init, str):
            name, given = ("cluster_centers_", self.cluster_centers_) if warm else ("init", self.init)
            return [given_start(points, self.n_clusters, given, name, shards)]
        seed = torch.tensor(seed_of(self.random_state), device=points.device)
        generator = torch.Generator().manual_seed(int(points.ranks.first(seed)))
        n_init = (10 if self.init == "random" else 1) if self.n_init == "auto" else int(self.n_init)
        return [
            choose_start(points, self.n_clusters, self.init, generator, in_shards=shards is not None)
            for _ in range(n_init)
        ]

    def _resumed(self, points: Points, drift: Any) -> Bounds | None:
        """The last fit's bounds, loosened by what the samples moved since."""
        if drift is None:
            return None
        if not self.warm_start:
            raise ValueError("drift: expected None unless warm_start=True")
        moved = as_drift(drift, points.x)
        carried = getattr(self, "_carried", None)
        fits = (
            self.algorithm != "lloyd" and carried is not None and points.frame.plain and carried.fits(points)
        )
        every = points.ranks.sum(torch.tensor(int(not fits), device=points.device))
        return None if int(every) or carried is None else Bounds.resumed(points, carried, moved)

    def _report(self, points: Points, checkpoint: Checkpoint | None) -> Any:
        def tell(centroids: Tensor, done: Progress) -> None:
            if self.verbose and points.ranks.rank == 0:
                print(f"Iteration {done.n_iter}, inertia {points.frame.unsee_square(done.history[-1]):g}.")
            if checkpoint:
                checkpoint.save(centroids, n_iter=done.n_iter, history=done.history, ended=done.ended)

        return tell

    def _checkpoint_of(self, points: Points) -> Checkpoint | None:
        if self.checkpoint is None:
            return None
        names = ("n_clusters", "metric", "max_iter", "tol", "empty", "shard_centroids")
        purpose = {name: getattr(self, name) for name in names}
        given = self.init if isinstance(self.init, str) else as_samples(self.init, "init").x
        purpose["init"] = given if isinstance(given, str) else digest(given, torch.float64)
        purpose["random_state"] = _plain_seed(self.random_state)
        purpose["ranks"] = [points.ranks.rank, points.ranks.size]
        purpose["samples"] = points.identity()
        return Checkpoint(self.checkpoint, purpose, points.ranks, points.device)


def _plain_seed(random_state: Any) -> int | None:
    """A seed as Python's own int; None where it is a generator."""
    return int(random_state) if isinstance(random_state, int | np.integer) else None


_STATE = ("n_clusters", "metric", "n_init", "max_iter", "tol", "algorithm", "empty")
