"""Tests of how the user's weight files are found, and of the message if one is missing."""

import pytest

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained.weight_files import WEIGHT_FILES, explain_absence, find_weights


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in WEIGHT_FILES.values():
        monkeypatch.delenv(file.environment, raising=False)
    return tmp_path


@pytest.mark.parametrize("kind", WEIGHT_FILES)
def test_files_are_looked_for_as_configured_then_in_the_environment_then_in_the_cache(kind, home, monkeypatch):
    assert find_weights(kind, "", "--file") is None
    cache = home / ".cache" / "ibq_jax"
    cache.mkdir(parents=True)
    for name in reversed(WEIGHT_FILES[kind].names):
        (cache / name).touch()
        assert find_weights(kind, "", "--file") == cache / name
    mine, yours = home / "mine.pth", home / "yours.pth"
    mine.touch(), yours.touch()
    monkeypatch.setenv(WEIGHT_FILES[kind].environment, str(mine))
    assert find_weights(kind, "", "--file") == mine
    assert find_weights(kind, "~/yours.pth", "--file") == yours


def test_a_configured_file_has_to_exist(home, monkeypatch):
    monkeypatch.setenv("IBQ_VGG16", str(home / "absent.pth"))
    with pytest.raises(
        UsageError, match=r"\$IBQ_VGG16 is .*absent.pth, which does not exist; it must name the file of .* VGG16"
    ):
        find_weights("vgg16", "", "loss.perceptual_file")
    with pytest.raises(UsageError, match=r"loss.perceptual_file is nowhere.pth, which does not exist"):
        find_weights("vgg16", "nowhere.pth", "loss.perceptual_file")


def test_the_message_names_the_file_its_owner_and_every_way_to_provide_it():
    message = explain_absence("inception", "--inception")
    for part in ("pt_inception-2015-12-05-6726825d.pth", "release fid_weights", "--inception", "$IBQ_INCEPTION"):
        assert part in message
    assert explain_absence("vgg16", "loss.perceptual_file") == (
        "torchvision's vgg16-397923af.pth was not found; "
        "set loss.perceptual_file or $IBQ_VGG16, or put it into ~/.cache/ibq_jax/"
    )
