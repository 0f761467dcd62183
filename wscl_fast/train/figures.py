"""The pictures of a run: loss and accuracy, maps of the test images, nearest neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from wscl_fast.data import ImageDataset
from wscl_fast.files import replacing
from wscl_fast.train.features import Features
from wscl_fast.train.report import methods_of
from wscl_fast.train.results import Result
from wscl_fast.train.stages import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = npt.NDArray[np.int64]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    "random": "#999999", "pixels": "#5b5b5b", "none": "#0072B2", "tags": "#D55E00", "attributes": "#CC79A7",
    "hierarchy": "#56B4E9", "ids": "#F0E442", "kmeans": "#009E73", "labels": "#E69F00",
}  # fmt: skip
STYLE: Any = {
    "font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 150,
    "text.parse_math": False,  # names of classes and columns are the user's
}  # fmt: skip
FRAME = (0, 158, 115)
GREY = "#666666"


def draw_curves(file: Path, results: Sequence[Result]) -> None:
    """The loss over the epochs, and the accuracies that the methods came to."""
    with _style():
        columns = list(results[0].scores)
        methods = methods_of(results)
        figure = _figure(5.2 + 3.9 * len(columns), max(4.0, 1.6 + 0.42 * len(methods)))
        axes = figure.subplots(1, 1 + len(columns), squeeze=False, width_ratios=[5, *([3.9] * len(columns))])[
            0
        ]
        _draw_losses(axes[0], results)
        for position, (axis, column) in enumerate(zip(axes[1:], columns, strict=True)):
            _draw_accuracies(axis, results, column, names=position == 0)
        _save(figure, file)


def _draw_losses(axis: Axes, results: Sequence[Result]) -> None:
    for method in methods_of(results):
        losses: dict[int, list[float]] = {}  # of the seeds, by epoch: some of a log may have been lost
        for m in itertools.chain.from_iterable(r.metrics for r in results if r.method == method):
            if m["kind"] == "epoch":
                losses.setdefault(m["epoch"] + 1, []).append(m["loss"])
        if not losses:
            continue
        epochs = sorted(losses)
        least, mean, greatest = (np.array([f(losses[e]) for e in epochs]) for f in (np.min, np.mean, np.max))
        axis.plot(epochs, mean, color=COLOURS[method], lw=2, label=TITLES[method])
        if (least < greatest).any():
            axis.fill_between(epochs, least, greatest, color=COLOURS[method], alpha=0.2, lw=0)
    axis.set(xlabel="epoch", ylabel="loss", title="training loss")
    axis.locator_params(axis="x", integer=True)
    if axis.get_lines():  # baselines have no curve
        axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _draw_accuracies(axis: Axes, results: Sequence[Result], column: str, *, names: bool) -> None:
    from matplotlib.lines import Line2D

    methods = methods_of(results)
    for row, method in enumerate(methods):
        runs = [r.scores[column] for r in results if r.method == method]
        for offset, marker, face, values in (
            (-0.14, "o", COLOURS[method], [s.images.linear_top1 for s in runs]),
            (0.14, "D", "white", [s.images.knn_top1 for s in runs]),
        ):
            percent = 100 * np.array(values)
            heights = np.full(len(percent), row + offset)
            axis.scatter(percent, heights, s=36, marker=marker, fc=face, ec=COLOURS[method], zorder=3)
            axis.plot([percent.min(), percent.max()], heights[:1].repeat(2), color=COLOURS[method], lw=1.5)
    axis.set_yticks(range(len(methods)), [TITLES[m] if names else "" for m in methods])
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.set(title=column, xlabel="top-1 accuracy, %")
    handles = [Line2D([], [], ls="", marker=m, mec=GREY, mfc=f) for m, f in (("o", GREY), ("D", "white"))]
    axis.legend(
        handles,
        ["linear probe", "k-NN"],
        fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=2,
    )


def draw_embedding(file: Path, results: Sequence[Result], dataset: ImageDataset, *, seed: int = 0) -> None:
    """One 2-D t-SNE map of the test images per method, coloured by the first label column."""
    firsts = [_first(results, method) for method in methods_of(results)]
    rows = _shown_rows(dataset, limit=2000)
    column = next(iter(dataset.labels), None)
    labels = dataset.labels[column][rows] if column else np.full(len(rows), -1)
    names = dataset.label_names[column] if column else []
    groups, colours = _colouring(labels, names)
    across = min(3, len(firsts))
    down = -(-len(firsts) // across)
    size = max(9, 40 - len(rows) // 20)
    with _style():
        figure = _figure(4.1 * across, 4.1 * down + 0.9)
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for axis, result in zip(axes, firsts, strict=False):
            where = map_to_plane(result.features[rows], seed=seed)
            drawn = [
                axis.scatter(*where[members].T, s=size, color=colour, lw=0, alpha=0.85)
                for (_, members), colour in zip(groups, colours, strict=True)
            ]
            axis.set(title=TITLES[result.method], xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.margins(0.06)
        for axis in axes[len(firsts) :]:
            axis.set_axis_off()
        names = [name for name, _ in groups]  # given here: a label of its own that begins with _ has no entry
        once = "" if dataset.groups is None else ", one of each group of variants"
        if column:
            title = f"t-SNE of {len(rows):,} test images{once}, coloured by {column}"
            where_to: Any = {"loc": "outside lower center", "ncols": min(5, len(names)), "markerscale": 2.5}
            figure.legend(drawn, names, title=title, **where_to)
        _save(figure, file)


def map_to_plane(features: Features, *, seed: int = 0) -> npt.NDArray[np.float64]:
    """t-SNE of unit features (van der Maaten and Hinton, 2008), float [n, 2].

    Points in a row where there is no map to draw: fewer than 4 features, equal ones, ones not finite.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    unit = F.normalize(torch.from_numpy(features), dim=1).numpy()
    n, d = unit.shape
    if n < 4 or not unit.std(axis=0).max() > 1e-6:  # NaN included
        return np.column_stack([np.arange(n, dtype=float), np.zeros(n)])
    start = "pca" if d > 1 else "random"
    tsne = TSNE(perplexity=min(30.0, (n - 1) / 3), init=start, random_state=seed, max_iter=500)
    with threadpool_limits(
        1
    ):  # its threads spin: slower by far on a busy machine, hardly faster on an idle one
        small = PCA(min(50, n, d), random_state=seed).fit_transform(unit)
        return np.asarray(tsne.fit_transform(small), dtype=np.float64)


def _colouring(labels: Rows, names: Sequence[str]) -> tuple[list[tuple[str, Any]], list[Any]]:
    """Groups of rows with a name and a colour: the classes, at most 20; the smaller ones together."""
    import matplotlib as mpl

    present, counts = np.unique(labels[labels >= 0], return_counts=True)
    if len(present) > 20:
        present = np.sort(present[np.argsort(-counts, kind="stable")[:19]])
    groups = [(names[c], np.flatnonzero(labels == c)) for c in present]
    palette = mpl.colormaps["tab10" if len(groups) <= 10 else "tab20"]
    colours: list[Any] = [palette(i) for i in range(len(groups))]
    rest = np.flatnonzero(~np.isin(labels, present))
    if len(rest):
        groups.insert(0, ("other", rest))
        colours.insert(0, "#cccccc")
    return groups, colours


def draw_neighbours(
    file: Path,
    results: Sequence[Result],
    dataset: ImageDataset,
    *,
    queries: int = 8,
    found: int = 4,
    seed: int = 0,
) -> None:
    """Test images and the training images each method finds nearest; those of the same class are framed."""
    firsts = [_first(results, method) for method in methods_of(results)]
    column = next(iter(dataset.labels), None)
    labels = dataset.labels[column] if column else np.full(len(dataset.keys), -1)
    picked = _pick_queries(_shown_rows(dataset), labels, queries, seed)
    tile = max(48, min(96, dataset.images.shape[-1]))
    blocks = [_column(dataset, picked[:, None], tile, np.zeros((len(picked), 1), dtype=bool))]
    for result in firsts:
        nearest = _nearest(result.features, picked, dataset, found)
        right = (labels[nearest] == labels[picked][:, None]) & (labels[picked][:, None] >= 0)
        blocks.append(_column(dataset, nearest, tile, right))
    gap = np.full((blocks[0].shape[0], tile // 3, 3), 255, dtype=np.uint8)
    canvas = np.concatenate([piece for block in blocks for piece in (block, gap)][:-1], axis=1)
    height, width = canvas.shape[:2]
    with _style():
        above, margin = 0.75, 0.1  # inches
        full_width, full_height = width / 100 + 2 * margin, height / 100 + above + margin
        figure = _figure(full_width, full_height, layout=None)
        axis = figure.add_axes(
            (margin / full_width, margin / full_height, width / 100 / full_width, height / 100 / full_height)
        )
        axis.imshow(canvas, interpolation="nearest")
        axis.set_axis_off()
        left = 0
        for title, block in zip(["query", *(TITLES[r.method] for r in firsts)], blocks, strict=True):
            text = title.replace(", ", "\n", 1)
            axis.text(left + block.shape[1] / 2, -tile / 6, text, ha="center", va="bottom", fontsize=10)
            left += block.shape[1] + gap.shape[1]
        if column:
            once = "" if dataset.groups is None else " (one of each group of variants)"
            note = f"test images and their nearest training images{once}; green frame: the same {column}"
            figure.text(
                margin / full_width, 1 - 0.05 / full_height, note, va="top", fontsize=9, color="#555555"
            )
        _save(figure, file)


def _nearest(features: Features, queries: Rows, dataset: ImageDataset, k: int) -> Rows:
    """The k training images nearest to each query, int64 [queries, k]; of a group of variants one."""
    bank = dataset.indices("train")
    unit = F.normalize(torch.from_numpy(features), dim=1)
    ranked = bank[(unit[queries] @ unit[bank].T).argsort(dim=1, descending=True, stable=True).numpy()]
    if dataset.groups is None:
        return np.asarray(ranked[:, :k])
    firsts = [row[np.sort(np.unique(dataset.groups[row], return_index=True)[1])[:k]] for row in ranked]
    return np.asarray(np.stack(firsts))


def _pick_queries(rows: Rows, labels: Rows, count: int, seed: int) -> Rows:
    """Random rows, one of each class before a second of any."""
    rows = np.random.default_rng(seed).permutation(rows)
    turn = np.zeros(len(rows), dtype=np.int64)
    seen: dict[int, int] = {}
    for i, row in enumerate(rows):
        turn[i] = seen.get(int(labels[row]), 0)
        seen[int(labels[row])] = int(turn[i]) + 1
    chosen = rows[np.argsort(turn, kind="stable")[:count]]
    return np.asarray(chosen[np.argsort(labels[chosen], kind="stable")])


def _column(
    dataset: ImageDataset, rows: Rows, tile: int, framed: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """A block of pictures, one per entry of rows [r, c], as uint8 [r · cell, c · cell, 3]."""
    border, margin = 3, 2
    cell = tile + 2 * (border + margin)
    block = np.full((rows.shape[0] * cell, rows.shape[1] * cell, 3), 255, dtype=np.uint8)
    for (r, c), row in np.ndenumerate(rows):
        image = torch.from_numpy(np.array(dataset.images[row]))[None].float()
        image = F.interpolate(image, size=(tile, tile), mode="bilinear", antialias=True)
        spot = block[r * cell + margin : (r + 1) * cell - margin, c * cell + margin : (c + 1) * cell - margin]
        spot[:] = FRAME if framed[r, c] else 235
        inset = 0 if framed[r, c] else border - 1
        spot[inset : -inset or None, inset : -inset or None] = FRAME if framed[r, c] else 225
        spot[border:-border, border:-border] = image[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
        if not framed[r, c]:
            spot[:inset], spot[-inset:], spot[:, :inset], spot[:, -inset:] = 255, 255, 255, 255
    return block


def _shown_rows(dataset: ImageDataset, limit: int | None = None) -> Rows:
    """Test images (validation or training images where there are none), one of each group of variants."""
    rows = next(r for r in (dataset.indices(s) for s in ("test", "val", "train")) if len(r))
    if dataset.groups is not None:
        rows = rows[np.sort(np.unique(dataset.groups[rows], return_index=True)[1])]
    if limit is not None and len(rows) > limit:
        rows = np.sort(np.random.default_rng(0).choice(rows, limit, replace=False))
    return rows


def _first(results: Sequence[Result], method: str) -> Result:
    return next(r for r in results if r.method == method)


def _style() -> Any:
    import matplotlib as mpl

    return mpl.rc_context(STYLE)


def _figure(width: float, height: float, layout: Any = "constrained") -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, file: Path) -> None:
    with replacing(file) as beside:
        figure.savefig(beside, facecolor="white")
