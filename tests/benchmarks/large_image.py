"""Measures the peak memory of encoding one large image with Emu3.5's tokenizer, in float32.

    python tests/benchmarks/large_image.py [--side=2048] [--compare=512]

The tokenizer has the sizes of `emu35_131072` (455 M parameters) and made-up weights, which a process of its own writes.
Its encoder and codebook are loaded. The image is a photograph of scikit-image's, enlarged. The peak is that of the
whole process: Python, JAX, the weights and the program. With --compare, an image of that many pixels a side is encoded
by bands of rows and on whole arrays, and codes are compared.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import skimage
from PIL import Image

from ibq_jax import Tokenizer
from ibq_jax.ops import row_bands
from ibq_jax.tokenizer import autoencoder
from ibq_jax.tokenizer.parts import DECIDING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--compare", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=Path("made_up"), help="Written if it does not exist.")
    flags = parser.parse_args()
    if not flags.weights.exists():
        write = "import sys, pathlib, onnx_codes; onnx_codes.write_made_up(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", write, flags.weights.resolve()], cwd=Path(__file__).parent, check=True)
    tokenizer = Tokenizer.load(flags.weights, parts=DECIDING)
    photograph = Image.open(Path(skimage.__file__).parent / "data" / "retina.jpg")
    report("with the weights loaded")
    if flags.compare:
        compare(tokenizer, photograph.resize((flags.compare, flags.compare), Image.Resampling.BICUBIC))
    image = photograph.resize((flags.side, flags.side), Image.Resampling.BICUBIC)
    start = time.time(), time.process_time()
    codes = np.asarray(tokenizer.encode_image(image, min_pixels=flags.side**2, max_pixels=flags.side**2))
    elapsed, worked = time.time() - start[0], time.process_time() - start[1]
    print(
        f"{codes.shape} codes, {len(set(codes.flat)):,} different ones, in {elapsed:,.0f} s, {worked:,.0f} CPU seconds"
    )
    report("in all")


def report(when: str) -> None:
    print(f"peak memory {when}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB", flush=True)


def compare(tokenizer: Tokenizer, image: Image.Image) -> None:
    """Says how many codes differ, and by how much the latents do, with a block on whole arrays and in bands."""
    pixels = np.asarray(image, np.float32)[None] / 127.5 - 1
    found = {}
    for name, most in (("whole", image.width**2), ("bands", image.width**2 - 1)):
        autoencoder.MOST_PIXELS = most
        row_bands.PIXELS_AT_ONCE = 64 * image.width
        jax.clear_caches()
        latents = jax.jit(lambda params, x: tokenizer.model.apply({"params": params}, x, method="latent"))
        found[name] = np.asarray(tokenizer.encode(pixels)), np.asarray(latents(tokenizer.params, pixels))
    (codes, latents), (others, close) = found.values()
    error = np.abs(latents - close).max() / np.abs(latents).max()
    print(
        f"{image.size}: {(codes != others).sum()} of {codes.size:,} codes differ, latents by {error:.1e} of the largest"
    )


if __name__ == "__main__":
    main()
