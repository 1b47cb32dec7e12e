"""Vision transformers in JAX, as frozen networks: DINO (arXiv 2104.14294), DINOv2 (2304.07193), SigLIP (2303.15343).

Shapes: images float [B, H, W, 3] in [0, 1], sides multiples of the patch; h x w patches, T = 1 + h * w tokens of C
channels, the first of which stands for the image; SigLIP has none for the image, T = h * w. DINO's and DINOv2's files
are the authors' or timm's, whose tensors have the same names; SigLIP's are those of transformers, or timm's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import FULL
from ibq_jax.pretrained.normalisation import normalise_layer, standardised
from ibq_jax.pretrained.patches import convolve_patches
from ibq_jax.pretrained.tensor_files import read_tensors

MLP = 4  # width of a block's inner layer, as a multiple of C
# Starts of the names of tensors that files may have: those of training alone, and SigLIP's pooling and its text model.
UNUSED = ("mask_token", "head.", "attn_pool.", "vision_model.head.", "text_model.", "logit_scale", "logit_bias")


@dataclass(frozen=True)
class Form:
    """The sizes of a vision transformer.

    Attributes:
        title: its name in words.
        width: C.
        blocks: their number.
        heads: of the attention.
        patch: pixels of a patch's side.
        side: pixels of the images that the position embedding is for.
        scaled: whether each branch is multiplied by a learned vector, as in DINOv2.
        depths: blocks after which `maps` takes the tokens, counted from 1; 0: before the first.
        siglip: whether it has no token for the image, pixels in [-1, 1], and GELU by tanh.
    """

    title: str
    width: int
    blocks: int
    heads: int
    patch: int
    side: int
    scaled: bool
    depths: tuple[int, ...]
    siglip: bool = False


SHALLOW, DEEP = (0, 3, 6, 9, 12), (0, 6, 12, 18, 24)  # VAR's discriminator looks at these of DINO
FORMS = {
    "dino_vits16": Form("DINO ViT-S/16", 384, 12, 6, 16, 224, False, SHALLOW),
    "dinov2_vits14": Form("DINOv2 ViT-S/14", 384, 12, 6, 14, 518, True, SHALLOW),
    "dinov2_vitb14": Form("DINOv2 ViT-B/14", 768, 12, 12, 14, 518, True, SHALLOW),
    "dinov2_vitl14": Form("DINOv2 ViT-L/14", 1024, 24, 16, 14, 518, True, DEEP),
    "siglip_vitb16": Form("SigLIP ViT-B/16", 768, 12, 12, 16, 224, False, SHALLOW, siglip=True),
    "siglip_vitl16": Form("SigLIP ViT-L/16", 1024, 24, 16, 16, 256, False, DEEP, siglip=True),
}


def load_weights(path: str | Path, kind: str) -> dict:
    """Reads the weights of one of `FORMS`, float32, as the tree of `weight_shapes`.

    Raises UsageError if the file cannot be read, lacks a tensor, has an unknown one, or one of another shape.
    """
    tensors, form = _under_timm_names(read_tensors(path)), FORMS[kind]

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise UsageError(f"{path}: not {form.title}: it has no tensor {name}")
        if tensors[name].shape != shape:
            raise UsageError(f"{path}: not {form.title}: {name} has shape {tensors[name].shape}, not {shape}")
        return tensors.pop(name).astype(np.float32)

    def read(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        *layers, last = (jax.tree_util.keystr((part,), simple=True) for part in path)
        shape = leaf.shape
        if last == "kernel":  # PyTorch has the outputs first
            shape = shape[::-1] if len(shape) == 2 else (shape[3], shape[2], *shape[:2])
            kernel = take(".".join([*layers, "weight"]), shape)
            return kernel.T if kernel.ndim == 2 else kernel.transpose(2, 3, 1, 0)
        return take(".".join([*layers, "weight" if last == "scale" else last]), shape)

    weights = jax.tree_util.tree_map_with_path(read, weight_shapes(kind))
    unknown = [name for name in tensors if not name.startswith(UNUSED)]
    if unknown:
        raise UsageError(f"{path}: not {form.title}: it has a tensor {unknown[0]}")
    return weights


# Names in the files of transformers -> timm's.
RENAMED = (
    (r"vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"vision_model\.embeddings\.position_embedding\.weight", "pos_embed"),
    (r"vision_model\.post_layernorm\.", "norm."),
    (r"vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"blocks.\1.norm\2."),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.", r"blocks.\1.attn."),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
)


def _under_timm_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of a file of transformers under timm's names, those of other files as they are."""
    found = dict(tensors)
    for name in tensors:
        timm_name = name
        for pattern, replacement in RENAMED:
            timm_name = re.sub(pattern, replacement, timm_name)
        found[timm_name] = found.pop(name)
    for name in [name for name in found if ".attn.q_proj." in name]:
        parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if all(part in found for part in parts):
            found[name.replace("q_proj", "qkv")] = np.concatenate([found.pop(part) for part in parts])
    if "pos_embed" in found and found["pos_embed"].ndim == 2:
        found["pos_embed"] = found["pos_embed"][None]
    return found


def weight_shapes(kind: str) -> dict:
    """Returns the shapes and types of the result of `load_weights`, under the files' names, without a file."""
    form = FORMS[kind]
    c, positions = form.width, (form.side // form.patch) ** 2

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def affine(*kernel: int) -> dict:
        return {"kernel": array(*kernel), "bias": array(kernel[-1])}

    def norm() -> dict:
        return {"scale": array(c), "bias": array(c)}

    def block() -> dict:
        attention = {"qkv": affine(c, 3 * c), "proj": affine(c, c)}
        mlp = {"fc1": affine(c, MLP * c), "fc2": affine(MLP * c, c)}
        scales = {name: {"gamma": array(c)} for name in ("ls1", "ls2")} if form.scaled else {}
        return {"norm1": norm(), "attn": attention, "norm2": norm(), "mlp": mlp, **scales}

    of_image = {} if form.siglip else {"cls_token": array(1, 1, c)}
    return {
        **of_image,
        "pos_embed": array(1, len(of_image) + positions, c),
        "patch_embed": {"proj": affine(form.patch, form.patch, 3, c)},
        "blocks": {str(number): block() for number in range(form.blocks)},
        "norm": norm(),
    }


def maps(form: Form, weights: dict, images: jax.Array, dtype: jnp.dtype = jnp.float32) -> list[jax.Array]:
    """Computes patches' tokens, plus the image's token if there is one, at `form.depths`: [B, h, w, C] in `dtype`.

    Adding the image's token is how VAR's and StyleGAN-T's discriminators read a vision transformer.
    """
    tokens = _tokens(form, weights, images, dtype)
    if form.siglip:
        return [_grid(form, images, tokens[depth]) for depth in form.depths]
    return [_grid(form, images, tokens[depth][:, 1:] + tokens[depth][:, :1]) for depth in form.depths]


def features(form: Form, weights: dict, images: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Computes the patches' tokens at the end, after the last norm: [B, h, w, C] in `dtype`."""
    last = normalise_layer(weights["norm"], _tokens(form, weights, images, dtype)[-1])
    return _grid(form, images, last if form.siglip else last[:, 1:])


def _grid(form: Form, images: jax.Array, tokens: jax.Array) -> jax.Array:
    height, width = (side // form.patch for side in images.shape[1:3])
    return tokens.reshape(tokens.shape[0], height, width, -1)


@jax.named_scope("vit")
def _tokens(form: Form, weights: dict, images: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """Returns the tokens [B, T, C] before the first block and after each."""
    positions = _positions(form, weights["pos_embed"], images.shape[1:3])
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), weights)
    seen = (2.0 * images - 1.0 if form.siglip else standardised(images)).astype(dtype)
    h = convolve_patches(weights["patch_embed"]["proj"], seen)
    h = h.reshape(h.shape[0], -1, form.width)
    if not form.siglip:
        h = jnp.concatenate([jnp.broadcast_to(weights["cls_token"], (h.shape[0], 1, form.width)), h], axis=1)
    found = [h + positions.astype(dtype)]
    for number in range(form.blocks):
        found.append(_block(form, weights["blocks"][str(number)], found[-1]))
    return found


def _positions(form: Form, embedding: jax.Array, sides: tuple[int, ...]) -> jax.Array:
    """Returns the position embedding [1, T, C] for images of other sides: bicubic with antialiasing, as timm does."""
    grid, wanted = (form.side // form.patch,) * 2, tuple(side // form.patch for side in sides)
    if grid == wanted:
        return jnp.asarray(embedding)
    image_tokens = 0 if form.siglip else 1
    patches = jnp.asarray(embedding[:, image_tokens:]).reshape(1, *grid, form.width)
    patches = jax.image.resize(patches, (1, *wanted, form.width), "bicubic")
    return jnp.concatenate([jnp.asarray(embedding[:, :image_tokens]), patches.reshape(1, -1, form.width)], axis=1)


def _block(form: Form, layers: dict, h: jax.Array) -> jax.Array:
    attended = _attention(form, layers["attn"], normalise_layer(layers["norm1"], h))
    h = h + (attended * layers["ls1"]["gamma"].reshape(1, 1, -1) if form.scaled else attended)
    inner = jax.nn.gelu(_dense(layers["mlp"]["fc1"], normalise_layer(layers["norm2"], h)), approximate=form.siglip)
    outer = _dense(layers["mlp"]["fc2"], inner)
    return h + (outer * layers["ls2"]["gamma"].reshape(1, 1, -1) if form.scaled else outer)


def _attention(form: Form, layers: dict, h: jax.Array) -> jax.Array:
    b, t, c = h.shape
    query, key, value = jnp.moveaxis(_dense(layers["qkv"], h).reshape(b, t, 3, form.heads, -1), 2, 0)
    shares = jax.nn.softmax(_compare(query, key) * (c // form.heads) ** -0.5, axis=-1).astype(h.dtype)
    return _dense(layers["proj"], jnp.einsum("bhqk,bkhc->bqhc", shares, value, precision=FULL).reshape(b, t, c))


@jax.custom_vjp
def _compare(query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the products of queries [B, q, heads, c] and keys [B, k, heads, c], float32 [B, heads, q, k].

    In the backward pass their gradient is rounded to the type of the operands: JAX's own rule multiplies it as float32.
    """
    return jnp.einsum("bqhc,bkhc->bhqk", query, key, precision=FULL, preferred_element_type=jnp.float32)


def _compare_forward(query: jax.Array, key: jax.Array):
    return _compare(query, key), (query, key)


def _compare_backward(operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    query, key = operands
    gradient = gradient.astype(query.dtype)
    of_query = jnp.einsum("bhqk,bkhc->bqhc", gradient, key, precision=FULL)
    return of_query, jnp.einsum("bhqk,bqhc->bkhc", gradient, query, precision=FULL)


_compare.defvjp(_compare_forward, _compare_backward)


def _dense(layer: dict, x: jax.Array) -> jax.Array:
    return jnp.einsum("bti,io->bto", x, layer["kernel"], precision=FULL) + layer["bias"].reshape(1, 1, -1)
