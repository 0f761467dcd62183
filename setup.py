"""Builds the extension ``wscl_fast._C`` and says what it builds; everything else is in pyproject.toml.

Environment: ``WSCL_CUDA=0`` leaves CUDA out and ``WSCL_CUDA=1`` insists on it; ``TORCH_CUDA_ARCH_LIST`` and
``MAX_JOBS`` are torch.utils.cpp_extension's own.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
KERNELS = ("portable", "avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("portable",)
LEAST_CUDA = (8, 0)
EVERY_GPU = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"  # where no architectures are asked for


def say(text: str) -> None:
    """To the terminal even where pip hides a build's standard output only when it succeeds."""
    print(f"wscl_fast: {text}", file=sys.stderr, flush=True)


def sources(cuda: bool) -> list[str]:
    """Everything of csrc but the kernels of other machines' instruction sets and, without CUDA, its part."""
    found = {p for p in (ROOT / "csrc").rglob("*.cpp") if "avx2" in KERNELS or "_avx" not in p.stem}
    if cuda:
        found |= set((ROOT / "csrc").rglob("*.cu"))
    else:
        found = {p for p in found if not p.stem.endswith("_cuda")}
    return sorted(str(p.relative_to(ROOT)) for p in found)


def numbered(wish: str) -> str:
    """A list of architectures as PyTorch reads it, names ("Hopper") as numbers; what is too old left out.

    The extension is asked at run time which devices it serves, by numbers; NVIDIA's images ask for old ones.
    """
    from torch.utils import cpp_extension

    os.environ["TORCH_CUDA_ARCH_LIST"] = wish
    try:
        codes = re.findall(r"code=(\w+)", " ".join(cpp_extension._get_cuda_arch_flags()))
    except (ValueError, IndexError) as error:
        sys.exit(
            f"wscl_fast: TORCH_CUDA_ARCH_LIST: expected a list such as {EVERY_GPU}, got {wish!r} ({error})"
        )
    found = {}
    for major, minor, kind in re.findall(r"\bsm_(\d+)(\d)([af]?)\b", " ".join(codes)):
        ptx = "+PTX" if f"compute_{major}{minor}{kind}" in codes else ""
        found[int(major), int(minor), kind] = f"{major}.{minor}{kind}{ptx}"
    old = [found.pop(key) for key in sorted(found) if key[:2] < LEAST_CUDA]
    if old:
        say(f"CUDA kernels: not for {', '.join(old)}: they need {LEAST_CUDA[0]}.{LEAST_CUDA[1]}")
    return ";".join(found[key] for key in sorted(found))


def cuda_architectures() -> str:
    """The CUDA architectures to build for; empty, with the reason told, where there are none."""
    from torch.utils import cpp_extension

    wish = os.environ.get("WSCL_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"wscl_fast: WSCL_CUDA: expected 0 or 1, got {wish!r}")
    if wish == "0":
        reason = "WSCL_CUDA=0"
    elif cpp_extension.CUDA_HOME is None:
        reason = "no CUDA toolkit found, or this PyTorch is a CPU build"
    elif not Path(cpp_extension.CUDA_HOME, "include", "cuda_runtime.h").exists():
        reason = f"no cuda_runtime.h in {cpp_extension.CUDA_HOME}/include: set CUDA_HOME to the toolkit"
    elif architectures := numbered(os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or EVERY_GPU):
        return architectures
    else:
        reason = f"TORCH_CUDA_ARCH_LIST has none from {LEAST_CUDA[0]}.{LEAST_CUDA[1]} on"
    if wish == "1":
        sys.exit(f"wscl_fast: WSCL_CUDA=1, but {reason}")
    say(f"CUDA kernels: none ({reason})")
    return ""


CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=fast",  # the kernels' multiply-adds
    "-fvisibility=hidden",
    "-Wall",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "--threads=2", "-Xcompiler=-fvisibility=hidden"]


def to_build() -> dict[str, Any]:
    """The extension, and how to build it."""
    from torch.utils import cpp_extension

    architectures = cuda_architectures()
    say(f"CPU kernels: {', '.join(KERNELS)}, chosen at run time")
    if architectures:
        say(f"CUDA kernels: {architectures}")
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures  # where it is not set, there may be no GPU to ask

    make = cpp_extension.CUDAExtension if architectures else cpp_extension.CppExtension
    extension = make(
        "wscl_fast._C",
        sources(bool(architectures)),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[
            # LibTorch's stable ABI of 2.11: one binary serves that version and later ones.
            ("TORCH_TARGET_VERSION", "0x020b000000000000"),
            ("WSCL_CUDA_ARCHITECTURES", f'"{architectures}"'),
        ],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=["-pthread"],
    )
    # The operators go through the dispatcher and the stable ABI: nothing here uses torch's Python bindings,
    # nor the C++ of its CUDA libraries.
    for library in ("torch_python", "c10_cuda"):
        if library in extension.libraries:
            extension.libraries.remove(library)

    class BuildExtension(cpp_extension.BuildExtension):
        """Keeps the objects of an extension that lies in the project's folder.

        An editable install would throw them away. The next one compiles what changed, and make test links the
        C++ tests with them; nothing else writes there, so that they are always those of the extension beside
        them.
        """

        def finalize_options(self) -> None:
            super().finalize_options()
            if self.editable_mode or self.inplace:
                self.build_temp = str(ROOT / "build" / f"objects.{sysconfig.get_config_var('SOABI')}")

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)},
    }


# pip asks twice what this is before it has it built, and torch takes seconds to import.
only_asked = sys.argv[1:2] in (["egg_info"], ["dist_info"])
setup(**({} if only_asked else to_build()))
