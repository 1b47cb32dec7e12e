"""Losses on frozen networks against PyTorch, and in the train step with VQGAN's adaptive weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import released
from support.small_nets import maps, small_net
from support.small_runs import SMALL, SMALL_TOKENIZER
from support.stated_precision import products
from torch.nn import functional as F

from ibq_jax.base.checkpoint import Checkpoints
from ibq_jax.base.config import load_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import abstract_state, create_sharded, make_mesh
from ibq_jax.data.preprocess import to_float
from ibq_jax.interop.tokenizer_names import published_tensors
from ibq_jax.pretrained.frozen_nets import NETS
from ibq_jax.tokenizer.check import check_config
from ibq_jax.tokenizer.net_losses import (
    alignment_losses,
    feature_distances,
    measure_features,
    measure_logits,
    wanted_nets,
    weight_shapes,
)
from ibq_jax.tokenizer.step import TokenizerTrainer, jit_train_step
from ibq_jax.tokenizer.tokenize import fingerprint

TOLERANCE = 1e-5
TINY = (
    "data.image_size=8",
    "model.channel_multipliers=(1,)",
    "discriminator.channels=4",
    "optimizer.learning_rate=1e-5",
)
ON_NET = (
    "loss.features_weight=0.5",
    "loss.logits_weight=0.25",
    "loss.logits_net=efficientnet",
    "alignment.weight=0.1",
    "alignment.net=efficientnet",
    "loss.adaptive_limit=100.0",
)


def config_with(*overrides: str):
    return load_config(SMALL_TOKENIZER, [f"--config.{field}" for field in (*SMALL, *overrides)])


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def test_distances_of_hidden_maps_are_pytorchs():
    maps, others = [normal(2, 4, 4, 3), normal(2, 2, 2, 5)], [normal(2, 4, 4, 3) ** 2, normal(2, 2, 2, 5) ** 2]
    ours, gradient = jax.value_and_grad(lambda others: feature_distances(maps, others) @ jnp.array([1.0, 2.0]))(others)
    theirs = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in others]
    terms = [
        (F.normalize(torch.tensor(x, dtype=torch.float64), dim=3) - F.normalize(y, dim=3)).square().sum(3).mean((1, 2))
        for x, y in zip(maps, theirs, strict=True)
    ]
    expected = (sum(terms) / 2) @ torch.tensor([1.0, 2.0], dtype=torch.float64)
    expected.backward()
    assert float(ours) == pytest.approx(expected.item(), rel=TOLERANCE)
    for found, other in zip(gradient, theirs, strict=True):
        released.assert_close(found, other.grad.numpy(), TOLERANCE)


def test_alignment_is_va_vaes():
    projected, features = normal(2, 3, 4, 5), normal(2, 3, 4, 5) ** 3

    def ours(projected):
        cosine, distance = alignment_losses(projected, features, 0.5, 0.25)
        return cosine + 2 * distance, (cosine, distance)

    (_, found), gradient = jax.value_and_grad(ours, has_aux=True)(projected)
    z, aux = (torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2) for x in (projected, features))
    z.requires_grad_()
    z_norm, aux_norm = (F.normalize(x.flatten(2), dim=1) for x in (z, aux))
    between = torch.einsum("bci,bcj->bij", z_norm, z_norm) - torch.einsum("bci,bcj->bij", aux_norm, aux_norm)
    distance = F.relu(between.abs() - 0.25).mean()
    cosine = F.relu(1 - 0.5 - F.cosine_similarity(aux, z)).mean()
    (cosine + 2 * distance).backward()
    assert [float(value) for value in found] == pytest.approx([cosine.item(), distance.item()], rel=TOLERANCE)
    released.assert_close(gradient, z.grad.permute(0, 2, 3, 1).numpy(), TOLERANCE)


def test_aligned_latents_cost_nothing_within_the_margins():
    features = normal(1, 2, 2, 6)
    assert [float(loss) for loss in alignment_losses(3 * features, features, 0.0, 0.0)] == pytest.approx(
        [0, 0], abs=1e-6
    )


def test_features_and_logits_compare_images_in_0_to_1(monkeypatch):
    net, weights = small_net()
    monkeypatch.setitem(NETS, "efficientnet", net)
    config, images, others = config_with("loss.logits_net=efficientnet"), normal(2, 8, 8, 3), normal(2, 8, 8, 3) ** 2
    mine, yours = (maps(weights, (batch + 1) / 2) for batch in (images, others))
    measured = measure_features(config, {"efficientnet": weights}, images, others)
    np.testing.assert_allclose(measured, feature_distances(mine, yours), rtol=1e-6)
    measured = measure_logits(config, {"efficientnet": weights}, images, others)
    expected = [np.mean((x.mean((0, 1)) - y.mean((0, 1))) ** 2) for x, y in zip(mine[1], yours[1], strict=True)]
    np.testing.assert_allclose(measured, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("net", "of_activations"), [("efficientnet", 0), ("convnext_small", 0), ("dino_vits16", 2 * 12)]
)
def test_frozen_networks_multiply_in_bfloat16_and_take_no_gradient_of_their_weights(net, of_activations):
    """Counts products: forwards for both sides, backwards one each, two for those of two activations, in attention.

    A gradient of the weights would be one more for each product with weights.
    """
    config = config_with("dtype=bfloat16", f"loss.features_net={net}")
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    weights = NETS[net].weight_shapes()

    def loss(nets, images, reconstructions):
        return jnp.mean(measure_features(config, nets, images, reconstructions))

    forward = products(lambda weights, images: NETS[net].maps(weights, images, jnp.bfloat16), weights, images)
    of_loss = products(jax.value_and_grad(loss, argnums=2), {net: weights}, images, images)
    of_network = [product.operands for product in of_loss if "normalisation" not in product.source]
    of_network = [operands for operands in of_network if "bfloat16" in operands]
    assert {*of_network, *(product.operands for product in forward)} == {("bfloat16", "bfloat16")}
    assert len(of_network) == 3 * len(forward) + of_activations


def test_the_networks_that_a_config_wants():
    assert wanted_nets(config_with("loss.perceptual_weight=0.0")) == {}
    assert wanted_nets(config_with()) == {"vgg16": ["loss.perceptual_weight"]}
    config = config_with("loss.features_weight=0.1", "discriminator.name=dino", "alignment.weight=0.1")
    wanted = wanted_nets(config)
    assert list(wanted) == ["vgg16", "efficientnet", "dinov2_vits14"]
    assert wanted["efficientnet"] == ["loss.features_weight", "discriminator.name"]
    assert weight_shapes(config).keys() == wanted.keys()
    config = config_with("discriminator.name=dino", "loss.adversarial_weight=0.0")
    assert "efficientnet" not in wanted_nets(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["loss.logits_net=dino_vits16"], "loss.logits_net=dino_vits16 is not one of efficientnet, convnext_small"),
        (["alignment.of=codes"], "alignment.of=codes is not one of latents, decoder"),
        (
            ["alignment.weight=0.1", "finetune.freeze=encoder,codebook"],
            "alignment.of=latents trains the encoder, which",
        ),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        check_config(config_with(*fields), make_mesh({}, jax.devices()[:1]))


# ---- in the train step ---------------------------------------------------------------------------------------------

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 8, 3), np.uint8)


class Run:
    """A tokenizer with every loss on a small network, on some devices, and its states before and after two steps."""

    def __init__(self, devices: int, *overrides: str):
        _, weights = small_net()
        self.nets = {"efficientnet": weights}
        self.config = config_with(*TINY, *ON_NET, *overrides)
        self.trainer = TokenizerTrainer(self.config, make_mesh({"data": devices}, jax.devices()[:devices]), 1)
        self.step = jit_train_step(self.trainer)
        state = create_sharded(self.trainer.create_state, self.trainer.mesh, 0)
        self.states, self.logs = [jax.device_get(state)], []
        for images in IMAGES[:2]:
            state, metrics = self.step(state, self.nets, images)
            self.states.append(jax.device_get(state))
            self.logs.append({name: float(value) for name, value in metrics.items()})


@pytest.fixture(scope="module")
def on_net():
    net, _ = small_net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETS, "efficientnet", net)
        yield


@pytest.fixture(scope="module")
def one(on_net):
    return Run(1)


@pytest.mark.slow
def test_eight_devices_and_the_whole_loss(one):
    eight = Run(8)
    for ours, theirs in zip(one.logs, eight.logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            tolerance = 1e-4 if "gradient_norm" in name or "adaptive" in name else 1e-5
            assert theirs[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    log = one.logs[0]
    distances = log["loss/l1"] + 0.5 * log["loss/features"] + 0.25 * log["loss/logits"]
    assert log["loss/nll"] == pytest.approx(distances, rel=1e-6)
    adversarial = 0.1 * log["loss/adaptive_weight"] * log["loss/adversarial"]
    total = distances + log["loss/codebook"] + 0.1 * log["loss/alignment"] + adversarial
    assert log["loss/total"] == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_the_adaptive_weight_and_the_gradient_are_those_of_the_losses_as_functions_of_the_weights(one):
    """The step adds up gradients at the reconstructions; here each loss's goes through the whole model by itself."""
    trainer, before, after, images = one.trainer, one.states[0], one.states[1], to_float(jnp.asarray(IMAGES[0]))

    def losses(params):
        (reconstructions, latents, _), _ = trainer.forward_pass.reconstruct(
            params, images, one.nets, with_latents=False
        )
        nll, _ = trainer.reconstruction_loss(images, reconstructions, one.nets)
        discriminator = jax.tree.map(jnp.asarray, after.discriminator)
        adversarial, _ = trainer.adversarial.loss_of(discriminator, reconstructions, jnp.int32(0), None)
        return nll, adversarial, latents

    def gradients(params):
        pull_back = jax.vjp(losses, params)[1]
        return [pull_back(tuple(jnp.float32(i == number) for i in range(3)))[0] for number in range(3)]

    nll, adversarial, latents = jax.jit(gradients)(before.params)
    last = [np.linalg.norm(gradient["decoder"]["conv_out"]["kernel"]) for gradient in (nll, adversarial)]
    weight = last[0] / (last[1] + 1e-4)
    assert one.logs[0]["loss/adaptive_weight"] == pytest.approx(weight, rel=1e-3)
    expected = jax.tree.map(lambda n, a, z: n + 0.1 * weight * a + z, nll, adversarial, latents)
    found = jax.tree.map(lambda mu: mu / (1 - one.config.optimizer.beta1), after.optimizer[0].mu)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-4 * largest


@pytest.mark.slow
def test_a_stopped_and_continued_run_is_the_same_bit_for_bit(one, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, one.states[2], {})
    checkpoints.wait()
    restored = checkpoints.restore(abstract_state(one.trainer.create_state, one.trainer.mesh, 0)[0])
    checkpoints.close()
    assert restored is not None
    starts = (jax.device_put(one.states[2], jax.tree.map(lambda leaf: leaf.sharding, restored.state)), restored.state)
    ends = [jax.device_get(one.step(state, one.nets, IMAGES[2])[0]) for state in starts]
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.slow
def test_the_projection_is_trained_and_not_exported(one):
    before, after = (state.params["alignment"]["kernel"] for state in (one.states[0], one.states[2]))
    assert before.shape == (8, 4) and not np.any(before == after)
    params = one.states[2].params
    assert not [name for name in published_tensors(params, one.states[2].ema) if "alignment" in name]
    exported = {name: leaves for name, leaves in params.items() if name != "alignment"}
    assert fingerprint(one.trainer.model, params) == fingerprint(one.trainer.model, exported)
