"""Finds the user's copies of weight files that no Python package contains.

A file is looked for, in this order, where the config or a flag says, where an environment variable says, and under its
original name in ~/.cache/ibq_jax. Nothing is ever downloaded.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from ibq_jax.base.errors import UsageError


@dataclass(frozen=True)
class WeightFile:
    """A published file of weights."""

    stem: str  # of its name, which ends in .pth or .safetensors
    owner: str
    net: str
    environment: str  # variable that may hold its path
    page: str = ""  # where to get it, if the owner's name is not enough

    @property
    def origin(self) -> str:
        """Owner and network, such as "torchvision's VGG16"."""
        return f"{self.owner}'s {self.net}"

    @property
    def names(self) -> tuple[str, str]:
        """The file's possible names."""
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
    "convnext_small": WeightFile("convnext_small-0c510722", "torchvision", "ConvNeXt-Small", "IBQ_CONVNEXT_SMALL"),
    "dino_vits16": WeightFile(
        "dino_deitsmall16_pretrain", "DINO", "ViT-S/16", "IBQ_DINO_VITS16", page="github.com/facebookresearch/dino"
    ),
    **{
        f"dinov2_vit{size}14": WeightFile(
            f"dinov2_vit{size}14_pretrain",
            "DINOv2",
            f"ViT-{size.upper()}/14",
            f"IBQ_DINOV2_VIT{size.upper()}14",
            page="github.com/facebookresearch/dinov2",
        )
        for size in ("s", "b", "l")
    },
    **{
        f"siglip_vit{size}16": WeightFile(
            f"siglip-{name}-patch16-{side}",
            "SigLIP",
            f"ViT-{size.upper()}/16",
            f"IBQ_SIGLIP_VIT{size.upper()}16",
            page=f"model.safetensors of huggingface.co/google/siglip-{name}-patch16-{side}",
        )
        for size, name, side in (("b", "base", 224), ("l", "large", 256))
    },
}


def find_weights(kind: str, configured: str, option: str) -> Path | None:
    """Finds the user's weight file.

    Args:
        kind: which file, of WEIGHT_FILES.
        configured: its path according to the config's field or flag `option`; empty if not given.
        option: name of that field or flag, for the error.

    Returns:
        the file's path; None if it is in none of the places.

    Raises:
        UsageError: the path that `configured` or the environment variable gives does not exist.
    """
    file = WEIGHT_FILES[kind]
    for source, path in ((option, configured), (f"${file.environment}", os.environ.get(file.environment, ""))):
        if path:
            if not Path(path).expanduser().is_file():
                raise UsageError(f"{source} is {path}, which does not exist; it must name the file of {file.origin}")
            return Path(path).expanduser()
    cache = Path.home() / ".cache" / "ibq_jax"
    return next((cache / name for name in file.names if (cache / name).is_file()), None)


def explain_absence(kind: str, option: str) -> str:
    """Returns a clause that names the missing file, its owner and the ways to provide it."""
    file = WEIGHT_FILES[kind]
    page = f" ({file.page})" if file.page else ""
    return (
        f"{file.owner}'s {file.names[0]}{page} was not found; set {option} or ${file.environment}, "
        "or put it into ~/.cache/ibq_jax/"
    )
