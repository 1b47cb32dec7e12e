"""Evaluation of reconstructions: the same numbers for any batch size and number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import make_mesh
from ibq_jax.data.preprocess import to_uint8
from ibq_jax.evaluate.feature_nets import FD, find_feature_nets
from ibq_jax.evaluate.protocols import PROTOCOLS
from ibq_jax.evaluate.reconstruction import ReconstructionEvaluator

IMAGES = np.random.default_rng(0).integers(0, 256, (13, 16, 16, 3), np.uint8)


def darker(params, images):
    """Scales images by `factor` of the range; an image's only code is its first pixel's red."""
    reconstructions = (images.astype(jnp.float32) / 127.5 - 1.0) * params["factor"]
    return reconstructions, images[:, :1, :1, 0].astype(jnp.int32)


def batches_of(size):
    def batches(num_images):
        images = IMAGES[:num_images] if num_images else IMAGES
        padded = np.zeros((-(-len(images) // size) * size, 16, 16, 3), np.uint8)
        padded[: len(images)] = images
        for start in range(0, len(padded), size):
            yield {"image": padded[start : start + size], "mask": np.arange(start, start + size) < len(images)}

    return batches


def evaluator(size, devices=1, num_images=0):
    mesh = make_mesh({"data": -1}, jax.devices()[:devices])
    return ReconstructionEvaluator(darker, 256, mesh, batches_of(size), num_images)


PARAMS = {"factor": jnp.asarray(0.9)}


def test_psnr_and_ssim_agree_with_scikit_image():
    numbers = dict(evaluator(8)(PARAMS))
    shown = np.asarray(to_uint8(darker(PARAMS, jnp.asarray(IMAGES))[0]))
    psnr = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(IMAGES, shown, strict=True)]
    ssim = [structural_similarity(a, b, data_range=255, channel_axis=-1) for a, b in zip(IMAGES, shown, strict=True)]
    assert numbers["psnr"] == pytest.approx(np.mean(psnr), rel=1e-5)
    assert numbers["ssim"] == pytest.approx(np.mean(ssim), rel=1e-4)
    assert numbers["l1"] == pytest.approx(np.abs(0.1 * (IMAGES / 127.5 - 1)).mean(), rel=1e-4)
    codes = IMAGES[:, 0, 0, 0]
    assert numbers["images"] == 13 and numbers["usage"] == len(set(codes)) / 256
    share = np.unique(codes, return_counts=True)[1] / 13
    assert numbers["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)


def test_without_rounding_psnr_and_ssim_agree_with_scikit_image_on_floats():
    mesh, protocol = make_mesh({"data": 1}, jax.devices()[:1]), PROTOCOLS["bicubic"]
    numbers = dict(ReconstructionEvaluator(darker, 256, mesh, batches_of(8), 0, protocol)(PARAMS))
    shown = (np.clip(darker(PARAMS, jnp.asarray(IMAGES))[0], -1, 1).astype(np.float64) + 1) / 2
    pairs = list(zip(IMAGES / 255, shown, strict=True))
    psnr = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
    ssim = [structural_similarity(a, b, data_range=1, channel_axis=-1) for a, b in pairs]
    assert numbers["psnr"] == pytest.approx(np.mean(psnr), rel=1e-5)
    assert numbers["ssim"] == pytest.approx(np.mean(ssim), rel=1e-5)


@pytest.mark.parametrize(("size", "devices"), [(16, 1), (8, 8), (16, 4)])
def test_padding_and_devices_do_not_matter(size, devices):
    one, other = dict(evaluator(1)(PARAMS)), dict(evaluator(size, devices)(PARAMS))
    assert one == pytest.approx(other, rel=1e-6)


def test_seed_voken_is_what_the_released_code_computes():
    """Both images are truncated; PSNR and SSIM are averaged over batches of four, then over batches."""
    mesh = make_mesh({"data": -1})
    protocol = PROTOCOLS["seed_voken"]
    numbers = dict(ReconstructionEvaluator(darker, 256, mesh, batches_of(8), protocol=protocol)(PARAMS))
    originals = (IMAGES / 127.5 - 1.0).astype(np.float32)
    reconstructions = np.asarray(darker(PARAMS, jnp.asarray(IMAGES))[0])
    a, b = (((x + 1) / 2 * 255.0).astype(np.uint8).astype(np.float32) / 255.0 for x in (originals, reconstructions))
    pairs = list(zip(a, b, strict=True))
    for name, values in (
        ("psnr", [peak_signal_noise_ratio(x, y) for x, y in pairs]),
        ("ssim", [structural_similarity(y, x, data_range=1.0, channel_axis=-1) for x, y in pairs]),
    ):
        batches = [np.mean(values[start : start + 4]) for start in range(0, 13, 4)]
        assert numbers[name] == pytest.approx(np.mean(batches), rel=1e-6)
        assert numbers[name] != pytest.approx(np.mean(values), rel=1e-6)


def test_distances_are_the_same_on_one_device_and_on_eight():
    found = []
    for size, devices in ((8, 8), (4, 1)):
        mesh = make_mesh({"data": -1}, jax.devices()[:devices])
        how = {"protocol": PROTOCOLS["seed_voken"], "feature_nets": find_feature_nets(["efficientnet"], {})}
        found.append(dict(ReconstructionEvaluator(darker, 256, mesh, batches_of(size), **how)(PARAMS)))
    assert found[0][FD] > 0 and found[0][FD] == pytest.approx(found[1][FD], rel=1e-6)


def test_an_empty_split_is_an_error():
    with pytest.raises(UsageError, match="the split is empty"):
        dict(ReconstructionEvaluator(darker, 256, make_mesh({"data": -1}), lambda num_images: iter(()))(PARAMS))


def test_only_the_first_num_images_are_measured():
    assert dict(evaluator(8, num_images=5)(PARAMS))["images"] == 5


def test_the_grid_shows_each_original_above_its_reconstruction():
    grid = evaluator(8, devices=8).comparison_grid(PARAMS, columns=7, rows=2)  # one more than there are images
    assert grid.shape == (4 * 16, 7 * 16, 3)
    shown = np.asarray(to_uint8(darker(PARAMS, jnp.asarray(IMAGES))[0]))
    np.testing.assert_array_equal(grid[:16, 16:32], IMAGES[1])
    np.testing.assert_array_equal(grid[16:32, 16:32], shown[1])
    np.testing.assert_array_equal(grid[32:48, :16], IMAGES[7])
    assert not grid[32:, 6 * 16 :].any()
