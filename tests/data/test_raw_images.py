"""Images with their texts from folders and tar shards, good and bad ones."""

import io
import os

import numpy as np
import pytest
from PIL import Image
from support.image_files import noise, noise_file, write_tar
from support.mixed_images import SIZES, readable, unreadable, write_folder, write_shards

from ibq_jax.base.errors import UsageError
from ibq_jax.data import raw_images
from ibq_jax.data.any_size import stated_size
from ibq_jax.data.preprocess import UnreadableImage
from ibq_jax.data.raw_images import find_images


def found(where: str) -> dict:
    parts = find_images(where).parts
    return {raw.name: raw for part in parts for raw in part.images_with_texts()}


def test_a_folders_images_come_with_the_texts_of_their_name(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_images, "IMAGES_PER_PART", 4)
    where = write_folder(tmp_path / "in")
    (tmp_path / "in" / ".hidden.png").write_bytes(noise_file(0))
    (tmp_path / "in" / "deep").mkdir()
    (tmp_path / "in" / "deep" / "a.b.png").write_bytes(noise_file(1))
    (tmp_path / "in" / "deep" / "a.b.txt").write_text("b")
    (tmp_path / "in" / "deep" / "a.txt").write_text("another one's")
    images = found(where)
    files = {**readable(), **unreadable(), "deep/a.b.png": noise_file(1)}
    assert list(images) == sorted(files)
    assert {name: raw.encoded for name, raw in images.items()} == files
    assert images["01.png"].texts == {"txt": "a caption, with ümlaut", "json": '{"label": 3}'}
    assert images["02.png"].texts == {} and images["deep/a.b.png"].texts == {"txt": "b"}
    assert [len(part.images) for part in find_images(where).parts] == [3, 4, 3, 4]


def test_shards_images_come_with_the_members_of_their_key(tmp_path):
    images = found(write_shards(tmp_path / "in"))
    assert images["0.tar:01.png"].encoded == readable()["01.png"]
    assert images["0.tar:01.png"].texts == {"txt": "a caption", "cls": "4"}
    broken = images["1.tar"]
    assert isinstance(broken.encoded, UnreadableImage) and "the rest of the shard" in str(broken.encoded)
    assert 0 < sum(name.startswith("1.tar:") for name in images) < 8
    assert found(str(tmp_path / "in")).keys() == images.keys()  # a folder of shards


@pytest.mark.parametrize("write", [write_folder, write_shards])
def test_sizes_are_counted_from_the_heads_of_files(write, tmp_path):
    images = find_images(write(tmp_path / "in"))
    counts = sum(
        (images.size_counts(number) for number in range(len(images.parts))), start=type(images.size_counts(0))()
    )
    whole = [raw for part in images.parts for raw in part.images_with_texts() if isinstance(raw.encoded, bytes)]
    expected = [Image.open(io.BytesIO(raw.encoded)).size for raw in whole if raw.encoded != b"junk"]
    for size in {*SIZES}:
        assert counts[size[::-1]] == expected.count(size[::-1]) > 0
    assert counts[(1, 5000)] == counts[(40, 40)] == counts[None] == 1


def test_a_size_behind_a_long_profile_and_a_turned_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(noise(0, 24, 40))
    image.save(tmp_path / "long.jpg", icc_profile=os.urandom(200_000))
    for name in ("turned0.jpg", "turned1.png", "turned2.webp"):
        image.save(tmp_path / name, exif=exif)
    members = [(path.name, path.read_bytes()) for path in sorted(tmp_path.iterdir())]
    with pytest.raises(OSError, match=r"."):
        stated_size(io.BytesIO(members[0][1][: raw_images.HEAD_BYTES]))
    write_tar(tmp_path / "a.tar", members)
    for where in (str(tmp_path), str(tmp_path / "a.tar")):
        assert find_images(where).size_counts(0) == {(40, 24): 1, (24, 40): 3}


def test_the_digest_tells_other_images(tmp_path):
    where = write_folder(tmp_path / "in")
    before = find_images(where).digest
    assert find_images(where).digest == before
    (tmp_path / "in" / "new.png").write_bytes(b"")
    assert find_images(where).digest != before


def test_what_is_no_source_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for where, words in ((tmp_path / "empty", "holds no images"), (tmp_path / "*.tar", "no file matches it")):
        with pytest.raises(UsageError, match=words):
            find_images(str(where))


def test_pipes_and_links_to_nothing_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "lost.png").symlink_to("nowhere")
    images = found(str(tmp_path))
    assert {name: str(raw.encoded) for name, raw in images.items()} == {
        "lost.png": "No such file or directory",
        "pipe.png": "not a regular file",
    }
    assert find_images(str(tmp_path)).size_counts(0) == {None: 2}
    assert np.all([isinstance(raw.encoded, UnreadableImage) for raw in images.values()])
