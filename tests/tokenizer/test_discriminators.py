"""The discriminators by name: a training step of each against PyTorch in float64, on meshes, stopped and continued."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import released
from support import torch_discriminators as theirs
from support.small_nets import small_net
from support.small_runs import SMALL, SMALL_TOKENIZER

from ibq_jax.base.checkpoint import Checkpoints
from ibq_jax.base.config import load_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import abstract_state, batch_sharding, create_sharded, make_mesh, replicated
from ibq_jax.base.state import adam
from ibq_jax.pretrained.frozen_nets import NETS
from ibq_jax.tokenizer import diff_augment, losses, spectral_norm
from ibq_jax.tokenizer.check import check_config
from ibq_jax.tokenizer.discriminators import DISCRIMINATORS, DiscriminatorTrainer
from ibq_jax.tokenizer.feature_discriminator import FeatureDiscriminator
from ibq_jax.tokenizer.step import TokenizerTrainer
from ibq_jax.tokenizer.style_discriminator import StyleDiscriminator

TOLERANCE = 1e-5  # of a tensor's largest value; float32 gradients of these networks are measured to be within 4e-6
GROUP, BETA1 = 2, 0.5
TINY = ("data.image_size=8", "discriminator.channels=4")  # as compiling takes the longest
ALL = ("discriminator.r1_weight=0.5", "discriminator.r1_every=4", "discriminator.spectral_norm=True")
AUGMENTED = "discriminator.augment=color,translation,cutout"


def trainer_with(*overrides: str, devices: int = 1) -> DiscriminatorTrainer:
    config = load_config(SMALL_TOKENIZER, [f"--config.{field}" for field in (*SMALL, *overrides)])
    mesh = make_mesh({"data": devices}, jax.devices()[:devices])
    check_config(config, mesh)
    return DiscriminatorTrainer(config, mesh, adam(lambda step: 1e-5, beta1=BETA1, beta2=0.9, gradient_clip=0.0))


def batches(number: int = 8, side: int = 16) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return tuple(random.uniform(-1, 1, (number, side, side, 3)).astype(np.float32) for _ in range(2))


def first_state(trainer: DiscriminatorTrainer):
    """A state whose logits are of usual size: the random initial weights leave them near 0."""
    state = create_sharded(lambda: trainer.create(jax.random.key(0)), trainer.mesh)
    random = np.random.default_rng(1)

    def moved(leaf):
        return leaf + random.normal(0, 0.3, leaf.shape).astype(np.float32)

    return jax.device_get(state.replace(params=jax.tree.map(moved, state.params)))


def step_of(trainer: DiscriminatorTrainer, net: dict | None = None):
    """Returns the jitted step of (state, images, reconstructions, step number)."""
    mesh = trainer.mesh
    _, shardings = abstract_state(lambda: trainer.create(jax.random.key(0)), mesh)
    return jax.jit(
        functools.partial(trainer.train, net=net),
        in_shardings=(shardings, batch_sharding(mesh), batch_sharding(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )


def assert_trees_close(ours, expected, tolerance: float = TOLERANCE) -> None:
    ours, _ = jax.tree_util.tree_flatten_with_path(ours)
    expected = jax.tree.leaves(expected)
    largest = max(np.abs(leaf).max() for leaf in expected)
    for (path, leaf), other in zip(ours, expected, strict=True):
        error = np.abs(np.asarray(leaf, np.float64) - other).max()
        assert error <= tolerance * largest, f"{jax.tree_util.keystr(path)}: {error / largest:.1e}"


def spectrally_normalised(params: dict, vectors: dict) -> dict:
    """Divides kernels as PyTorch's own module does after one step of power iteration from the given vectors."""
    normalised = {}
    for name, value in params.items():
        if isinstance(value, dict):
            normalised[name] = spectrally_normalised(value, vectors.get(name, {}))
        elif name == "kernel":
            matrix = value.permute(3, 0, 1, 2).flatten(1)
            with torch.no_grad():
                right = torch.nn.functional.normalize(matrix.T @ vectors[name], dim=0)
                left = torch.nn.functional.normalize(matrix @ right, dim=0)
            normalised[name] = value / (left @ matrix @ right)
        else:
            normalised[name] = value
    return normalised


@pytest.mark.parametrize(("name", "loss"), [("patch", "lsgan"), ("stylegan", "non_saturating")])
def test_a_step_has_the_gradient_of_pytorch(name, loss):
    trainer = trainer_with(f"discriminator.name={name}", f"discriminator.loss={loss}", *ALL, AUGMENTED)
    state, (images, reconstructions) = first_state(trainer), batches()
    after, metrics = step_of(trainer)(state, images, reconstructions, 4)

    params, vectors = theirs.tensors(state.params, requires_grad=True), theirs.tensors(state.batch_stats["spectral"])
    network, normalised = getattr(theirs, name), spectrally_normalised(params, vectors)
    draws = [trainer._draws(jnp.int32(4), number) for number in range(2)]
    real_images = torch.tensor(images.astype(np.float64), requires_grad=True)
    real = network(normalised, theirs.augmented(real_images, draws[0]), GROUP)
    fake = network(normalised, theirs.augmented(torch.tensor(reconstructions.astype(np.float64)), draws[1]), GROUP)
    plain, penalty = theirs.discriminator_loss(loss, real, fake), theirs.r1(real, real_images)
    averages = [0.001 * logits.mean().detach() for logits in (real, fake)]
    lecam = (real - averages[1]).relu().square().mean() + (averages[0] - fake).relu().square().mean()
    total = plain + 0.05 * lecam + 0.5 * 0.5 * 4 * penalty
    total.backward()

    assert_trees_close(jax.tree.map(lambda mu: mu / (1 - BETA1), after.optimizer[0].mu), theirs.gradients(params))
    expected = {"loss": total, loss: plain, "lecam": lecam, "r1": penalty}
    for key, value in expected.items():
        assert float(metrics[f"discriminator/{key}"]) == pytest.approx(value.item(), rel=TOLERANCE), key


@pytest.mark.parametrize(("name", "loss"), [("patch", "hinge"), ("stylegan", "lsgan")])
def test_the_tokenizers_loss_has_the_gradient_of_pytorch(name, loss):
    trainer = trainer_with(f"discriminator.name={name}", f"loss.adversarial={loss}", AUGMENTED)
    state, (images, _) = first_state(trainer), batches()

    def loss_of(images):
        return trainer.loss_of(jax.tree.map(jnp.asarray, state), images, jnp.int32(4), None)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss_of))(images)
    reconstructions = torch.tensor(images.astype(np.float64), requires_grad=True)
    seen = theirs.augmented(reconstructions, trainer._draws(jnp.int32(4), 2))
    expected = theirs.adversarial_loss(loss, getattr(theirs, name)(theirs.tensors(state.params), seen, GROUP))
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=TOLERANCE)
    released.assert_close(gradient, reconstructions.grad.numpy(), TOLERANCE)


def test_heads_on_hidden_maps_have_the_values_and_gradients_of_pytorch():
    random = np.random.default_rng(0)
    maps = [random.normal(size=(4, side, side, c)).astype(np.float32) for side, c in ((8, 3), (4, 5), (2, 6))]
    module = FeatureDiscriminator(channels=4, norm_group=GROUP)
    variables = jax.tree.map(jnp.asarray, jax.jit(module.init)(jax.random.key(0), maps))
    params = jax.tree.map(
        lambda leaf: leaf + random.normal(0, 0.2, leaf.shape).astype(np.float32),
        jax.tree.map(lambda box: box.value, variables["params"], is_leaf=lambda leaf: hasattr(leaf, "names")),
    )

    def weighed(params, maps):
        logits = module.apply({"params": params, "batch_stats": variables["batch_stats"]}, maps)
        return jnp.sum(jnp.sin(logits)), logits

    (_, logits), found = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1), has_aux=True))(params, maps)
    their_params, their_maps = theirs.tensors(params, requires_grad=True), theirs.tensors(maps, requires_grad=True)
    expected = theirs.feature_heads(their_params, their_maps, GROUP)
    expected.sin().sum().backward()
    assert logits.shape == (4, 8, 8, 3)
    released.assert_close(logits, expected.detach().numpy(), TOLERANCE)
    assert_trees_close(found[0], theirs.gradients(their_params))
    for ours, other in zip(found[1], their_maps, strict=True):
        released.assert_close(ours, other.grad.numpy(), TOLERANCE)


def test_heads_on_tokens_are_stylegan_ts():
    """With spectral normalisation, and in PyTorch with biases before the batch norms, which undo them."""
    random = np.random.default_rng(0)
    maps = [random.normal(size=(4, 3, 4, 5)).astype(np.float32) for _ in range(2)]
    module = FeatureDiscriminator(channels=6, norm_group=GROUP, form="tokens")
    variables = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), maps))
    params = jax.tree.map(lambda x: x + random.normal(0, 0.2, x.shape).astype(np.float32), variables["params"])
    vectors = spectral_norm.initial_vectors(jax.random.key(1), params)

    def weighed(params, maps):
        normalised, _ = spectral_norm.normalise(params, vectors)
        logits = module.apply({"params": normalised, "batch_stats": variables["batch_stats"]}, maps)
        return jnp.sum(jnp.sin(logits)), logits

    (_, logits), found = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1), has_aux=True))(params, maps)
    heads = [theirs.TokenHead(params[name], vectors[name], GROUP) for name in ("head_0", "head_1")]
    their_maps = theirs.tensors(maps, requires_grad=True)
    expected = torch.cat([head(x.flatten(1, 2).mT) for head, x in zip(heads, their_maps, strict=True)], 1)
    expected.sin().sum().backward()
    released.assert_close(logits, expected.detach().mT.unflatten(1, (3, 4)).numpy(), TOLERANCE)
    assert_trees_close(found[0], {f"head_{number}": head.gradients() for number, head in enumerate(heads)})
    for ours, other in zip(found[1], their_maps, strict=True):
        released.assert_close(ours, other.grad.numpy(), TOLERANCE)


def test_heads_on_dinos_tokens_have_the_size_of_vars():
    """VAR's five heads have 7,386,245 parameters, of which 5 * 2 * 384 are biases that batch norms undo."""
    fields = ("discriminator.net=dino_vits16", "discriminator.heads=tokens", "discriminator.channels=384")
    trainer = trainer_with("discriminator.name=dino", *fields)
    state = nn.meta.unbox(jax.eval_shape(trainer.create, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 7_386_245 - 5 * 2 * 384


def test_spectral_normalisation_finds_the_largest_singular_value():
    random = np.random.default_rng(0)
    params = {"conv": {"kernel": random.normal(size=(3, 3, 4, 6)).astype(np.float32), "bias": np.ones(6)}}
    vectors = spectral_norm.initial_vectors(jax.random.key(0), params)
    for _ in range(200):
        normalised, vectors = spectral_norm.normalise(params, vectors)
    kernel = np.asarray(normalised["conv"]["kernel"])
    assert np.linalg.norm(kernel.reshape(-1, 6), 2) == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_array_equal(normalised["conv"]["bias"], params["conv"]["bias"])


def test_the_tokenizers_share_starts_and_rises():
    trainer = trainer_with("discriminator.start_step=2", "discriminator.ramp_steps=4")
    assert [float(trainer.share(jnp.int32(step))) for step in range(8)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_the_adaptive_weight_is_the_clipped_ratio_of_lengths():
    random = np.random.default_rng(0)
    nll, adversarial = random.normal(size=(3, 3, 4, 3)), random.normal(size=(3, 3, 4, 3))
    expected = np.linalg.norm(nll) / (np.linalg.norm(adversarial) + 1e-4)
    assert float(losses.adaptive_weight(nll, adversarial, 1e4)) == pytest.approx(expected, rel=1e-6)
    assert float(losses.adaptive_weight(nll, 1e-9 * adversarial, 100.0)) == 100.0


ON_NET = ("discriminator.spectral_norm=True", "discriminator.net_side=16", "discriminator.net=dino_vits16")


CROPPED = ("discriminator.crop_probability=1.0", "discriminator.net_side=6", "discriminator.heads=tokens")


@pytest.mark.parametrize(("name", "others"), [*((name, ()) for name in DISCRIMINATORS), ("dino", CROPPED)])
def test_eight_devices_and_micro_batches_take_the_same_step(name, others, monkeypatch):
    net, weights = small_net()
    monkeypatch.setitem(NETS, "dino_vits16", net)
    others = (*ON_NET, *others) if name == "dino" else ALL
    fields = (f"discriminator.name={name}", *TINY, *others, AUGMENTED, "data.batch_size=16")
    results = []
    for devices, micro_batches in ((1, 1), (8, 2)):
        trainer = trainer_with(*fields, f"train.grad_accum_steps={micro_batches}", devices=devices)
        step = step_of(trainer, weights if name == "dino" else None)
        results.append(step(first_state(trainer), *batches(16, 8), 4))
    (one, of_one), (eight, of_eight) = results
    for key, value in of_one.items():
        assert float(of_eight[key]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), key
    assert_trees_close(eight.optimizer[0].mu, jax.device_get(one.optimizer[0].mu), 1e-4)


@pytest.fixture(scope="module")
def with_r1():
    """A discriminator's trainer with everything switched on, its step, and a state before the first one."""
    trainer = trainer_with("discriminator.name=stylegan", *TINY, *ALL, AUGMENTED)
    return trainer, step_of(trainer), first_state(trainer)


def test_r1_is_due_every_so_many_steps(with_r1):
    _, step, state = with_r1
    penalties = [float(step(state, *batches(8, 8), number)[1]["discriminator/r1"]) for number in range(6)]
    assert [penalty > 0 for penalty in penalties] == [True, False, False, False, True, False]


def test_a_stopped_and_continued_discriminator_is_the_same_bit_for_bit(tmp_path, with_r1):
    trainer, step, state = with_r1
    state, _ = step(state, *batches(8, 8), 0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"discriminator": state}, {})
    checkpoints.wait()
    shapes, _ = abstract_state(lambda: trainer.create(jax.random.key(0)), trainer.mesh)
    restored = checkpoints.restore({"discriminator": shapes})
    checkpoints.close()
    ends = [step(start, *batches(8, 8), 1)[0] for start in (state, restored.state["discriminator"])]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_the_first_weights_of_the_style_discriminator_keep_the_size_of_what_passes():
    module = StyleDiscriminator(channels=32, norm_group=0)
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    logits, _ = jax.jit(module.init_with_output)(jax.random.key(0), images)
    assert logits.shape == (4, 1, 1, 1)
    assert 0.05 < float(jnp.sqrt(jnp.mean(logits**2))) < 5.0


def test_none_leaves_the_state_without_a_discriminator():
    trainer = trainer_with("discriminator.name=none")
    whole = TokenizerTrainer(trainer.config, trainer.mesh, 1)
    assert abstract_state(whole.create_state, trainer.mesh, 0)[0].discriminator is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["discriminator.name=gan"], "discriminator.name=gan is not one of patch, stylegan, dino, none"),
        (["discriminator.heads=lines"], "discriminator.heads=lines is not one of maps, tokens"),
        (
            ["discriminator.name=dino", "discriminator.heads=tokens"],
            r"and discriminator.net=efficientnet has none; choose one of dino_vits16, .*, or discriminator.heads=maps",
        ),
        (["discriminator.loss=wgan"], "discriminator.loss=wgan is not one of hinge, non_saturating, lsgan"),
        (["discriminator.augment=color,flip"], "there is no 'flip'; there are color, translation, cutout"),
        (["discriminator.r1_weight=-1.0"], "discriminator.r1_weight=-1.0 is negative; it must be at least 0"),
        (["discriminator.r1_every=0"], "discriminator.r1_every=0 is not positive"),
        (["discriminator.name=none", "finetune.discriminator_warmup_steps=3"], "and discriminator.name is none"),
        (["discriminator.name=stylegan", "discriminator.norm_group=3"], "norm_group=3 does not divide"),
        (["discriminator.crop_probability=1.5"], "discriminator.crop_probability=1.5 is not in 0..1"),
        (["discriminator.crop_probability=0.5"], "is for discriminator.name=dino, not for patch; set it to 0"),
        (
            ["discriminator.crop_probability=0.5", "discriminator.name=dino"],
            "needs images larger than .* data.image_size=16, discriminator.net_side=224",
        ),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        trainer_with(*fields)


@pytest.mark.parametrize("module", [StyleDiscriminator(8, 4), FeatureDiscriminator(8, 4)])
def test_a_batch_that_does_not_divide_into_groups_is_refused(module):
    seen = jnp.zeros((6, 8, 8, 3)) if isinstance(module, StyleDiscriminator) else [jnp.zeros((6, 8, 8, 3))]
    with pytest.raises(UsageError, match=r"6 images.*groups of 4"):
        jax.eval_shape(module.init, jax.random.key(0), seen)


def test_augmentations_draw_from_their_whole_ranges():
    draws = diff_augment.draw(jax.random.key(0), ("color", "translation", "cutout"), 4096)
    assert sorted(draws) == sorted(name for names in diff_augment.DRAWS.values() for name in names)
    assert len({float(values[0]) for values in draws.values()}) == len(draws)
    ones = jnp.ones((4096, 16, 16, 3))
    moved = diff_augment.augment(ones, {name: draws[name] for name in ("down", "across")})
    rows = np.asarray(moved[:, :, 8, 0].sum(1) + moved[:, 8, :, 0].sum(1))
    assert rows.min() == 28 and rows.max() == 32  # up to two of sixteen rows and columns left the image
    cut = diff_augment.augment(ones, {name: draws[name] for name in ("row", "column")})
    share = 1 - np.asarray(cut).mean((1, 2, 3))
    assert share.max() == 0.25 and share.min() == 0.0625  # half of each side, of which the edge may hide half


def test_crops_are_pieces_of_the_images():
    """Values against slices in NumPy, and gradients: a pixel's is that of the place in the piece where it is seen."""
    images, _ = batches(6, 16)
    whole = np.zeros((6, 4, 7, 3), np.float32)
    draws = {
        "cropped": np.array([True, True, True, True, False, True]),
        "top": np.array([0.0, 0.5, 0.999, 0.3, 0.3, 0.8], np.float32),
        "left": np.array([0.999, 0.25, 0.0, 0.7, 0.7, 0.1], np.float32),
    }
    rows, columns = [0, 6, 12, 3, None, 10], [9, 2, 0, 7, None, 1]  # of 13 and 10 places
    weights = np.random.default_rng(2).normal(size=whole.shape).astype(np.float32)
    pieces, pull_back = jax.vjp(lambda images: diff_augment.crop(images, whole, draws), images)
    (gradient,) = pull_back(weights)
    for number, (row, column) in enumerate(zip(rows, columns, strict=True)):
        expected, of_image = np.zeros_like(whole[0]), np.zeros_like(images[0])
        if row is not None:
            expected = images[number, row : row + 4, column : column + 7]
            of_image[row : row + 4, column : column + 7] = weights[number]
        np.testing.assert_array_equal(pieces[number], expected)
        np.testing.assert_array_equal(gradient[number], of_image)


def test_images_that_are_no_larger_are_not_cropped():
    images, _ = batches(2, 16)
    draws = diff_augment.draw_crop(jax.random.key(0), 1.0, 2)
    for height in (16, 17):
        whole = jnp.zeros((2, height, 8, 3))
        assert diff_augment.crop(images, whole, draws) is whole
    assert diff_augment.crop(images, jnp.zeros((2, 8, 8, 3)), {}).shape == (2, 8, 8, 3)


def test_crops_follow_from_seed_and_step_and_are_one_for_a_batch():
    """A discriminator's step crops images and reconstructions alike; the tokenizer's loss has its own draw."""
    fields = ("discriminator.name=dino", "discriminator.net_side=8", "discriminator.crop_probability=0.5")
    steps = jnp.arange(200)

    def drawn(number: int) -> dict[str, np.ndarray]:
        return jax.device_get(jax.vmap(lambda step: trainer_with(*fields)._draws(step, number))(steps))

    real, fake, again, against = (drawn(number) for number in (0, 1, 0, 2))
    for name, values in real.items():
        assert values.shape == (200, 8) and (values == values[:, :1]).all()
        np.testing.assert_array_equal(values, fake[name])
        np.testing.assert_array_equal(values, again[name])
        assert (values != against[name]).any()
    for draws in (real, against):
        assert 70 < draws["cropped"][:, 0].sum() < 130
    places = np.floor(9 * np.stack([real["top"], real["left"]])).astype(int)[:, :, 0]
    assert len(np.unique(places, axis=1).T) > 60  # of 81


def test_a_discriminator_sees_the_piece(monkeypatch):
    """With crops at every look, logits and gradients are those of the pieces themselves."""
    net, weights = small_net()
    monkeypatch.setitem(NETS, "dino_vits16", net)
    fields = ("discriminator.name=dino", *ON_NET, "discriminator.net_side=8", "discriminator.channels=4")
    trainer, plain = trainer_with(*fields, "discriminator.crop_probability=1.0"), trainer_with(*fields)
    state, (images, _), step = jax.tree.map(jnp.asarray, first_state(plain)), batches(8, 16), jnp.asarray(3)
    draws = trainer._draws(step, 2)
    row, column = (int(9 * draws[name][0]) for name in ("top", "left"))
    losses_of = [
        jax.value_and_grad(lambda x, one=one: one.loss_of(state, x, step, weights)[0]) for one in (trainer, plain)
    ]
    (cropped, gradient), (expected, of_piece) = (
        jax.jit(loss)(seen)
        for loss, seen in zip(losses_of, (images, images[:, row : row + 8, column : column + 8]), strict=True)
    )
    assert float(cropped) == pytest.approx(float(expected), rel=1e-6)
    whole = np.zeros_like(images)
    whole[:, row : row + 8, column : column + 8] = of_piece
    np.testing.assert_allclose(gradient, whole, rtol=0, atol=1e-6 * np.abs(whole).max())
