"""`python -m wscl_fast` is the command `wscl-fast`."""

from __future__ import annotations

import sys

from wscl_fast.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
