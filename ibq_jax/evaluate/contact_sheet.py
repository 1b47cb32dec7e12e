"""Pictures side by side, a row a class, with the class's name: what a person looks at to tell classes apart."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST_SHOWN = 64  # pixels of a picture's side; smaller ones are enlarged a whole number of times
FONT_PIXELS = 15
GAP = 4


def contact_sheet(images: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Images uint8 [rows, columns, H, W, 3], and a name for each row -> uint8 [height, width, 3] on white."""
    factor = -(-SMALLEST_SHOWN // images.shape[2])
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
