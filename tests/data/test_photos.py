"""The photographs inside scikit-image: colour, large enough, split by photograph, licensed."""

import importlib.metadata
import importlib.util

import numpy as np
import pytest

from ibq_jax.base.errors import UsageError
from ibq_jax.data import photos
from ibq_jax.data.batches import NO_LABEL
from ibq_jax.data.photos import photographs
from ibq_jax.data.preprocess import decode_image


def test_the_photographs_are_in_colour_and_lie_in_the_package():
    examples = list(photographs().examples())
    files = {str(file) for file in importlib.metadata.files("scikit-image")}
    for example in examples:
        image = decode_image(example.read()).astype(int)
        assert min(image.shape[:2]) >= 300, example.name
        assert np.abs(image[..., 0] - image[..., 2]).mean() > 2, example.name  # grey pictures have 0
        assert f"skimage/data/{example.name}" in files
    assert len(examples) == photographs().total == 8


def test_training_and_validation_photographs_are_different_ones():
    collection = photographs()
    by_split = {
        split: {example.name: example.label for example in collection.examples() if example.split == split}
        for split in ("train", "validation")
    }
    assert by_split["validation"] == {"chelsea.png": NO_LABEL, "coffee.png": NO_LABEL}
    assert sorted(by_split["train"].values()) == [*range(6)] == [*range(len(collection.class_names))]
    assert "other ones than those for validation (cat, coffee)" in collection.description


def test_every_photograph_has_a_licence():
    license = photographs().license
    assert all(f"{title}: {photograph.license}" in license for title, photograph in photos.PHOTOGRAPHS.items())


def test_scikit_image_may_be_absent_or_another_version(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(UsageError, match=r"come with scikit-image: pip install -r requirements-photos\.txt"):
            photographs()
    monkeypatch.setattr(photos, "_folder", lambda: tmp_path)
    with pytest.raises(UsageError, match=r"lacks astronaut\.png"):
        photographs()
