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

from ibq_jax.autoregressive.generate import LogitFilter
from ibq_jax.autoregressive.layers import Block, rotary_angles
from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.autoregressive.sample import Guidance, Sampler
from ibq_jax.base.sharding import make_mesh
from ibq_jax.interop import tokenizer_names, torch_model
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

    def worse(self, other: "Difference") -> "Difference":
        """Of the two together, as of one tensor."""
        largest, magnitude = np.maximum((self.largest, self.magnitude), (other.largest, other.magnitude))  # NaN stays
        return Difference(self.name, float(largest), float(magnitude))


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
    weights = list(_weights(tokenizer_names.tokenizer_to_torch(params), module))
    encode, decode = _capturing(model, "encode"), _capturing(model, "decode")
    layers: dict[str, Difference] = {}
    agreeing = compared = 0
    for image in np.split(images, len(images)):  # one by one: what every layer gives is held, from both sides
        ours, theirs = {}, {}
        codes = np.array(encode(params, jnp.asarray(image), ours))
        with torch.inference_mode(), _outputs(module, theirs):
            codes_there = module.encode(torch.from_numpy(image).permute(0, 3, 1, 2)).numpy()
            module.decode(torch.from_numpy(codes).long())
        decode(params, jnp.asarray(codes), ours)
        for name in [name for name in theirs if name in ours]:
            difference = _difference(name, ours.pop(name), _nhwc(theirs.pop(name)))
            layers[name] = difference.worse(layers.get(name, difference))
        agreeing, compared = agreeing + int((codes == codes_there).sum()), compared + codes.size
    return Report((*weights, *layers.values()), agreeing, compared)


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
    settings = dict(
        guidance=Guidance(1.0), logit_filter=LogitFilter(), temperature=0.0, seed=0, sample_ids=np.arange(len(labels))
    )
    drawn = np.asarray(sampler(labels, prefix=prefix, **settings))
    drawn_there = module.sample(
        torch.from_numpy(labels).long(), temperature=0.0, prefix=torch.from_numpy(prefix).long()
    ).numpy()
    same = (drawn == drawn_there).reshape(flat.shape)[:, prefix.shape[1] :]
    differences = (*weights, *layers, _difference("logits", expected, logits))
    return Report(differences, int(same.sum()), same.size)


def _weights(tensors: Mapping[str, np.ndarray], module: torch.nn.Module) -> Iterator[Difference]:
    loaded = module.state_dict()
    for name, tensor in tensors.items():
        yield _difference(f"weight {name}", tensor, loaded[name].numpy())


def _capturing(model: TokenizerModel, method: str):
    """`method`, compiled: (params, x, outputs) -> what it returns; `outputs` gets what every module in it gave, under
    its published name."""
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
    """("blocks.i", what layer i gives) of every layer."""
    bound = model.bind({"params": params})
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
