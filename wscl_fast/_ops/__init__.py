"""The extension's operators: loading, fake kernels, autograd. The only user of ``torch.ops.wscl_fast``."""

from __future__ import annotations

from wscl_fast._ops.extension import extension, load_error, serves
from wscl_fast._ops.infonce import clustered_infonce

__all__ = ["clustered_infonce", "extension", "load_error", "serves"]
