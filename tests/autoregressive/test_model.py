"""The generator's network: what each position sees, its initial values, and its options."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import released

from ibq_jax.autoregressive.model import GeneratorModel, TokenEmbedding, check_layout
from ibq_jax.base.errors import UsageError
from ibq_jax.interop.generator_names import abstract_params

EXACT = 1e-5  # relative to the largest magnitude, between two forms of the same float32 formula
QUICK = {"xla_backend_optimization_level": 0}  # compiles twice as fast
SMALL = dict(
    vocab_size=24, grid=(3, 4), num_classes=5, num_layers=2, num_heads=4, num_kv_heads=4, embed_dim=32, gamma_init=1e-3
)


def assert_same(actual, expected, tolerance=EXACT):
    def close(left, right):
        left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
        np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * np.abs(right).max())

    jax.tree.map(close, actual, expected)


@functools.cache
def random_params(model: GeneratorModel):
    """Returns weights from normal(0, 0.3): gates and head count, which initial values would switch off."""
    leaves, tree = jax.tree.flatten(abstract_params(model))
    random = np.random.default_rng(0)
    return tree.unflatten([jnp.asarray(0.3 * random.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def batch(model: GeneratorModel, size: int = 3):
    random = np.random.default_rng(1)
    codes = random.integers(0, model.vocab_size, (size, *model.grid), np.int32)
    return jnp.asarray(codes), jnp.asarray(np.arange(size) % (model.num_classes + 1), jnp.int32)


def logits(model: GeneratorModel, params):
    return jax.jit(model.apply)({"params": params}, *batch(model))


def value_and_gradient(model: GeneratorModel, params, train: bool = False):
    """Returns a random projection of the head's input, with dropout by one key, and its gradient."""
    codes, labels = batch(model)
    projection = jax.random.normal(jax.random.key(2), (len(codes), model.positions, model.embed_dim))

    def value(params):
        rngs = {"dropout": jax.random.key(3)}
        hidden = model.apply({"params": params}, codes, labels, train, method="hidden", rngs=rngs)
        return jnp.sum(hidden * projection)

    return jax.jit(jax.value_and_grad(value), compiler_options=QUICK)(params)


def test_every_code_sees_all_codes_before_it_and_none_other():
    model = GeneratorModel(**SMALL)
    variables = {"params": random_params(model)}
    codes, labels = batch(model, 1)
    weights = jax.random.normal(jax.random.key(0), (model.vocab_size,))

    def of_each_position(moved):
        def add(call, args, kwargs, context):
            out = call(*args, **kwargs)
            return out + moved[None] if isinstance(context.module, TokenEmbedding) else out

        with nn.intercept_methods(add):
            return model.apply(variables, codes, labels)[0] @ weights

    jacobian = jax.jit(jax.jacrev(of_each_position), compiler_options=QUICK)(
        jnp.zeros((model.positions - 1, model.embed_dim))
    )
    sees = np.asarray(jnp.abs(jacobian).max(axis=-1))
    seen, unseen = np.tril_indices(model.positions, -1, model.positions - 1), np.triu_indices(model.positions - 1)
    assert np.all(sees[unseen] == 0.0)
    assert sees[seen].min() > 1e-3


def test_the_last_code_changes_nothing_and_the_class_everything():
    model = GeneratorModel(**SMALL)
    variables, (codes, labels) = {"params": random_params(model)}, batch(model)
    apply = jax.jit(model.apply)
    expected = apply(variables, codes, labels)
    np.testing.assert_array_equal(apply(variables, codes.at[:, -1, -1].set(0), labels), expected)
    assert np.all(np.abs(apply(variables, codes, labels[::-1] + 1) - expected).max(axis=-1) > 1e-3)


def test_initial_values():
    model = GeneratorModel(**SMALL | {"embed_dim": 64, "vocab_size": 512})
    params = nn.meta.unbox(jax.jit(model.init, compiler_options=QUICK)(jax.random.key(0), *batch(model)))["params"]
    assert not params["head"].any() and not params["head_modulation"]["bias"].any()
    assert np.all(params["blocks"]["ffn_norm"]["scale"] == 1) and np.all(params["head_norm"]["scale"] == 1)
    ada, first_layer, second_layer = (params["modulation"]["ada_lin"]["kernel"][i] for i in (slice(None), 0, 1))
    assert np.abs(first_layer - second_layer).max() > 0
    deviations = {
        "embedding": (params["tok_emb"]["embedding"], 0.02),
        "wqkv": (params["blocks"]["attention"]["wqkv"]["kernel"], 0.02),
        "w2": (params["blocks"]["feed_forward"]["w2"]["kernel"], 0.02),
        "gammas": (ada[..., :128], 0.02e-3),
        "scales and shifts": (ada[..., 128:], 0.01),
        "head's modulation": (params["head_modulation"]["kernel"], 0.01),
    }
    for name, (values, deviation) in deviations.items():
        # 5 standard errors of a deviation: 5 / sqrt(2 n)
        assert abs(np.std(values) / deviation - 1) < 5 / np.sqrt(2 * values.size), name


def test_shared_keys_and_values_equal_repeated_ones():
    model = GeneratorModel(**SMALL | {"num_kv_heads": 2})
    params = random_params(model)
    heads = params["blocks"]["attention"]["wqkv"]["kernel"].reshape(2, 32, 8, 8)  # 4 queries, 2 keys, 2 values
    repeated = jnp.concatenate((heads[:, :, :4], jnp.repeat(heads[:, :, 4:], 2, axis=2)), axis=2)
    full = jax.tree.map(lambda leaf: leaf, params)
    full["blocks"]["attention"]["wqkv"]["kernel"] = repeated.reshape(2, 32, 96)
    assert_same(logits(model, params), logits(GeneratorModel(**SMALL), full))


@functools.cache
def with_nothing_recomputed():
    model = GeneratorModel(**SMALL, dropout=0.2)
    return value_and_gradient(model, random_params(model), train=True)


@pytest.mark.parametrize("remat", ["dots", "blocks"])
def test_recomputing_changes_no_value_and_no_gradient(remat):
    model = GeneratorModel(**SMALL, dropout=0.2, remat=remat)
    assert_same(value_and_gradient(model, random_params(model), train=True), with_nothing_recomputed())


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_layers_without_a_loop_are_the_same(remat):
    model = GeneratorModel(**SMALL, dropout=0.2, remat=remat, unroll=SMALL["num_layers"])
    assert_same(value_and_gradient(model, random_params(model), train=True), with_nothing_recomputed())


def test_bfloat16_is_close_to_float32_and_logits_stay_float32():
    model = GeneratorModel(**SMALL)
    expected = logits(model, random_params(model))
    actual = logits(model.clone(dtype=jnp.bfloat16), random_params(model))
    assert actual.dtype == jnp.float32
    assert np.abs(actual - expected).max() > 0
    released.assert_close(actual, expected, 2**-5)  # 8 roundings in a row to 8 bits


def test_dropout_is_for_training_only():
    model, still = GeneratorModel(**SMALL, dropout=0.5), GeneratorModel(**SMALL)
    codes, labels = batch(model)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def hidden(model, key, train):
        variables = {"params": random_params(still)}
        return model.apply(variables, codes, labels, train, method="hidden", rngs={"dropout": key})

    keys = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(hidden(model, keys[0], False), hidden(still, keys[0], True))
    first, second = (hidden(model, key, True) for key in keys)
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_array_equal(hidden(model, keys[0], True), first)


def test_token_embeddings_from_the_tokenizers_codebook():
    model = GeneratorModel(**SMALL, use_pretrained_codebook=True, codebook_dim=6)
    params = random_params(model)
    table, fc1, fc2 = (params["tok_emb"][name] for name in ("embedding", "fc1", "fc2"))
    assert table.shape == (24, 6)
    codes = batch(model)[0].reshape(3, -1)
    x = np.asarray(table)[codes] @ fc1["kernel"] + np.asarray(fc1["bias"])[None, None]
    gelu = x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    expected = gelu @ fc2["kernel"] + np.asarray(fc2["bias"])[None, None]
    embed = jax.jit(functools.partial(model.apply, method="embed"))
    assert_same(embed({"params": params}, codes), expected)


def test_an_oblong_grid_counts_its_rows_and_columns():
    wide, tall = (GeneratorModel(**SMALL | {"grid": grid}) for grid in ((2, 8), (8, 2)))
    codes, labels = batch(wide)
    variables = {"params": random_params(wide)}
    as_wide, as_tall = (jax.jit(m.apply)(variables, codes.reshape(-1, *m.grid), labels) for m in (wide, tall))
    assert as_wide.shape == as_tall.shape == (3, 16, 24)
    assert np.abs(as_wide - as_tall)[:, 3:].max() > 1e-3


@pytest.mark.parametrize(
    ("width", "heads", "num_kv_heads", "words"),
    [
        (30, 4, 4, "model.embed_dim=30 does not divide into model.num_heads=4"),
        (24, 4, 4, "model.embed_dim=24 does not divide into model.num_heads=4 of a multiple of 4 channels"),
        (32, 4, 3, "model.num_heads=4 is not a multiple of model.num_kv_heads=3"),
        (32, 4, 8, "model.num_heads=4 is not a multiple of model.num_kv_heads=8"),
    ],
)
def test_heads_that_do_not_divide_are_refused(width, heads, num_kv_heads, words):
    with pytest.raises(UsageError, match=words):
        check_layout(width, heads, num_kv_heads)
    with pytest.raises(UsageError, match=words):
        abstract_params(
            GeneratorModel(**SMALL | {"embed_dim": width, "num_heads": heads, "num_kv_heads": num_kv_heads})
        )
