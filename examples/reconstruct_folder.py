"""Reconstructs a folder of photographs with a trained tokenizer, and writes originals and reconstructions side by side.

It shows how to load a tokenizer (a run, a published file or hf://OWNER/NAME), turn images into codes and codes into
images. It needs no GPU: a small tokenizer takes milliseconds per image on a CPU, a published one of 256 pixels seconds.

    python examples/reconstruct_folder.py --tokenizer=runs/quickstart/tokenizer --images=photos --out=sheet.png
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from ibq_jax import Tokenizer
from ibq_jax.data.preprocess import centre_crop, decode_image, resize_shorter_side, to_uint8
from ibq_jax.data.sources import IMAGE_SUFFIXES
from ibq_jax.evaluate.contact_sheet import contact_sheet
from ibq_jax.evaluate.image_metrics import psnr


def load_images(folder: Path, size: int, limit: int) -> np.ndarray:
    """Returns the first images of a folder, resized and cropped to squares, as uint8 [B, size, size, 3]."""
    files = sorted(path for path in folder.iterdir() if path.suffix[1:].lower() in IMAGE_SUFFIXES)[:limit]
    if not files:
        raise SystemExit(f"{folder} holds no images")
    images = [resize_shorter_side(decode_image(file.read_bytes()), size) for file in files]
    return np.stack([centre_crop(image, size) for image in images])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="run, file of weights, or hf://OWNER/NAME")
    parser.add_argument("--images", required=True, type=Path, help="folder of images")
    parser.add_argument("--out", type=Path, default=Path("reconstructions.png"), help="sheet to write")
    parser.add_argument("--size", type=int, default=0, help="side in pixels (default: what the tokenizer is made for)")
    parser.add_argument("--limit", type=int, default=8, help="number of images (default: 8)")
    arguments = parser.parse_args(argv)

    tokenizer = Tokenizer.load(arguments.tokenizer)
    images = load_images(arguments.images, arguments.size or tokenizer.model.resolution, arguments.limit)
    codes = [tokenizer.encode(image[None]) for image in images]  # one by one: activations of one image in memory
    reconstructions = np.concatenate([to_uint8(tokenizer.decode(code)) for code in codes])

    codes = np.concatenate(codes)
    decibels = np.mean(psnr(images / np.float32(255), reconstructions / np.float32(255)))
    print(f"{len(images)} images of {codes.shape[1]}x{codes.shape[2]} codes: mean PSNR {decibels:.2f} dB,")
    print(f"{len(np.unique(codes)):,} of {tokenizer.codebook_size:,} codes in use")
    sheet = contact_sheet(np.stack([images, reconstructions]), ["image", "reconstruction"])
    Image.fromarray(sheet).save(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
