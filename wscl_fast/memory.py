"""Memory that stays for the next step."""

from __future__ import annotations

from wscl_fast import _ops


def empty_reserve() -> None:
    """Give back to the system what the CPU's operators keep for their next call: 256 MiB at most.

    That is what weights and logits lay in that a backward pass reads, and large gradients that were let go:
    fresh memory is slow. What a tensor still holds stays as it is. Like ``torch.cuda.empty_cache()`` it makes
    nothing faster; it is for a process that has taken its last step. Without the extension there is nothing
    to give back.

    Example:
        >>> import wscl_fast
        >>> wscl_fast.empty_reserve()
    """
    if _ops.extension is not None:
        _ops.extension.empty_reserve()
