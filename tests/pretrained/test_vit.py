"""Vision transformers against a form in PyTorch, on made-up weights of smaller ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support import released, torch_nets

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained import vit
from ibq_jax.pretrained.vit import Form

SMALL = {
    "plain": Form("plain", 12, 3, 2, 4, 24, False, (0, 2, 3)),
    "scaled": Form("scaled", 12, 3, 3, 2, 12, True, (1, 3)),
}
IMAGES = np.random.default_rng(0).uniform(size=(2, 24, 24, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for kind, form in SMALL.items():
        monkeypatch.setitem(vit.FORMS, kind, form)


def made_up(kind: str) -> dict[str, np.ndarray]:
    """The network's tensors under the published names."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(vit.weight_shapes(kind))[0]:
        *layers, last = (part.key for part in path)
        shape = leaf.shape
        if last == "kernel":
            shape = shape[::-1] if len(shape) == 2 else (shape[3], shape[2], *shape[:2])
        shapes[".".join([*layers, {"kernel": "weight", "scale": "weight"}.get(last, last)])] = shape
    return torch_nets.made_up(shapes)


def load(kind: str, tmp_path, **changes) -> dict:
    tensors = {name: array for name, array in (made_up(kind) | changes).items() if array is not None}
    save_file(tensors, tmp_path / "net.safetensors")
    return vit.load_weights(tmp_path / "net.safetensors", kind)


# The first has the position embedding's own grid, 6x6; the others are resized to 6x6 of 12x12 patches and 3x5.
@pytest.mark.parametrize(("kind", "height", "width"), [("plain", 24, 24), ("scaled", 24, 24), ("plain", 12, 20)])
def test_maps_features_and_gradients_are_pytorchs(kind, height, width, tmp_path):
    form, weights, images = SMALL[kind], load(kind, tmp_path, mask_token=np.zeros(1, np.float32)), IMAGES
    images = images[:, :height, :width]

    def of(images):
        maps, features = vit.maps(form, weights, images), vit.features(form, weights, images)
        return jnp.sum(jnp.sin(features)) + sum(jnp.sum(jnp.sin(hidden)) for hidden in maps), (maps, features)

    (_, (maps, features)), gradient = jax.jit(jax.value_and_grad(of, has_aux=True))(images)
    theirs = torch.tensor(images, dtype=torch.float64, requires_grad=True)
    tokens, their_features = torch_nets.vit(torch_nets.doubles(made_up(kind)), theirs, form.patch, form.heads)
    grid = (height // form.patch, width // form.patch)
    their_maps = [(tokens[depth][:, 1:] + tokens[depth][:, :1]).unflatten(1, grid) for depth in form.depths]
    (their_features.sin().sum() + sum(hidden.sin().sum() for hidden in their_maps)).backward()
    for ours, other in zip([*maps, features], [*their_maps, their_features], strict=True):
        assert ours.shape == (2, *grid, form.width)
        released.assert_close(ours, other.detach().numpy(), 1e-5)
    released.assert_close(gradient, theirs.grad.numpy(), 1e-5)


def test_bfloat16_stays_close_to_float32(tmp_path):
    weights = load("scaled", tmp_path)
    exact, rounded = (vit.features(SMALL["scaled"], weights, IMAGES, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    assert 0 < jnp.linalg.norm(rounded.astype(jnp.float32) - exact) / jnp.linalg.norm(exact) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.bias": None}, "it has no tensor norm.bias"),
        ({"pos_embed": np.zeros((1, 5, 12), np.float32)}, r"pos_embed has shape \(1, 5, 12\), not \(1, 37, 12\)"),
        ({"register_tokens": np.zeros((1, 4, 12), np.float32)}, "it has a tensor register_tokens"),
    ],
)
def test_another_network_is_refused_by_the_name_of_the_tensor(change, message, tmp_path):
    with pytest.raises(UsageError, match=f"net.safetensors: not plain: {message}"):
        load("plain", tmp_path, **change)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("dino_vits16", 21_665_664),
        ("dinov2_vits14", 22_056_576),
        ("dinov2_vitb14", 86_580_480),
        ("dinov2_vitl14", 304_368_640),
    ],
)
def test_the_whole_networks_have_the_published_number_of_parameters(kind, parameters):
    """DINOv2's own counts include a mask token of C numbers, which is for training."""
    form = vit.FORMS[kind]
    token = form.width if kind.startswith("dinov2") else 0
    assert sum(leaf.size for leaf in jax.tree.leaves(vit.weight_shapes(kind))) + token == parameters
