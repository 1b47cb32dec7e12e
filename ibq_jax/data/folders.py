"""Folders of images: one class per subfolder or no classes, with train and val folders or split by file name."""

import functools
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ibq_jax.base.errors import UsageError
from ibq_jax.data.preprocess import UnreadableImage
from ibq_jax.data.sources import (
    IMAGE_SUFFIXES,
    Example,
    ImageCollection,
    class_names_to_store,
    held_out,
    printable,
    read_bounded,
)

IMAGES_PER_PART = 8192


class _Image(NamedTuple):
    split: str
    class_name: str | None
    path: str  # relative to the root, with "/"


def image_folder(root: str | os.PathLike, name: str, validation: float = 0.05) -> ImageCollection:
    """Returns the .jpg, .jpeg, .png, .webp and .bmp images below `root`, in one of four layouts:

        root/CLASS/**/x.jpg    root/x.jpg    root/{train,val}/CLASS/**/x.jpg    root/{train,val}/x.jpg

    Classes are numbered in the order of their names. If `root` holds both `train` and `val` (or `validation`), they
    are the splits; otherwise the fraction `validation` of every class is held out, chosen by the hashes of the files'
    paths below `root`. Hidden files are skipped.

    Args:
        root: the folder.
        name: the collection's name.
        validation: the fraction to hold out, at least 0 and below 1.

    Raises:
        UsageError: there is no folder or no images, there are images next to class folders, or a folder's name cannot
            be a class's name.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder")
    folders = _split_folders(root)
    images = [image for split, folder in folders.items() for image in _images(root, folder, split)]
    class_names = _class_names(root, images)
    if len(folders) == 1:
        images = _with_validation(images, validation)
    label_of = {None: None} | {class_name: label for label, class_name in enumerate(class_names)}
    read_part = functools.partial(_examples, root=root, label_of=label_of)
    return ImageCollection(
        name=name,
        description=f"The images of the folder {printable(root.resolve().name)}.",
        examples=lambda: read_part(images),
        class_names=class_names_to_store(class_names, root),
        total=len(images),
        parts=tuple(tuple(images[first : first + IMAGES_PER_PART]) for first in range(0, len(images), IMAGES_PER_PART)),
        read_part=read_part,
    )


def _examples(images: Iterable[_Image], root: Path, label_of: Mapping[str | None, int | None]) -> list[Example]:
    return [
        Example(image.split, image.path, functools.partial(_read, root / image.path), label_of[image.class_name])
        for image in images
    ]


def _split_folders(root: Path) -> dict[str, Path]:
    train = root / "train"
    held = [path for path in (root / "val", root / "validation") if path.is_dir()]
    if not train.is_dir() or not held:
        return {"train": root}
    if len(held) == 2:
        raise UsageError(f"{root} holds both val and validation: keep one")
    return {"train": train, "validation": held[0]}


def _images(root: Path, folder: Path, split: str) -> Iterator[_Image]:
    """Yields the images of one split in the order of their names; the class is the folder directly below `folder`."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            for path in sorted(_images_below(entry)):
                yield _Image(split, entry.name, path.relative_to(root).as_posix())
        elif _is_image(entry.name):
            yield _Image(split, None, entry.relative_to(root).as_posix())


def _images_below(folder: Path) -> Iterator[Path]:
    for parent, _, files in os.walk(folder):
        yield from (Path(parent, file) for file in files if _is_image(file))


def _is_image(file: str) -> bool:
    return not file.startswith(".") and file.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def _class_names(root: Path, images: list[_Image]) -> list[str]:
    if not images:
        suffixes = ", ".join(f".{suffix}" for suffix in sorted(IMAGE_SUFFIXES))
        raise UsageError(f"{root} holds no images ({suffixes})")
    examples = {image.class_name: image.path for image in images}
    unclassed = examples.pop(None, None)
    if unclassed and examples:
        raise UsageError(
            f"{root} holds images in class folders ({min(examples.values())}) and next to them ({unclassed}): "
            "move the latter into a class folder or away"
        )
    return sorted(name for name in examples if name is not None)


def _with_validation(images: list[_Image], fraction: float) -> list[_Image]:
    paths = defaultdict(list)
    for image in images:
        paths[image.class_name].append(image.path)
    held = held_out(paths, fraction)
    return [image._replace(split="validation") if image.path in held else image for image in images]


def _read(path: Path) -> bytes:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait forever, and a device may never end
        raise UnreadableImage("not a regular file")
    with path.open("rb") as file:
        return read_bounded(file)
