"""Tags and paths as people write them in a table cell."""

from __future__ import annotations

import re

_SEPARATORS = re.compile(r"[\s,;#]+")


def parse_tags(cell: str | None) -> tuple[str, ...]:
    """The tags of one cell, lower-case, in order, none twice.

    Tags are separated by spaces, commas, semicolons or number signs in any mixture: "#dog #beach",
    "dog;beach", "Dog, beach" and "#dog#beach" are all ("dog", "beach").
    """
    tags = (tag.lower() for tag in _SEPARATORS.split(cell or ""))
    return tuple(dict.fromkeys(tag for tag in tags if tag))


def parse_path(cell: str | None) -> tuple[str, ...]:
    """The path from the root in one cell: "animal/dog/beagle" is ("animal", "dog", "beagle")."""
    return tuple(level for level in (part.strip() for part in (cell or "").split("/")) if level)
