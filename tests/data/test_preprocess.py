"""Decoding, resizing and cropping, against values known beforehand and jax.image's resize."""

import jax
import numpy as np
import pytest
from PIL import Image
from support.image_files import encode, noise

from ibq_jax.data.preprocess import UnreadableImage, centre_crop, decode_image, random_crop, resize_shorter_side


@pytest.mark.parametrize("form", ["PNG", "BMP", "WEBP"])
def test_lossless_files_come_back_exactly(form):
    image = noise(0, 5, 7)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(image), form, lossless=True)), image)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 0x8040, (0x80, 0x80, 0x80)),
        ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb_on_white(mode, colour, expected):
    image = decode_image(encode(Image.new(mode, (3, 2), colour)))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.broadcast_to(np.uint8(expected), (2, 3, 3)))


def test_transparent_palette_entries_show_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert decode_image(encode(palette, transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_cmyk_jpeg_is_converted():
    image = decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    np.testing.assert_allclose(image, np.broadcast_to(np.uint8([255, 0, 0]), (16, 16, 3)), atol=3)


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    assert decode_image(encode(Image.fromarray(noise(0, 4, 9)), "JPEG", exif=exif)).shape == (4, 9, 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_files_are_unreadable(form):
    whole = encode(Image.fromarray(noise(0, 64, 64)), form)
    decode_image(whole)
    with pytest.raises(UnreadableImage):
        decode_image(whole[: len(whole) // 2])


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_other_bytes_are_unreadable(content):
    with pytest.raises(UnreadableImage):
        decode_image(content)


def test_a_decompression_bomb_is_unreadable(monkeypatch):
    bomb = encode(Image.new("RGB", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_999)
    with pytest.raises(UnreadableImage, match="bomb"):
        decode_image(bomb)


@pytest.mark.parametrize(("height", "width", "size"), [(70, 93, 32), (70, 93, 69), (93, 70, 140), (40, 41, 7)])
@pytest.mark.parametrize("method", ["bilinear", "plain"])
def test_resize_agrees_with_jax(height, width, size, method):
    image = noise(0, height, width)
    resized = resize_shorter_side(image, size, method)
    expected = jax.image.resize(image.astype(np.float32), resized.shape, "linear", antialias=method == "bilinear")
    # Pillow rounds to 8 bits after each of its two passes; the plain resize rounds once.
    np.testing.assert_allclose(resized, expected, atol=1.0 if method == "bilinear" else 0.501)


SHAPES = [(64, 64), (70, 93), (93, 70), (64, 81), (200, 131), (131, 200), (40, 57), (300, 257), (640, 128), (127, 640)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_bicubic_is_what_torchvisions_resize_asks_pillow_for(height, width):
    image, size = noise(0, height, width), 64
    shorter, longer = min(height, width), int(size * max(height, width) / min(height, width))
    target = (longer, size) if shorter == height else (size, longer)
    expected = image if shorter == size else Image.fromarray(image).resize(target, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize_shorter_side(image, size, "bicubic"), expected)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_box_bicubic_and_a_centre_crop_are_adms(height, width):
    """Halving by averages, bicubic to the nearest size, the middle: written for a Pillow image from end to end."""
    image, size = Image.fromarray(noise(0, height, width)), 64
    for _ in range(int(np.log2(min(image.size) / size))):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    expected = image.crop((left, top, left + size, top + size))
    found = centre_crop(resize_shorter_side(noise(0, height, width), size, "box_bicubic"), size)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("shape", "expected"), [((480, 640), (256, 341)), ((640, 480), (341, 256)), ((9, 9), (256, 256))]
)
def test_the_shorter_side_gets_the_size(shape, expected):
    for method in ("bilinear", "plain", "bicubic", "box_bicubic"):
        assert resize_shorter_side(noise(0, *shape), 256, method).shape == (*expected, 3)


def test_an_image_of_the_right_size_is_left_alone():
    image = noise(0, 32, 50)
    np.testing.assert_array_equal(resize_shorter_side(image, 32), image)


def test_centre_crop_takes_the_middle():
    image = noise(0, 11, 8)
    np.testing.assert_array_equal(centre_crop(image, 4), image[3:7, 2:6])


def test_random_crop_reaches_every_position_equally_often():
    rows, columns = np.mgrid[0:5, 0:4]
    image = np.stack([rows, columns, rows], axis=-1).astype(np.uint8)
    rng = np.random.default_rng(1)
    corners = [tuple(random_crop(image, 3, rng)[0, 0, :2]) for _ in range(3_000)]
    counts = {corner: corners.count(corner) for corner in set(corners)}
    assert set(counts) == {(row, column) for row in range(3) for column in range(2)}
    assert all(400 < count < 600 for count in counts.values())  # 500 expected, standard deviation 20
