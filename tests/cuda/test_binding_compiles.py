"""The CUDA operators' bindings compile where setup.py builds the CPU's alone: against this PyTorch's stable
headers and the CUDA toolkit's, both with the simulator in the device's place and without.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from simulator import ROOT
from torch.utils import cpp_extension

SOURCES = sorted((ROOT / "csrc" / "binding").glob("*_cuda.cpp"))


def toolkit_headers() -> list[str]:
    """The CUDA toolkit's include folders, as nvcc names them."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not on PATH: there are no CUDA headers")
    said = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", "-c", "none.cu"], capture_output=True, text=True, check=False
    ).stderr
    return [str(Path(folder)) for folder in re.findall(r'"-I([^"]+)"', said)]


@pytest.mark.parametrize("defines", [(), ("-DWSCL_SIMULATED",)], ids=["device", "simulated"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles(source: Path, defines: tuple[str, ...]) -> None:
    folders = [ROOT / "csrc", *cpp_extension.include_paths(), *toolkit_headers()]
    command = ["g++", "-std=c++17", "-fsyntax-only", "-fvisibility=hidden", "-Wall", "-Werror", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *defines]
    command += [option for folder in folders for option in ("-isystem", str(folder))]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
