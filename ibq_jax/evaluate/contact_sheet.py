"""Contact sheets: samples side by side, one row per class, with the class's name at the left."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 64  # pixels; smaller images are enlarged by an integer factor
FONT_PIXELS = 15
GAP = 4


def contact_sheet(images: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Lays out images on white, one row per name.

    Args:
        images: uint8 [rows, columns, H, W, 3].
        names: one for each row, printed at its left.

    Returns:
        uint8 [height, width, 3]
    """
    factor = -(-MIN_SIDE // images.shape[2])
    images = images.repeat(factor, axis=2).repeat(factor, axis=3)
    rows, columns, height, width, _ = images.shape
    font = ImageFont.load_default(FONT_PIXELS)
    margin = 2 * GAP + int(max(font.getlength(name) for name in names))
    sheet = Image.new("RGB", (margin + columns * (width + GAP), rows * (height + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        top = GAP + row * (height + GAP)
        draw.text((GAP, top + height // 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images[row]):
            sheet.paste(Image.fromarray(image), (margin + column * (width + GAP), top))
    return np.asarray(sheet)
