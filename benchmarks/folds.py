"""A recipe over the five splits of the OpenMoji pictures, so that every picture is tested once.

    python -m benchmarks.folds NAME [settings of wscl-fast compare ...]

The comparison of each split is run NAME-foldK (one that stands already is not done again). Prints the mean
and the standard deviation of the splits, and by how much methods differ within a split; the accuracies of
every split go to benchmarks/results/folds.csv, where rows of other names, methods and seeds stay.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from wscl_fast.data.emoji import FOLDS
from wscl_fast.files import replacing
from wscl_fast.train.report import Counting, aligned, table
from wscl_fast.train.results import Result, read_evaluation
from wscl_fast.train.runs import EVALUATION
from wscl_fast.train.stages import TITLES

RESULTS = Path(__file__).parent / "results" / "folds.csv"
HEADER = ("recipe", "method", "seed", "split", "each counts once", "label", "tested", "linear %", "k-NN %")
COUNTINGS: dict[str, Counting] = {"emoji": "groups", "picture": "images"}
PAIRS = (("tags", "none"), ("labels", "tags"))  # whose differences are of interest


def rows_of(name: str, fold: int, results: list[Result]) -> list[tuple[str, ...]]:
    """A row for each method, seed, counting and label."""
    rows = []
    for result in results:
        for unit, counting in COUNTINGS.items():
            for label, score in result.scores.items():
                right = getattr(score, counting)
                tested = score.n_test_groups if counting == "groups" else score.n_test
                percents = (f"{100 * share:.2f}" for share in (right.linear_top1, right.knn_top1))
                run = (name, result.method, str(result.seed), str(fold))
                rows.append((*run, unit, label, str(tested), *percents))
    return rows


def differences(by_fold: list[list[Result]], counting: Counting) -> str:
    """How much better one method is than another in the same split: mean ± standard error, in points."""
    kinds = {"linear": "linear_top1", "k-NN": "knn_top1"}
    columns = [(label, kind) for label in by_fold[0][0].scores for kind in kinds]
    rows = []
    methods = {result.method for result in by_fold[0]}
    for better, other in PAIRS:
        if not {better, other} <= methods:
            continue
        cells = []
        for label, kind in columns:
            points = []
            for results in by_fold:
                right = {
                    method: mean(
                        100 * getattr(getattr(r.scores[label], counting), kinds[kind])
                        for r in results
                        if r.method == method
                    )
                    for method in (better, other)
                }
                points.append(right[better] - right[other])
            cells.append(f"{mean(points):+.1f} ± {stdev(points) / len(points) ** 0.5:.1f}")
        rows.append([f"{TITLES[better]} less {TITLES[other]}", *cells])
    return aligned(["difference", *(f"{label} {kind}" for label, kind in columns)], rows)


def main(arguments: list[str]) -> None:
    """Run the recipe on every split, and write what came."""
    if not arguments or arguments[0].startswith("-"):
        sys.exit(f"usage: {(__doc__ or '').splitlines()[2].strip()}")
    name, *settings = arguments
    rows: list[tuple[str, ...]] = []
    if RESULTS.exists():
        with RESULTS.open(newline="", encoding="utf-8") as file:
            rows = [tuple(row) for row in csv.reader(file)][1:]
    new: list[tuple[str, ...]] = []
    by_fold = []
    for fold in range(FOLDS):
        run = f"{name}-fold{fold}"
        command = [sys.executable, "-m", "wscl_fast", "compare", *settings, "--name", run]
        subprocess.run([*command, "--data.fold", str(fold)], check=True)
        by_fold.append(read_evaluation(Path("runs") / run / EVALUATION))
        new += rows_of(name, fold, by_fold[-1])
    done_again = {row[:3] for row in new}
    rows = [row for row in rows if row[:3] not in done_again] + new
    RESULTS.parent.mkdir(exist_ok=True)
    with replacing(RESULTS) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])
    for unit, counting in COUNTINGS.items():
        print(f"\n{name}: top-1 accuracy in %, mean ± deviation of the splits; each {unit} counts once\n")
        print(table([result for results in by_fold for result in results], counting=counting))
        print(f"\n{differences(by_fold, counting)}")


if __name__ == "__main__":
    main(sys.argv[1:])
