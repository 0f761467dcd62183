"""The picture cache: mapped, vouched for, rebuilt when broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wscl_fast.data.cache import Notes, cached_images

SHAPE = (3, 4, 4)


class Builder:
    """Writes five pictures and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, target: Path) -> Notes:
        self.calls += 1
        np.save(target, np.arange(5 * 48, dtype=np.uint8).reshape(5, *SHAPE))
        return {"calls": self.calls}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "pictures.npy"


def test_built_once_and_mapped(path: Path) -> None:
    build = Builder()
    first, _ = cached_images(path, SHAPE, build)
    second, notes = cached_images(path, SHAPE, build)
    assert build.calls == 1
    assert notes == {"calls": 1}
    assert isinstance(second, np.memmap)
    assert np.array_equal(first, second)
    assert not second.flags.writeable
    assert sorted(p.name for p in path.parent.iterdir()) == ["pictures.json", "pictures.npy"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip_a_pixel(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _lose_the_record(path: Path) -> None:
    path.with_suffix(".json").unlink()


def _half_a_record(path: Path) -> None:
    record = path.with_suffix(".json")
    record.write_text(record.read_text()[:20])


def _record_of_another_kind(path: Path) -> None:
    path.with_suffix(".json").write_text("[1, 2]")


def _lose_the_array(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _flip_a_pixel,
        _empty,
        _lose_the_record,
        _half_a_record,
        _record_of_another_kind,
        _lose_the_array,
    ],
)
def test_damage_is_detected_and_repaired(path: Path, damage: object) -> None:
    build = Builder()
    first, _ = cached_images(path, SHAPE, build)
    expected = np.array(first)
    del first
    assert callable(damage)
    damage(path)
    images, _ = cached_images(path, SHAPE, build)
    assert build.calls == 2
    assert np.array_equal(images, expected)


def test_another_size_is_no_hit(path: Path) -> None:
    build = Builder()
    cached_images(path, SHAPE, build)
    with pytest.raises(OSError, match="cannot be read back"):
        cached_images(path, (3, 8, 8), build)  # the builder still writes 4 × 4


def test_failed_build_leaves_nothing(path: Path) -> None:
    def fail(target: Path) -> Notes:
        target.write_bytes(b"half")
        raise RuntimeError("out of ink")

    with pytest.raises(RuntimeError, match="out of ink"):
        cached_images(path, SHAPE, fail)
    assert list(path.parent.iterdir()) == []
