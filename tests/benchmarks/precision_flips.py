"""How many codes change at lower precisions? Prints a table in markdown.

    python tests/benchmarks/precision_flips.py --run=runs/quickstart/tokenizer --images=189
    python tests/benchmarks/precision_flips.py --preset=imagenet256_262144 --photographs

Operands of products are rounded on this CPU to the bits that a precision multiplies, which is what those machines do to
one product. "logits" rounds those of latents and codes only, "encoder" those of the encoder's convolutions too, and
"bfloat16 activations" is the encoder that holds its activations in bfloat16, as `--precision=bfloat16` does. Codes are
compared with float32 throughout. --preset takes made-up weights: latents are scaled to the length of codes, because
those of an untrained encoder are nearly equal.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ibq_jax.base.config import load_config
from ibq_jax.data.pipeline import decode_record, open_split
from ibq_jax.data.preprocess import centre_crop, resize_shorter_side, to_float
from ibq_jax.ops import nearest_codes
from ibq_jax.tokenizer.autoencoder import Conv
from ibq_jax.tokenizer.model import TokenizerModel, build_model
from ibq_jax.tokenizer.restore import restore_run

BITS = {"3 passes": 16, "TF32": 11, "bfloat16": 8}
PHOTOGRAPHS = ("astronaut", "cat", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field", "immunohistochemistry")


def rounded(x: jax.Array, bits: int) -> jax.Array:
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits - 1)


def latent_function(model: TokenizerModel, bits: int) -> Callable:
    """Returns a function of parameters and images whose convolutions multiply so many bits of their operands."""

    def round_inputs(call, args, kwargs, context):
        if isinstance(context.module, Conv) and context.method_name == "__call__":
            args = (rounded(args[0], bits), *args[1:])
        return call(*args, **kwargs)

    def latent(params, images):
        kernels = jax.tree.map(lambda leaf: rounded(leaf, bits) if leaf.ndim == 4 else leaf, params)
        with nn.intercept_methods(round_inputs):
            return model.apply({"params": kernels}, images, method="latent")

    return jax.jit(latent)


def flips(model: TokenizerModel, params, images: np.ndarray, scale: bool) -> list[tuple[str, str, float]]:
    """Returns (precision, where, share of codes that change) for images uint8 [N, H, W, 3]."""
    model = model.clone(mesh=None).for_encoding("float32")
    codebook = params["quantize"]["codebook"]
    length = jnp.linalg.norm(codebook, axis=1).mean()

    def codes(latent, bits):
        z = latent.reshape(-1, latent.shape[-1])
        if scale:
            z = z - z.mean(axis=0)
            z = z / jnp.linalg.norm(z, axis=1).mean() * length
        return np.asarray(nearest_codes(rounded(z, bits), rounded(codebook, bits)))

    def latents(function):
        return jnp.concatenate([function(params, to_float(image[None])) for image in images])

    full = latents(latent_function(model, 24))
    expected = codes(full, 24)
    rows = []
    for name, bits in BITS.items():
        rows.append((name, "logits", np.mean(codes(full, bits) != expected)))
        rows.append((name, "encoder", np.mean(codes(latents(latent_function(model, bits)), bits) != expected)))
    low = model.for_encoding("bfloat16")
    activations = latents(jax.jit(lambda params, images: low.apply({"params": params}, images, method="latent")))
    rows.append(("bfloat16", "bfloat16 activations", np.mean(codes(activations, 8) != expected)))
    return rows


def photographs(size: int) -> np.ndarray:
    """Returns the colour photographs that come with scikit-image, cropped to `size` pixels."""
    from skimage import data

    images = []
    for name in PHOTOGRAPHS:
        try:
            image = np.asarray(getattr(data, name)())[..., :3]
        except OSError:  # not part of the package, and not downloaded
            continue
        images.append(centre_crop(resize_shorter_side(image, size), size))
    return np.stack(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="A tokenizer's run; its validation images are encoded.")
    source.add_argument("--preset", help="A preset of configs/tokenizer.py, with made-up weights.")
    parser.add_argument("--codes", type=int, default=0, help="Codes in place of the preset's. Default: the preset's.")
    parser.add_argument("--images", type=int, default=64, help="Images of the validation split. Default: 64.")
    parser.add_argument("--photographs", action="store_true", help="Encode scikit-image's photographs instead.")
    flags = parser.parse_args()
    if flags.run:
        trainer, restored = restore_run(flags.run)
        model, params, config = trainer.model, restored.state.ema, trainer.config
    else:
        overrides = [f"--config.codebook.size={flags.codes}"] if flags.codes else []
        config = load_config(f"configs/tokenizer.py:{flags.preset}", overrides)
        model = build_model(config)
        blank = jnp.zeros((1, 32, 32, 3))
        params = nn.meta.unbox(jax.jit(lambda: model.init(jax.random.key(0), blank, method="initialize"))()["params"])
    size = config.data.image_size
    if flags.photographs:
        images = photographs(size)
    else:
        split = open_split(config.data.name, config.data.dir, config.data.validation_split)
        images = np.stack(
            [
                centre_crop(resize_shorter_side(decode_record(split[i], str(split)), config.data.resize), size)
                for i in range(min(flags.images, len(split)))
            ]
        )
    rows = flips(model, params, images, scale=not flags.run)
    tokens = len(images) * (size // 2 ** (len(config.model.channel_multipliers) - 1)) ** 2
    print(f"{flags.run or flags.preset}, {model.codebook_size:,} codes, {tokens:,} tokens")
    print("| operands | rounded | codes that change |\n|---|---|---|")
    for name, where, share in rows:
        print(f"| {name} | {where} | {100 * share:.3f}% |")


if __name__ == "__main__":
    main()
