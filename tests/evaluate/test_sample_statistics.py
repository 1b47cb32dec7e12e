"""Evaluation of samples: reading sets, distances and scores, on any number of devices and processes."""

import functools
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import released

from ibq_jax.__main__ import main
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import make_mesh
from ibq_jax.evaluate.feature_nets import FD, FID, LOGITS, SFID, find_feature_nets
from ibq_jax.evaluate.protocols import PROTOCOLS
from ibq_jax.evaluate.sample_statistics import FeatureExtractor, ImageSet, compare, read_moments
from ibq_jax.evaluate.statistics import FeatureStatistics
from ibq_jax.pretrained.weight_files import WEIGHT_FILES

# Feature nets run longer than it takes to optimize them.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized")]

RNG = np.random.default_rng(0)
SMOOTH = np.kron(RNG.integers(0, 256, (24, 4, 4, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)  # [24, 32, 32, 3]
NOISE = RNG.integers(0, 256, (24, 32, 32, 3)).astype(np.uint8)


def saved(path, images):
    np.savez(path, arr_0=images, arr_1=np.zeros(len(images), np.int64))
    return path


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / WEIGHT_FILES["inception"].names[1]
    save_file(released.stand_ins(released.load("inception")["state_dict_json"]), path)
    yield path
    path.unlink()


@functools.cache
def extractor(devices: int, kind: str, file: Path | None) -> FeatureExtractor:
    """Compiles its network once for all tests that call it."""
    mesh = make_mesh({"data": -1}, jax.devices()[:devices])
    files = {} if file is None else {kind: str(file)}
    return FeatureExtractor(find_feature_nets([kind], files), PROTOCOLS["adm"], mesh)


def features_of_images(images, path, devices=1, batch=8, kind="efficientnet", file=None):
    return extractor(devices, kind, file)(ImageSet(saved(path, images)).batches(batch))


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """The features of SMOOTH and of NOISE in batches of 8, and their comparison; a distance takes seconds."""
    path = tmp_path_factory.mktemp("sets") / "set.npz"
    smooth, noise = (features_of_images(set_, path) for set_ in (SMOOTH, NOISE))
    return smooth, noise, dict(compare(smooth, noise, PROTOCOLS["adm"]))


def test_a_set_is_read_batch_by_batch_with_its_last_one_padded(tmp_path):
    image_set = ImageSet(saved(tmp_path / "set.npz", NOISE[:13]))
    batches = list(image_set.batches(8))
    assert len(image_set) == 13 and [batch["mask"].sum() for batch in batches] == [8, 5]
    images = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(images[:13], NOISE[:13])
    assert images.shape == (16, 32, 32, 3) and not images[13:].any()


def test_a_compressed_set_is_read_too(tmp_path):
    np.savez_compressed(tmp_path / "set.npz", arr_0=NOISE[:3])
    np.testing.assert_array_equal(next(ImageSet(tmp_path / "set.npz").batches(3))["image"], NOISE[:3])


def test_equal_sets_have_distance_0_precision_1_and_recall_1(on_one_device):
    features = on_one_device[0]
    found = dict(compare(features, features, PROTOCOLS["adm"]))
    assert abs(found[FD]) < 1e-6 and found["images"] == 24
    assert found["precision (EfficientNetLite0)"] == found["recall (EfficientNetLite0)"] == 1.0


def test_noise_is_farther_away_than_images_of_the_same_kind(tmp_path):
    half, other, noise = (
        features_of_images(set_, tmp_path / "set.npz") for set_ in (SMOOTH[:12], SMOOTH[12:], NOISE[:12])
    )
    near, far = (dict(compare(features, half, PROTOCOLS["adm"])) for features in (other, noise))
    assert 0 < near[FD] < far[FD]
    assert far["precision (EfficientNetLite0)"] == 0.0


@pytest.mark.parametrize(("devices", "batch"), [(8, 8), (4, 16), (1, 5)])
def test_devices_and_batches_change_nothing(on_one_device, tmp_path, devices, batch):
    """On one device, two batch sizes differ only by the rounding of float32 convolutions of other shapes."""
    same, same_others = (features_of_images(set_, tmp_path / "other.npz", devices, batch) for set_ in (SMOOTH, NOISE))
    assert dict(compare(same, same_others, PROTOCOLS["adm"])) == pytest.approx(on_one_device[2], rel=1e-6)


def test_two_processes_get_the_result_of_one(tmp_path):
    """Each counts its own images, and both get the statistics of all."""
    paths = [saved(tmp_path / f"{name}.npz", set_) for name, set_ in (("set", SMOOTH[:21]), ("reference", NOISE[:21]))]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[1] / "support" / "features_in_processes.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(port), str(index), "2", *map(str, paths)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for index in range(2)
    ]
    printed = [process.communicate(timeout=240)[0].split("found ")[1].split() for process in processes]
    assert printed[0] == printed[1] and printed[0][0] == "21"
    samples, reference = (features_of_images(set_[:21], tmp_path / "one.npz", batch=8) for set_ in (SMOOTH, NOISE))
    assert float(printed[0][1]) == pytest.approx(dict(compare(samples, reference, PROTOCOLS["adm"]))[FD], rel=1e-6)


def test_inception_gives_all_metrics_and_its_statistics_can_replace_images(tmp_path, inception_file):
    net = {"kind": "inception", "file": inception_file}
    reference, samples = (features_of_images(set_, tmp_path / "set.npz", **net) for set_ in (SMOOTH[:6], NOISE[:6]))
    found = dict(compare(samples, reference, PROTOCOLS["adm"]))
    assert found.keys() == {
        FID, SFID, "inception_score", "inception_score_deviation", "precision", "recall", "images"
    }  # fmt: skip
    assert samples.features[LOGITS].shape == (6, 1008)
    pool, of_noise = reference.features[FID].astype(np.float64), samples.features[FID].astype(np.float64)
    assert found[FID] > np.sum((pool.mean(axis=0) - of_noise.mean(axis=0)) ** 2)
    moments = {
        f"{part}{suffix}": getattr(reference.statistics[name], attribute)
        for name, suffix in ((FID, ""), (SFID, "_s"))
        for part, attribute in (("mu", "mean"), ("sigma", "covariance"))
    }
    np.savez(tmp_path / "moments.npz", **moments)
    read = read_moments(tmp_path / "moments.npz")
    for name in (FID, SFID):
        assert samples.statistics[name].frechet(read[name]) == pytest.approx(found[name], rel=1e-9)
    command = ["evaluate", f"--samples={saved(tmp_path / 'noise.npz', NOISE[:6])}", "--batch-size=8"]
    command += [f"--inception={inception_file}", f"--json={tmp_path / 'numbers.json'}"]
    assert main([*command, f"--reference={tmp_path / 'moments.npz'}"]) == 0


def error_line(arguments, capsys) -> str:
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_wrong_use_ends_with_one_line(tmp_path, capsys):
    good = saved(tmp_path / "good.npz", NOISE[:4])
    np.savez(tmp_path / "floats.npz", arr_0=NOISE[:4] / 255)
    np.savez(tmp_path / "other.npz", features=NOISE[:4])
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "short.npz").write_bytes(good.read_bytes()[:-200])
    np.savez(tmp_path / "empty.npz", arr_0=NOISE[:0])
    np.savez(tmp_path / "moments.npz", mu=np.zeros(5), sigma=np.eye(5))
    for arguments, words in (
        ((), "give either --run=RUN or --samples"),
        ((f"--samples={good}",), "--samples needs --reference=FILE.npz"),
        ((f"--samples={tmp_path / 'no.npz'}", f"--reference={good}"), "no.npz: no such file"),
        ((f"--samples={tmp_path / 'floats.npz'}", f"--reference={good}"), "float64 [4, 32, 32, 3]; images are uint8"),
        ((f"--samples={tmp_path / 'other.npz'}", f"--reference={good}"), "with images as 'arr_0'"),
        ((f"--samples={tmp_path / 'text.npz'}", f"--reference={good}"), "not a whole .npz file"),
        ((f"--samples={tmp_path / 'short.npz'}", f"--reference={good}"), "not a whole .npz file"),
        ((f"--samples={tmp_path / 'empty.npz'}", f"--reference={good}"), "there are no images to evaluate"),
        ((f"--samples={good}", f"--reference={tmp_path / 'moments.npz'}"), "mu has 5 features, FID's are 2048"),
        ((f"--samples={good}", f"--reference={good}", "--inception=nowhere.pth"), "nowhere.pth, which does not exist"),
        ((f"--samples={good}", f"--reference={good}", "--batch-size=12"), "--batch-size=12 does not divide"),
    ):
        assert words in error_line(["--batch-size=8", *arguments], capsys)


def test_a_set_with_a_damaged_array_is_refused(tmp_path):
    path = saved(tmp_path / "set.npz", NOISE)
    content = bytearray(path.read_bytes())
    content[5000:5100] = bytes(100)  # the checksum of arr_0 is wrong now
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cut short"):
        list(ImageSet(path).batches(24))


def test_a_caveat_names_distances_with_fewer_images_than_features(tmp_path, capsys):
    good = saved(tmp_path / "good.npz", NOISE[:8])
    command = ["evaluate", f"--samples={good}", f"--reference={good}", "--batch-size=8"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"unreliable with only 8 images: {FD} (1,280 features)" in printed
    assert "8 images, the protocol has 50,000" in printed and "images of 32 pixels, the protocol has 256" in printed
    assert "FID, sFID, Inception Score, precision and recall: not computed" in printed


def test_statistics_merge_to_what_one_pass_gives(on_one_device):
    features = on_one_device[0].features[FD]
    whole, parts = FeatureStatistics(1280), [FeatureStatistics(1280) for _ in range(2)]
    whole.update(features)
    for part, rows in zip(parts, (features[::2], features[1::2]), strict=True):
        part.update(rows)
    other = FeatureStatistics(1280)
    other.update(features[:10])
    merged = parts[0].merge(parts[1])
    assert merged.frechet(other) == pytest.approx(whole.frechet(other), rel=1e-8)
