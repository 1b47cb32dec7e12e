"""The quantizers beside IBQ: against plain formulas, on a mesh, and from `train` to a cache of codes."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec
from support.compiled_text import largest_array
from support.small_runs import arguments, generator_arguments

from ibq_jax import Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.base.config import load_config, read_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import AXES, CODEBOOK, create_sharded, make_mesh
from ibq_jax.data.token_cache import open_token_cache
from ibq_jax.tokenizer.quantizer import IndexBackpropQuantizer
from ibq_jax.tokenizer.quantizers import QUANTIZERS, build_quantizer
from ibq_jax.tokenizer.restore import restore_run
from ibq_jax.tokenizer.scalar_quantizers import FiniteScalarQuantizer, LookupFreeQuantizer
from ibq_jax.tokenizer.tokenize import fingerprint
from ibq_jax.tokenizer.vector_quantizers import SimVectorQuantizer, VectorQuantizer, nearest_rows
from ibq_jax.training.fit import check_same_run
from ibq_jax.training.tokenizer import FIELD_ROLES

TOLERANCE = 2e-6  # of a tensor's largest magnitude
OTHERS = tuple(name for name in QUANTIZERS if name != "ibq")
SHAPE = (2, 3, 4)  # B, h, w
BETA = 0.3


def assert_close(ours, theirs, tolerance: float = TOLERANCE) -> None:
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1e-30, np.abs(theirs).max()))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def distances(z: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """|z - e|^2 in float64: [N, K]."""
    z, rows = z.reshape(-1, z.shape[-1]).astype(np.float64), rows.astype(np.float64)
    return ((z[:, None] - rows[None]) ** 2).sum(axis=-1)


def loss_of(module, params: dict, z, upstream):
    """What the gradients are of: z_q against a random cotangent, and quant_loss."""
    out = module.apply({"params": params}, z)
    return jnp.sum(out.z_q * upstream) + out.quant_loss, out


# ---- vq and simvq ----------------------------------------------------------------------------------------------------


def test_vq_takes_the_nearest_row_and_trains_it_and_the_latent_towards_each_other():
    z, rows, upstream = normal(0, *SHAPE, 8), normal(1, 16, 8), normal(2, *SHAPE, 8)
    module = VectorQuantizer(16, 8, beta=BETA)
    gradients, out = jax.grad(lambda rows, z: loss_of(module, {"codebook": rows}, z, upstream), (0, 1), has_aux=True)(
        rows, z
    )
    indices = distances(z, rows).argmin(axis=1)
    np.testing.assert_array_equal(out.indices.reshape(-1), indices)
    chosen = rows[indices].reshape(z.shape)
    np.testing.assert_array_equal(out.z_q, chosen)
    assert_close(out.quant_loss, (1 + BETA) * np.mean((z - chosen) ** 2))
    assert out.entropy_loss == 0 and out.sample_entropy is out.avg_entropy is out.max_logit is None
    of_rows = np.zeros_like(rows)
    np.add.at(of_rows, indices, (2 * (chosen - z) / z.size).reshape(-1, 8))
    assert_close(gradients[0], of_rows)
    assert_close(gradients[1], upstream + BETA * 2 * (z - chosen) / z.size)


def test_vq_on_the_unit_sphere_compares_directions():
    z, rows, upstream = normal(0, *SHAPE, 8), normal(1, 16, 8), normal(2, *SHAPE, 8)
    module = VectorQuantizer(16, 8, beta=BETA, l2_normalize=True)
    (gradient, out) = jax.grad(lambda z: loss_of(module, {"codebook": rows}, z, upstream), has_aux=True)(z)
    lengths = np.linalg.norm(z, axis=-1, keepdims=True)
    unit, unit_rows = z / lengths, rows / np.linalg.norm(rows, axis=1, keepdims=True)
    indices = (unit.reshape(-1, 8) @ unit_rows.T).argmax(axis=1)
    np.testing.assert_array_equal(out.indices.reshape(-1), indices)
    chosen = unit_rows[indices].reshape(z.shape)
    assert_close(out.z_q, chosen)
    assert_close(out.quant_loss, (1 + BETA) * np.mean((unit - chosen) ** 2))
    of_unit = upstream + BETA * 2 * (unit - chosen) / z.size
    assert_close(gradient, (of_unit - unit * (unit * of_unit).sum(axis=-1, keepdims=True)) / lengths)
    bound = module.bind({"params": {"codebook": rows}})
    np.testing.assert_array_equal(bound.lookup(out.indices), out.z_q)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1 / 16384])
def test_the_nearest_of_small_rows_is_found_where_plain_distances_in_float32_would_not_do(size):
    """1/16384 is how a codebook of as many codes starts: z . e is 1e-4 of |z|^2 then."""
    z, rows = normal(0, 512, 64), np.random.default_rng(1).uniform(-size, size, (1024, 64)).astype(np.float32)
    exact = distances(z, rows)
    found = np.asarray(nearest_rows(jnp.asarray(z), jnp.asarray(rows)))
    missed = exact[np.arange(512), found] - exact.min(axis=1)
    rounding = 64 * np.finfo(np.float32).eps * size
    assert missed.max() <= rounding
    assert (found == exact.argmin(axis=1)).mean() > 0.99


def test_the_nearest_of_equals_is_the_first():
    rows = jnp.stack([jnp.zeros(2), jnp.ones(2), jnp.ones(2)])
    bound = VectorQuantizer(3, 2, block_size=1).bind({"params": {"codebook": rows}})
    assert bound.nearest(jnp.full((1, 1, 1, 2), 0.9)).item() == 1
    assert bound.nearest(jnp.full((1, 1, 1, 2), 0.5)).item() == 0


def test_a_vq_codebook_starts_uniform_within_one_over_k():
    box = VectorQuantizer(1024, 16).init(jax.random.key(0), jnp.zeros((1, 1, 1, 16)))["params"]["codebook"]
    assert box.names == ("codes", "code_dim")
    assert 0.99 / 1024 < np.abs(box.value).max() <= 1 / 1024
    assert abs(box.value.std() * 1024 - 3**-0.5) < 0.01


def test_simvq_trains_the_layer_and_not_the_codebook():
    z, upstream, module = normal(0, *SHAPE, 8), normal(2, *SHAPE, 8), SimVectorQuantizer(16, 8, beta=BETA)
    params = meta.unbox(module.init(jax.random.key(0), z)["params"])
    gradients, out = jax.grad(lambda params, z: loss_of(module, params, z, upstream), (0, 1), has_aux=True)(params, z)
    fixed, layer = np.asarray(params["codebook"]), jax.device_get(params["projection"])
    rows = fixed @ layer["kernel"] + layer["bias"]
    indices = distances(z, rows).argmin(axis=1)
    np.testing.assert_array_equal(out.indices.reshape(-1), indices)
    chosen = rows[indices].reshape(z.shape)
    assert_close(out.z_q, chosen)
    assert_close(out.quant_loss, (1 + BETA) * np.mean((z - chosen) ** 2))
    of_chosen = (2 * (chosen - z) / z.size).reshape(-1, 8)
    assert_close(gradients[0]["projection"]["kernel"], fixed[indices].T @ of_chosen)
    assert_close(gradients[0]["projection"]["bias"], of_chosen.sum(axis=0))
    assert not np.any(gradients[0]["codebook"])
    assert_close(gradients[1], upstream + BETA * 2 * (z - chosen) / z.size)


def test_a_simvq_codebook_starts_with_rows_of_length_one():
    params = SimVectorQuantizer(4096, 16).init(jax.random.key(0), jnp.zeros((1, 1, 1, 16)))["params"]
    assert abs(params["codebook"].value.std() - 0.25) < 0.005
    assert 0.9 * 0.25 < np.abs(params["projection"]["kernel"]).max() <= 0.25


# ---- lfq -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["streamed", "dense"])
def test_lfq_s_entropies_are_those_of_all_corners(implementation):
    z, temperature, group = normal(0, *SHAPE, 5) / 4, 0.5, 12
    module = LookupFreeQuantizer(32, BETA, temperature, group, 0.7, 1.3, implementation=implementation)
    corners = np.array([corner[::-1] for corner in itertools.product((-1, 1), repeat=5)])
    np.testing.assert_array_equal(module.lookup(jnp.arange(32)), corners)

    def entropies(z):
        logits = 2 * jnp.einsum("nd,kd->nk", z.reshape(-1, 5), corners) / temperature
        q = jnp.exp(logits) / jnp.exp(logits).sum(axis=1, keepdims=True)
        a = q.reshape(-1, group, 32).mean(axis=1)
        sample = -(q * jnp.log(q)).sum(axis=1).mean()
        return 0.7 * sample + 1.3 * (a * jnp.log(a + 1e-5)).sum(axis=1).mean(), sample

    def losses(z):
        out = module.apply({}, z)
        return out.entropy_loss, out

    (expected, sample), of_expected = jax.value_and_grad(entropies, has_aux=True)(z)
    (entropy_loss, out), gradient = jax.value_and_grad(losses, has_aux=True)(z)
    assert_close(out.sample_entropy, sample)
    assert_close(entropy_loss, expected)
    assert_close(gradient, of_expected, 2e-5)
    assert_close(out.quant_loss, BETA * np.mean((z - np.sign(z)) ** 2))


def test_lfq_is_the_signs():
    z, upstream = normal(0, *SHAPE, 5), normal(2, *SHAPE, 5)
    z[0, 0, 0, 0] = 0.0
    module = LookupFreeQuantizer(32, beta=BETA)
    gradient, out = jax.grad(lambda z: loss_of(module, {}, z, upstream), has_aux=True)(z)
    signs = np.where(z > 0, 1, -1)
    np.testing.assert_array_equal(out.z_q, signs)
    np.testing.assert_array_equal(out.indices, ((signs > 0) * [1, 2, 4, 8, 16]).sum(axis=-1))
    assert_close(gradient, upstream + BETA * 2 * (z - signs) / z.size)


def test_lfq_wants_a_power_of_two():
    with pytest.raises(UsageError, match=r"codebook.size=1000: quantizer lfq takes powers of two, such as 1024"):
        _ = LookupFreeQuantizer(1000).latent_dim
    assert LookupFreeQuantizer(2**18).latent_dim == 18


# ---- fsq -------------------------------------------------------------------------------------------------------------


def test_fsq_s_codes_are_the_paper_s():
    """The implicit codebook of levels (3, 5, 4), and the example of the authors' notebook: code 10."""
    module = FiniteScalarQuantizer(60, levels=(3, 5, 4))
    rows = np.asarray(module.lookup(jnp.arange(60)))
    np.testing.assert_array_equal(rows[:4], [[-1, -1, -1], [0, -1, -1], [1, -1, -1], [-1, -0.5, -1]])
    np.testing.assert_array_equal(rows[[15, 59]], [[-1, -1, -0.5], [1, 1, 0.5]])
    out = module.apply({}, jnp.array([[[[0.25, 0.6, -7.0]]]]))
    np.testing.assert_array_equal(out.z_q.reshape(-1), [0.0, 0.5, -1.0])
    assert out.indices.item() == 10 and out.quant_loss == out.entropy_loss == 0


@pytest.mark.parametrize("levels", [(8, 6, 5), (16, 8, 8), (2, 3), (256,)])
def test_fsq_values_indices_and_gradients(levels):
    size, dim = math.prod(levels), len(levels)
    module = FiniteScalarQuantizer(size, levels=levels)
    z, upstream = 2 * normal(0, *SHAPE, dim), normal(2, *SHAPE, dim)
    gradient, out = jax.grad(lambda z: loss_of(module, {}, z, upstream), has_aux=True)(z)
    for i, level in enumerate(levels):
        half, offset = (level - 1) * 1.001 / 2, 0.0 if level % 2 else 0.5
        inside = z[..., i].astype(np.float64) + math.atanh(offset / half)
        value = np.round(np.tanh(inside) * half - offset)
        np.testing.assert_array_equal(out.z_q[..., i], (value / (level // 2)).astype(np.float32))
        assert_close(gradient[..., i], upstream[..., i] * half / np.cosh(inside) ** 2 / (level // 2), 2e-5)
        digit = out.indices // math.prod(levels[:i]) % level
        np.testing.assert_array_equal(digit, value + level // 2)
    rows = np.asarray(module.lookup(jnp.arange(size)))
    assert len(np.unique(rows, axis=0)) == size


@pytest.mark.parametrize("level", [2, 3, 7, 8, 255, 256])
def test_fsq_reaches_every_level_and_none_beyond(level):
    module = FiniteScalarQuantizer(level, levels=(level,))
    z = jnp.linspace(-20, 20, 40_001).reshape(1, 1, -1, 1)
    assert set(np.unique(module.nearest(z))) == set(range(level))
    assert module.nearest(jnp.zeros((1, 1, 1, 1))).item() == level // 2


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        (64, (8, 8)),
        (240, (8, 6, 5)),
        (1000, (8, 5, 5, 5)),
        (1024, (16, 8, 8)),
        (4375, (7, 5, 5, 5, 5)),
        (8192, (16, 8, 8, 8)),
        (15360, (8, 8, 8, 6, 5)),
        (16384, (16, 16, 8, 8)),
        (64000, (8, 8, 8, 5, 5, 5)),
        (262144, (8,) * 6),
    ],
)
def test_fsq_chooses_levels(size, levels):
    module = FiniteScalarQuantizer(size)
    assert module.latent_dim == len(levels)
    highest = np.float32([(level - 1 - level // 2) / (level // 2) for level in levels])
    np.testing.assert_array_equal(module.lookup(jnp.array(size - 1)), highest)


@pytest.mark.parametrize(
    ("size", "levels", "words"),
    [
        (100, (), "knows no levels for it; set quantizer.levels to numbers of that product"),
        (32, (), "or a power of two from 64 on"),
        (64, (8, 5), "make 40 codes, codebook.size is 64; set codebook.size=40"),
        (64, (64, 1), "each must be an integer from 2 to 256"),
        (64, (8.0, 8), "each must be an integer from 2 to 256"),
        (1024, (1024,), "each must be an integer from 2 to 256"),
    ],
)
def test_levels_that_cannot_be(size, levels, words):
    with pytest.raises(UsageError, match=words):
        _ = FiniteScalarQuantizer(size, levels=levels).latent_dim


# ---- all of them -----------------------------------------------------------------------------------------------------


def test_ibq_with_a_single_loss_has_vq_s():
    z, rows = normal(0, *SHAPE, 8), normal(1, 16, 8)
    single = IndexBackpropQuantizer(16, 8, beta=BETA, beta_on="commitment", double_loss=False)
    out = single.apply({"params": {"codebook": rows}}, z)
    assert_close(out.quant_loss, (1 + BETA) * np.mean((z - rows[out.indices]) ** 2))
    both = IndexBackpropQuantizer(16, 8, beta=BETA, beta_on="commitment").apply({"params": {"codebook": rows}}, z)
    assert_close(both.quant_loss - out.quant_loss, np.mean((z - rows[out.indices]) ** 2))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_a_latent_becomes_is_looked_up_by_its_code(name):
    module = build_quantizer(name, {}, codebook_size=64, dim=8)
    z = jnp.asarray(normal(0, *SHAPE, module.latent_dim))
    bound = module.bind(meta.unbox(module.init(jax.random.key(0), z)))
    codes, out = bound.nearest(z), bound(z)
    assert codes.dtype == out.indices.dtype == jnp.int32 and codes.shape == SHAPE
    np.testing.assert_array_equal(codes, out.indices)
    np.testing.assert_array_equal(bound.lookup(codes), out.z_q)
    every = jnp.arange(64).reshape(1, 8, 8)
    if name != "ibq":  # whose largest dot product need not be a row's own
        np.testing.assert_array_equal(bound.nearest(_inverse(name, bound.lookup(every))), every)


def _inverse(name: str, rows: jax.Array) -> jax.Array:
    """Latents that lie on the rows; FSQ's latents are bounded by a tanh first."""
    if name != "fsq":
        return rows
    half, shift = 7 * 1.001 / 2, math.atanh(1 / 7.007)
    return jnp.arctanh((4 * rows + 0.5) / half) - shift


@pytest.mark.parametrize("name", OTHERS)
def test_codes_split_over_devices_give_the_same_losses_and_gradients(name):
    z, mesh = normal(0, 16, 4, 4, 8 if name in ("vq", "simvq") else 6), make_mesh({"data": 2, "codebook": 4})
    settings = {"levels": (2,) * 6, "entropy_group_tokens": 64, "entropy_temperature": 0.5}
    params = meta.unbox(build_quantizer(name, settings, codebook_size=64, dim=8).init(jax.random.key(0), z))

    def gradients(mesh, params, z):
        module = build_quantizer(name, settings, codebook_size=64, dim=8, mesh=mesh)

        def loss(params, z):
            out = module.apply(params, z)
            return out.quant_loss + out.entropy_loss + jnp.sum(out.z_q * jnp.cos(z)), out.indices

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, z)

    def placed(path, leaf):
        spec = PartitionSpec(CODEBOOK) if path[-1].key == "codebook" else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    split = gradients(
        mesh,
        jax.tree_util.tree_map_with_path(placed, params),
        jax.device_put(z, NamedSharding(mesh, PartitionSpec(AXES))),
    )
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), split, gradients(None, params, z))


@pytest.mark.parametrize("name", ["vq", "simvq"])
def test_no_array_of_tokens_by_codes(name):
    tokens, width, codes = 256, 16, 8192
    module = build_quantizer(name, {"block_size": 256}, codebook_size=codes, dim=width)
    z = jax.ShapeDtypeStruct((1, 16, 16, width), jnp.float32)
    params = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), z))

    def loss(params, z):
        out = module.apply(params, z)
        return out.quant_loss + out.z_q.sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, z).compile()
    assert largest_array(compiled.as_text()) == codes * (width + 1) < tokens * codes


# ---- from the command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("quantizer.name=vqvae",), "quantizer.name=vqvae is not one of ibq, vq, simvq, lfq, fsq"),
        (("quantizer.name=lfq", "codebook.size=72"), "quantizer lfq takes powers of two, such as 64"),
        (("quantizer.name=fsq", "codebook.size=72"), "quantizer fsq knows no levels for it"),
        (("quantizer.name=fsq", "quantizer.levels=(8,5)"), "make 40 codes, codebook.size is 64"),
        (("quantizer.name=simvq", "quantizer.l2_normalize=True"), "l2_normalize=True is a setting of quantizer.name=vq"),
        (("quantizer.levels=(8,8)",), "quantizer.levels=(8, 8) is a setting of quantizer.name=fsq, not of ibq"),
        (("quantizer.name=lfq", "quantizer.entropy_group_tokens=100"), "does not divide the 512 tokens"),
    ],
)
def test_a_quantizer_that_cannot_be_is_one_line_and_writes_nothing(overrides, words, data_dir, tmp_path, capsys):
    assert main(arguments(tmp_path / "run", data_dir, *overrides)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


TINY = (
    "data.image_size=8",
    "data.resize=8",
    "model.resolution=8",
    "model.channel_multipliers=(1,)",
    "loss.adversarial_weight=0.0",
    "log.images_every=100",
    "evaluate.every=4",
    "evaluate.examples=8",
    "checkpoint.every=2",
)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """A run that goes on compiles what it did before."""
    fields = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {field: getattr(jax.config, field) for field in fields}
    for field, value in zip(fields, (str(tmp_path_factory.mktemp("compiled")), 0.0), strict=True):
        jax.config.update(field, value)
    yield
    for field, value in before.items():
        jax.config.update(field, value)


@pytest.fixture(scope="module", params=OTHERS)
def trained(request, tmp_path_factory, data_dir, compiled_once):
    """(name, workdir) after two steps, and two more from the checkpoint."""
    workdir = tmp_path_factory.mktemp("runs") / request.param
    for steps in (2, 4):
        fields = f"quantizer.name={request.param}", f"train.steps={steps}"
        assert main(arguments(workdir, data_dir, *TINY, *fields)) == 0
    return request.param, workdir


def test_a_run_trains_goes_on_and_logs_what_there_is(trained):
    name, workdir = trained
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "loss/total" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "validation/psnr" in row] == [2, 4]  # the end of either run
    assert "codebook/max_probability" not in logged[0] and "codebook/max_logit" not in logged[0]
    assert ("codebook/batch_entropy" in logged[0]) == (name == "lfq")
    assert ("codebook/max_norm" in logged[0]) == (name == "vq")
    assert all(math.isfinite(value) for row in logged for value in row.values() if isinstance(value, float))
    trainer, restored = restore_run(workdir)
    assert restored.step == 4
    if name == "simvq":
        start = create_sharded(trainer.create_state, trainer.mesh, trainer.config.seed).params["quantize"]
        for tree in (restored.state.params["quantize"], restored.state.ema["quantize"]):
            np.testing.assert_array_equal(tree["codebook"], start["codebook"])
            assert np.any(tree["projection"]["kernel"] != start["projection"]["kernel"])


def test_its_codes_are_cached(trained, tmp_path):
    _, workdir = trained
    splits = "--splits=train[:16],validation[:8]"
    assert main(["tokenize", f"--tokenizer={workdir}", f"--out={tmp_path / 'codes'}", splits]) == 0
    tokenizer, codes = Tokenizer.load(workdir), open_token_cache(tmp_path / "codes", "train")
    assert codes.codebook_size == tokenizer.codebook_size == 64
    every = np.arange(64).reshape(1, 8, 8)
    assert np.asarray(tokenizer.decode(every)).shape == (1, 8, 8, 3)
    assert len({fingerprint(tokenizer.model.clone(quantizer=name), tokenizer.params) for name in QUANTIZERS}) == 5


@pytest.mark.long
@pytest.mark.parametrize("trained", ["fsq"], indirect=True)  # the furthest from IBQ: no parameter, no loss
def test_it_is_evaluated_and_reported_and_a_generator_learns_its_codes(trained, tmp_path):
    _, workdir = trained
    assert main(["evaluate", f"--run={workdir}", "--examples=16"]) == 0
    assert main(["report", f"--workdir={workdir}"]) == 0
    assert "tokenizer of 64 codes of 2 dimensions (fsq)" in (workdir / "report.html").read_text()
    codes, run = tmp_path / "codes", tmp_path / "ar"
    splits = "--splits=train[:32],validation[:16]"
    assert main(["tokenize", f"--tokenizer={workdir}", f"--out={codes}", splits]) == 0
    fields = "model.use_pretrained_codebook=True", "model.codebook_dim=2", "train.steps=1"
    assert main(generator_arguments(run, codes, *fields)) == 0
    assert main(["sample", f"--run={run}", f"--out={tmp_path / 'out.png'}", "--labels=0", "--per-class=1"]) == 0


@pytest.mark.parametrize("trained", ["vq"], indirect=True)
def test_vq_s_codebook_grows_as_ibq_s_does(trained, tmp_path):
    assert main(["convert", f"--in={trained[1]}", f"--out={tmp_path / 'grown'}", "--codebook-size=128"]) == 0
    before, after = (Tokenizer.load(run).params["quantize"]["codebook"] for run in (trained[1], tmp_path / "grown"))
    np.testing.assert_array_equal(after[:64], before)


def test_published_names_are_ibq_s_alone(trained, tmp_path, capsys):
    name, workdir = trained
    resize = "--codebook-size=128"
    for out, *flags in (("out.safetensors",), ("out", "--hub"), ("out", resize))[: 2 if name == "vq" else 3]:
        assert main(["convert", f"--in={workdir}", f"--out={tmp_path / out}", *flags]) == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1 and not (tmp_path / out).exists()
    with pytest.raises(UsageError, match=f"IBQ's tokenizer; the quantizer here is {name}"):
        Tokenizer.load(workdir).to_torch()


def test_a_run_of_before_there_were_others_is_ibq_s_and_goes_on(data_dir, tmp_path):
    config = load_config(arguments(tmp_path, data_dir)[1].removeprefix("--config="))
    saved = config.to_dict()
    for field in ("name", "double_loss", "l2_normalize", "levels"):
        del saved["quantizer"][field]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    other = load_config(arguments(tmp_path, data_dir)[1].removeprefix("--config="), ["--config.quantizer.name=vq"])
    with pytest.raises(UsageError, match=r"another config \(quantizer.name: 'ibq' -> 'vq'\)"):
        check_same_run(tmp_path, other, FIELD_ROLES)
    check_same_run(tmp_path, config, FIELD_ROLES)
    assert read_config(tmp_path / "config.json").to_dict() == config.to_dict()
