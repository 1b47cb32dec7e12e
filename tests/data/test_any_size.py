"""Images of any size: bad and odd files, and the size that each gets, against the formula written another way."""

import math
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from ibq_jax.base.errors import UsageError
from ibq_jax.data.any_size import read_upright, resize_within, size_within


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def half_up(side: int, multiple: int) -> int:
    return math.floor(Fraction(side, multiple) + Fraction(1, 2)) * multiple


@pytest.mark.parametrize("area", [512 * 512, 720 * 720, 1024 * 1024])
@pytest.mark.parametrize(
    ("width", "height"), [(512, 512), (640, 480), (480, 640), (1920, 1080), (37, 501), (3000, 33), (4032, 3024)]
)
def test_one_area_gives_the_sizes_of_emu35s_processor(width, height, area):
    """Its rule: whole pixels of the height first, the width from those, then the nearest multiples of 16."""
    rows = math.isqrt(area * height // width)  # exact; the processor's floats may lose a pixel, which rounding absorbs
    columns = math.floor(Fraction(rows * width, height))
    found = size_within(width, height, 16, area, area)
    for side, exact in zip(found, (columns, rows), strict=True):
        assert side % 16 == 0 and side in {half_up(exact - 1, 16), half_up(exact, 16)}


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((640, 480), (1, 10**7), (640, 480)),  # inside the bounds an image of multiples keeps its size
        ((650, 490), (1, 10**7), (656, 496)),
        ((100, 100), (256**2, 10**7), (256, 256)),
        ((2000, 1000), (1, 2**19), (1024, 512)),
        ((512, 512), (518_400, 518_400), (720, 720)),
        ((1600, 900), (518_400, 518_400), (960, 544)),  # Emu3.5's sizes for 16:9 and 4:3
        ((1024, 768), (1024**2, 1024**2), (1184, 880)),
    ],
)
def test_sizes(size, bounds, expected):
    assert size_within(*size, 16, *bounds) == expected


def test_pixels_are_pillows_bicubic_ones():
    image = Image.fromarray(noise(70, 50))
    found = resize_within(image, 16, 1, 10**6)
    np.testing.assert_array_equal(found, np.asarray(image.resize((64, 48), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(
    ("bounds", "words"),
    [((0, 5), "0 < min_pixels"), ((9, 5), "min_pixels=9 and max_pixels=5"), ((1, 64), "has no side of 16 pixels left")],
)
def test_bounds_that_leave_nothing_are_refused(bounds, words):
    with pytest.raises(UsageError, match=words):
        size_within(300, 20, 16, *bounds)


def saved(tmp_path, image: Image.Image, name: str, **options) -> str:
    image.save(tmp_path / name, **options)
    return str(tmp_path / name)


def test_an_image_is_turned_as_its_exif_says(tmp_path):
    image, exif = Image.fromarray(noise(40, 24)), Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn a quarter clockwise
    path = saved(tmp_path, image, "turned.png", exif=exif)
    expected = np.rot90(np.asarray(image), -1)
    for source in (path, Image.open(path)):
        np.testing.assert_array_equal(read_upright(source), expected)


def test_cmyk_grey_and_sixteen_bits_become_rgb(tmp_path):
    cmyk = Image.fromarray(noise(40, 24, 4), "CMYK")
    np.testing.assert_array_equal(read_upright(cmyk), cmyk.convert("RGB"))
    path = saved(tmp_path, cmyk, "cmyk.jpg", quality=95)
    np.testing.assert_array_equal(read_upright(path), Image.open(path).convert("RGB"))
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    path = saved(tmp_path, Image.fromarray(deep), "deep.png")
    np.testing.assert_array_equal(read_upright(path), np.repeat((deep >> 8)[..., None], 3, axis=2))
    np.testing.assert_array_equal(read_upright(Image.fromarray(noise(9, 9, 1)[..., 0])).size, (9, 9))


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.fromarray(noise(24, 24)), Image.new("RGB", (24, 24), "red")]
    for name, options in (("moving.webp", {"lossless": True}), ("moving.png", {})):
        path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(read_upright(path), frames[0])


def test_transparent_pixels_of_a_palette_become_white(tmp_path):
    palette = Image.fromarray(noise(24, 24)).quantize(8)
    path = saved(tmp_path, palette, "palette.png", transparency=3)
    found, clear = np.asarray(read_upright(path)), np.asarray(palette) == 3
    assert clear.any() and np.all(found[clear] == 255)
    np.testing.assert_array_equal(found[~clear], np.asarray(palette.convert("RGB"))[~clear])


def test_what_cannot_be_read_is_one_line(tmp_path):
    path = saved(tmp_path, Image.fromarray(noise(64, 64)), "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "words.jpg").write_bytes(b"no image")
    saved(tmp_path, Image.fromarray(noise(8, 8)), "other.gif")
    thin = Image.new("RGB", (1, 5000))
    cases = {
        str(tmp_path / "cut.jpg"): "cut.jpg: .*truncated",
        str(tmp_path / "words.jpg"): r"words.jpg: no image of a known format \(JPEG, PNG, WEBP, BMP\)",
        str(tmp_path / "other.gif"): "other.gif: no image of a known format",
        str(tmp_path / "absent.jpg"): "absent.jpg: .*No such file",
        str(tmp_path): "Is a directory",
        saved(tmp_path, thin, "thin.png"): "thin.png: 1x5000 pixels, one side over 100 times the other",
    }
    for source, words in cases.items():
        with pytest.raises(UsageError, match=words) as raised:
            read_upright(source)
        assert "\n" not in str(raised.value)
    for image, words in (
        (thin, "the image: 1x5000 pixels"),
        (Image.new("F", (8, 8)), "pixels of mode F have no known range"),
        (Image.new("I", (8, 8)), "pixels of mode I have no known range"),
    ):
        with pytest.raises(UsageError, match=words):
            read_upright(image)
    assert read_upright(path).size == (64, 64)
