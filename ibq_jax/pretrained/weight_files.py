"""Weights that no package carries: which files they are, and where the user's copies are looked for.

A file is named by the config or a flag, else by an environment variable, else it lies under its own name in
~/.cache/ibq_jax. Nothing is ever downloaded.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from ibq_jax.base.errors import UsageError


@dataclass(frozen=True)
class WeightFile:
    """`owner`'s weights of `net`. `stem` of the names that the file has, as .pth or .safetensors; `page`: where it is
    to be had, where the owner's name alone does not say."""

    stem: str
    owner: str
    net: str
    environment: str
    page: str = ""

    @property
    def origin(self) -> str:
        return f"{self.owner}'s {self.net}"

    @property
    def names(self) -> tuple[str, str]:
        return f"{self.stem}.pth", f"{self.stem}.safetensors"


WEIGHT_FILES = {
    "vgg16": WeightFile("vgg16-397923af", "torchvision", "VGG16", "IBQ_VGG16"),
    "alexnet": WeightFile("alexnet-owt-7be5be79", "torchvision", "AlexNet", "IBQ_ALEXNET"),
    "inception": WeightFile(
        "pt_inception-2015-12-05-6726825d",
        "pytorch-fid",
        "Inception-v3",
        "IBQ_INCEPTION",
        page="github.com/mseitzer/pytorch-fid, release fid_weights",
    ),
}


def find(kind: str, configured: str, option: str) -> Path | None:
    """The user's file of a `kind` (see WEIGHT_FILES); None where it is in none of the places.

    `configured` is what the config's field or the flag `option` says; empty where it says nothing. Raises UsageError
    when a file that was asked for there or by the environment does not exist.
    """
    file = WEIGHT_FILES[kind]
    for asker, path in ((option, configured), (f"${file.environment}", os.environ.get(file.environment, ""))):
        if path:
            if not Path(path).expanduser().is_file():
                raise UsageError(f"{asker} is {path}, which does not exist; it names {file.origin} file")
            return Path(path).expanduser()
    cache = Path.home() / ".cache" / "ibq_jax"
    return next((cache / name for name in file.names if (cache / name).is_file()), None)


def absence(kind: str, option: str) -> str:
    """Which file is missing, whose it is, and the ways to give it: the end of a sentence."""
    file = WEIGHT_FILES[kind]
    page = f" ({file.page})" if file.page else ""
    return (
        f"{file.owner}'s {file.names[0]}{page} is not here; set {option} or ${file.environment}, "
        "or put it into ~/.cache/ibq_jax/"
    )
