"""Image files to one uint8 array, by threads: PIL decodes and resizes outside the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from wscl_fast.data.extras import train_extra
from wscl_fast.files import replacing

_WRITE_CHUNK = 1024
_MAX_16_BITS = 65535


class Failure(NamedTuple):
    """Why an image has no pixels, and whether that may pass (the system refused, not the file)."""

    reason: str
    passing: bool


def read_image(path: Path, image_size: int) -> NDArray[np.uint8]:
    """One image file as uint8 [3, image_size, image_size]: shorter side resized, centre cropped.

    Turned upright by its EXIF note; transparency is laid on white; greyscale (8 or 16 bits) becomes RGB.

    Raises:
        ValueError: if the file is no image that PIL can decode, or has more than 16 bits a pixel and channel;
            the message says why.
    """
    with train_extra():
        from PIL import Image, ImageOps
    try:
        with Image.open(path) as picture:
            picture.draft(
                "RGB", (2 * image_size, 2 * image_size)
            )  # lets JPEG decode at a fraction of its size
            upright = ImageOps.exif_transpose(picture)
            if upright.mode[0] in "IF":
                upright = Image.fromarray(_eight_bits(np.asarray(upright), upright.mode))
            if "A" in upright.getbands() or "transparency" in upright.info:
                layer = upright.convert("RGBA")
                upright = Image.new("RGBA", layer.size, "white")
                upright.alpha_composite(layer)
            fitted = ImageOps.fit(upright.convert("RGB"), (image_size, image_size), Image.Resampling.BICUBIC)
    except Exception as error:  # decoders of broken files raise nearly anything
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return np.asarray(fitted, dtype=np.uint8).transpose(2, 0, 1)


def _eight_bits(grey: NDArray[Any], mode: str) -> NDArray[np.uint8]:
    """Greyscale of PIL's wider modes: "I;16…" has 16 bits, "I" has 8 or 16 in 32."""
    if mode == "F":
        raise ValueError("expected pixels of 8 or 16 bits, got floating-point ones")
    lowest, highest = int(grey.min()), int(grey.max())
    if lowest < 0 or highest > _MAX_16_BITS:
        raise ValueError(f"expected pixels of 8 or 16 bits, got {lowest} to {highest}")
    return (grey >> 8 if mode != "I" or highest > 255 else grey).astype(np.uint8)


def decode_images(paths: Sequence[Path], image_size: int, target: Path) -> dict[int, Failure]:
    """Writes the images of ``paths`` to ``target``, an ``.npy`` of uint8 [n, 3, image_size, image_size].

    Args:
        paths: the files.
        image_size: height and width in pixels.
        target: written row by row through a memory map, so that the images need not fit in memory.

    Returns:
        Position in ``paths`` -> why it could not be decoded. Such images have no row in the array.
    """
    with train_extra():
        from tqdm import tqdm
    shape = (len(paths), 3, image_size, image_size)
    images = open_memmap(target, mode="w+", dtype=np.uint8, shape=shape)
    failures: dict[int, Failure] = {}

    def decode(index: int) -> None:
        try:
            images[index] = read_image(paths[index], image_size)
        except ValueError as error:
            failures[index] = Failure(str(error), _may_pass(error.__cause__))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        done = pool.map(decode, range(len(paths)))
        for _ in tqdm(done, total=len(paths), desc=f"decoding to {image_size} px", unit="img", disable=None):
            pass
    images.flush()
    if failures:
        _drop_rows(images, failures, target)
    return dict(sorted(failures.items()))


def _may_pass(error: BaseException | None) -> bool:
    """Too many open files, no permission, no memory: nothing that the file's bytes say."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def _drop_rows(images: NDArray[np.uint8], dropped: dict[int, Failure], target: Path) -> None:
    kept = np.setdiff1d(np.arange(len(images)), list(dropped))
    with replacing(target) as beside:
        smaller = open_memmap(beside, mode="w+", dtype=np.uint8, shape=(len(kept), *images.shape[1:]))
        for start in range(0, len(kept), _WRITE_CHUNK):
            chunk = slice(start, start + _WRITE_CHUNK)
            smaller[chunk] = images[kept[chunk]]
        smaller.flush()
