"""Random windows of images: where they lie, how they are reduced, what they depend on."""

import functools
import re

import numpy as np
import pytest
from support.image_files import noise_file

from ibq_jax.base.errors import UsageError
from ibq_jax.data.preprocess import UnreadableImage, decode_image
from ibq_jax.data.sources import Example, ImageCollection
from ibq_jax.data.windows import Windows, in_windows

WIDE = noise_file(0, 150, 70, "PNG")


def image_example(name: str, encoded: bytes = WIDE, split: str = "train", label: int | None = 2) -> Example:
    return Example(split, name, lambda: encoded, label)


def cut(windows: Windows, *examples: Example) -> dict[str, np.ndarray]:
    return {window.name: decode_image(window.read()) for window in windows.cut(examples)}


def block_means(image: np.ndarray, scale: int) -> np.ndarray:
    height, width = (side // scale * scale for side in image.shape[:2])
    blocks = image[:height, :width].astype(np.float64).reshape(height // scale, scale, width // scale, scale, 3)
    return blocks.mean(axis=(1, 3))


def test_every_window_is_a_part_of_its_image_reduced_by_means_of_blocks():
    image = decode_image(WIDE)
    found = cut(Windows(count=40, size=8), image_example("a"))
    assert len(found) == 40
    scales = [int(re.search(r"1:(\d)$", name)[1]) for name in found]
    assert set(scales) == {1, 2, 4}  # of 4, a window covers 32 of 70 pixels; of 8 it would cover over half of them
    for window, scale in zip(found.values(), scales, strict=True):
        shifts = [(top, left) for top in range(scale) for left in range(scale)]
        reduced = (block_means(image[top:, left:], scale) for top, left in shifts)
        views = (np.lib.stride_tricks.sliding_window_view(each, (8, 8), axis=(0, 1)) for each in reduced)
        distances = min(np.abs(view.transpose(0, 1, 3, 4, 2) - window).max(axis=(2, 3, 4)).min() for view in views)
        assert distances <= 1  # Pillow rounds after either axis


def test_the_draws_depend_on_the_seed_and_the_name_alone():
    a, b = image_example("a"), image_example("b")
    alone, after = cut(Windows(5, 8), a), cut(Windows(5, 8), b, a)
    for name, window in alone.items():
        np.testing.assert_array_equal(after[name], window)

    def total(found):
        return sum(int(window.sum(dtype=np.int64)) for window in found.values())

    of_b = {name: window for name, window in after.items() if name.startswith("b")}
    assert len({total(alone), total(of_b), total(cut(Windows(5, 8, seed=1), a))}) == 3


def test_windows_keep_the_split_and_label_of_their_image():
    windows = list(Windows(2, 8).cut([image_example("a", split="validation", label=7)]))
    assert [(window.split, window.label) for window in windows] == [("validation", 7)] * 2


@pytest.mark.parametrize(
    ("encoded", "message"),
    [(b"text", "no image of a known format"), (WIDE, "70x150 pixels, smaller than a window of 71")],
)
def test_an_image_without_windows_is_named_once(encoded, message):
    bad, good = image_example("bad", encoded), image_example("good", noise_file(1, 80, 80, "PNG"))
    [first, *others] = Windows(3, 71).cut([bad, good])
    assert first.name == "bad" and len(others) == 3
    with pytest.raises(UnreadableImage, match=message):
        first.read()
    assert {decode_image(window.read()).shape for window in others} == {(71, 71, 3)}


def test_parts_hold_the_same_windows_as_the_whole():
    names = ("a", "b", "c")
    collection = ImageCollection(
        "x",
        "Noise.",
        examples=lambda: map(image_example, names),
        total=3,
        parts=(("a", "b"), ("c",)),
        read_part=functools.partial(map, image_example),
    )
    windowed = in_windows(collection, Windows(2, 8))
    assert windowed.total == 6 and windowed.description.startswith("Noise. 2 random windows of each, 8 pixels")
    whole = {example.name: example.read() for example in windowed.examples()}
    of_parts = {example.name: example.read() for part in windowed.parts for example in windowed.read_part(part)}
    assert whole == of_parts and len(whole) == 6


@pytest.mark.parametrize(("count", "size", "message"), [(0, 8, "--windows=0"), (1, 7, "--size=7: windows have 8 to")])
def test_windows_have_bounds(count, size, message):
    with pytest.raises(UsageError, match=message):
        Windows(count, size)
