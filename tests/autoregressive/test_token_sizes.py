"""The sizes that a generator's config takes from its token cache, or a preset's where there is no cache."""

import pytest
from support.token_caches import CODEBOOK_SIZE, GRID, settings, write_cache

from ibq_jax.autoregressive.token_sizes import FROM_CACHE, cache_sizes, check_fit, load_preset, resolve_model
from ibq_jax.base.config import load_config
from ibq_jax.base.errors import UsageError
from ibq_jax.data.token_cache import TokenCacheSplit, open_token_cache

PRESET = "configs/autoregressive.py:openmoji32"


def model_sizes(config) -> dict:
    return {name: config.model[name] for name in FROM_CACHE}


@pytest.fixture
def source(tmp_path) -> TokenCacheSplit:
    write_cache(tmp_path, settings())
    return open_token_cache(tmp_path, "train")


def test_sizes_come_from_the_cache_and_nothing_else_changes(source):
    config = load_config(PRESET)
    resolved = resolve_model(config, cache_sizes(source))
    assert model_sizes(config) == FROM_CACHE
    assert model_sizes(resolved) == {"vocab_size": CODEBOOK_SIZE, "grid": GRID, "num_classes": 5}
    assert resolved.is_locked
    check_fit(resolved, source)
    others = [fields.to_dict() for fields in (config, resolved)]
    for fields in others:
        for name in FROM_CACHE:
            del fields["model"][name]
    assert others[0] == others[1]


def test_a_cache_without_classes_has_none(tmp_path):
    write_cache(tmp_path, settings(classes=0))
    assert cache_sizes(open_token_cache(tmp_path, "train"))["num_classes"] == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.vocab_size=64", "model.vocab_size=64, the token cache has 300; a new run takes"),
        ("model.grid=(3, 2)", r"model.grid=\(3, 2\), the token cache has \(2, 3\); a new run takes"),
        ("model.num_classes=0", "model.num_classes=0, the token cache has 5; a new run takes"),
    ],
)
def test_given_sizes_must_agree_with_the_cache(source, override, words):
    resolved = resolve_model(load_config(PRESET, [f"--config.{override}"]), cache_sizes(source))
    with pytest.raises(UsageError, match=words):
        check_fit(resolved, source)


def test_images_of_none_of_the_classes_need_a_generator_that_knows_no_class(tmp_path):
    manifest = write_cache(tmp_path, settings(), unlabelled=3)
    assert manifest["splits"]["validation"]["labels"] == [0, 0, 0, 1, 0]
    source = open_token_cache(tmp_path, "train")
    check_fit(resolve_model(load_config(PRESET), cache_sizes(source)), source)
    without = resolve_model(load_config(PRESET, ["--config.loss.class_dropout=0"]), cache_sizes(source))
    with pytest.raises(UsageError, match=r"3 images of the split train of .* loss\.class_dropout is over 0"):
        check_fit(without, source)


def test_without_a_cache_they_are_the_presets():
    assert model_sizes(load_preset(PRESET)) == {"vocab_size": 1_024, "grid": (16, 16), "num_classes": 9}
    published = {"vocab_size": 16_384, "grid": (16, 16), "num_classes": 1_000}
    assert model_sizes(load_preset("configs/autoregressive.py:imagenet256_XXL")) == published
    given = load_preset(PRESET, ["--config.model.num_classes=0", "--config.model.vocab_size=64"])
    assert model_sizes(given) == {"vocab_size": 64, "grid": (16, 16), "num_classes": 0}


def test_a_config_file_that_expects_no_sizes_needs_them_given(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from ibq_jax.base.config import load_config\n\nPRESETS = ('mine',)\n\n\n"
        f"def get_config(preset):\n    return load_config({PRESET!r}).unlock()\n"
    )
    with pytest.raises(UsageError, match=r"model.vocab_size=0 means as in the token cache; without one, set"):
        load_preset(f"{file}:mine")
    fields = ["--config.model.vocab_size=64", "--config.model.grid=(8, 8)", "--config.model.num_classes=9"]
    assert load_preset(f"{file}:mine", fields).model.vocab_size == 64
