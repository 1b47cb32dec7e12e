"""Adaptive weights of the losses: whole train steps against PyTorch in float64, on made-up weights."""

import functools
import math
import re

import jax
import numpy as np
import pytest
import torch
from support import released
from support import torch_discriminators as theirs
from support.made_up_weights import made_up_params
from support.small_nets import small_net
from support.small_runs import SMALL, SMALL_TOKENIZER
from torch.nn import functional as F

from ibq_jax.base.config import load_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import AXES, abstract_state, batch_sharding, make_mesh
from ibq_jax.interop import tokenizer_names, torch_model
from ibq_jax.pretrained.frozen_nets import NETS
from ibq_jax.tokenizer.check import check_config
from ibq_jax.tokenizer.step import TokenizerTrainer, abstract_arguments, jit_train_step

# Float32 against float64, of a tensor's largest value or of the largest gradient: measured to be within 7e-7.
TOLERANCE = 1e-5
GROUP, BETA1, ADVERSARIAL = 2, 0.5, 0.1
NET = "efficientnet"
WEIGHT, LIMIT = 0.3, 1e8
FIELDS = (
    *SMALL,
    "data.image_size=8",
    "data.resize=8",
    "loss.perceptual_weight=0.0",
    "loss.entropy_weight=0.0",
    f"loss.adversarial_weight={ADVERSARIAL}",
    "quantizer.entropy_group_tokens=0",
    f"discriminator.norm_group={GROUP}",
    f"optimizer.beta1={BETA1}",
    f"alignment.weight={WEIGHT}",
    f"alignment.net={NET}",
    "alignment.cosine_margin=0.2",
    "alignment.distance_margin=0.1",
)
ADAPTIVE = f"alignment.adaptive_limit={LIMIT}"
BOTH = (ADAPTIVE, "loss.adaptive_limit=100.0")
ALONE = (ADAPTIVE, "loss.adversarial_weight=0.0")
IMAGES = np.random.default_rng(5).integers(0, 256, (8, 8, 8, 3), np.uint8)


def make_trainer(*overrides: str, sizes=(1, 1, 1)) -> TokenizerTrainer:
    config = load_config(SMALL_TOKENIZER, [f"--config.{field}" for field in (*FIELDS, *overrides)])
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)])
    check_config(config, mesh)
    return TokenizerTrainer(config, mesh, steps_per_epoch=1)


def first_state(trainer: TokenizerTrainer):
    """A state before the first step whose random weights are as wide as the model's own."""
    shapes, shardings = abstract_state(trainer.create_state, trainer.mesh, 0)
    random = np.random.default_rng(0)
    params = made_up_params(shapes.params, random)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes).replace(params=params)
    if state.discriminator is not None:
        networks = made_up_params(shapes.discriminator.params, random)
        state = state.replace(discriminator=state.discriminator.replace(params=networks))
    return jax.device_put(state, shardings)


@pytest.fixture(scope="module", autouse=True)
def on_small_net():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETS, NET, small_net()[0])
        yield
    take_step.cache_clear()


@functools.cache
def take_step(*overrides: str, sizes=(1, 1, 1)):
    """Returns (state before, state after, metrics), on the host."""
    trainer = make_trainer(*overrides, sizes=sizes)
    before = first_state(trainer)
    on_host = jax.device_get(before)
    images = jax.device_put(IMAGES, batch_sharding(trainer.mesh))
    state, metrics = jit_train_step(trainer)(before, {NET: small_net()[1]}, images)
    return on_host, jax.device_get(state), {name: float(value) for name, value in metrics.items()}


def gradients(state) -> tuple[dict, np.ndarray]:
    """Returns those of a first step, read off Adam's moments: under published names, and the projection's."""
    found = jax.tree.map(lambda moment: moment / (1 - BETA1), state.optimizer[0].mu)
    projection = found.pop("alignment")["kernel"]
    return tokenizer_names.tokenizer_to_torch(found), projection


def check_gradients(state, expected, tolerance: float) -> None:
    """Compares the gradients of two first steps, by their largest."""
    ours, theirs = (jax.tree.leaves(state.optimizer[0].mu) for state in (state, expected))
    largest = max(np.abs(leaf).max() for leaf in theirs)
    for leaf, other in zip(ours, theirs, strict=True):
        assert np.abs(leaf - other).max() <= tolerance * largest


def features_of(images: torch.Tensor) -> torch.Tensor:
    """The small network's features of positions [B, h, w, C], as PyTorch computes them from images in [0, 1]."""
    kernel = torch.tensor(np.asarray(small_net()[1]["kernels"][0], np.float64)).permute(3, 2, 0, 1)
    return torch.tanh(F.conv2d(F.pad(images, (0, 1, 0, 1)), kernel, stride=2)).permute(0, 2, 3, 1)


def alignment_of(latents: torch.Tensor, features: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    ours, others = (F.normalize(x.flatten(1, 2), dim=2) for x in (latents @ projection, features))
    near = F.relu(1 - 0.2 - (ours * others).sum(2)).mean()
    return near + F.relu((ours @ ours.mT - others @ others.mT).abs() - 0.1).mean()


def in_pytorch(before, after, adversarial: bool, adaptive: bool):
    """The loss as one would write it down, with both weights from gradients that autograd finds; its gradients."""
    config = make_trainer(ADAPTIVE).config
    network = torch_model.Tokenizer.of(tokenizer_names.published_architecture(config.to_dict())).double()
    params = {name: leaves for name, leaves in before.params.items() if name != "alignment"}
    tensors = tokenizer_names.tokenizer_to_torch(params)
    network.load_state_dict({name: torch.tensor(np.asarray(array)).double() for name, array in tensors.items()})
    projection = torch.tensor(before.params["alignment"]["kernel"].astype(np.float64), requires_grad=True)
    x = torch.tensor(IMAGES).double().permute(0, 3, 1, 2) / 127.5 - 1

    z = network.latent(x).permute(0, 2, 3, 1)
    rows = network.quantize.embedding.weight
    soft = torch.softmax(z @ rows.T, dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), len(rows)).double()
    z_q = (hard + soft - soft.detach()) @ rows
    reconstructions = network.decoder(network.post_quant_conv(z_q.permute(0, 3, 1, 2)))
    quantizer = ((z_q - z) ** 2).mean() + ((z_q.detach() - z) ** 2).mean()
    quantizer = quantizer + 0.25 * ((hard @ rows - z.detach()) ** 2).mean()
    nll, alignment = (x - reconstructions).abs().mean(), alignment_of(z, features_of((x + 1) / 2), projection)

    def ratio(other: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        lengths = [torch.autograd.grad(loss, kernel, retain_graph=True)[0].norm() for loss in (nll, other)]
        return lengths[0] / (lengths[1] + 1e-4)

    expected = {"loss/l1": nll, "loss/alignment": alignment}
    expected["loss/alignment_adaptive_weight"] = ratio(alignment, network.encoder.conv_out.weight)
    total = nll + quantizer + WEIGHT * expected["loss/alignment_adaptive_weight"] * alignment
    if adversarial:
        judge = theirs.tensors(after.discriminator.params)
        logits = theirs.patch(judge, reconstructions.permute(0, 2, 3, 1), GROUP)
        loss = expected["loss/adversarial"] = theirs.adversarial_loss("non_saturating", logits)
        factor = 1.0
        if adaptive:
            factor = expected["loss/adaptive_weight"] = ratio(loss, network.decoder.conv_out.weight)
        total = total + ADVERSARIAL * factor * loss
    total.backward()
    expected["loss/total"] = total
    found = {name: tensor.grad.numpy() for name, tensor in network.named_parameters()}
    return {name: value.item() for name, value in expected.items()}, found, projection.grad.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("fields", [ALONE, (ADAPTIVE,), BOTH, (*BOTH, "train.grad_accum_steps=2")])
def test_a_step_by_adaptive_weights_is_pytorchs(fields):
    before, after, metrics = take_step(*fields)
    expected, of_network, of_projection = in_pytorch(before, after, fields != ALONE, fields[:2] == BOTH)
    assert {name for name in metrics if "adaptive" in name} == {name for name in expected if "adaptive" in name}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=TOLERANCE), name
    ours, projection = gradients(after)
    assert ours.keys() == of_network.keys()
    largest = max(np.abs(array).max() for array in of_network.values())
    for name, array in of_network.items():
        assert np.abs(ours[name] - array).max() <= TOLERANCE * largest, name
    released.assert_close(projection, of_projection, TOLERANCE)


@pytest.mark.slow
def test_a_factor_at_its_limit_is_a_weight_by_itself():
    """The two ways of taking a step, with and without a factor, are the same where the factor is known."""
    limit = 2.0**-6
    _, after, metrics = take_step("loss.adversarial_weight=0.0", f"alignment.adaptive_limit={limit}")
    assert metrics["loss/alignment_adaptive_weight"] == limit
    _, expected, logged = take_step("loss.adversarial_weight=0.0", f"alignment.weight={WEIGHT * limit}")
    assert metrics.keys() - logged.keys() == {"loss/alignment_adaptive_weight"}
    for name, value in logged.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name
    check_gradients(after, expected, 1e-6)


@pytest.mark.slow
def test_eight_devices_take_the_step_of_one():
    _, eight, metrics = take_step(*BOTH, sizes=(2, 2, 2))
    _, one, logged = take_step(*BOTH)
    assert metrics.keys() == logged.keys()
    for name, value in logged.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    check_gradients(eight, one, 1e-5)


@pytest.mark.slow
def test_the_factor_costs_no_second_way_back_through_the_encoder():
    """It adds a convolution for each of the decoder's, for its gradient at inputs, and those of the two last layers.

    Without a discriminator the two ways back through the decoder are one, and only the last layers are added.
    """
    counts = {}
    for fields in ((), (ADAPTIVE,), ("loss.adversarial_weight=0.0",), ALONE):
        trainer = make_trainer(*fields)
        program = jit_train_step(trainer).lower(*abstract_arguments(trainer)).compile().as_text()
        counts[fields] = len(re.findall(r"= \S+ convolution\(", program))
    shapes = abstract_state(trainer.create_state, trainer.mesh, 0)[0].params
    decoding = (shapes["decoder"], shapes["post_quant_conv"])
    kernels = sum(path[-1].key == "kernel" for path, _ in jax.tree_util.tree_flatten_with_path(decoding)[0])
    assert kernels <= counts[(ADAPTIVE,)] - counts[()] <= kernels + 4
    assert counts[ALONE] - counts["loss.adversarial_weight=0.0",] <= 4


@pytest.mark.parametrize("frozen", ["codebook", "decoder", "codebook,decoder"])
def test_the_encoder_may_be_aligned_alone(frozen):
    trainer = make_trainer(*BOTH, f"finetune.freeze={frozen}")
    arguments = abstract_arguments(trainer)
    state, metrics = jax.eval_shape(trainer.train_step, *arguments)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), arguments[0]
    )
    assert {"loss/alignment_adaptive_weight", "loss/adaptive_weight"} <= metrics.keys()


def test_the_decoder_is_aligned_by_a_fixed_weight_only():
    make_trainer("alignment.of=decoder")
    with pytest.raises(UsageError, match=r"adaptive_limit=2\.0 compares .* at the encoder's .*; with .* set it to 0"):
        make_trainer("alignment.of=decoder", "alignment.adaptive_limit=2.0")
    with pytest.raises(UsageError, match=r"trains the encoder, which finetune\.freeze=encoder"):
        make_trainer(ADAPTIVE, "finetune.freeze=encoder")
