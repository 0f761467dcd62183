"""The table of a comparison, and report.md around it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Literal

from wscl_fast.data import ImageDataset
from wscl_fast.train.config import Config
from wscl_fast.train.evaluation import protocol
from wscl_fast.train.results import Result
from wscl_fast.train.runs import CURVES, EMBEDDING, NEIGHBOURS
from wscl_fast.train.stages import TITLES, Clustering, diagnose_training, label_columns

Counting = Literal["images", "groups"]


def methods_of(results: Sequence[Result]) -> list[str]:
    """The methods, each once, in the order of the results."""
    return list(dict.fromkeys(r.method for r in results))


def table(results: Sequence[Result], *, top: int = 1, counting: Counting = "images") -> str:
    """Markdown, aligned to be read as plain text: mean ± standard deviation over the seeds, in per cent.

    Args:
        results: of every method and seed.
        top: 1 or 5.
        counting: what counts once, every test image or every group of variants.
    """
    columns = list(results[0].scores)
    header = ["method", *(f"{column} {kind}" for column in columns for kind in ("linear", "k-NN"))]
    rows = []
    for method in methods_of(results):
        runs = [r.scores for r in results if r.method == method]
        cells = [
            _mean_and_spread(
                [getattr(getattr(scores[column], counting), f"{kind}_top{top}") for scores in runs]
            )
            for column in columns
            for kind in ("linear", "knn")
        ]
        rows.append([TITLES[method], *cells])
    return aligned(header, rows)


def aligned(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up; the first to the left, the others to the right."""
    # Columns and classes are called as the user calls them.
    header, *rows = ([" ".join(c.split()).replace("|", r"\|") for c in row] for row in (header, *rows))
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (w + 1) + ":") if i else ":" + "-" * (w + 1) for i, w in enumerate(widths)]
    return "\n".join([line(header), f"|{'|'.join(rule)}|", *map(line, rows)])


def _mean_and_spread(values: list[float]) -> str:
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def caption(results: Sequence[Result], config: Config, dataset: ImageDataset) -> str:
    """What the numbers of the table are."""
    test = max((s.n_test for r in results for s in r.scores.values()), default=0)
    seeds = len({r.seed for r in results if r.metrics})
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    return f"top-1 accuracy in % on {test:,} test images of {dataset.name}{spread}"


def _by_group(results: Sequence[Result]) -> list[str]:
    """The table that counts every group of variants once, where there are groups."""
    scores = [score for r in results for score in r.scores.values()]
    groups = max(score.n_test_groups for score in scores)
    if all(score.n_test_groups == score.n_test for score in scores):
        return []
    return [
        f"The same, but each of the {groups:,} groups of variants in the test split counts once, whatever "
        "the number of its images:",
        table(results, counting="groups"),
    ]


def report(
    title: str,
    results: Sequence[Result],
    config: Config,
    dataset: ImageDataset,
    *,
    clusterings: Sequence[Clustering] = (),
    encoder_of: str = "",
) -> str:
    """The text of report.md."""
    # A machine that lost its power may have lost the log of what its checkpoint says was done.
    trained = [r for r in results if any(m["kind"] == "epoch" for m in r.metrics)]
    parts = [f"# {title}"]
    if results and results[0].scores:
        parts += [f"{caption(results, config, dataset)[0].upper()}{caption(results, config, dataset)[1:]}.",
                  table(results), *_by_group(results), f"Protocol: {protocol(config.eval)}."]  # fmt: skip
        if any(score.n_classes > 5 for score in results[0].scores.values()):
            parts += ["Top-5 accuracy in %:", table(results, top=5)]
    pictures = {
        "Loss and accuracy": CURVES,
        "Map of the test images": EMBEDDING,
        "Nearest neighbours": NEIGHBOURS,
    }
    parts += [f"![{alt}]({file})" for alt, file in pictures.items()]
    if clusterings:
        parts += ["## Stage 1: the clusters of the training split", _cluster_table(clusterings, dataset)]
    if trained:
        parts += ["## Training", _training_table(trained), _budget(trained, config, dataset, encoder_of)]
    if dataset.attribution:
        parts += ["## Data", dataset.attribution]
    return "\n\n".join(parts) + "\n"


def _budget(results: Sequence[Result], config: Config, dataset: ImageDataset, encoder_of: str) -> str:
    supervised = ""
    if any(r.method == "labels" for r in results):
        columns = " and ".join(label_columns(config.cluster, dataset))
        supervised = f" SupCon trains on the labels of {columns}."
    saved = f" `encoder.safetensors` is the encoder of: {encoder_of}." if encoder_of else ""
    return (
        f"{config.train.epochs} epochs of {len(dataset.indices('train')):,} images, batches of "
        f"{config.train.batch_size}, two views each, temperature {config.loss.temperature:g}, "
        f"{config.optim.name} with learning rate {config.optim.lr:g}; all settings in `config.yaml`."
        f"{supervised}{saved}"
    )


def _cluster_table(clusterings: Sequence[Clustering], dataset: ImageDataset) -> str:
    label = next(iter(dataset.labels), None)
    header = ["method", "clusters", "singletons", "largest", "without", "H(Z)"]
    header += [f"I(Z; {label})", f"H(Z, given {label})"] if label else []
    rows = []
    for clustering in clusterings:
        found = diagnose_training(clustering, dataset, label)
        row = [TITLES[clustering.method], f"{found.n_clusters:,}", f"{found.n_singletons:,}"]
        row += [f"{max(found.sizes, default=0):,}", f"{found.n_ignored:,}", f"{found.entropy:.2f}"]
        if found.mutual_information is not None and found.conditional_entropy is not None:
            row += [f"{found.mutual_information:.2f}", f"{found.conditional_entropy:.2f}"]
        elif label:
            row += ["–", "–"]
        rows.append(row)
    return (
        aligned(header, rows)
        + "\n\nEntropies in bits; a clustering serves the better the higher I and the lower H(Z, given T)."
    )


def _training_table(results: Sequence[Result]) -> str:
    header = [
        "method",
        "seed",
        "final loss",
        "anchors with a positive from another sample",
        "images/s",
        "seconds",
    ]
    rows = []
    for r in results:
        epochs = [m for m in r.metrics if m["kind"] == "epoch"]
        share = mean(m["anchors_with_positive"] for m in epochs)
        seconds = sum(m["seconds"] for m in epochs)
        speed = mean(m["images_per_second"] for m in epochs)
        row = [TITLES[r.method], str(r.seed), f"{epochs[-1]['loss']:.3f}", f"{share:.0%}"]
        rows.append([*row, f"{speed:,.0f}", f"{seconds:.1f}"])
    return aligned(header, rows)
