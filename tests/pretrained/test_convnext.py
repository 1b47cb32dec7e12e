"""ConvNeXt against a form in PyTorch, on made-up weights of a smaller network under both published sets of names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support import released, torch_nets

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained import convnext

IMAGES = np.random.default_rng(0).uniform(size=(2, 32, 64, 3)).astype(np.float32)
TIMM, TORCHVISION = 0, 1


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(convnext, "CHANNELS", (4, 6, 8, 10))
    monkeypatch.setattr(convnext, "DEPTHS", (1, 2, 1, 1))


def made_up(which: int) -> dict[str, np.ndarray]:
    """The network's tensors under timm's or torchvision's names; the same numbers, in the same order."""
    shapes = {}

    def note(names, like):
        name = names[which]
        if not isinstance(like, dict):
            shapes[name] = (*like.shape, 1, 1) if which == TORCHVISION else like.shape
        elif "scale" in like:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = like["scale"].shape
        else:
            *window, inputs, outputs = like["kernel"].shape
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, *window), (outputs,)

    convnext._map_layers(note)
    return torch_nets.made_up(shapes)


@pytest.mark.parametrize("which", [TIMM, TORCHVISION])
def test_maps_logits_and_gradients_are_pytorchs(which, tmp_path):
    save_file(made_up(which), tmp_path / "net.safetensors")
    weights = convnext.load_weights(tmp_path / "net.safetensors")
    assert jax.tree.map(lambda leaf: leaf.shape, weights) == jax.tree.map(lambda x: x.shape, convnext.weight_shapes())

    def of(images):
        maps, logits = convnext.maps(weights, images), convnext.logits(weights, images)
        return jnp.sum(jnp.sin(logits)) + sum(jnp.sum(jnp.sin(hidden)) for hidden in maps), (maps, logits)

    (_, (maps, logits)), gradient = jax.jit(jax.value_and_grad(of, has_aux=True))(IMAGES)
    images = torch.tensor(IMAGES, dtype=torch.float64, requires_grad=True)
    their_maps, their_logits = torch_nets.convnext(torch_nets.doubles(made_up(TORCHVISION)), images)
    (their_logits.sin().sum() + sum(hidden.sin().sum() for hidden in their_maps)).backward()
    assert [hidden.shape for hidden in maps] == [(2, 8, 16, 4), (2, 4, 8, 6), (2, 2, 4, 8), (2, 1, 2, 10)]
    for ours, theirs in zip(maps, their_maps, strict=True):
        released.assert_close(ours, theirs.detach().numpy(), 1e-5)
    released.assert_close(logits, their_logits.detach().numpy(), 1e-5)
    released.assert_close(gradient, images.grad.numpy(), 1e-5)


def test_bfloat16_stays_close_to_float32(tmp_path):
    save_file(made_up(TIMM), tmp_path / "net.safetensors")
    weights = convnext.load_weights(tmp_path / "net.safetensors")
    exact, rounded = (convnext.maps(weights, IMAGES, dtype)[-1] for dtype in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    assert 0 < jnp.linalg.norm(rounded.astype(jnp.float32) - exact) / jnp.linalg.norm(exact) < 0.05


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("head.fc.bias", None, "it has no tensor head.fc.bias"),
        ("stem.0.weight", np.zeros((4, 3, 2, 2), np.float32), r"stem.0.weight has shape \(4, 3, 2, 2\), not"),
        ("stages.3.blocks.1.gamma", np.zeros(10, np.float32), "it has a tensor stages.3.blocks.1.gamma"),
    ],
)
def test_another_network_is_refused_by_the_name_of_the_tensor(name, change, message, tmp_path):
    tensors = made_up(TIMM) | {name: change}
    save_file({name: array for name, array in tensors.items() if array is not None}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=f"x.safetensors: not ConvNeXt-Small: {message}"):
        convnext.load_weights(tmp_path / "x.safetensors")


def test_the_whole_network_has_the_published_number_of_parameters(monkeypatch):
    monkeypatch.undo()
    assert sum(leaf.size for leaf in jax.tree.leaves(convnext.weight_shapes())) == 50_223_688
