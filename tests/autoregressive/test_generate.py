"""Drawing codes: the cached program against the whole network, the draws' distribution, and what decides them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibq_jax import Generator
from ibq_jax.autoregressive.generate import LogitFilter, generate, step_weights
from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.autoregressive.sample_codes import Guidance, Sampler
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import AXES, make_mesh
from ibq_jax.interop.generator_names import abstract_params

SMALL = dict(
    vocab_size=64, grid=(4, 4), num_classes=5, num_layers=2, num_heads=2, num_kv_heads=2, embed_dim=32, gamma_init=1e-3
)
LARGE = SMALL | dict(vocab_size=1024, num_heads=4, num_kv_heads=2, embed_dim=128)
COLLECTIVES = r"all-(gather|reduce|to-all)|reduce-scatter|collective-(permute|broadcast)"


@functools.cache
def generator(**changes) -> Generator:
    """With random weights that make every layer, gate and code count, as they do not yet after `init`."""
    model = GeneratorModel(**SMALL | changes)
    random = np.random.default_rng(0)

    def weight(path, leaf):
        kind = path[-1].key
        fan_in = leaf.shape[{"kernel": -2, "head": -1}[kind]] if kind in ("kernel", "head") else 1
        return jnp.asarray(random.normal(size=leaf.shape) / math.sqrt(fan_in), jnp.float32)

    return Generator(model, jax.tree_util.tree_map_with_path(weight, abstract_params(model)))


@functools.cache
def sampler(devices: int, **changes) -> Sampler:
    drawn = generator(**changes)
    return Sampler(drawn.model, drawn.params, make_mesh({"data": devices}, jax.devices()[:devices]))


def draw(devices: int, labels, seed: int = 0, **changes) -> np.ndarray:
    settings = dict(guidance=Guidance(1.5), logit_filter=LogitFilter(), temperature=1.0, seed=seed)
    return sampler(devices, **changes)(np.asarray(labels), **settings)


def guided_logits(drawn: Generator, codes, labels, scale: float) -> np.ndarray:
    with_class = np.asarray(drawn.logits(codes, labels))
    without = np.asarray(drawn.logits(codes, np.full_like(labels, drawn.model.num_classes)))
    return without + (with_class - without) * np.float32(scale)


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(np.asarray(x, np.float64) - np.max(x, axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("changes", [{}, dict(num_kv_heads=1, grid=(2, 8))], ids=["square", "oblong, shared keys"])
@pytest.mark.parametrize("scale", [1.0, 2.25])
def test_the_likeliest_codes_are_those_of_the_whole_network(changes, scale):
    drawn, labels = generator(**changes), np.array([0, 1, 4, 4, 2])
    codes = np.asarray(drawn.sample(labels, cfg_scale=scale, temperature=0))
    assert codes.shape == (5, *drawn.model.grid) and len(np.unique(codes)) > 5
    expected = guided_logits(drawn, codes, labels, scale).argmax(axis=-1)
    np.testing.assert_array_equal(codes.reshape(5, -1), expected)
    np.testing.assert_array_equal(codes[2], codes[3])


def test_the_drawn_codes_are_the_likeliest_after_noise_of_the_pictures_number_and_position():
    drawn, labels, first, seed = generator(), np.array([0, 1, 4]), 7, 3
    codes = drawn.sample(labels, cfg_scale=2.25, temperature=0.8, seed=seed, first=first)
    logits = guided_logits(drawn, codes, labels, 2.25) / np.float32(0.8)
    for i in range(len(labels)):
        key = jax.random.fold_in(jax.random.key(seed), first + i)
        noise = np.stack([jax.random.gumbel(jax.random.fold_in(key, s), (64,)) for s in range(16)])
        np.testing.assert_array_equal(np.ravel(codes[i]), (logits[i] + noise).argmax(axis=-1))


@pytest.mark.parametrize(("given", "scale"), [(7, 2.25), (15, 1.0)])
def test_a_prefix_stays_and_the_rest_follows_it(given, scale):
    drawn, labels = generator(), np.array([0, 4, 2])
    prefix = np.random.default_rng(0).integers(0, 64, (3, given))
    codes = np.asarray(drawn.sample(labels, cfg_scale=scale, temperature=0, prefix=prefix)).reshape(3, -1)
    np.testing.assert_array_equal(codes[:, :given], prefix)
    expected = guided_logits(drawn, codes, labels, scale).argmax(axis=-1)
    assert np.any(expected[:, :given] != prefix)
    np.testing.assert_array_equal(codes[:, given:], expected[:, given:])


def test_whole_rows_are_a_prefix_too():
    rows = np.random.default_rng(0).integers(0, 64, (3, 2, 4))
    sample = functools.partial(generator().sample, np.array([0, 4, 2]), cfg_scale=1.5)
    np.testing.assert_array_equal(sample(prefix=rows), sample(prefix=rows.reshape(3, 8)))
    np.testing.assert_array_equal(sample(prefix=rows)[:, :2], rows)


def test_an_empty_prefix_is_none():
    sample = functools.partial(generator().sample, np.array([0, 4]))
    np.testing.assert_array_equal(sample(prefix=np.zeros((2, 0), np.int32)), sample())


@pytest.mark.parametrize("changes", [{}, LARGE], ids=["small", "large"])
def test_a_picture_is_the_same_alone_and_among_sixteen_and_on_any_devices(changes):
    labels = np.arange(16) % 5
    together = draw(1, labels, **changes)
    assert len(np.unique(together.reshape(16, -1), axis=0)) == 16
    np.testing.assert_array_equal(draw(8, labels, **changes), together)
    alone = functools.partial(generator(**changes).sample, cfg_scale=1.5, temperature=1.0)
    for i in range(16):
        np.testing.assert_array_equal(alone(labels[i : i + 1], first=i)[0], together[i])


def test_more_pictures_than_one_round_holds():
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


def test_pictures_of_one_code_pair_follow_the_guided_distribution():
    changes, scale, temperature, count = dict(vocab_size=6, grid=(1, 2)), 1.7, 4.0, 16384
    drawn, label = generator(**changes), np.array([3])
    sampler = Sampler(drawn.model, drawn.params, make_mesh({"data": 8}), per_device_batch=512)
    settings = dict(logit_filter=LogitFilter(), temperature=temperature, seed=0)
    codes = sampler(np.repeat(label, count), guidance=Guidance(scale), **settings).reshape(-1, 2)
    counts = np.zeros((6, 6))
    np.add.at(counts, tuple(codes.T), 1)

    def probabilities(scale: float, temperature: float) -> np.ndarray:
        """Of every pair: of the first code, times of the second given the first."""
        pairs = np.stack((np.arange(6), np.arange(6)), axis=1)
        p = softmax(guided_logits(drawn, pairs, np.repeat(label, 6), scale) / temperature)
        return p[0, 0][:, None] * p[:, 1]

    def chi_square(expected: np.ndarray) -> float:
        return float(((counts - count * expected) ** 2 / (count * expected)).sum())

    assert count * probabilities(scale, temperature).min() > 5  # where chi square is chi square distributed
    bound = 35 + 5 * math.sqrt(2 * 35)  # mean and five deviations at 35 degrees of freedom
    assert chi_square(probabilities(scale, temperature)) < bound
    for wrong in (probabilities(1.0, temperature), probabilities(scale, 3.5)):
        assert chi_square(wrong) > bound


def kept_by_reference(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which codes of one distribution stay, code by code from the likeliest on; equals stay together."""
    order = sorted(range(len(logits)), key=lambda code: -logits[code])
    if top_k:
        order = [code for code in order if logits[code] >= logits[order[min(top_k, len(order)) - 1]]]
    p, kept, mass = softmax(logits[order]), [], 0.0
    for code, probability in zip(order, p, strict=True):
        if mass < top_p or logits[code] == logits[kept[-1]]:
            kept.append(code)
            mass += probability
    return np.isin(np.arange(len(logits)), kept)


@pytest.mark.parametrize("top_p", [1.0, 0.99, 0.9, 0.5, 0.05, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 3, 10, 40, 64, 1000])
def test_filters_keep_what_a_plain_loop_keeps(top_k, top_p):
    random = np.random.default_rng(0)
    logits = np.concatenate((random.normal(size=(20, 40)) * 3, random.integers(-2, 3, (20, 40)))).astype(np.float32)
    actual = np.asarray(LogitFilter(top_k, top_p)(jnp.asarray(logits)))
    expected = np.stack([kept_by_reference(row, top_k, top_p) for row in logits])
    np.testing.assert_array_equal(np.isfinite(actual), expected)
    np.testing.assert_array_equal(actual[expected], logits[expected])


def test_the_code_that_crosses_the_threshold_stays():
    logits = jnp.log(jnp.asarray([[0.15, 0.4, 0.05, 0.3, 0.1]]))
    for top_p, kept in ((0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [0, 1, 3]), (0.96, [0, 1, 2, 3, 4])):
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(LogitFilter(top_p=top_p)(logits)[0])), kept)


def test_top_p_counts_what_top_k_left():
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
    assert np.isfinite(LogitFilter(top_p=0.5)(logits)).sum() == 2
    assert np.isfinite(LogitFilter(top_k=2, top_p=0.5)(logits)).sum() == 1  # 0.4 is 0.57 of the two


def test_only_kept_codes_are_drawn():
    drawn, labels, keep = generator(), np.arange(12) % 5, dict(top_k=5, top_p=0.8)
    codes = drawn.sample(labels, cfg_scale=1.5, temperature=2.0, **keep)
    logits = jnp.asarray(guided_logits(drawn, codes, labels, 1.5).reshape(-1, 64) / 2.0)
    kept = np.isfinite(LogitFilter(**keep)(logits))
    assert np.all(kept[np.arange(len(kept)), np.ravel(codes)])
    assert np.mean(np.ravel(codes) != logits.argmax(axis=-1)) > 0.2


def test_filters_that_keep_everything_change_nothing():
    logits = jax.random.normal(jax.random.key(0), (8, 64))
    for keep in (LogitFilter(), LogitFilter(top_k=64), LogitFilter(top_k=1000), LogitFilter(top_p=1.0)):
        np.testing.assert_array_equal(keep(logits), logits)
    drawn, labels = generator(), np.arange(4)
    np.testing.assert_array_equal(drawn.sample(labels, top_k=None), drawn.sample(labels, top_k=0, top_p=1.0))


def scales(positions: int, *arguments, **settings) -> list[float]:
    actual = Guidance(*arguments, **settings).scales(positions)
    assert actual.dtype == np.float32
    return actual.tolist()


def test_guidance_scales_follow_their_formulas():
    assert scales(4, 2.5) == [2.5] * 4
    assert scales(5, 3.0, "linear") == [1.0, 1.5, 2.0, 2.5, 3.0]
    for power in (1.0, 2.0, 0.5):
        climb = [1 + 2 * 0.5 * (1 - math.cos(math.pi * (i / 255) ** power)) for i in range(256)]
        np.testing.assert_allclose(scales(256, 3.0, "cosine", power), climb, rtol=1e-6)
    assert scales(8, 3.0, interval=(0.25, 0.5)) == [1, 1, 3, 3, 1, 1, 1, 1]
    assert scales(8, 3.0, interval=(0.5, 1.0)) == [1] * 4 + [3] * 4
    assert scales(8, 3.0, interval=(0.5, 0.5)) == [1] * 8
    assert scales(5, 3.0, "linear", interval=(0.2, 0.8)) == [1.0, 1.5, 2.0, 2.5, 1.0]
    assert scales(4, 0.0) == [0.0] * 4


@pytest.mark.parametrize(
    "guidance", [Guidance(3.0, "linear"), Guidance(3.0, "cosine", 2.0), Guidance(3.0, interval=(0.25, 0.6))]
)
def test_every_code_is_drawn_at_its_own_scale(guidance):
    drawn, labels = generator(), np.arange(5)
    settings = dict(cfg_schedule=guidance.schedule, cfg_power=guidance.power, cfg_interval=guidance.interval)
    codes = np.asarray(drawn.sample(labels, cfg_scale=3.0, temperature=0, **settings))
    logits = guided_logits(drawn, codes, labels, guidance.scales(16)[None, :, None])
    np.testing.assert_array_equal(codes.reshape(5, -1), logits.argmax(axis=-1))


def test_without_guidance_no_row_is_doubled():
    drawn = generator()
    weights = step_weights(drawn.model, drawn.params)

    def shapes(guided: bool) -> set[str]:
        arguments = (
            drawn.params,
            weights,
            jnp.zeros(7, jnp.int32),
            jax.random.split(jax.random.key(0), 7),
            jnp.zeros((7, 3), jnp.int32),
            jnp.ones(16),
            jnp.float32(1),
        )
        program = jax.make_jaxpr(functools.partial(generate, drawn.model, LogitFilter(), guided))(*arguments)
        return set(re.findall(r"\d+", " ".join(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", str(program)))))

    assert "14" in shapes(guided=True)
    assert "7" in shapes(guided=False) and "14" not in shapes(guided=False)


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
    sampler._generate = lambda *arguments: asked.append(arguments[2]) or np.zeros((4, 16), np.int32)
    sampler(np.array([0]), guidance=guidance, logit_filter=LogitFilter(), temperature=1.0, seed=0)
    assert asked == [guided]


def test_devices_never_talk():
    drawn, programs = generator(), []
    sampler = Sampler(drawn.model, drawn.params, make_mesh({"data": 8}))
    compiled = sampler._generate

    def keep_program(*arguments):
        programs.append(compiled.lower(*arguments).compile().as_text())
        return np.zeros((32, 16), np.int32)

    sampler._generate = keep_program
    sampler(np.arange(5), guidance=Guidance(1.5), logit_filter=LogitFilter(), temperature=1.0, seed=0)
    total = jax.jit(jnp.sum).lower(sampler._batch(np.arange(5), np.arange(5), np.zeros((5, 0), int), 0)[0])
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
        (dict(prefix=np.zeros((2, 16), int)), "a prefix of 16 codes leaves none of the picture's 16 to draw"),
        (dict(prefix=np.zeros((2, 4, 4), int)), "a prefix of 16 codes leaves none"),
        (dict(prefix=np.zeros((3, 4), int)), r"a prefix is integer codes \[2, P\], not int64 of shape \(3, 4\)"),
        (dict(prefix=np.zeros((2, 4))), "not float64"),
        (dict(top_p=0.0), r"top_p=0.0 is not in \(0, 1\]"),
        (dict(top_p=1.5), r"top_p=1.5 is not in \(0, 1\]"),
        (dict(top_p=math.nan), "top_p=nan"),
        (dict(top_k=-1), "top_k=-1 is not a whole number of at least 0"),
        (dict(top_k=2.5), "top_k=2.5 is not a whole number"),
        (dict(seed=1.5), "seed=1.5 is not a whole number"),
        (dict(cfg_interval=(0.1, 0.2, 0.3)), "is not two parts of a picture"),
        (dict(first=-1), "pictures are numbered 0"),
        (dict(temperature=-0.5), "temperature=-0.5 is not a number of at least 0"),
        (dict(temperature=math.nan), "temperature=nan"),
        (dict(temperature=math.inf), "temperature=inf"),
        (dict(cfg_scale=-1.0), "guidance scale -1.0 is not a number of at least 0"),
        (dict(cfg_scale=math.nan), "guidance scale nan"),
        (dict(cfg_schedule="square"), "guidance schedule 'square' does not exist; there are constant, linear, cosine"),
        (dict(cfg_power=0.0), "guidance power 0.0 is not positive"),
        (
            dict(cfg_interval=(0.5, 0.4)),
            r"guidance interval \(0.5, 0.4\) is not two parts of a picture in 0..1",
        ),
        (dict(cfg_interval=(0.0, 1.1)), r"guidance interval \(0.0, 1.1\)"),
        (dict(seed=-1), r"seed=-1 is not a whole number in 0..2\*\*32 - 1"),
        (dict(seed=2**32), "seed=4294967296 is not a whole number in"),
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
def test_logits_of_what_is_no_picture_are_refused(codes, labels, words):
    with pytest.raises(UsageError, match=words):
        generator().logits(codes, labels)


@pytest.mark.parametrize("changes", [dict(no_class=False), dict(num_classes=0)])
def test_guidance_is_refused_where_no_class_was_not_learned(changes):
    with pytest.raises(UsageError, match=r'guidance needs a model that has learned "no class".*use cfg_scale=1'):
        generator(**changes).sample([0])


def test_a_model_without_classes_draws_without_guidance():
    drawn = generator(num_classes=0)
    codes = np.asarray(drawn.sample([0, 0], cfg_scale=1.0, temperature=0))
    np.testing.assert_array_equal(codes.reshape(2, -1), np.asarray(drawn.logits(codes, [0, 0])).argmax(axis=-1))
