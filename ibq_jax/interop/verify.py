"""Checks that PyTorch computes from an exported file what JAX computes from its source, layer by layer on real images.

Imports PyTorch, which is an optional dependency.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict

from ibq_jax.autoregressive.generate import LogitFilter
from ibq_jax.autoregressive.layers import Block, rotary_angles
from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.autoregressive.sample_codes import Guidance, Sampler
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import make_mesh
from ibq_jax.data.openmoji import openmoji
from ibq_jax.data.preprocess import centre_crop, decode_image, resize_shorter_side
from ibq_jax.data.sources import IMAGE_SUFFIXES
from ibq_jax.interop import generator_names, tokenizer_names, torch_model
from ibq_jax.interop.load import load_generator, load_tokenizer, stage_of
from ibq_jax.interop.recognize import GENERATOR
from ibq_jax.interop.to_file import export
from ibq_jax.pretrained.tensor_files import write_tensors
from ibq_jax.tokenizer.model import TokenizerModel

TOLERANCE = 1e-3  # relative to a tensor's largest magnitude: float32 rounding after some hundred layers stays below it
NUM_IMAGES, NUM_SEQUENCES = 4, 2


@dataclass(frozen=True)
class Difference:
    """The difference of one tensor between PyTorch and JAX.

    Attributes:
        name: the tensor's published name.
        largest: the largest absolute difference.
        magnitude: the tensor's largest magnitude in JAX.
    """

    name: str
    largest: float
    magnitude: float

    @property
    def relative(self) -> float:
        """The largest difference relative to the tensor's largest magnitude."""
        return self.largest / self.magnitude if self.magnitude else self.largest

    def worse(self, other: "Difference") -> "Difference":
        """Returns the difference of both tensors taken as one."""
        largest, magnitude = np.maximum((self.largest, self.magnitude), (other.largest, other.magnitude))  # NaN stays
        return Difference(self.name, float(largest), float(magnitude))


@dataclass(frozen=True)
class Report:
    """The result of a comparison.

    Attributes:
        differences: one per weight and per layer's output, in the order in which the layers run.
        agreeing: how many of the compared codes are the same.
        codes: how many codes were compared.
        origin: what the compared codes are, in words.
    """

    differences: tuple[Difference, ...]
    agreeing: int
    codes: int
    origin: str

    @property
    def first_beyond(self) -> Difference | None:
        """The first difference above TOLERANCE, or None."""
        return next((difference for difference in self.differences if not difference.relative <= TOLERANCE), None)


def verify(source: Path, written: Path | None, weights: str = "all", images: Path | None = None) -> Report:
    """Compares what PyTorch computes from an exported file with what JAX computes from `source`.

    Args:
        source: a run or a file of weights.
        written: the file that was exported from it; None exports to a temporary file.
        weights: the weights to export and compare, as `to_file.export_run` takes them.
        images: a folder of images for a tokenizer; None takes embedded ones.

    Raises:
        UsageError: `source` holds neither network, or `images` holds no images.
    """
    use_ema = weights != "raw"
    with _exported(source, written, weights) as file:
        if stage_of(file) == GENERATOR:
            model, params, _ = load_generator(source, use_ema)
            codes, labels = _random_codes(model)
            return verify_generator(model, params, file, codes, labels)
        model, params = load_tokenizer(source, use_ema)
        return verify_tokenizer(model, params, file, _images(images, model.resolution))


def verify_tokenizer(model: TokenizerModel, params: Mapping, file: Path, images: np.ndarray) -> Report:
    """Compares a tokenizer's weights, the outputs of its layers and its codes with those of `file` in PyTorch.

    `images` are float [B, H, W, 3] in [-1, 1]. Both decoders get the codes that JAX computed.
    """
    module: Any = torch_model.load(file)
    model = model.clone(mesh=None).for_encoding("float32")
    weights = list(_weights(tokenizer_names.tokenizer_to_torch(params), module))
    encode, decode = _capturing(model, "encode"), _capturing(model, "decode")
    layers: dict[str, Difference] = {}
    agreeing = compared = 0
    for image in np.split(
        images, len(images)
    ):  # one at a time: the outputs of all layers are in memory, from both sides
        ours, theirs = {}, {}
        codes = np.array(encode(params, jnp.asarray(image), ours))
        with torch.inference_mode(), _outputs(module, theirs):
            torch_codes = module.encode(torch.from_numpy(image).permute(0, 3, 1, 2)).numpy()
            module.decode(torch.from_numpy(codes).long())
        decode(params, jnp.asarray(codes), ours)
        for name in [name for name in theirs if name in ours]:
            difference = _difference(name, ours.pop(name), _nhwc(theirs.pop(name)))
            layers[name] = difference.worse(layers.get(name, difference))
        agreeing, compared = agreeing + int((codes == torch_codes).sum()), compared + codes.size
    return Report((*weights, *layers.values()), agreeing, compared, f"codes of {len(images)} images")


def verify_generator(
    model: GeneratorModel, params: Mapping, file: Path, codes: np.ndarray, labels: np.ndarray
) -> Report:
    """Compares a generator's weights, the outputs of its layers and its samples with those of `file` in PyTorch.

    Logits are those of `codes` int [B, h, w] with `labels` int [B]. The compared codes are drawn greedily after the
    first half of `codes`.
    """
    module: Any = torch_model.load(file)
    model = model.clone(dtype=jnp.float32, mesh=None)
    weights = list(_weights(generator_names.generator_to_torch(params, ""), module))
    theirs = {}
    flat = codes.reshape(len(codes), -1)
    with torch.inference_mode(), _outputs(module, theirs):
        logits = module(torch.from_numpy(flat).long(), torch.from_numpy(labels).long()).numpy()
    ours = dict(_blocks(model, params, jnp.asarray(codes), jnp.asarray(labels)))
    layers = [_difference(name, ours[name], theirs[name]) for name in ours]
    expected = np.asarray(model.apply({"params": params}, jnp.asarray(codes), jnp.asarray(labels)))
    prefix = flat[:, : flat.shape[1] // 2]
    sampler = Sampler(model, params, make_mesh({"data": 1}, jax.local_devices()[:1]))
    settings: dict[str, Any] = dict(
        guidance=Guidance(1.0), logit_filter=LogitFilter(), temperature=0.0, seed=0, sample_ids=np.arange(len(labels))
    )
    drawn = np.asarray(sampler(labels, prefix=prefix, **settings))
    torch_drawn = module.sample(
        torch.from_numpy(labels).long(), temperature=0.0, prefix=torch.from_numpy(prefix).long()
    ).numpy()
    same = (drawn == torch_drawn).reshape(flat.shape)[:, prefix.shape[1] :]
    differences = (*weights, *layers, _difference("logits", expected, logits))
    origin = "codes drawn greedily after the first half of random ones"
    return Report(differences, int(same.sum()), same.size, origin)


@contextmanager
def _exported(source: Path, written: Path | None, weights: str) -> Iterator[Path]:
    """Gives the file to compare with `source`."""
    if written is not None:
        yield written
        return
    tensors, about = export(source, weights)
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(Path(folder) / "weights.safetensors", tensors, about)
        del tensors
        yield Path(folder) / "weights.safetensors"


def _images(folder: Path | None, side: int) -> np.ndarray:
    """Returns the first images of a folder, or embedded ones, as float32 [B, side, side, 3] in [-1, 1]."""
    if folder is None:
        encoded = (example.read() for example in openmoji(size=side).examples())
    else:
        files = sorted(path for path in folder.glob("*") if path.suffix[1:].lower() in IMAGE_SUFFIXES)
        if not files:
            raise UsageError(f"--images={folder}: no images there")
        encoded = (path.read_bytes() for path in files)
    images = [
        centre_crop(resize_shorter_side(decode_image(image), side), side) for image in islice(encoded, NUM_IMAGES)
    ]
    return (np.stack(images).astype(np.float32) / 127.5 - 1.0).astype(np.float32)


def _random_codes(model: GeneratorModel) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, model.vocab_size, (NUM_SEQUENCES, *model.grid), np.int32)
    return codes, rng.integers(0, max(model.num_classes, 1), NUM_SEQUENCES, np.int32)


def _weights(tensors: Mapping[str, np.ndarray], module: torch.nn.Module) -> Iterator[Difference]:
    loaded = module.state_dict()
    for name, tensor in tensors.items():
        yield _difference(f"weight {name}", tensor, loaded[name].numpy())


def _capturing(model: TokenizerModel, method: str):
    """Returns `method` as a compiled function of (params, x, outputs).

    It returns what `method` does, and stores the output of every module in `outputs` under its published name.
    """
    apply = jax.jit(
        lambda params, x: model.apply(
            {"params": params}, x, method=method, capture_intermediates=True, mutable=["intermediates"]
        )
    )

    def run(params: Mapping, x: jax.Array, outputs: dict[str, np.ndarray]) -> jax.Array:
        result, state = apply(params, x)
        for path, (output, *_) in flatten_dict(state["intermediates"]).items():
            if path[-1] == "__call__" and isinstance(output, jax.Array):
                outputs[tokenizer_names.published_name(path[:-1])] = np.asarray(output)
        return result

    return run


def _blocks(model: GeneratorModel, params: Mapping, codes: jax.Array, labels: jax.Array):
    """Yields ("blocks.i", the output of layer i) for every layer."""
    bound: Any = model.bind({"params": params})
    per_layer, _ = bound.modulations(labels)
    known = codes.reshape(len(codes), -1)[:, :-1]
    x = jnp.concatenate((params["class_emb"][labels][:, None], bound.embed(known)), axis=1)
    block = Block(model.num_heads, model.num_kv_heads, 0.0, model.attention, model.dtype)
    angles = rotary_angles(model.grid, model.head_channels)
    apply = jax.jit(lambda layer, x, modulation: block.apply({"params": layer}, x, modulation, angles, False)[0])
    for i in range(model.num_layers):
        x = apply(jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]), x, per_layer[i])
        yield f"blocks.{i}", np.asarray(x)


@contextmanager
def _outputs(module: torch.nn.Module, outputs: dict[str, np.ndarray]) -> Iterator[None]:
    """Stores the output of every submodule in `outputs`, in the order in which they finish.

    Norms are stored with the SiLU that follows all of them but attention's, because ours compute both in one pass.
    """

    def keep(name: str):
        def hook(part, arguments, output):
            if isinstance(part, torch.nn.GroupNorm) and not name.endswith(".norm"):
                output = torch.nn.functional.silu(output)
            if isinstance(output, torch.Tensor):
                outputs[name] = output.detach().numpy()

        return hook

    handles = [part.register_forward_hook(keep(name)) for name, part in module.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nhwc(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def _difference(name: str, ours: np.ndarray, theirs: np.ndarray) -> Difference:
    ours, theirs = (np.asarray(array, np.float64) for array in (ours, theirs))
    largest = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
    return Difference(name, largest, float(np.abs(ours).max()))
