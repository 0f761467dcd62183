"""Prints the requirements of the named extras of pyproject.toml, one a line, for pip.

Usage: python tools/requirements.py EXTRA...
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def extras(text: str) -> dict[str, list[str]]:
    """The table of optional dependencies (tomllib is only there from Python 3.11 on)."""
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    found = re.findall(r"^(\w+) = \[(.*?)\]", table, flags=re.MULTILINE | re.DOTALL)
    return {name: re.findall(r'"([^"]+)"', items) for name, items in found}


if __name__ == "__main__":
    known = extras((Path(__file__).parent.parent / "pyproject.toml").read_text())
    for extra in sys.argv[1:]:
        print("\n".join(known[extra]))
