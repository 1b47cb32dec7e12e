"""The generator's train step: schedules and optimizer against formulas and PyTorch; meshes, micro-batches, seeds."""

import functools
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import released
from support.partition_specs import partition_specs_text

from ibq_jax.autoregressive.step import GeneratorState, GeneratorTrainer, abstract_arguments, jit_train_step
from ibq_jax.autoregressive.token_sizes import load_preset
from ibq_jax.base.sharding import AXES, abstract_state, batch_sharding, make_mesh
from ibq_jax.interop.generator_names import generator_to_torch

CONFIG = Path(__file__).parents[2] / "configs" / "autoregressive.py"
EXACT = 1e-5  # relative to the largest magnitude, between two orders of the same float32 sums
ONE = (1, 1, 1)
QUICK = {"xla_backend_optimization_level": 0}  # compiles twice as fast
SMALL = (
    "model.vocab_size=64",
    "model.grid=(3, 4)",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.embed_dim=32",
    "model.gamma_init=1.0",
    "model.dropout=0.0",
    "data.batch_size=32",
    "optimizer.warmup_fraction=0.0",
    "optimizer.ema_decay=0.75",
    "train.steps=100",
)


def config(*overrides: str, preset: str = "openmoji32"):
    return load_preset(f"{CONFIG}:{preset}", [f"--config.{field}" for field in overrides])


def make_trainer(*overrides: str, sizes: tuple[int, int, int] = ONE) -> GeneratorTrainer:
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)])
    return GeneratorTrainer(config(*SMALL, *overrides), mesh, steps_per_epoch=1)


def batches(steps: int, size: int = 32) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        (random.integers(0, 64, (size, 3, 4), np.int32), random.integers(0, 9, size).astype(np.int32))
        for _ in range(steps)
    ]


def starting_state(trainer: GeneratorTrainer) -> GeneratorState:
    """Returns a state with random weights: with the zero head of `create_state` nothing else would learn at first."""
    shapes, shardings = abstract_state(trainer.create_state, trainer.mesh, 0)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (0.2 * random.normal(size=leaf.shape)).astype(np.float32), shapes.params)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.device_put(zeros.replace(params=params, ema=shapes.ema and params), shardings)


def compiled_step(trainer: GeneratorTrainer):
    return jit_train_step(trainer).lower(*abstract_arguments(trainer)).compile(QUICK)


@functools.cache
def run_steps(*overrides: str, sizes: tuple[int, int, int] = ONE, steps: int = 2):
    """Returns (state after every step, loss of every step) as NumPy arrays, from the same state and batches."""
    trainer = make_trainer(*overrides, sizes=sizes)
    state, step, states, losses = starting_state(trainer), compiled_step(trainer), [], []
    for batch in batches(steps):
        state, metrics = step(state, *jax.device_put(batch, batch_sharding(trainer.mesh)))
        assert metrics["finite"]
        states.append(jax.tree.map(np.array, state))
        losses.append(float(metrics["loss/total"]))
    return states, losses


def assert_same(actual, expected, tolerance: float = EXACT) -> None:
    def close(path, left, right):
        atol = tolerance * np.abs(right).max()
        np.testing.assert_allclose(left, right, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, actual, expected)


def assert_same_run(actual, expected) -> None:
    """Compares losses, last parameters and Adam's first moments, which show gradients' sizes where its steps do not."""
    (states, losses), (expected_states, expected_losses) = actual, expected
    np.testing.assert_allclose(losses, expected_losses, rtol=EXACT)
    assert_same(states[-1].params, expected_states[-1].params)
    assert_same(moments(states[-1].optimizer).mu, moments(expected_states[-1].optimizer).mu)


def moments(optimizer):
    """Returns Adam's part of an optimizer's state."""

    def has_moments(part) -> bool:
        return hasattr(part, "mu")

    return next(part for part in jax.tree.leaves(optimizer, is_leaf=has_moments) if has_moments(part))


def released_rate(step: int, steps: int, warmup: int, start: float, final: float) -> float:
    """Returns the learning rate relative to its peak, as the released code computes it."""
    if step < warmup:
        return start + (1 - start) * step / warmup
    passed = (step - warmup) / (steps - 1 - warmup)
    rest = 1 - passed
    return 1.0 if passed < 0.05 else final + (1 - final) * rest / 0.95


@pytest.mark.parametrize(
    ("preset", "final", "decays"), [("imagenet256_B", 0.1, (0.05, 0.05)), ("imagenet256_XXL", 0.01, (0.05, 0.08))]
)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.0])
def test_schedules_are_the_released_ones(preset, final, decays, share):
    fields = config("train.steps=100", f"optimizer.warmup_fraction={share}", preset=preset)
    trainer = GeneratorTrainer(fields, make_mesh({"data": 8}), steps_per_epoch=1)
    first, last = decays
    for step in range(100):
        rate = 3e-4 * released_rate(step, 100, round(100 * share), 0.005, final)
        assert float(trainer.learning_rate(step)) == pytest.approx(rate, rel=1e-5)
        decay = last + (first - last) * (0.5 + 0.5 * math.cos(math.pi * step / 99))
        assert float(trainer.weight_decay(step)) == pytest.approx(decay, rel=1e-6)


@pytest.mark.parametrize(("preset", "epochs", "warm"), [("B", 300, 6), ("L", 350, 7), ("XL", 400, 8), ("XXL", 450, 9)])
def test_the_published_lengths_count_in_epochs(preset, epochs, warm):
    fields = config(preset=f"imagenet256_{preset}")
    trainer, steps = GeneratorTrainer(fields, make_mesh({"data": 8}), steps_per_epoch=1668), 1668
    final = fields.optimizer.end_lr_factor
    for step in (0, 1, warm * steps - 1, warm * steps, warm * steps + 1, 40 * steps, epochs * steps - 1):
        rate = 3e-4 * released_rate(step, epochs * steps, warm * steps, 0.005, final)
        assert float(trainer.learning_rate(step)) == pytest.approx(rate, rel=1e-5), step


@pytest.mark.parametrize("decay_all", [False, True])
def test_optimizer_steps_are_pytorchs(decay_all):
    """Clipped AdamW in groups; weight decay and rate are large, so that a few steps show them."""
    torch = pytest.importorskip("torch")
    fields = (f"optimizer.decay_all={decay_all}", "optimizer.learning_rate=0.02", "optimizer.weight_decay=0.5")
    trainer = make_trainer(
        *fields, "optimizer.weight_decay_end=0.9", "optimizer.warmup_fraction=0.03", "train.steps=10"
    )
    random = np.random.default_rng(0)
    shapes = {"head": (8, 4), "norm": {"scale": (4,)}, "layer": {"kernel": (4, 4), "bias": (4,)}}
    params = jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    start, tree = jax.tree.flatten(params)
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for leaf in start]
    decays = [decay_all or leaf.ndim > 1 for leaf in start]
    groups = [{"params": [t for t, d in zip(tensors, decays, strict=True) if d is kind]} for kind in (True, False)]
    theirs = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), eps=1e-8)
    state, update = trainer.optimizer.init(params), jax.jit(trainer.optimizer.update)
    for step in range(6):
        gradients = [(0.05 if step == 3 else 2.0) * random.normal(size=leaf.shape) for leaf in start]
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = torch.tensor(gradient, dtype=torch.float32)
        norm = torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        assert (norm < 1) == (step == 3)
        decay = 0.9 - 0.4 * (0.5 + 0.5 * math.cos(math.pi * step / 9))
        for group, wanted in zip(theirs.param_groups, (decay, 0.0), strict=False):
            group |= {"lr": 0.02 * released_rate(step, 10, 0, 0.005, 0.1), "weight_decay": wanted}
        theirs.step()
        updates, state = update(tree.unflatten([jnp.asarray(g, jnp.float32) for g in gradients]), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for ours, tensor, before in zip(jax.tree.leaves(params), tensors, start, strict=True):
            released.assert_close(ours - before, tensor.detach().numpy() - np.asarray(before), 1e-4)


@pytest.mark.parametrize("decay_all", [False, True])
def test_norms_and_biases_keep_their_size_unless_all_decay(decay_all):
    """Without gradients only decay moves a parameter; a matrix is what PyTorch keeps in two dimensions."""
    trainer = make_trainer(f"optimizer.decay_all={decay_all}", "optimizer.weight_decay=0.5")
    params = jax.tree.map(jnp.ones_like, starting_state(trainer).params)
    boxed_state = jax.eval_shape(trainer.create_state, 0).optimizer
    state = jax.tree.map(jnp.zeros_like, nn.meta.unbox(boxed_state))
    updates, _ = jax.jit(trainer.optimizer.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    moved = generator_to_torch(updates)
    assert sum(tensor.ndim == 1 for tensor in moved.values()) == 8
    for name, tensor in moved.items():
        expected = -2e-3 * 0.5 if decay_all or tensor.ndim > 1 else 0.0
        np.testing.assert_allclose(tensor, expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("sizes", [(2, 1, 4), pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_eight_devices_step_as_one_does(sizes):
    assert_same_run(run_steps(sizes=sizes), run_steps())


@pytest.mark.parametrize("sizes", [ONE, pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_micro_batches_step_as_the_whole_batch_does(sizes):
    assert_same_run(run_steps("train.grad_accum_steps=4", sizes=sizes), run_steps())


def test_every_parameter_moves_and_the_loss_falls_on_codes_seen():
    trainer = make_trainer()
    state, step, batch, losses = starting_state(trainer), compiled_step(trainer), batches(1)[0], []
    before = jax.tree.map(np.array, state.params)
    for _ in range(8):
        state, metrics = step(state, *jax.device_put(batch, batch_sharding(trainer.mesh)))
        losses.append(float(metrics["loss/total"]))
    assert losses[-1] < losses[0] - 0.1
    assert float(metrics["loss/perplexity"]) == pytest.approx(math.exp(losses[-1]), rel=1e-5)
    assert int(state.step) == 8
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), state.params, before)
    assert min(jax.tree.leaves(moved)) > 0


def test_the_step_is_a_function_of_seed_and_step():
    """With dropout and class dropout; a loss is that of the state before the step."""
    batch, losses = batches(1)[0], {}
    for seed in (0, 1):
        trainer = make_trainer("model.dropout=0.3", f"seed={seed}")
        state = starting_state(trainer)
        loss = jax.jit(lambda *a, trainer=trainer: trainer.train_step(*a)[1]["loss/total"], compiler_options=QUICK)
        for number in (0, 1, 0):
            value = float(loss(state.replace(step=jnp.int32(number)), *batch))
            losses.setdefault((seed, number), set()).add(value)
    assert all(len(same) == 1 for same in losses.values())
    assert len(set.union(*losses.values())) == 4


def test_bfloat16_keeps_parameters_and_losses_in_float32():
    states, losses = run_steps("dtype=bfloat16", steps=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(states[0].params)} == {np.dtype(np.float32)}
    assert 1e-6 < abs(losses[0] - run_steps()[1][0]) < 1e-2


class TrainedOn(Exception):
    """Carries the labels out of a step."""


def labels_trained_on(monkeypatch, trainer: GeneratorTrainer, labels: np.ndarray, step: int = 0) -> np.ndarray:
    def gradient(self, params, codes, labels, key):
        raise TrainedOn(np.asarray(labels))

    monkeypatch.setattr(GeneratorTrainer, "_gradient", gradient)
    state = GeneratorState(step=jnp.int32(step), params={}, optimizer=(), ema=None)
    with pytest.raises(TrainedOn) as raised:
        trainer.train_step(state, jnp.zeros((len(labels), 3, 4), jnp.int32), jnp.asarray(labels))
    return raised.value.args[0]


def test_a_tenth_of_the_labels_becomes_no_class(monkeypatch):
    labels = np.arange(9000, dtype=np.int32) % 9
    seen = labels_trained_on(monkeypatch, make_trainer(), labels)
    dropped = seen != labels
    assert np.all(seen[dropped] == 9)
    assert abs(dropped.mean() - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 9000)
    later = labels_trained_on(monkeypatch, make_trainer(), labels, step=1) != labels
    assert abs((dropped & later).mean() - 0.01) < 5 * math.sqrt(0.01 * 0.99 / 9000)  # another tenth at another step


def test_without_class_dropout_every_label_stays(monkeypatch):
    labels = np.arange(900, dtype=np.int32) % 9
    trainer = make_trainer("loss.class_dropout=0.0")
    assert trainer.model.no_class is False
    np.testing.assert_array_equal(labels_trained_on(monkeypatch, trainer, labels), labels)


@pytest.mark.parametrize("overrides", [(), ("model.num_classes=0", "loss.class_dropout=0.0")])
def test_images_without_a_class_are_no_class(overrides):
    trainer = make_trainer(*overrides)
    codes, classes = np.zeros((2, *trainer.model.grid), np.int32), trainer.config.model.num_classes
    tables = {"params": nn.meta.unbox(trainer.create_state(0).params)}

    def hidden(*labels):
        return np.asarray(trainer.model.clone(mesh=None).apply(tables, codes, np.array(labels), method="hidden"))

    assert trainer.model.no_class
    np.testing.assert_array_equal(hidden(-1, -1), hidden(classes, classes))
    if classes:
        assert np.any(hidden(-1, -1) != hidden(0, classes - 1), axis=(1, 2)).all()


def test_the_average_is_kept_only_if_asked_for():
    state = jax.eval_shape(make_trainer("optimizer.ema_decay=0.0").create_state, 0)
    assert state.ema is None and state.weights("ema") is state.weights("raw") is state.params


def test_the_average_follows_the_parameters():
    start, (states, _) = starting_state(make_trainer()), run_steps()
    assert states[0].weights("ema") is states[0].ema
    before = start.ema
    for state in states:
        expected = jax.tree.map(lambda average, value: 0.75 * average + 0.25 * value, before, state.params)
        assert_same(state.ema, expected, 1e-6)
        before = state.ema


def test_the_compiled_step_takes_the_abstract_arguments():
    trainer = make_trainer(sizes=(2, 2, 2))
    state, codes, labels = abstract_arguments(trainer)
    assert (codes.shape, labels.shape) == ((32, 3, 4), (32,))
    after, metrics = jax.eval_shape(jit_train_step(trainer), state, codes, labels)
    shapes = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    assert shapes(after) == shapes(state)
    assert {metric.shape for metric in metrics.values()} == {()}


def test_every_parameter_lies_where_the_golden_file_says_and_its_moments_beside_it(check_golden):
    trainer = GeneratorTrainer(
        config("optimizer.ema_decay=0.9", preset="imagenet256_B"), make_mesh({"data": 2, "fsdp": 2, "codebook": 2}), 1
    )
    check_golden("partition_specs_generator.json", partition_specs_text(trainer.placement.computing))
    _, shardings = abstract_state(trainer.create_state, trainer.mesh, 0)
    check_golden("stored_specs_generator.json", partition_specs_text(shardings.params))
    assert trainer.placement.stored == shardings.params
    adam = moments(shardings.optimizer)
    for place in (shardings.ema, adam.mu, adam.nu):
        assert place == shardings.params
