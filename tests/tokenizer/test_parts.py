"""Fine-tuning in the train step: parts that stay as they are, rates of their own, the discriminator's first steps."""

import jax
import numpy as np
import pytest
from support.small_runs import SMALL, SMALL_TOKENIZER

from ibq_jax.base.config import load_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import create_sharded, make_mesh
from ibq_jax.tokenizer.check import check_config
from ibq_jax.tokenizer.parts import frozen_parts, keeps_codes
from ibq_jax.tokenizer.step import TokenizerTrainer, jit_train_step

CALM = "optimizer.learning_rate=1e-5"  # larger ones make Adam's first steps chaotic: rounding decides their signs


def config_with(*overrides: str):
    fields = (*SMALL, "optimizer.ema_decay=0.9", CALM, *overrides)
    return load_config(SMALL_TOKENIZER, [f"--config.{field}" for field in fields])


def train(steps: int, *overrides: str, devices: int = 1) -> tuple:
    """Returns the states before and after some steps on random images, on the host, and the scalars of each step."""
    trainer = TokenizerTrainer(config_with(*overrides), make_mesh({"data": devices}, jax.devices()[:devices]), 1)
    state = create_sharded(trainer.create_state, trainer.mesh, 0)
    states, logs, step = [jax.device_get(state)], [], jit_train_step(trainer)
    random = np.random.default_rng(0)
    for _ in range(steps):
        state, metrics = step(state, None, random.integers(0, 256, (8, 16, 16, 3), np.uint8))
        states.append(jax.device_get(state))
        logs.append({name: float(value) for name, value in metrics.items()})
    return states, logs


def largest(tree) -> float:
    return max(np.abs(leaf).max() for leaf in jax.tree.leaves(tree))


def assert_equal(tree, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.fixture(scope="module")
def plain():
    return train(2)


def test_frozen_parts_stay_as_they_are_and_take_no_memory(plain):
    states, logs = train(2, "finetune.freeze=encoder,codebook")
    first, last, trained = states[0], states[-1], {"decoder", "post_quant_conv"}
    for name, leaves in last.params.items():
        if name in trained:
            assert not all(map(np.array_equal, jax.tree.leaves(leaves), jax.tree.leaves(first.params[name])))
        else:
            assert_equal(leaves, first.params[name])
    assert set(last.ema) == set(last.optimizer[0].mu) == set(last.optimizer[0].nu) == trained
    assert_equal(last.weights("ema")["encoder"], first.params["encoder"])
    assert_equal(last.weights("ema")["decoder"], last.ema["decoder"])
    # The decoder's first gradient does not depend on what else is trained. Biases before a norm of one channel have a
    # gradient of zero, of which only rounding errors are left.
    moments, expected = (state[1].optimizer[0].mu["decoder"] for state in (states, plain[0]))
    within = 1e-6 * largest(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=within), moments, expected)
    assert logs[0]["loss/total"] == pytest.approx(plain[1][0]["loss/total"], rel=1e-5)


def test_eight_devices_freeze_as_one_does():
    one, eight = (train(2, "finetune.freeze=codebook", devices=devices) for devices in (1, 8))
    for name in ("loss/total", "loss/codebook", "optimizer/gradient_norm"):
        for ours, theirs in zip(one[1], eight[1], strict=True):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    assert_equal(eight[0][-1].params["quantize"], eight[0][0].params["quantize"])


def test_first_only_the_discriminator_learns(plain):
    states, logs = train(3, "finetune.discriminator_warmup_steps=2")
    for state in states[1:3]:
        assert_equal((state.params, state.optimizer, state.ema), (states[0].params, states[0].optimizer, states[0].ema))
    networks = [state.discriminator.params for state in states]
    assert not all(map(np.array_equal, *(jax.tree.leaves(network) for network in networks[:2])))
    assert states[3].optimizer[0].count == 1
    assert not all(map(np.array_equal, *(jax.tree.leaves(states[i].params) for i in (2, 3))))
    assert [log["optimizer/learning_rate"] for log in logs] == pytest.approx([1e-5] * 3)


def test_a_part_has_a_rate_of_its_own(plain):
    states, _ = train(1, "finetune.encoder_rate=0.5", "finetune.codebook_rate=2.0")
    for module, rate in (("encoder", 0.5), ("quantize", 2.0), ("decoder", 1.0)):
        moved, expected = (
            jax.tree.map(np.subtract, run[1].params[module], run[0].params[module]) for run in (states, plain[0])
        )
        gradient = plain[0][1].optimizer[0].mu[module]
        noise = 1e-6 * largest(gradient)  # a gradient that is zero but for rounding errors, which Adam would magnify
        leaves = zip(*map(jax.tree.leaves, (moved, expected, gradient)), strict=True)
        compared = [(ours, theirs) for ours, theirs, slope in leaves if np.abs(slope).max() > noise]
        assert len(compared) > len(jax.tree.leaves(moved)) / 2
        for ours, theirs in compared:
            # The difference of parameters near 1 after steps of 1e-5 has the rounding error of the parameters.
            np.testing.assert_allclose(ours, rate * theirs, rtol=0, atol=5e-7)


def test_parts_are_named_and_checked():
    mesh = make_mesh({}, jax.devices()[:1])
    assert frozen_parts(config_with("finetune.freeze=encoder, codebook")) == ("encoder", "codebook")
    assert keeps_codes(config_with("finetune.freeze=codebook,encoder"))
    assert not keeps_codes(config_with("finetune.freeze=codebook"))
    for fields, message in (
        (["finetune.freeze=head"], "there is no part 'head'; the parts are encoder, codebook, decoder"),
        (["finetune.freeze=encoder,codebook,decoder"], "leaves nothing to train"),
        (["finetune.encoder_rate=0.0"], "finetune.freeze=encoder leaves it as it is"),
        (["finetune.discriminator_warmup_steps=-1"], "is negative"),
        (["finetune.discriminator_warmup_steps=5", "loss.adversarial_weight=0.0"], "needs a discriminator"),
    ):
        with pytest.raises(UsageError, match=message):
            check_config(config_with(*fields), mesh)
