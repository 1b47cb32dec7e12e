"""Published results next to a run: which configs they belong to, and where the page shows them."""

import json

import pytest
from support.small_runs import ROOT

from ibq_jax.base.config import flatten, load_config, save_config
from ibq_jax.report.published import PUBLISHED, published_for
from ibq_jax.report.run import read_run
from ibq_jax.report.single_run import single_run_page

FROM_CACHE = ("model.vocab_size=16384", "model.num_classes=1000")  # what training takes from the token cache


def config(spec: str, *fields: str):
    return load_config(f"{ROOT}/configs/{spec}", [f"--config.{field}" for field in fields])


@pytest.mark.parametrize(
    ("spec", "fields", "results"),
    [
        ("tokenizer.py:imagenet256_8192", (), [{"rFID": 1.87, "LPIPS": 0.2437, "usage": 0.98}]),
        ("tokenizer.py:imagenet256_8192", ("quantizer.name=vq",), []),
        ("tokenizer.py:imagenet256_8192", ("codebook.size=4096",), []),
        ("tokenizer.py:emu35_131072", (), []),
        ("tokenizer.py:openmoji32", (), []),
        ("autoregressive.py:imagenet256_L", FROM_CACHE, [{"FID": 2.45, "IS": 267.48}]),
        ("autoregressive.py:openmoji32", FROM_CACHE, []),
    ],
)
def test_results_belong_to_the_sizes_they_were_published_for(spec, fields, results):
    assert [found.results for found in published_for(flatten(config(spec, *fields)))] == results


def test_every_result_is_found_by_a_preset():
    presets = [f"tokenizer.py:imagenet256_{codes}" for codes in (1_024, 8_192, 16_384, 262_144)]
    tokenizers = [found for preset in presets for found in published_for(flatten(config(preset)))]
    sizes = [f"autoregressive.py:imagenet256_{size}" for size in ("B", "L", "XL", "XXL")]
    generators = [found for size in sizes for found in published_for(flatten(config(size, *FROM_CACHE)))]
    assert len(tokenizers) + len(generators) == len(PUBLISHED)
    assert all(found in tokenizers or found in generators for found in PUBLISHED)


def test_a_page_says_what_was_published_and_draws_its_level(tmp_path):
    save_config(config("tokenizer.py:imagenet256_16384"), tmp_path / "config.json")
    rows = [{"step": step, "codebook/usage": 0.5, "loss/l1": 0.1} for step in (100, 200)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, _ = single_run_page(read_run(tmp_path))
    assert "rFID 1.37, LPIPS 0.2235, usage 96%, after 1,651,320 steps of 256 images of ImageNet" in page
    assert "rFID 2.06, PSNR 22.01 dB, SSIM 0.61, after 1,500,000 steps of 256 images of larger data sets" in page
    drawn = [svg for svg in page.split("<svg") if "published, after 1,651,320 steps" in svg]
    assert len(drawn) == 1 and "Share of the codebook in use" in drawn[0]
