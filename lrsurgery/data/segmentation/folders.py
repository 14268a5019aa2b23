"""Folders of images with their masks beside them, as tables of paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrsurgery.data.datasets import choose_split
from lrsurgery.errors import DataError
from lrsurgery.text import expanded

if TYPE_CHECKING:
    from datasets import Dataset

IMAGES, MASKS = ("images", "image"), ("masks", "annotations", "labels", "mask")  # names of the two folders
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def paired_folder(reference: str, split: str | None, prefer: Sequence[str]) -> Dataset | None:
    """Pair DIR/images with DIR/masks (or annotations), or those of DIR/SPLIT; None where there are no such folders.

    Pairs have the same path but for its ending. Raises DataError that names an image without a mask.
    """
    import datasets

    place = expanded(reference)
    if not place.is_dir():
        return None
    found = _two(place)
    if found is None:
        splits = {each.name: two for each in sorted(place.iterdir()) if each.is_dir() and (two := _two(each))}
        if not splits:
            return None
        found = splits[choose_split(list(splits), split, prefer, reference)]
    images, masks = (_by_stem(folder) for folder in found)
    lacking = sorted(images.keys() - masks.keys())
    if lacking:
        raise DataError(f"{images[lacking[0]]}: has no mask of that name in {found[1]}; {len(lacking):,} have none")
    if not images:
        raise DataError(f"{found[0]}: holds no image")
    paths = [{"image": str(images[stem]), "mask": str(masks[stem])} for stem in sorted(images)]
    return datasets.Dataset.from_list(paths)


def _two(place: Path) -> tuple[Path, Path] | None:
    images, masks = (next((place / n for n in names if (place / n).is_dir()), None) for names in (IMAGES, MASKS))
    return None if images is None or masks is None else (images, masks)


def _by_stem(folder: Path) -> dict[str, Path]:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
    return {str(file.relative_to(folder).with_suffix("")): file for file in files}
