"""The embedded photographs: those in colour inside scikit-image's package, with their licences; nothing is downloaded.

Left out are scikit-image's grey images, drawings and colour wheel, what it would download, and the right half of its
stereo pair, which shows the scene of the left one. scikit-learn's two photographs are left out too: the data set is the
same wherever it is made, so it cannot take what happens to be installed, and two images are not worth a package.
"""

import functools
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import NamedTuple

from ibq_jax.base.errors import UsageError
from ibq_jax.data.batches import NO_LABEL
from ibq_jax.data.sources import Example, ImageCollection, read_bounded

PACKAGE = "skimage"


class _Photograph(NamedTuple):
    file: str
    split: str
    license: str  # as scikit-image's documentation names it


PHOTOGRAPHS = {
    "astronaut": _Photograph("astronaut.png", "train", "NASA, public domain"),
    "cat": _Photograph("chelsea.png", "validation", "Stefan van der Walt, CC0"),
    "coffee": _Photograph("coffee.png", "validation", "Rachel Michetti, CC0"),
    "galaxies": _Photograph("hubble_deep_field.jpg", "train", "NASA, public domain"),
    "motorcycle": _Photograph(
        "motorcycle_left.png",
        "train",
        "Middlebury 2014 stereo benchmark, no licence besides the package's BSD-3-Clause",
    ),
    "retina": _Photograph("retina.jpg", "train", "Mikael Häggström, CC0"),
    "rocket": _Photograph("rocket.jpg", "train", "SpaceX, public domain"),
    "tissue": _Photograph("ihc.png", "train", "CMMI, no known copyright restrictions"),
}


def photographs(name: str = "photos") -> ImageCollection:
    """Returns the 8 photographs: six for training, each a class, and for validation the cat and the coffee.

    Those two have the label NO_LABEL, since a generator cannot learn a class that it never sees in training.

    Raises:
        UsageError: scikit-image is not installed, or lacks one of them.
    """
    folder = _folder()
    for photograph in PHOTOGRAPHS.values():
        if not (folder / photograph.file).is_file():
            raise UsageError(f"{folder} lacks {photograph.file}: install the version of requirements-photos.txt")
    class_names = tuple(title for title, photograph in PHOTOGRAPHS.items() if photograph.split == "train")
    examples = [
        Example(
            split=photograph.split,
            name=photograph.file,
            read=functools.partial(_read, folder / photograph.file),
            label=class_names.index(title) if title in class_names else NO_LABEL,
        )
        for title, photograph in PHOTOGRAPHS.items()
    ]
    return ImageCollection(
        name=name,
        description=(
            "The colour photographs inside the package scikit-image. The training photographs are other ones than "
            f"those for validation ({', '.join(sorted(PHOTOGRAPHS.keys() - class_names))})."
        ),
        examples=lambda: examples,
        class_names=class_names,
        total=len(examples),
        homepage="https://scikit-image.org",
        citation=f"scikit-image {importlib.metadata.version('scikit-image')}, skimage.data",
        license="; ".join(f"{title}: {photograph.license}" for title, photograph in PHOTOGRAPHS.items()),
    )


def _folder() -> Path:
    """Returns the package's folder of images, found without importing it."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise UsageError("the photographs come with scikit-image: pip install -r requirements-photos.txt")
    return Path(package.origin).parent / "data"


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return read_bounded(file)
