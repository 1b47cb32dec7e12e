"""A small folder of images of mixed sizes with texts and bad files, and a stand-in for a tokenizer's encoder."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ibq_jax.data.raw_images import ImageParts, find_images
from ibq_jax.tokenizer.tokenize_mixed import MixedJob
from support.image_files import encode, noise, noise_file, write_tar

SIZES = ((12, 20), (16, 16), (20, 12))  # (height, width)
COUNT = 10  # readable images


def readable() -> dict[str, bytes]:
    """Returns {name: file} of images of three sizes."""
    return {f"{i:02}.png": noise_file(i, *SIZES[i % 3]) for i in range(COUNT)}


def unreadable() -> dict[str, bytes]:
    """Returns {name: file} of images that are skipped."""
    jpeg = encode(Image.fromarray(noise(0, 40, 40)), "JPEG")
    thin = encode(Image.new("RGB", (1, 5000)))
    return {"03_cut.jpg": jpeg[: len(jpeg) // 2], "05_junk.png": b"junk", "07_thin.png": thin}


def write_folder(folder: Path) -> str:
    """Writes all of them, a caption and metadata; returns the folder's path."""
    folder.mkdir()
    for name, content in {**readable(), **unreadable()}.items():
        (folder / name).write_bytes(content)
    (folder / "01.txt").write_text("a caption, with ümlaut")
    (folder / "01.json").write_text(json.dumps({"label": 3}))
    (folder / "02.npy").write_bytes(b"\xff\xfe\x00")  # no text
    return str(folder)


def write_shards(folder: Path) -> str:
    """Writes two shards, the second one cut off; returns their pattern."""
    folder.mkdir()
    members = [(name, content) for name, content in readable().items()]
    texts = [("01.txt", b"a caption"), ("01.cls", b"4"), ("01.bin", b"\xff")]
    write_tar(folder / "0.tar", [*members[:2], *texts, *unreadable().items()])
    write_tar(folder / "1.tar", members[2:])
    content, last = (folder / "1.tar").read_bytes(), readable()["05.png"]
    (folder / "1.tar").write_bytes(content[: content.index(last) + len(last) // 2])
    return str(folder / "*.tar")


def job(images: ImageParts | str, max_shapes: int = 24, **fields) -> MixedJob:
    """Returns a job of small areas and small batches."""
    images = find_images(images) if isinstance(images, str) else images
    options = dict(min_pixels=100, max_pixels=400, batch_tokens=200, num_threads=2)
    return MixedJob(images, max_shapes=max_shapes, **options | fields)


def brightness_codes(pixels: np.ndarray) -> np.ndarray:
    """Stands in for an encoder of 2 pixels a code: uint8 [B, H, W, 3] -> one pixel's red >> 2, int32 [B, h, w]."""
    return (pixels[:, ::2, ::2, 0] >> 2).astype(np.int32)
