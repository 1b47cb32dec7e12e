"""SigLIP's image model against that of transformers, on made-up weights of a smaller one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support import released

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained import vit
from ibq_jax.pretrained.vit import Form

FORM = Form("small SigLIP", 12, 3, 2, 4, 24, False, (0, 2, 3), siglip=True)
IMAGES = np.random.default_rng(0).uniform(size=(2, 24, 24, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(vit.FORMS, "siglip", FORM)


@pytest.fixture(scope="module")
def theirs():
    from transformers import SiglipConfig, SiglipModel

    sizes = {"hidden_size": 12, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = SiglipConfig(
        vision_config={**sizes, "image_size": 24, "patch_size": 4}, text_config={**sizes, "vocab_size": 7}
    )
    torch.manual_seed(0)
    model = SiglipModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def file(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    theirs.save_pretrained(folder)
    return folder / "model.safetensors"


def test_maps_features_and_gradients_are_those_of_transformers(theirs, file):
    weights = vit.load_weights(file, "siglip")

    def of(images):
        maps, features = vit.maps(FORM, weights, images), vit.features(FORM, weights, images)
        return jnp.sum(jnp.sin(features)) + sum(jnp.sum(jnp.sin(hidden)) for hidden in maps), (maps, features)

    (_, (maps, features)), gradient = jax.jit(jax.value_and_grad(of, has_aux=True))(IMAGES)
    images = torch.tensor(IMAGES, dtype=torch.float64, requires_grad=True)
    out = theirs.vision_model.double()(2 * images.permute(0, 3, 1, 2) - 1, output_hidden_states=True)
    expected = [*(out.hidden_states[depth] for depth in FORM.depths), out.last_hidden_state]
    sum(tokens.sin().sum() for tokens in expected).backward()
    for ours, other in zip([*maps, features], expected, strict=True):
        released.assert_close(ours, other.detach().unflatten(1, (6, 6)).numpy(), 1e-5)
    released.assert_close(gradient, images.grad.numpy(), 1e-5)


def test_a_whole_models_file_and_timms_are_read_alike(file, tmp_path):
    wanted, tensors = vit.load_weights(file, "siglip"), load_file(file)
    save_file(
        tensors | {"text_model.final.weight": np.zeros(3), "logit_scale": np.zeros(1)}, tmp_path / "whole.safetensors"
    )
    save_file({name: array for name, array in vit._under_timm_names(tensors).items()}, tmp_path / "timm.safetensors")
    for name in ("whole", "timm"):
        found = vit.load_weights(tmp_path / f"{name}.safetensors", "siglip")
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("vision_model.encoder.layers.1.self_attn.k_proj.bias", "it has no tensor blocks.1.attn.qkv.bias"),
        ("vision_model.embeddings.position_embedding.weight", "it has no tensor pos_embed"),
    ],
)
def test_what_a_file_lacks_is_named(lost, message, file, tmp_path):
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, tmp_path / "net.safetensors")
    with pytest.raises(UsageError, match=message):
        vit.load_weights(tmp_path / "net.safetensors", "siglip")
