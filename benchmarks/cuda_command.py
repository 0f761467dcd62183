"""The command line that the benchmarks for a GPU share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from wscl_fast.files import write_text

Case = TypeVar("Case")
Bench = Callable[[torch.device, list[Case], float, float], dict[str, Any]]


def main(
    name: str, description: str, bench: Bench[Case], on_gpu: list[Case], on_cpu: list[Case], *,
    seconds: float, budget: float,
) -> int:  # fmt: skip
    """Runs the cases of the device that was asked for; exit status 2 where there is none."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="where to write the results; by default to the terminal")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="of repetitions, for each side and pass"
    )
    parser.add_argument("--budget", type=float, default=budget, help="seconds after which no case is begun")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"{name}: no CUDA device here; --device cpu tries the harness", file=sys.stderr)
        return 2
    found = bench(device, on_gpu if device.type == "cuda" else on_cpu, options.seconds, options.budget)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    if options.json:
        write_text(options.json, text)
    else:
        print(text)
    return 0
