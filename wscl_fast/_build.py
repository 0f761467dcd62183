"""What this installation is made of."""

from __future__ import annotations

from dataclasses import dataclass

from wscl_fast import _ops

__version__ = "0.1.0"


@dataclass(frozen=True)
class BuildInfo:
    """What :func:`build_info` found; printing it gives one readable line an item."""

    version: str
    kernels: str  # "fused" or "fallback"
    reason: str  # why the kernels are missing; empty where they are there
    instruction_set: str  # in use on this processor; empty in a fallback
    built_instruction_sets: tuple[str, ...]
    cuda_architectures: tuple[str, ...]

    def __str__(self) -> str:
        if self.kernels == "fallback":
            return f"wscl_fast {self.version}\nkernels: fallback in plain PyTorch ({self.reason})"
        return "\n".join(
            (
                f"wscl_fast {self.version}",
                "kernels: fused",
                f"CPU instruction set: {self.instruction_set}"
                f" (built: {', '.join(self.built_instruction_sets)})",
                f"CUDA architectures: {', '.join(self.cuda_architectures) or 'none'}",
            )
        )


def build_info() -> BuildInfo:
    """Version, fused kernels or fallback, instruction set in use, CUDA architectures.

    Example:
        >>> import wscl_fast
        >>> print(wscl_fast.build_info())  # doctest: +SKIP
        wscl_fast 0.1.0
        kernels: fused
        CPU instruction set: avx512 (built: portable, avx2, avx512)
        CUDA architectures: none
    """
    module = _ops.extension
    if module is None:
        return BuildInfo(__version__, "fallback", _ops.load_error, "", (), ())
    architectures = module.cuda_architectures
    return BuildInfo(
        __version__,
        "fused",
        "",
        module.instruction_set(),
        tuple(module.built_instruction_sets()),
        tuple(architectures.split(";")) if architectures else (),
    )
