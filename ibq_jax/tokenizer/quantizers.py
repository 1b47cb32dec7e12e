"""The quantizers by name, and one of them built from a config's fields.

Each is a module with `codebook_size` codes exactly, `latent_dim` (D of its latents), `module(z) -> Quantized`,
`nearest(z)` and `lookup(indices)`, as described in `ibq_jax.tokenizer.quantizer`. Its other fields are those of a
config's groups `quantizer` and `codebook` that it has a use for.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
from jax.sharding import Mesh

from ibq_jax.base.errors import UsageError
from ibq_jax.tokenizer.quantizer import IndexBackpropQuantizer
from ibq_jax.tokenizer.scalar_quantizers import FiniteScalarQuantizer, LookupFreeQuantizer
from ibq_jax.tokenizer.vector_quantizers import SimVectorQuantizer, VectorQuantizer

QUANTIZERS: dict[str, type[nn.Module]] = {
    "ibq": IndexBackpropQuantizer,
    "vq": VectorQuantizer,
    "simvq": SimVectorQuantizer,
    "lfq": LookupFreeQuantizer,
    "fsq": FiniteScalarQuantizer,
}
WITH_TRAINED_ROWS = ("ibq", "vq")  # whose codes are the parameter `codebook`
WITH_ENTROPY = ("ibq", "lfq")
OWN_FIELDS = {"l2_normalize": "vq", "levels": "fsq"}  # which code a latent gets, beside sizes and parameters


def build_quantizer(
    name: str, settings: Mapping, *, codebook_size: int, dim: int, mesh: Mesh | None = None
) -> nn.Module:
    """The quantizer `name`, which takes what it has a use for of the `settings`, of the width `dim` and of the mesh.

    Raises UsageError for a name that there is not.
    """
    if name not in QUANTIZERS:
        raise UsageError(f"quantizer.name={name} is not one of {', '.join(QUANTIZERS)}")
    kind = QUANTIZERS[name]
    known = {field.name for field in dataclasses.fields(kind)}
    fields = {**settings, "codebook_size": codebook_size, "dim": dim, "mesh": mesh}
    return kind(**{field: value for field, value in fields.items() if field in known})


def check_settings(name: str, settings: Mapping) -> None:
    """Raises UsageError for a setting of another quantizer's."""
    for field, owner in OWN_FIELDS.items():
        if settings[field] and name != owner:
            raise UsageError(f"quantizer.{field}={settings[field]} is of quantizer.name={owner}, not of {name}")


def check_trained_rows(name: str, what: str) -> None:
    """Raises UsageError where `what` needs codes that are rows of a trained codebook."""
    if name not in WITH_TRAINED_ROWS:
        raise UsageError(f"{what} needs a trained codebook, as {' and '.join(WITH_TRAINED_ROWS)} have; this is {name}")


def fingerprint_fields(name: str, settings: Mapping) -> dict:
    """What of a quantizer decides codes, beside sizes and parameters; of ibq nothing, which was the only one when the
    first caches were made."""
    if name == "ibq":
        return {}
    return {"quantizer": name} | {field: settings[field] for field in OWN_FIELDS if field in settings}
