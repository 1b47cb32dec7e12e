"""Where the user's files of weights are looked for, and what is said where they are not."""

import pytest

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained.weight_files import WEIGHT_FILES, absence, find


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in WEIGHT_FILES.values():
        monkeypatch.delenv(file.environment, raising=False)
    return tmp_path


@pytest.mark.parametrize("kind", WEIGHT_FILES)
def test_files_are_looked_for_as_configured_then_in_the_environment_then_in_the_cache(kind, home, monkeypatch):
    assert find(kind, "", "--file") is None
    cache = home / ".cache" / "ibq_jax"
    cache.mkdir(parents=True)
    for name in reversed(WEIGHT_FILES[kind].names):
        (cache / name).touch()
        assert find(kind, "", "--file") == cache / name
    mine, yours = home / "mine.pth", home / "yours.pth"
    mine.touch(), yours.touch()
    monkeypatch.setenv(WEIGHT_FILES[kind].environment, str(mine))
    assert find(kind, "", "--file") == mine
    assert find(kind, "~/yours.pth", "--file") == yours


def test_a_file_that_was_asked_for_has_to_exist(home, monkeypatch):
    monkeypatch.setenv("IBQ_VGG16", str(home / "absent.pth"))
    with pytest.raises(UsageError, match=r"\$IBQ_VGG16 is .*absent.pth, which does not exist; it names .* VGG16 file"):
        find("vgg16", "", "loss.perceptual_file")
    with pytest.raises(UsageError, match=r"loss.perceptual_file is nowhere.pth, which does not exist"):
        find("vgg16", "nowhere.pth", "loss.perceptual_file")


def test_an_absence_names_the_file_its_origin_and_every_way_to_give_it():
    said = absence("inception", "--inception")
    for part in ("pt_inception-2015-12-05-6726825d.pth", "release fid_weights", "--inception", "$IBQ_INCEPTION"):
        assert part in said
    assert absence("vgg16", "loss.perceptual_file") == (
        "torchvision's vgg16-397923af.pth is not here; "
        "set loss.perceptual_file or $IBQ_VGG16, or put it into ~/.cache/ibq_jax/"
    )
