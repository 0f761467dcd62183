"""Tags and paths as people write them in a table cell."""

from __future__ import annotations

import re

Cell = str | tuple[str, ...] | None  # text, a list of texts, nothing

_SEPARATORS = re.compile(r"[\s,;#]+")


def parse_tags(cell: Cell) -> tuple[str, ...]:
    """The tags of one cell, lower-case, in order, none twice.

    Tags are separated by spaces, commas, semicolons or number signs in any mixture: "#dog #beach",
    "dog;beach", "Dog, beach" and "#dog#beach" are all ("dog", "beach"). Of a list each entry is one tag,
    spaces included: ("#dog", "New York") is ("dog", "new york").
    """
    if isinstance(cell, tuple):
        words = [entry.lstrip("#").strip() for entry in cell]
    else:
        words = _SEPARATORS.split(cell or "")
    return tuple(dict.fromkeys(word.lower() for word in words if word))


def parse_path(cell: Cell) -> tuple[str, ...]:
    """The path from the root in one cell, "animal/dog/beagle" or the list ("animal", "dog", "beagle")."""
    if isinstance(cell, tuple):
        return cell
    return tuple(level for level in (part.strip() for part in (cell or "").split("/")) if level)
