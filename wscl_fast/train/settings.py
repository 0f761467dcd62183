"""Settings in and out: YAML files, `--set key=value` and `--section.key value`, and back to YAML.

A key that does not exist, a value of the wrong type and a choice that is not offered are refused in
one line that names the nearest valid one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from wscl_fast.files import write_text
from wscl_fast.train.config import Config


class ConfigError(ValueError):
    """A setting that does not exist or does not hold."""


@dataclass(frozen=True)
class _Text:
    """A value typed on the command line: its type is known only once its key is."""

    text: str


def load_config(file: Path | None = None, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """The defaults, changed by a YAML file, changed by overrides (dotted key, text) in their order.

    A file may say ``extends: other.yaml``, a path from its own folder: it then changes what that one says.

    Raises:
        ConfigError: a key that does not exist, a value of the wrong type or out of range.
        FileNotFoundError: no such file.
    """
    merged: dict[str, Any] = {}
    if file is not None:
        merged = _read_yaml(file)
    for key, text in overrides:
        _put(merged, key.replace("-", "_").split("."), _Text(text))
    config = _decode(Config, merged, "")
    assert isinstance(config, Config)
    return config


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, default_flow_style=None)


def save_config(config: Config, file: Path) -> None:
    """Write `dump_config` to `file`."""
    write_text(file, dump_config(config))


def differences(one: Config, other: Config) -> list[str]:
    """Dotted keys whose values differ, in the order of the dataclasses."""
    mine, theirs = dict(_leaves(one)), dict(_leaves(other))
    return [key for key, value in mine.items() if value != theirs[key]]


def describe_settings(config: Config | None = None) -> Iterator[tuple[str, str, str]]:
    """(dotted key, default as text, help) of every setting, for `--help`."""
    config = config or Config()
    for key, value in _leaves(config):
        yield key, _as_text(value), _help(key)


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def _help(key: str) -> str:
    """The help text of a setting; the attribute's line in the docstring where a class has no such texts."""
    owner: Any = Config()
    *sections, leaf = key.split(".")
    for section in sections:
        owner = getattr(owner, section)
    text = next(f for f in dataclasses.fields(owner) if f.name == leaf).metadata.get("help")
    if text is None:
        found = re.search(
            rf"^ +(?:\w+, )*{leaf}(?:, \w+)*: ([^\n]+)$", type(owner).__doc__ or "", re.MULTILINE
        )
        text = found[1].rstrip(".") if found else ""
    return str(text)


def _as_text(value: Any) -> str:
    if value is None or value == "":
        return "unset"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "empty"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _read_yaml(file: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a file says, over what the file says that it extends."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected settings by section, got {_kind(content)}")
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise ConfigError(f"{file}: extends must be a file's path, got {base!r}")
    extending = (*extending, file.resolve())
    extended = file.parent / base
    if extended.resolve() in extending:
        raise ConfigError(f"{file}: extends {base}, which extends it in turn")
    if not extended.is_file():
        raise ConfigError(f"{file}: extends {base}, but there is no file {extended}")
    return _merge(_read_yaml(extended, extending), content)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both trees; where both have a leaf, the one above."""
    merged = {str(key).replace("-", "_"): value for key, value in below.items()}
    for key, value in ((str(key).replace("-", "_"), value) for key, value in above.items()):
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _put(tree: dict[str, Any], keys: list[str], value: _Text) -> None:
    *sections, leaf = keys
    for section in sections:
        inner = tree.get(section)
        if not isinstance(inner, dict):  # absent or empty; a value in its place loses to the later one
            inner = tree[section] = {}
        tree = inner
    tree[leaf] = value


def _unknown(key: str, section: str = "") -> str:
    """One line that names the nearest key: in its section, of its name elsewhere, or spelt alike."""
    known = [k for k, _ in _leaves(Config())]
    leaf = key.split(".")[-1]
    siblings = {k.removeprefix(section): k for k in known if section and k.startswith(section)}
    namesakes = [k for k in known if k.split(".")[-1] == leaf]
    nearest = (
        [
            siblings[name]
            for name in difflib.get_close_matches(key.removeprefix(section), siblings, n=1, cutoff=0.6)
        ]
        or difflib.get_close_matches(key, namesakes, n=1, cutoff=0.0)
        or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    )
    if nearest:
        return f"unknown setting '{key}': did you mean '{nearest[0]}'?"
    return f"unknown setting '{key}': choose from {', '.join(siblings.values() or _sections())}"


def _sections() -> list[str]:
    return [f.name for f in dataclasses.fields(Config)]


def _decode(kind: Any, value: Any, path: str) -> Any:
    """`value` as `kind`, or ConfigError naming `path`."""
    if dataclasses.is_dataclass(kind):
        return _decode_section(kind, value, path)
    if isinstance(value, Mapping) and value:
        raise ConfigError(_unknown(_first_leaf(path, value)))
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = [a for a in args if a is not type(None)]
        unset = value.text in ("", "null", "~") if isinstance(value, _Text) else value is None
        return None if unset else _decode(inner, value, path)
    if origin is Literal:
        return _decode_choice(args, value, path)
    if origin is tuple:
        return _decode_tuple(args, value, path)
    return _decode_scalar(kind, value, path)


def _decode_section(kind: Any, value: Any, path: str) -> Any:
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        shown = value.text if isinstance(value, _Text) else value
        raise ConfigError(
            f"{path} is a section: set one of its keys ({_first_keys(kind, path)}), got {shown!r}"
        )
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{path}." if path else ""
    made = {}
    for raw, inner in value.items():
        key = str(raw).replace("-", "_")
        if key not in fields:
            raise ConfigError(_unknown(_first_leaf(prefix + key, inner), prefix))
        decoded = _decode(hints[key], inner, prefix + key)
        _check_range(fields[key], decoded, prefix + key)
        made[key] = decoded
    try:
        return kind(**made)
    except (TypeError, ValueError) as error:  # a section's own check, e.g. of the augmentations
        raise ConfigError(f"{path}: {error}") from error


def _first_leaf(key: str, value: Any) -> str:
    """The first setting that a misspelt section holds, which tells what was meant."""
    while isinstance(value, Mapping) and value:
        first, value = next(iter(value.items()))
        key = f"{key}.{first}".replace("-", "_")
    return key


def _first_keys(kind: Any, path: str) -> str:
    return ", ".join(f"{path}.{f.name}" for f in dataclasses.fields(kind)[:3]) + " ..."


def _check_range(f: dataclasses.Field[Any], value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    minimum, maximum = f.metadata.get("minimum"), f.metadata.get("maximum")
    if minimum is not None and not value >= minimum:
        raise ConfigError(f"{path} must be at least {minimum}, got {value}")
    if maximum is not None and not value <= maximum:
        raise ConfigError(f"{path} must be at most {maximum}, got {value}")


def _decode_choice(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    text = value.text if isinstance(value, _Text) else value
    if text in choices:
        return text
    near = difflib.get_close_matches(str(text), [str(c) for c in choices], n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(map(str, choices))}"
    raise ConfigError(f"{path} cannot be {text!r}: {hint}")


def _decode_tuple(args: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, _Text):
        text = value.text.strip().strip("[]()")
        items: Sequence[Any] = [_Text(part.strip()) for part in text.split(",") if part.strip()]
    elif isinstance(value, list | tuple):
        items = value
    else:
        items = [value]  # `seeds: 3` means one seed
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], item, path) for item in items)
    if len(items) != len(args):
        raise ConfigError(f"{path} takes {len(args)} values, got {len(items)}")
    return tuple(_decode(kind, item, path) for kind, item in zip(args, items, strict=True))


_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def _decode_scalar(kind: type, value: Any, path: str) -> Any:
    shown = value
    if isinstance(value, _Text):
        shown = value.text
        if kind is str:
            return value.text
        try:
            value = yaml.safe_load(value.text)
        except yaml.YAMLError:
            value = shown
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if (kind is int and isinstance(value, bool)) or not isinstance(value, kind):
        raise ConfigError(f"{path} must be {_NAMES[kind]}, got {shown!r}")
    return value


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else type(value).__name__
