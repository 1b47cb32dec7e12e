"""The images, splits and labels that each kind of source yields."""

import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from support.image_files import fake_imagenet, noise_file, write_tar

from ibq_jax.base.errors import UsageError
from ibq_jax.data import tar_shards
from ibq_jax.data.folders import image_folder
from ibq_jax.data.imagenet import TRAIN_TAR, VALIDATION_TAR, imagenet2012
from ibq_jax.data.openmoji import openmoji
from ibq_jax.data.preprocess import UnreadableImage, decode_image
from ibq_jax.data.sources import ImageCollection, held_out, is_held_out, printable
from ibq_jax.data.tar_shards import tar_shards as shards_of

PNG, JPEG, WEBP = (noise_file(0, 4, 4, form) for form in ("PNG", "JPEG", "WEBP"))


def labels(collection: ImageCollection) -> dict[str, tuple[str, int | None]]:
    """Returns {name: (split, label)} of all examples, which must be readable."""
    found = {}
    for example in collection.examples():
        decode_image(example.read())
        assert example.name not in found
        found[example.name] = (example.split, example.label)
    return found


# --- splitting by name


def test_held_out_takes_a_fraction_of_every_class_by_name_alone():
    names = {0: [f"a{i}" for i in range(100)], 1: [f"b{i}" for i in range(7)], 2: ["c"], 3: ["d", "e"]}
    chosen = held_out(names, 0.1)
    assert [len(chosen & set(names[label])) for label in names] == [10, 1, 0, 1]
    assert chosen == held_out({label: names[label][::-1] for label in reversed(names)}, 0.1)
    assert held_out(names, 0.0) == frozenset()
    assert held_out({0: ["x", "y"]}, 0.99) == held_out({0: ["x", "y"]}, 0.5)  # never a whole class


def test_is_held_out_keeps_its_choice_as_the_fraction_grows():
    names = [f"shard:{i}.jpg" for i in range(4_000)]
    small = {name for name in names if is_held_out(name, 0.05)}
    large = {name for name in names if is_held_out(name, 0.2)}
    assert small < large
    assert 150 < len(small) < 250  # 200 expected, standard deviation 14
    assert not any(is_held_out(name, 0.0) for name in names)


def test_printable_names_cannot_write_to_a_terminal():
    assert printable("café/ü.png") == "café/ü.png"
    assert printable("a\x1b[2J\nb\udcff") == "a\\x1b[2J\\nb\\udcff"


# --- openmoji


@pytest.fixture(scope="module")
def emoji():
    return openmoji(16)


def test_openmoji_has_1898_images_in_9_categories(emoji):
    examples = list(emoji.examples())
    assert len(examples) == emoji.total == 1898
    assert len({example.name for example in examples}) == 1898
    assert emoji.class_names == (
        "Activities",
        "Animals & Nature",
        "Flags",
        "Food & Drink",
        "Objects",
        "People & Body",
        "Smileys & Emotion",
        "Symbols",
        "Travel & Places",
    )
    assert not any(re.search("1F3F[B-F]", example.name) for example in examples)  # no skin tones
    by_name = {example.name: emoji.class_names[example.label] for example in examples}
    assert by_name["1F600.svg"] == "Smileys & Emotion"
    assert by_name["1F40D.svg"] == "Animals & Nature"
    assert by_name["2764.svg"] == "Smileys & Emotion"  # stored without the variation selector
    assert by_name["0023-FE0F-20E3.svg"] == "Symbols"  # stored with it


def test_openmoji_holds_out_a_tenth_of_every_category_at_every_size(emoji):
    split = {example.name: (example.split, example.label) for example in emoji.examples()}
    assert split == {example.name: (example.split, example.label) for example in openmoji(64).examples()}
    counts = Counter(split.values())
    for label in range(9):
        held, kept = counts["validation", label], counts["train", label]
        assert held == round(0.1 * (held + kept))


def test_openmoji_renders_colour_on_white(emoji):
    [heart] = [example for example in emoji.examples() if example.name == "2764.svg"]
    image = decode_image(heart.read())
    assert image.shape == (16, 16, 3)
    np.testing.assert_array_equal(image[[0, 0, -1, -1], [0, -1, 0, -1]], 255)
    red, green, blue = image[8, 8]
    assert red > 200 and green < 100 and blue < 100


def test_openmoji_is_attributed(emoji):
    assert "OpenMoji" in emoji.description
    assert emoji.license.startswith("CC BY-SA 4.0")


@pytest.mark.parametrize("size", [0, 4096])
def test_openmoji_sizes_have_bounds(size):
    with pytest.raises(UsageError, match=f"{size}.*8 to 2048"):
        openmoji(size)


# --- folders


def write(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(PNG)
    return root


def test_a_folder_of_class_folders(tmp_path):
    write(tmp_path, "dog/1.PNG", "dog/deep/er/2.png", "cat/1.jpeg", "cat/.hidden.png", "cat/notes.txt", "empty/x.txt")
    collection = image_folder(tmp_path, "pets", validation=0)
    assert collection.class_names == ("cat", "dog")
    assert labels(collection) == {
        "cat/1.jpeg": ("train", 0),
        "dog/1.PNG": ("train", 1),
        "dog/deep/er/2.png": ("train", 1),
    }


def test_a_folder_without_classes(tmp_path):
    collection = image_folder(write(tmp_path, *(f"{i:02}.png" for i in range(40))), "flat", validation=0.1)
    found = labels(collection)
    assert collection.class_names == ()
    assert Counter(found.values()) == {("train", None): 36, ("validation", None): 4}


def test_the_split_of_a_folder_depends_on_names_below_it_only(tmp_path):
    paths = [f"{name}/{i}.png" for name in "ab" for i in range(30)]
    here = labels(image_folder(write(tmp_path / "here", *paths), "x"))
    there = labels(image_folder(write(tmp_path / "there" / "deeper", *reversed(paths)), "y"))
    assert here == there


@pytest.mark.parametrize("val", ["val", "validation"])
def test_train_and_val_folders_are_the_splits(tmp_path, val):
    write(tmp_path, "train/b/1.png", "train/a/2.png", f"{val}/b/3.png", f"{val}/c/4.png")
    collection = image_folder(tmp_path, "split")
    assert collection.class_names == ("a", "b", "c")
    assert labels(collection) == {
        "train/a/2.png": ("train", 0),
        "train/b/1.png": ("train", 1),
        f"{val}/b/3.png": ("validation", 1),
        f"{val}/c/4.png": ("validation", 2),
    }


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["a/1.png", "2.png"], r"class folders \(a/1.png\) and next to them \(2.png\)"),
        (["readme.txt"], "holds no images .*png"),
        (["train/1.png", "val/2.png", "validation/3.png"], "both val and validation"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path, paths, message):
    with pytest.raises(UsageError, match=message):
        image_folder(write(tmp_path, *paths), "x")


def test_a_missing_folder(tmp_path):
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        image_folder(tmp_path / "nowhere", "x")


# --- tar shards


def write_shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    return write_tar(path, members.items(), mode)


def test_shards_with_class_numbers(tmp_path):
    write_shard(
        tmp_path / "b.tar",
        {"1.jpg": JPEG, "1.cls": b"4\n", "2.cls": b"0", "2.webp": WEBP},
    )
    write_shard(tmp_path / "a.tar.gz", {"x/1.seg.png": b"", "x/1.png": PNG, "x/1.cls": b"1", "x/1.txt": b"hi"}, "w:gz")
    collection = shards_of(str(tmp_path / "*.tar*"), "n", validation=0)
    assert collection.class_names == ("0", "1", "2", "3", "4")
    assert collection.total == 3
    assert [(example.name, example.label) for example in collection.examples()] == [
        ("a.tar.gz:x/1.png", 1),
        ("b.tar:1.jpg", 4),
        ("b.tar:2.webp", 0),
    ]
    labels(collection)


def test_shards_with_class_names_in_json(tmp_path):
    dog, cat = (json.dumps({"label": label, "width": 4}).encode() for label in ("dog", "cat"))
    write_shard(
        tmp_path / "s.tar",
        {"1.png": PNG, "1.json": dog, "2.png": PNG, "2.json": cat},
    )
    collection = shards_of(str(tmp_path / "s.tar"), "n", validation=0)
    assert collection.class_names == ("cat", "dog")
    assert labels(collection) == {"s.tar:1.png": ("train", 1), "s.tar:2.png": ("train", 0)}


def test_shards_without_classes_are_split_by_name(tmp_path):
    captioned = {f"{i:03}.{suffix}": content for i in range(100) for suffix, content in (("png", PNG), ("json", b"{}"))}
    write_shard(tmp_path / "s.tar", captioned)
    found = labels(shards_of(str(tmp_path / "s.tar"), "n", validation=0.2))
    assert {label for _, label in found.values()} == {None}
    assert {name for name, (split, _) in found.items() if split == "validation"} == {
        name for name in found if is_held_out(name, 0.2)
    }
    assert 5 < sum(split == "validation" for split, _ in found.values()) < 40


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.png": PNG, "1.cls": b"3", "2.png": PNG}, "3 at s.tar:1 and None at s.tar:2"),
        ({"1.png": PNG, "1.cls": b"3", "2.png": PNG, "2.cls": b"dog"}, "3 at s.tar:1 and 'dog' at s.tar:2"),
        ({"1.png": PNG, "1.cls": b"99999999999"}, "label 99999999999 at s.tar:1 is not in 0"),
        ({"1.png": PNG, "1.json": b'{"cls": -1}'}, "label -1 at s.tar:1 is not in 0"),
        ({"1.txt": b"a caption"}, "no images"),
    ],
)
def test_shards_that_are_no_data_set(tmp_path, members, message):
    write_shard(tmp_path / "s.tar", members)
    with pytest.raises(UsageError, match=message):
        shards_of(str(tmp_path / "*.tar"), "n")


def test_no_shard_matches(tmp_path):
    with pytest.raises(UsageError, match=r"no file matches .*none-\*.tar"):
        shards_of(str(tmp_path / "none-*.tar"), "n")


def test_hostile_members_are_data_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_tar(
        tmp_path / "s.tar",
        [
            ("../../evil.png", PNG),
            (f"{tmp_path}/absolute.png", PNG),
            ("same.png", PNG),
            ("other.png", PNG),
            ("same.png", PNG),
            ("deep.json", b"[" * 100_000),
            ("deep.png", PNG),
        ],
    )
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    names = [example.name for example in shards_of("s.tar", "n").examples()]
    assert names == [
        "s.tar:../../evil.png",
        f"s.tar:{tmp_path}/absolute.png",
        "s.tar:same.png",
        "s.tar:other.png",
        "s.tar:same.png",
        "s.tar:deep.png",
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.tar"]


def test_oversized_members_are_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_shards, "MAX_ENCODED_BYTES", 1_000)
    write_shard(tmp_path / "s.tar", {"1.png": bytes(5_000_000)})
    [example] = shards_of(str(tmp_path / "s.tar"), "n").examples()
    assert len(example.read()) == 1_001


@pytest.mark.parametrize("keep", [2_000, 3])
def test_a_shard_that_breaks_off_is_named_and_the_rest_is_read(tmp_path, keep):
    whole = write_shard(tmp_path / "a.tar", {"1.png": PNG, "2.png": np.random.default_rng(0).bytes(9_000)}).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:keep])
    write_shard(tmp_path / "b.tar", {"1.png": PNG})
    *readable, broken, last = shards_of(str(tmp_path / "*.tar"), "n").examples()
    assert [example.name for example in readable] == (["a.tar:1.png"] if keep == 2_000 else [])
    assert (broken.name, last.name) == ("a.tar", "b.tar:1.png")
    with pytest.raises(UnreadableImage, match="the rest of the shard is unreadable: "):
        broken.read()


# --- ImageNet


def test_imagenet_has_tfds_labels(tmp_path):
    collection = imagenet2012(fake_imagenet(tmp_path))
    builder = tfds.builder("imagenet2012", data_dir=tmp_path)
    assert collection.class_names == tuple(builder.info.features["label"].names)
    assert (collection.name, collection.version) == (builder.name, str(builder.version))
    validation = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    synset = collection.class_names.index
    assert labels(collection) == {
        "n01443537_0.JPEG": ("train", 1),
        "n01443537_1.JPEG": ("train", 1),
        "n01440764_0.JPEG": ("train", 0),
        "n01440764_1.JPEG": ("train", 0),
        "ILSVRC2012_val_00000003.JPEG": ("validation", synset(validation[2])),
        "ILSVRC2012_val_00000001.JPEG": ("validation", synset(validation[0])),
        "ILSVRC2012_val_00050000.JPEG": ("validation", synset(validation[-1])),
    }


def test_imagenet_names_the_missing_tar(tmp_path):
    fake_imagenet(tmp_path)
    (tmp_path / VALIDATION_TAR).unlink()
    with pytest.raises(UsageError, match=f"lacks {VALIDATION_TAR}: .*image-net.org"):
        imagenet2012(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TRAIN_TAR, {"n99999999.tar": b""}, "'n99999999.tar', which is not an ILSVRC 2012 synset"),
        (VALIDATION_TAR, {"cat.JPEG": PNG}, "'cat.JPEG', which is not an ILSVRC 2012 validation image"),
        (VALIDATION_TAR, {"ILSVRC2012_val_00050001.JPEG": PNG}, "not an ILSVRC 2012 validation image"),
    ],
)
def test_imagenet_tars_with_something_else_in_them(tmp_path, name, content, message):
    write_shard(fake_imagenet(tmp_path) / name, content)
    with pytest.raises(UsageError, match=message):
        list(imagenet2012(tmp_path).examples())


@pytest.mark.parametrize("name", [TRAIN_TAR, VALIDATION_TAR])
def test_a_broken_imagenet_tar_is_an_error(tmp_path, name):
    path = fake_imagenet(tmp_path) / name
    path.write_bytes(path.read_bytes()[:1_100])
    with pytest.raises(UsageError, match=f"{name} is broken .*: download it again"):
        list(imagenet2012(tmp_path).examples())
