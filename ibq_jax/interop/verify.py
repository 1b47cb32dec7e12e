"""Whether PyTorch computes from a file what JAX computes from where it was made: layer by layer, on real pictures."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict

from ibq_jax.autoregressive.decode import Filter
from ibq_jax.autoregressive.layers import Block, rotary_angles
from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.autoregressive.sample import Guidance, Sampler
from ibq_jax.base.sharding import make_mesh
from ibq_jax.interop import names, torch_model
from ibq_jax.tokenizer.model import TokenizerModel

TOLERANCE = 1e-3  # of a tensor's largest magnitude: what float32 leaves after some hundred layers


@dataclass(frozen=True)
class Difference:
    """Of one tensor: the largest absolute difference, and the largest magnitude that it has in JAX."""

    name: str
    largest: float
    magnitude: float

    @property
    def relative(self) -> float:
        return self.largest / self.magnitude if self.magnitude else self.largest


@dataclass(frozen=True)
class Report:
    """`differences` in the order in which the layers run; `agreeing` of `codes` codes are the same."""

    differences: tuple[Difference, ...]
    agreeing: int
    codes: int

    @property
    def first_beyond(self) -> Difference | None:
        """The first layer of which more than TOLERANCE is off."""
        return next((difference for difference in self.differences if not difference.relative <= TOLERANCE), None)


def verify_tokenizer(model: TokenizerModel, params: Mapping, file: Path, images: np.ndarray) -> Report:
    """`images` float [B, H, W, 3] in [-1, 1]. The decoder is given the same codes on both sides."""
    module = torch_model.load(file)
    model = model.clone(dtype=jnp.float32, mesh=None)
    weights = list(_weights(names.tokenizer_to_torch(params), module))
    ours, theirs = {}, {}
    codes = np.array(_captured(model, params, jnp.asarray(images), "encode", ours))
    with torch.inference_mode(), _outputs(module, theirs):
        codes_there = module.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        _captured(model, params, jnp.asarray(codes), "decode", ours)
        module.decode(torch.from_numpy(codes).long())
    layers = [_difference(name, ours[name], _nhwc(array)) for name, array in theirs.items() if name in ours]
    return Report((*weights, *layers), int((codes == codes_there).sum()), codes.size)


def verify_generator(
    model: GeneratorModel, params: Mapping, tensors: Mapping, file: Path, codes: np.ndarray, labels: np.ndarray
) -> Report:
    """`codes` [B, h, w] and `labels` [B]; `tensors`: the parameters under their published names, without a prefix.
    Compared codes are those that both draw greedily after the first half of `codes`."""
    module = torch_model.load(file)
    model = model.clone(dtype=jnp.float32, mesh=None)
    weights = list(_weights(tensors, module))
    theirs = {}
    flat = codes.reshape(len(codes), -1)
    with torch.inference_mode(), _outputs(module, theirs):
        logits = module(torch.from_numpy(flat).long(), torch.from_numpy(labels).long()).numpy()
    ours = dict(_blocks(model, params, jnp.asarray(codes), jnp.asarray(labels)))
    layers = [_difference(name, ours[name], theirs[name]) for name in ours]
    expected = np.asarray(model.apply({"params": params}, jnp.asarray(codes), jnp.asarray(labels)))
    prefix = flat[:, : flat.shape[1] // 2]
    sampler = Sampler(model, params, make_mesh({"data": 1}, jax.local_devices()[:1]))
    settings = dict(guidance=Guidance(1.0), keep=Filter(), temperature=0.0, seed=0, numbers=np.arange(len(labels)))
    drawn = np.asarray(sampler(labels, prefix=prefix, **settings))
    drawn_there = module.sample(
        torch.from_numpy(labels).long(), temperature=0.0, prefix=torch.from_numpy(prefix).long()
    ).numpy()
    return Report(
        (*weights, *layers, _difference("logits", expected, logits)), int((drawn == drawn_there).sum()), drawn.size
    )


def _weights(tensors: Mapping[str, np.ndarray], module: torch.nn.Module) -> Iterator[Difference]:
    loaded = module.state_dict()
    for name, tensor in tensors.items():
        yield _difference(f"weight {name}", tensor, loaded[name].numpy())


def _captured(model: TokenizerModel, params: Mapping, x: jax.Array, method: str, outputs: dict) -> jax.Array:
    """What `method` returns; `outputs` gets what every module in it gave, under its published name."""
    result, state = jax.jit(
        lambda params, x: model.apply(
            {"params": params}, x, method=method, capture_intermediates=True, mutable=["intermediates"]
        )
    )(params, x)
    for path, (output, *_) in flatten_dict(state["intermediates"]).items():
        if path[-1] == "__call__" and isinstance(output, jax.Array):
            outputs[names.published_name(path[:-1])] = np.asarray(output)
    return result


def _blocks(model: GeneratorModel, params: Mapping, codes: jax.Array, labels: jax.Array):
    """("blocks.i", what layer i gives) of every layer."""
    bound = model.bind({"params": params})
    per_layer, _ = bound.modulations(labels)
    known = codes.reshape(len(codes), -1)[:, :-1]
    x = jnp.concatenate((params["class_emb"][labels][:, None], bound.embed(known)), axis=1)
    block = Block(model.heads, model.kv_heads, 0.0, model.attention, model.dtype)
    angles = rotary_angles(model.grid, model.head_channels)
    apply = jax.jit(lambda layer, x, modulation: block.apply({"params": layer}, x, modulation, angles, False)[0])
    for i in range(model.layers):
        x = apply(jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]), x, per_layer[i])
        yield f"blocks.{i}", np.asarray(x)


@contextmanager
def _outputs(module: torch.nn.Module, outputs: dict[str, np.ndarray]) -> Iterator[None]:
    """Inside, `outputs` gets what every module of `module` gives, in the order in which they end."""

    def keep(name: str):
        def hook(_, arguments, output):
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
