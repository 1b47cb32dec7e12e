"""Makes frechet.npz: Frechet distances by pytorch-fid 0.3.0; Inception Scores, precision and recall in plain NumPy.

    pip install torch==2.13.0 scipy pillow && pip install --no-deps torchvision==0.28.0 pytorch-fid==0.3.0

Precision and recall follow the definition in OpenAI's guided-diffusion: the squared radius of a point is the entry at
index 3 of its sorted squared distances to its own set, itself included; a point within or on a radius is inside.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import golden_script

golden_script.allow_torchvision_without_cuda()
from pytorch_fid.fid_score import calculate_frechet_distance  # noqa: E402

PAIRS = (("x1", "x2"), ("x1", "x1"), ("sing1", "sing2"), ("sing1", "x2"))
INPUTS = ("x1", "x2", "sing1", "sing2", "is_logits", "pr_ref", "pr_gen", "prtie_ref", "prtie_gen")


def make(committed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Computes everything from the committed feature sets and logits."""
    arrays = {name: committed[name] for name in INPUTS}
    for name in ("x1", "x2", "sing1", "sing2"):
        arrays |= {f"{name}_mu": arrays[name].mean(axis=0), f"{name}_sigma": np.cov(arrays[name], rowvar=False)}
    for pair in PAIRS:
        moments = [arrays[f"{name}_{part}"] for name in pair for part in ("mu", "sigma")]
        key = f"fid_{'_'.join(pair)}"
        arrays |= {key: calculate_frechet_distance(*moments), f"{key}_eigh": frechet_by_eigh(*moments)}
    for splits in (10, 1):
        scores = np.array([inception_score(part) for part in np.split(arrays["is_logits"], splits)])
        arrays |= {f"is{splits}_scores": scores, f"is{splits}_mean": scores.mean(), f"is{splits}_std": scores.std()}
    for case in ("pr", "prtie"):
        flags = precision_recall(arrays[f"{case}_ref"], arrays[f"{case}_gen"])
        arrays |= {f"{case}_{name}": array for name, array in flags.items()}
    return arrays


def frechet_by_eigh(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """The distance with tr sqrt(S1 S2) from the eigenvalues of S1^1/2 S2 S1^1/2, negative ones clipped to 0."""
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    return np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap


def inception_score(logits: np.ndarray) -> float:
    """exp of the mean over rows of sum p (log p - log mean p)."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(axis=0))), axis=1)))


def precision_recall(reference: np.ndarray, generated: np.ndarray) -> dict[str, np.ndarray]:
    """Squared radii, memberships, precision and recall by brute force in float64, k = 3."""

    def squared(a, b):
        return ((a.astype(np.float64)[:, None] - b.astype(np.float64)) ** 2).sum(axis=-1)

    reference_radii, generated_radii = (np.sort(squared(x, x), axis=1)[:, 3] for x in (reference, generated))
    between = squared(reference, generated)
    generated_in = (between <= reference_radii[:, None]).any(axis=0)
    reference_in = (between <= generated_radii).any(axis=1)
    return {
        "ref_radii_sq": reference_radii,
        "gen_radii_sq": generated_radii,
        "gen_in_ref": generated_in,
        "ref_in_gen": reference_in,
        "precision": generated_in.mean(),
        "recall": reference_in.mean(),
    }


if __name__ == "__main__":
    golden_script.main("frechet", make, __doc__)
