"""The joint step: gradients against PyTorch in float64, the switch to the bit, eight devices as one.

With LPIPS on a small trunk and alignments with a small network, too; their weights are made up.
"""

import functools
import math

import jax
import numpy as np
import pytest
import torch
from support import released
from support.made_up_weights import made_up_params
from support.small_nets import SMALL_TRUNK, small_net
from support.small_runs import ROOT, SMALL_JOINT
from torch.nn import functional as F

from ibq_jax.base.config import load_config
from ibq_jax.base.sharding import AXES, abstract_state, batch_sharding, make_mesh
from ibq_jax.interop import generator_names, tokenizer_names, torch_model
from ibq_jax.joint.hidden_alignment import aligned_layer, uses
from ibq_jax.joint.parts import resolve, tokenizer_part
from ibq_jax.joint.step import JointState, JointTrainer, abstract_arguments, jit_train_step
from ibq_jax.pretrained.frozen_nets import NETS, grid_features
from ibq_jax.pretrained.lpips import SCALE, SHIFT, TRUNKS, weight_shapes
from ibq_jax.tokenizer.net_losses import wanted_nets
from ibq_jax.tokenizer.step import TokenizerTrainer
from ibq_jax.tokenizer.step import jit_train_step as jit_tokenizer_step

# Float32 against float64, as a share of each tensor's largest gradient; a difference of two gradients loses a digit.
# Measured: 9.7e-6 at most, on two cores of an Intel Xeon.
TOLERANCE = 5e-5
pytestmark = pytest.mark.slow

WEIGHTS = 0.5, 2.0  # of the next-token and of the prediction loss
LINKED = (f"joint.next_token_weight={WEIGHTS[0]}", f"joint.prediction_weight={WEIGHTS[1]}")
APART = ("joint.next_token_gradient=false", "joint.prediction_weight=0.0")
STILL = ("generator.model.dropout=0.0", "generator.loss.class_dropout=0.0", "generator.optimizer.gradient_clip=0.0")
SMALLEST = ("tokenizer.model.channel_multipliers=(1,)", "tokenizer.data.image_size=4", "tokenizer.data.resize=4")
NO_DISCRIMINATOR = (
    "tokenizer.loss.adversarial_weight=0.0",
    "tokenizer.loss.perceptual_weight=0.0",
    "tokenizer.quantizer.entropy_group_tokens=64",
)
FIELDS = (*SMALL_JOINT, *SMALLEST, *STILL, *NO_DISCRIMINATOR)
DIRECTIONS = ("tokenizer.quantizer.l2_normalize=true", "tokenizer.quantizer.logit_temperature=0.2")
PERCEPTUAL, ALIGNMENT = 0.7, 0.3
WITH_NETS = (
    f"tokenizer.loss.perceptual_weight={PERCEPTUAL}",
    f"tokenizer.alignment.weight={ALIGNMENT}",
    "tokenizer.alignment.net=efficientnet",
    "tokenizer.alignment.adaptive_limit=1e8",
)
HIDDEN = 0.7
ALIGNED = (
    f"joint.hidden_alignment.weight={HIDDEN}",
    "joint.hidden_alignment.net=efficientnet",
    "joint.hidden_alignment.projector_channels=24",
    "generator.model.num_layers=3",
)
READ = (*ALIGNED, "joint.hidden_alignment.position=read")
GEAR = (*ALIGNED, "joint.next_token_gradient=false")
STOPPED = (*ALIGNED, "joint.hidden_alignment.gradient=false")
ONE = (1, 1, 1)


@pytest.fixture(scope="module", autouse=True)
def on_small_nets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETS, "efficientnet", small_net()[0])
        patch.setitem(TRUNKS, "vgg16", SMALL_TRUNK)
        yield
    take_step.cache_clear()


def perceptual_weights() -> dict:
    """Returns LPIPS' weights for the small trunk; its heads are positive, as learned ones are."""
    random = np.random.default_rng(2)

    def made_up(leaf) -> np.ndarray:
        width = 1 / math.sqrt(math.prod(leaf.shape[:-1])) if len(leaf.shape) == 4 else 0.5
        return (width * random.standard_normal(leaf.shape)).astype(np.float32)

    weights = jax.tree.map(made_up, weight_shapes())
    return weights | {"heads": [np.abs(head) for head in weights["heads"]]}


def nets_of(trainer: JointTrainer | TokenizerTrainer) -> dict | None:
    """Returns the frozen networks that a config wants."""
    part, more = (trainer.tokenizer, uses(trainer.config)) if isinstance(trainer, JointTrainer) else (trainer, ())
    weights = {"vgg16": perceptual_weights(), "efficientnet": small_net()[1]}
    return {name: weights[name] for name in wanted_nets(part.config, more)} or None


def lpips_in_pytorch(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """LPIPS of images [B, 3, H, W] on the small trunk, the mean over the batch."""
    weights = jax.tree.map(lambda array: torch.tensor(array).double(), perceptual_weights())
    shift, scale = (torch.tensor(values).double()[:, None, None] for values in (SHIFT, SCALE))
    x, y, total = (x - shift) / scale, (y - shift) / scale, torch.zeros(()).double()
    for number, (stage, head) in enumerate(zip(weights["stages"], weights["heads"], strict=True)):
        x, y = (F.max_pool2d(images, 2) if number else images for images in (x, y))
        for layer in stage:
            kernel = layer["kernel"].permute(3, 2, 0, 1)
            x, y = (F.relu(F.conv2d(images, kernel, layer["bias"], padding=1)) for images in (x, y))
        total = total + (head[:, None, None] * (F.normalize(x) - F.normalize(y)) ** 2).sum(1).mean()
    return total


def make_trainer(*overrides: str, sizes=ONE) -> JointTrainer:
    config = load_config(
        f"{ROOT}/configs/joint.py:openmoji32", [f"--config.{field}" for field in (*FIELDS, *overrides)]
    )
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)])
    return JointTrainer(resolve(config, {"num_classes": 5}), mesh, steps_per_epoch=1)


def first_state(trainer: JointTrainer) -> JointState:
    """A state before the first step whose random weights make every part count: the real one has a head of zeros."""
    shapes, shardings = abstract_state(trainer.create_state, trainer.mesh, 0)
    random = np.random.default_rng(0)
    parts = {}
    for name in ("tokenizer", "generator"):
        part = getattr(shapes, name)
        params = made_up_params(part.params, random, head=0.3, embedding=1.0)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), part)
        parts[name] = zeros.replace(params=params, ema=part.ema and params)
    if shapes.projector is not None:
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes.projector)
        parts["projector"] = zeros.replace(params=made_up_params(shapes.projector.params, random))
    return jax.device_put(JointState(**parts), shardings)


@functools.cache
def batch() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    return random.integers(0, 256, (8, 4, 4, 3), np.uint8), random.integers(0, 5, 8).astype(np.int32)


@functools.cache
def take_step(*overrides: str, sizes=ONE):
    """Returns (trainer, state before, state after, metrics), the latter two on the host."""
    trainer = make_trainer(*overrides, sizes=sizes)
    before = first_state(trainer)
    on_host = jax.device_get(before)
    arrays = jax.device_put(batch(), batch_sharding(trainer.mesh))
    state, metrics = jit_train_step(trainer)(before, nets_of(trainer), *arrays)
    return trainer, on_host, jax.device_get(state), {name: float(value) for name, value in metrics.items()}


def first_moments(optimizer):
    def has_moments(part) -> bool:
        return hasattr(part, "mu")

    return next(part.mu for part in jax.tree.leaves(optimizer, is_leaf=has_moments) if has_moments(part))


def gradients(trainer: JointTrainer, state: JointState) -> tuple[dict, dict]:
    """Returns those that led to `state`, read off Adam's first moments after one step, under published names."""
    parts = []
    for part, config in ((state.tokenizer, trainer.tokenizer.config), (state.generator, trainer.generator.config)):
        beta = config.optimizer.beta1
        parts.append(jax.tree.map(lambda moment, beta=beta: moment / (1 - beta), first_moments(part.optimizer)))
    return tokenizer_names.tokenizer_to_torch(parts[0]), generator_names.generator_to_torch(parts[1], "")


def of_projector(trainer: JointTrainer, state: JointState) -> dict:
    """Returns the gradient that led to the projector of `state`."""
    beta = trainer.generator.config.optimizer.beta1
    return jax.tree.map(lambda moment: moment / (1 - beta), first_moments(state.projector.optimizer))


def alignment_in_pytorch(trainer: JointTrainer, projector: dict, generator, embed, codes, labels) -> torch.Tensor:
    """Returns GEAR's alignment, given the embeddings of codes; the features are taken as they are."""
    settings, states, images = trainer.config.joint.hidden_alignment, [], batch()[0].astype(np.float32) / 127.5 - 1
    net, weights = small_net()
    features = np.asarray(grid_features(net, weights, 0.5 * (images + 1), (4, 4), np.float32), np.float64)
    features = torch.tensor(features).flatten(1, 2)
    generator.embed = embed
    hook = generator.blocks[aligned_layer(trainer.config) - 1].register_forward_hook(
        lambda block, inputs, output: states.append(output)
    )
    generator(codes, labels)
    hook.remove()
    (x,) = states
    for name in ("fc1", "fc2", "fc3"):
        x = (x if name == "fc1" else F.silu(x)) @ projector[name]["kernel"] + projector[name]["bias"]
    if settings.position == "read":  # the class token has no code, and the last code is no input
        x, features = x[:, 1:], features[:, :-1]
    return 1 - F.cosine_similarity(x, features, dim=-1).mean()


def in_pytorch(trainer: JointTrainer, before: JointState, next_token_gradient: bool):
    """All losses as one would write them down, in float64; returns them and the gradients of all networks."""
    networks = []
    for kind, params, names, to_torch in (
        (torch_model.Tokenizer, before.tokenizer.params, tokenizer_names, tokenizer_names.tokenizer_to_torch),
        (torch_model.Generator, before.generator.params, generator_names, functools.partial(
            generator_names.generator_to_torch, prefix="")),
    ):  # fmt: skip
        part = trainer.tokenizer if kind is torch_model.Tokenizer else trainer.generator
        network = kind.of(names.published_architecture(part.config.to_dict()) | {"no_class": False}).double()
        tensors = {name: torch.tensor(np.asarray(array)).double() for name, array in to_torch(params).items()}
        network.load_state_dict(tensors)
        networks.append(network)
    tokenizer, generator = networks
    images, labels = batch()
    x, labels = torch.tensor(images).double().permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(labels).long()
    z = tokenizer.latent(x).permute(0, 2, 3, 1).flatten(1, 2)  # [B, S, D]
    settings = trainer.tokenizer.config.quantizer
    rows = tokenizer.quantize.vectors(tokenizer.quantize.embedding.weight)
    soft = torch.softmax(tokenizer.quantize.vectors(z) @ rows.T / settings.logit_temperature, dim=-1)
    codes = soft.argmax(dim=-1)

    def straight_through(p):
        return torch.nn.functional.one_hot(p.argmax(dim=-1), p.shape[-1]) + p - p.detach()

    def embedding(linked: bool, temperature: float):
        p = torch.softmax(torch.log(soft) / temperature, dim=-1) if linked else soft.detach()
        return lambda known: (straight_through(p) @ generator.tok_emb.weight)[:, :-1]

    generator.embed = embedding(next_token_gradient, 1.0)
    logits = generator(codes, labels)
    next_token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    side = x.shape[-1]
    vectors = (straight_through(torch.softmax(logits, dim=-1)) @ rows).unflatten(1, (side, side)).permute(0, 3, 1, 2)
    predicted = tokenizer.decoder(tokenizer.post_quant_conv(vectors))
    prediction = ((x - predicted) ** 2).mean()
    if weight := trainer.tokenizer.config.loss.perceptual_weight:
        prediction = prediction + weight * lpips_in_pytorch(x, predicted)
    total, losses = WEIGHTS[0] * next_token + WEIGHTS[1] * prediction, [next_token.item(), prediction.item()]
    projector = {}
    if before.projector is not None:
        projector = jax.tree.map(lambda x: torch.tensor(x).double().requires_grad_(), before.projector.params)
        settings = trainer.config.joint.hidden_alignment
        embed = embedding(settings.gradient, settings.temperature)
        alignment = alignment_in_pytorch(trainer, projector, generator, embed, codes, labels)
        total, losses = total + HIDDEN * alignment, [*losses, alignment.item()]
    total.backward()
    slopes = [
        {name: np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy() for name, tensor in
         network.named_parameters()}
        for network in networks
    ]  # fmt: skip
    return losses, *slopes, jax.tree.map(lambda x: x.grad.numpy(), projector)


@pytest.mark.parametrize("fields", [(), DIRECTIONS, ("joint.next_token_gradient=false",), WITH_NETS, READ, GEAR])
def test_gradients_are_pytorchs(fields):
    """Compares the gradients that stage one lacks, and the generator's, with those of the losses in PyTorch."""
    linked = "joint.next_token_gradient=false" not in fields
    trainer, before, state, metrics = take_step(*LINKED, *fields)
    alone, _, apart, _ = take_step(*APART, *[field for field in fields if "joint" not in field])
    losses, tokenizer, generator, projector = in_pytorch(trainer, before, linked)
    for name, expected in zip(("next_token", "prediction", "hidden_alignment"), losses, strict=False):
        assert metrics[f"loss/{name}"] == pytest.approx(expected, rel=1e-5)
    (ours, of_generator), (stage_one, _) = gradients(trainer, state), gradients(alone, apart)
    assert ours.keys() == tokenizer.keys() and of_generator.keys() == generator.keys()
    largest = max(np.abs(array).max() for array in ours.values())
    for name, expected in tokenizer.items():
        error = np.abs(ours[name] - stage_one[name].astype(np.float64) - expected).max()
        assert error <= TOLERANCE * max(np.abs(expected).max(), 1e-2 * largest), name
    for name, expected in generator.items():
        released.assert_close(WEIGHTS[0] * of_generator[name], expected, TOLERANCE)
    for layer, expected in projector.items():
        for name, array in of_projector(trainer, state)[layer].items():
            released.assert_close(WEIGHTS[0] * array, expected[name], TOLERANCE)
    reached = (
        np.abs(tokenizer["encoder.conv_in.weight"]).max() > 0,
        np.abs(tokenizer["decoder.conv_in.weight"]).max() > 0,
    )
    assert reached == (linked or fields == GEAR, True)


@pytest.mark.parametrize("fields", [(), STOPPED])
def test_apart_nothing_of_the_generator_reaches_the_tokenizer(fields):
    """With another generator and other labels the tokenizer is the same to the bit."""
    trainer, before, state, metrics = take_step(*APART, *fields)
    other = before.replace(
        generator=before.generator.replace(params=jax.tree.map(np.negative, before.generator.params))
    )
    other = jax.device_put(other, abstract_state(trainer.create_state, trainer.mesh, 0)[1])
    images, labels = jax.device_put(batch(), batch_sharding(trainer.mesh))
    after, logged = jit_train_step(trainer)(other, nets_of(trainer), images, 4 - labels)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.tokenizer), state.tokenizer)
    assert float(logged["loss/next_token"]) != metrics["loss/next_token"]


@pytest.mark.parametrize("fields", [(), WITH_NETS])
def test_apart_the_tokenizer_is_trained_as_in_stage_one(fields):
    """Losses to the bit, and gradients to the rounding of what XLA fuses: to the bit where it fuses nothing."""
    trainer, before, state, metrics = take_step(*APART, *fields)
    alone = TokenizerTrainer(tokenizer_part(trainer.config), trainer.mesh, steps_per_epoch=1)
    expected, logged = jit_tokenizer_step(alone)(jax.device_put(before.tokenizer), nets_of(alone), batch()[0])
    for name in logged.keys() - {"loss/total", "optimizer/gradient_norm", "loss/alignment_adaptive_weight"}:
        assert metrics[name] == float(logged[name]), name
    if fields:
        factor = "loss/alignment_adaptive_weight"
        assert metrics[factor] == pytest.approx(float(logged[factor]), rel=1e-6)
        assert min(metrics["loss/lpips"], metrics["loss/alignment"], metrics[factor]) > 0
    ours, theirs = (first_moments(tokenizer.optimizer) for tokenizer in (state.tokenizer, jax.device_get(expected)))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6 * largest), ours, theirs)
    assert not any(name.endswith(("norm_next_token", "norm_prediction")) for name in metrics)
    assert metrics["loss/total"] == pytest.approx(float(logged["loss/total"]) + 0.1 * metrics["loss/next_token"])


def test_eight_devices_take_the_step_of_one():
    assert_same_step(take_step(*LINKED, *READ, sizes=(2, 2, 2)), take_step(*LINKED, *READ))


@pytest.mark.parametrize(("fields", "sizes"), [(WITH_NETS, (1, 2, 2)), (GEAR, ONE)])
def test_micro_batches_take_the_step_of_the_whole_batch(fields, sizes):
    """The groups of the batch entropy, 4 images, lie within a micro-batch."""
    step = take_step(*LINKED, *fields, "train.grad_accum_steps=2", sizes=sizes)
    assert_same_step(step, take_step(*LINKED, *fields))


def assert_same_step(step: tuple, other: tuple) -> None:
    """Checks that two results of `take_step` agree in their metrics and gradients, to rounding."""
    (*_, state, metrics), (*_, expected, logged) = step, other
    assert metrics.keys() == logged.keys()
    for name, value in logged.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for part in ("tokenizer", "generator", "projector")[: 2 if expected.projector is None else 3]:
        ours, theirs = (first_moments(getattr(side, part).optimizer) for side in (state, expected))
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4 * largest), ours, theirs)


def test_metrics():
    trainer, _, state, metrics = take_step(*LINKED)
    joint = WEIGHTS[0] * metrics["loss/next_token"] + WEIGHTS[1] * metrics["loss/prediction"]
    assert metrics["loss/total"] == pytest.approx(metrics["loss/nll"] + metrics["loss/codebook"] + joint, rel=1e-6)
    entropy = math.log(metrics["codebook/perplexity"])
    assert metrics["loss/next_token_relative"] == pytest.approx(metrics["loss/next_token"] / entropy, rel=1e-5)
    assert metrics["finite"]
    assert metrics["generator/learning_rate"] == pytest.approx(2e-3)
    norms = [metrics[f"codebook/gradient_norm_{name}"] for name in ("reconstruction", "next_token", "prediction")]
    whole = np.linalg.norm(gradients(trainer, state)[0]["quantize.embedding.weight"])
    assert min(norms) > 0 and max(norms) < whole + sum(norms) and whole <= sum(norms)


def test_metrics_with_frozen_networks():
    _, _, _, metrics = take_step(*LINKED, *WITH_NETS)
    joint = WEIGHTS[0] * metrics["loss/next_token"] + WEIGHTS[1] * metrics["loss/prediction"]
    alignment = ALIGNMENT * metrics["loss/alignment_adaptive_weight"] * metrics["loss/alignment"]
    distances = metrics["loss/l1"] + PERCEPTUAL * metrics["loss/lpips"]
    assert metrics["loss/nll"] == pytest.approx(distances, rel=1e-6)
    assert metrics["loss/total"] == pytest.approx(distances + metrics["loss/codebook"] + alignment + joint, rel=1e-6)


def test_metrics_of_aligned_hidden_states():
    trainer, _, state, metrics = take_step(*LINKED, *GEAR)
    joint = WEIGHTS[0] * metrics["loss/next_token"] + WEIGHTS[1] * metrics["loss/prediction"]
    joint += HIDDEN * metrics["loss/hidden_alignment"]
    assert metrics["loss/total"] == pytest.approx(metrics["loss/nll"] + metrics["loss/codebook"] + joint, rel=1e-6)
    norms = [metrics[f"codebook/gradient_norm_{name}"] for name in ("reconstruction", "prediction", "hidden_alignment")]
    whole = np.linalg.norm(gradients(trainer, state)[0]["quantize.embedding.weight"])
    assert min(norms) > 0 and "codebook/gradient_norm_next_token" not in metrics
    assert max(norms) < whole + sum(norms) and whole <= sum(norms)


def test_without_the_network_hidden_states_are_not_aligned():
    trainer = make_trainer(*LINKED, *GEAR)
    state, _, *batch = abstract_arguments(trainer)
    after, metrics = jax.eval_shape(trainer.train_step, state, None, *batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert not any("hidden_alignment" in name for name in metrics)


@pytest.mark.parametrize(("layers", "asked", "aligned"), [(12, 0, 4), (24, 0, 8), (36, 0, 12), (1, 0, 1), (12, 9, 9)])
def test_the_aligned_layer_is_a_third_of_the_way(layers, asked, aligned):
    fields = (f"generator.model.num_layers={layers}", f"joint.hidden_alignment.layer={asked}")
    assert aligned_layer(make_trainer(*fields).config) == aligned


def test_what_is_off_is_not_compiled():
    """Without the prediction loss the program has one decoder."""
    counts = []
    for fields in ((), ("joint.prediction_weight=0.0",)):
        trainer = make_trainer(*fields)
        program = str(jax.make_jaxpr(trainer.train_step)(*abstract_arguments(trainer)))
        counts.append(program.count("conv_general_dilated["))
    assert counts[0] > 1.3 * counts[1]


def test_frozen_parts_stay_as_they_are():
    trainer = make_trainer(*LINKED, "tokenizer.finetune.freeze=codebook")
    state, metrics = jax.eval_shape(trainer.train_step, *abstract_arguments(trainer))
    assert "quantize" not in state.tokenizer.ema and "encoder" in state.tokenizer.ema
    assert not any(name.startswith("codebook/gradient_norm") for name in metrics)
