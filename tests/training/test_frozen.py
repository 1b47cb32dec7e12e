"""The frozen networks of a run: which it reads, and what it says of those that are absent."""

import jax
import numpy as np
import pytest
from support.small_runs import SMALL, SMALL_TOKENIZER

from ibq_jax.base.config import load_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import abstract_state, make_mesh, replicated
from ibq_jax.tokenizer.model import PROJECTION
from ibq_jax.tokenizer.step import TokenizerTrainer, abstract_arguments
from ibq_jax.training.frozen import load_nets
from ibq_jax.training.initial import with_weights


def config_with(*overrides: str):
    return load_config(SMALL_TOKENIZER, [f"--config.{field}" for field in (*SMALL, *overrides)])


def random_state(trainer: TokenizerTrainer, seed: int):
    """A state of random numbers, which nothing has to be compiled for."""
    shapes, shardings = abstract_state(trainer.create_state, trainer.mesh, 0)
    random = np.random.default_rng(seed)
    return jax.device_put(jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), shapes), shardings)


@pytest.fixture
def mesh(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # without weights in its cache
    return make_mesh({"data": 2}, jax.devices()[:2])


def test_a_loss_without_its_network_is_off_and_the_run_says_so(mesh, capsys):
    config = config_with("loss.features_weight=1.0", "loss.logits_weight=1.0", "alignment.weight=0.1")
    nets = load_nets(config, mesh)
    lines = capsys.readouterr().out.splitlines()
    assert list(nets) == ["efficientnet"]
    assert lines[0].startswith("perceptual loss: OFF, because torchvision's vgg16-397923af.pth was not found")
    assert lines[1].startswith("feature loss: EfficientNet-Lite0 from ")
    assert lines[2].startswith("logit loss: OFF, because torchvision's convnext_small-0c510722.pth was not found; set ")
    assert lines[3].startswith("alignment: OFF, because DINOv2's dinov2_vits14_pretrain.pth")
    assert {leaf.sharding for leaf in jax.tree.leaves(nets)} == {replicated(mesh)}


def test_a_discriminator_needs_its_network(mesh):
    config = config_with("discriminator.name=dino", "discriminator.net=dino_vits16")
    with pytest.raises(UsageError, match=r"discriminator.net=dino_vits16 is needed, but DINO's dino_deitsmall16_pretr"):
        load_nets(config, mesh)
    assert not load_nets(config_with("loss.perceptual_weight=0.0"), mesh)


def test_initial_weights_leave_the_projection_as_it_is(mesh):
    plain, aligned = (
        TokenizerTrainer(config_with("model.channel_multipliers=(1,)", f"alignment.weight={weight}"), mesh, 1)
        for weight in (0.0, 0.1)
    )
    source, state = (random_state(trainer, seed) for trainer, seed in ((plain, 1), (aligned, 2)))
    started = with_weights(state, jax.device_get(source.params))
    for tree, before in ((started.params, state.params), (started.ema, state.ema)):
        assert (tree[PROJECTION]["kernel"] == before[PROJECTION]["kernel"]).all()
        assert (tree["quantize"]["codebook"] == source.params["quantize"]["codebook"]).all()
    back = with_weights(source, jax.device_get(started.params))  # a projection that the config does not want is dropped
    assert set(back.params) == set(source.params)


def test_a_joint_run_says_that_hidden_states_are_not_aligned(mesh, capsys):
    uses = [("joint.hidden_alignment.weight", 0.5, "dinov2_vitb14")]
    assert load_nets(config_with("loss.perceptual_weight=0.0"), mesh, "tokenizer.", uses) == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("alignment of hidden states: OFF, because DINOv2's dinov2_vitb14_pretrain.pth")
    assert "tokenizer.nets.dinov2_vitb14" in line


@pytest.mark.slow
def test_a_step_with_every_network_is_traced(mesh):
    config = config_with(
        *("discriminator.name=dino", "discriminator.net=dino_vits16", "discriminator.net_side=32"),
        *("loss.features_weight=1.0", "loss.logits_weight=1.0", "alignment.weight=0.1", "alignment.of=decoder"),
        *("dtype=bfloat16", "train.grad_accum_steps=2", "loss.adaptive_limit=1e4"),
    )
    trainer = TokenizerTrainer(config, mesh, 1)
    state, nets, images = abstract_arguments(trainer)
    after, metrics = jax.eval_shape(trainer.train_step, state, nets, images)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {"loss/lpips", "loss/features", "loss/logits", "loss/alignment", "loss/adaptive_weight"} <= set(metrics)
