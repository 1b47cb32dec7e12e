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
    """`stem` of the names that it has, as .pth or .safetensors; `origin` says whose file that is."""

    stem: str
    origin: str
    environment: str

    @property
    def names(self) -> tuple[str, str]:
        return f"{self.stem}.pth", f"{self.stem}.safetensors"


WEIGHT_FILES = {
    "vgg16": WeightFile("vgg16-397923af", "torchvision's VGG16", "IBQ_VGG16"),
    "alexnet": WeightFile("alexnet-owt-7be5be79", "torchvision's AlexNet", "IBQ_ALEXNET"),
    "inception": WeightFile(
        "pt_inception-2015-12-05-6726825d",
        "pytorch-fid's Inception-v3 (github.com/mseitzer/pytorch-fid, release fid_weights)",
        "IBQ_INCEPTION",
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
                raise UsageError(f"{asker} is {path}, which does not exist; it names {file.origin}")
            return Path(path).expanduser()
    cache = Path.home() / ".cache" / "ibq_jax"
    return next((cache / name for name in file.names if (cache / name).is_file()), None)


def absence(kind: str, option: str) -> str:
    """Which file is missing, whose it is, and the ways to give it: the end of a sentence."""
    file = WEIGHT_FILES[kind]
    return (
        f"{file.names[0]}, {file.origin}, is not here; set {option} or ${file.environment}, "
        "or put it into ~/.cache/ibq_jax/"
    )
