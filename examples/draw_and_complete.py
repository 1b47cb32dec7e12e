"""Draws samples of some classes with a trained generator, and completes the lower half of an image.

It shows how a generator and its tokenizer work together: classes become codes, codes become images, and given codes of
the upper half continue downwards. On a CPU the quickstart's generator takes about a second per image.

    python examples/draw_and_complete.py --generator=runs/quickstart/generator --tokenizer=runs/quickstart/tokenizer \
        --labels=0,3,7 --image=photo.jpg --out=sheet.png
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from ibq_jax import Generator, Tokenizer
from ibq_jax.data.preprocess import centre_crop, decode_image, resize_shorter_side, to_uint8
from ibq_jax.evaluate.contact_sheet import contact_sheet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, help="generator's run or file")
    parser.add_argument("--tokenizer", required=True, help="run or file of the tokenizer that made its codes")
    parser.add_argument("--labels", default="0", help="classes to draw, such as 0,3,7 (default: 0)")
    parser.add_argument("--image", type=Path, help="image whose upper half is completed, as the first of the classes")
    parser.add_argument("--columns", type=int, default=6, help="samples per row (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="sheet to write")
    arguments = parser.parse_args(argv)

    generator, tokenizer = Generator.load(arguments.generator), Tokenizer.load(arguments.tokenizer)
    labels = [int(label) for label in arguments.labels.split(",")]
    rows = []
    for label in labels:
        codes = generator.sample(np.full(arguments.columns, label), cfg_scale=2.0, seed=arguments.seed)  # [B, h, w]
        rows.append(to_uint8(tokenizer.decode(codes)))
    names = [f"class {label}" for label in labels]

    if arguments.image is not None:
        size = tokenizer.model.resolution
        image = centre_crop(resize_shorter_side(decode_image(arguments.image.read_bytes()), size), size)
        codes = np.asarray(tokenizer.encode(image[None]))
        upper = np.repeat(codes[:, : codes.shape[1] // 2], arguments.columns - 1, axis=0)  # [B, h/2, w]
        completed = generator.sample(np.full(len(upper), labels[0]), cfg_scale=2.0, seed=arguments.seed, prefix=upper)
        rows.append(np.concatenate([image[None], to_uint8(tokenizer.decode(completed))]))
        names.append("completed")

    Image.fromarray(contact_sheet(np.stack(rows), names)).save(arguments.out)
    print(
        f"wrote {arguments.out}: one row per class" + (", then the image and its completions" * bool(arguments.image))
    )


if __name__ == "__main__":
    main()
