"""Sampling on devices: what decides a sample, guidance's schedules, and which arguments are refused."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_generators import LARGE, draw, generator, guided_logits

from ibq_jax.autoregressive.generate import LogitFilter
from ibq_jax.autoregressive.sample_codes import Guidance, Sampler
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import AXES, make_mesh

COLLECTIVES = r"all-(gather|reduce|to-all)|reduce-scatter|collective-(permute|broadcast)"


@pytest.mark.usefixtures("optimized")  # what LLVM does to the sums is part of the promise
@pytest.mark.parametrize("changes", [{}, LARGE], ids=["small", "large"])
def test_a_sample_is_the_same_alone_and_among_sixteen_and_on_any_devices(changes):
    labels = np.arange(16) % 5
    together = draw(1, labels, **changes)
    assert len(np.unique(together.reshape(16, -1), axis=0)) == 16
    np.testing.assert_array_equal(draw(8, labels, **changes), together)
    alone = functools.partial(generator(**changes).sample, cfg_scale=1.5, temperature=1.0)
    for i in range(16):
        np.testing.assert_array_equal(alone(labels[i : i + 1], first=i)[0], together[i])


def test_more_samples_than_one_batch_holds():
    labels = np.arange(37) % 5
    np.testing.assert_array_equal(draw(8, labels), draw(1, labels))
    np.testing.assert_array_equal(draw(8, labels[:33]), draw(8, labels)[:33])


def test_any_mesh_draws_the_same():
    labels, drawn = np.arange(9) % 5, generator()
    mesh = make_mesh(dict(zip(AXES, (2, 2, 2), strict=True)))
    codes = Sampler(drawn.model, drawn.params, mesh)(
        labels, guidance=Guidance(1.5), logit_filter=LogitFilter(), temperature=1.0, seed=0
    )
    np.testing.assert_array_equal(codes, draw(1, labels))


def test_the_seed_decides():
    labels = np.zeros(6, np.int32)
    np.testing.assert_array_equal(draw(1, labels, seed=1), draw(1, labels, seed=1))
    assert np.mean(draw(1, labels, seed=1) != draw(1, labels, seed=2)) > 0.5
    assert np.mean(draw(1, labels)[0] != draw(1, labels)[1]) > 0.5


def scale_per_position(positions: int, *arguments, **settings) -> list[float]:
    actual = Guidance(*arguments, **settings).scale_per_position(positions)
    assert actual.dtype == np.float32
    return actual.tolist()


def test_guidance_scales_follow_their_formulas():
    assert scale_per_position(4, 2.5) == [2.5] * 4
    assert scale_per_position(5, 3.0, "linear") == [1.0, 1.5, 2.0, 2.5, 3.0]
    for power in (1.0, 2.0, 0.5):
        climb = [1 + 2 * 0.5 * (1 - math.cos(math.pi * (i / 255) ** power)) for i in range(256)]
        np.testing.assert_allclose(scale_per_position(256, 3.0, "cosine", power), climb, rtol=1e-6)
    assert scale_per_position(8, 3.0, interval=(0.25, 0.5)) == [1, 1, 3, 3, 1, 1, 1, 1]
    assert scale_per_position(8, 3.0, interval=(0.5, 1.0)) == [1] * 4 + [3] * 4
    assert scale_per_position(8, 3.0, interval=(0.5, 0.5)) == [1] * 8
    assert scale_per_position(5, 3.0, "linear", interval=(0.2, 0.8)) == [1.0, 1.5, 2.0, 2.5, 1.0]
    assert scale_per_position(4, 0.0) == [0.0] * 4


@pytest.mark.parametrize(
    "guidance", [Guidance(3.0, "linear"), Guidance(3.0, "cosine", 2.0), Guidance(3.0, interval=(0.25, 0.6))]
)
def test_every_code_is_drawn_at_its_own_scale(guidance):
    drawn, labels = generator(), np.arange(5)
    settings = dict(cfg_schedule=guidance.schedule, cfg_power=guidance.power, cfg_interval=guidance.interval)
    codes = np.asarray(drawn.sample(labels, cfg_scale=3.0, temperature=0, **settings))
    logits = guided_logits(drawn, codes, labels, guidance.scale_per_position(16)[None, :, None])
    np.testing.assert_array_equal(codes.reshape(5, -1), logits.argmax(axis=-1))


@pytest.mark.parametrize(
    ("guidance", "guided"),
    [
        (Guidance(1.0), False),
        (Guidance(3.0, interval=(0.5, 0.5)), False),
        (Guidance(1.0, "cosine"), False),
        (Guidance(3.0, "linear"), True),
        (Guidance(0.0), True),
    ],
)
def test_a_scale_of_one_throughout_takes_the_program_without_guidance(guidance, guided):
    drawn, asked = generator(), []
    sampler = Sampler(drawn.model, drawn.params, make_mesh({"data": 1}, jax.devices()[:1]))
    sampler._generate = lambda *_, **named: asked.append(named["guided"]) or np.zeros((4, 16), np.int32)
    sampler(np.array([0]), guidance=guidance, logit_filter=LogitFilter(), temperature=1.0, seed=0)
    assert asked == [guided]


def test_devices_never_talk():
    drawn, programs = generator(), []
    sampler = Sampler(drawn.model, drawn.params, make_mesh({"data": 8}))
    compiled = sampler._generate

    def keep_program(*arguments, **named):
        programs.append(compiled.lower(*arguments, **named).compile().as_text())
        return np.zeros((32, 16), np.int32)

    sampler._generate = keep_program
    sampler(np.arange(5), guidance=Guidance(1.5), logit_filter=LogitFilter(), temperature=1.0, seed=0)
    total = jax.jit(jnp.sum).lower(sampler._batch(np.arange(5), np.arange(5), np.zeros((5, 0), int), 0)["labels"])
    assert re.search(COLLECTIVES, total.compile().as_text())
    assert "num_partitions=8" in programs[0]
    assert not re.search(COLLECTIVES, programs[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(labels=[5]), r"labels lie in 0..4; these reach from 5 to 5"),
        (dict(labels=[0, -1]), "these reach from -1 to 0"),
        (dict(labels=[0.0, 1.0]), r"labels are integers \[N\], at least one, not float64 of shape \(2,\)"),
        (dict(labels=[[0, 1]]), r"not int64 of shape \(1, 2\)"),
        (dict(labels=np.zeros(0, np.int32)), r"at least one, not int32 of shape \(0,\)"),
        (dict(prefix=[[0, 64], [0, 0]]), "a prefix's codes lie in 0..63; these reach from 0 to 64"),
        (dict(prefix=[[-1], [0]]), "these reach from -1 to 0"),
        (dict(prefix=np.zeros((2, 16), int)), "a prefix of 16 codes leaves none of an image's 16 to draw"),
        (dict(prefix=np.zeros((2, 4, 4), int)), "a prefix of 16 codes leaves none"),
        (dict(prefix=np.zeros((3, 4), int)), r"a prefix is integer codes \[2, P\], not int64 of shape \(3, 4\)"),
        (dict(prefix=np.zeros((2, 4))), "not float64"),
        (dict(top_p=0.0), r"top_p=0.0 is not in \(0, 1\]"),
        (dict(top_p=1.5), r"top_p=1.5 is not in \(0, 1\]"),
        (dict(top_p=math.nan), "top_p=nan"),
        (dict(top_k=-1), "top_k=-1 is not an integer of at least 0"),
        (dict(top_k=2.5), "top_k=2.5 is not an integer"),
        (dict(seed=1.5), "seed=1.5 is not an integer"),
        (dict(cfg_interval=(0.1, 0.2, 0.3)), "is not two increasing fractions"),
        (dict(first=-1), "samples are numbered 0"),
        (dict(temperature=-0.5), "temperature=-0.5 is not a number of at least 0"),
        (dict(temperature=math.nan), "temperature=nan"),
        (dict(temperature=math.inf), "temperature=inf"),
        (dict(cfg_scale=-1.0), "guidance scale -1.0 is not a number of at least 0"),
        (dict(cfg_scale=math.nan), "guidance scale nan"),
        (dict(cfg_schedule="square"), "guidance schedule 'square' is not one of constant, linear, cosine"),
        (dict(cfg_power=0.0), "guidance power 0.0 is not positive"),
        (
            dict(cfg_interval=(0.5, 0.4)),
            r"guidance interval \(0.5, 0.4\) is not two increasing fractions in 0..1",
        ),
        (dict(cfg_interval=(0.0, 1.1)), r"guidance interval \(0.0, 1.1\)"),
        (dict(seed=-1), r"seed=-1 is not an integer in 0..2\*\*32 - 1"),
        (dict(seed=2**32), "seed=4294967296 is not an integer in"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        generator().sample(**dict(labels=[0, 1]) | settings)


@pytest.mark.parametrize(
    ("codes", "labels", "words"),
    [
        (np.zeros((1, 16), int), [6], "labels lie in 0..5; these reach from 6 to 6"),
        (np.zeros((1, 15), int), [0], r"codes are integers \[1, 4, 4\] for these labels, not int64 of shape \(1, 15\)"),
        (np.zeros((2, 16), int), [0], r"not int64 of shape \(2, 16\)"),
        (np.zeros((1, 16)), [0], "not float64"),
        (np.full((1, 16), 64), [0], "codes lie in 0..63; these reach from 64 to 64"),
    ],
)
def test_logits_of_codes_that_are_not_an_image_are_refused(codes, labels, words):
    with pytest.raises(UsageError, match=words):
        generator().logits(codes, labels)


@pytest.mark.parametrize("changes", [dict(no_class=False), dict(num_classes=0)])
def test_guidance_is_refused_where_no_class_was_not_learned(changes):
    with pytest.raises(UsageError, match=r'guidance needs a model that was trained on "no class".*use cfg_scale=1'):
        generator(**changes).sample([0])


def test_a_model_without_classes_draws_without_guidance():
    drawn = generator(num_classes=0)
    codes = np.asarray(drawn.sample([0, 0], cfg_scale=1.0, temperature=0))
    np.testing.assert_array_equal(codes.reshape(2, -1), np.asarray(drawn.logits(codes, [0, 0])).argmax(axis=-1))
