"""The quantizers by name, and how one is built from a config.

Each is a module with exactly `codebook_size` codes and the interface described in `ibq_jax.tokenizer.quantizer`:
`latent_dim` (D), `module(z) -> Quantized`, `nearest(z)` and `lookup(indices)`. Its other fields are those of the
config's groups `quantizer` and `codebook` that it uses. To add a quantizer, write such a class and list it here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from ibq_jax.base.errors import UsageError
from ibq_jax.tokenizer.quantizer import IndexBackpropQuantizer, Quantizer
from ibq_jax.tokenizer.scalar_quantizers import FiniteScalarQuantizer, LookupFreeQuantizer
from ibq_jax.tokenizer.vector_quantizers import SimVectorQuantizer, VectorQuantizer

QUANTIZERS: dict[str, type[nn.Module]] = {
    "ibq": IndexBackpropQuantizer,
    "vq": VectorQuantizer,
    "simvq": SimVectorQuantizer,
    "lfq": LookupFreeQuantizer,
    "fsq": FiniteScalarQuantizer,
}
WITH_TRAINED_ROWS = ("ibq", "vq")  # their codes are the rows of the parameter `codebook`
WITH_ENTROPY = ("ibq", "lfq")  # they have an entropy loss, whatever `entropy_logits` is
# Settings of some quantizers only, and those quantizers: {setting: (the value that all others have, quantizers)}.
OWN_FIELDS = {
    "l2_normalize": (False, ("ibq", "vq")),
    "levels": ((), ("fsq",)),
    "logit_temperature": (1.0, ("ibq",)),
    "entropy_logits": ("own", ("ibq", "vq", "simvq")),
}
DECIDING_FIELDS = ("l2_normalize", "levels")  # with sizes and parameters they decide which code a latent gets


def build_quantizer(
    name: str, settings: Mapping, *, codebook_size: int, dim: int, mesh: Mesh | None = None
) -> Quantizer:
    """Returns the quantizer `name`; of `settings`, `dim` and `mesh` it gets those that its class declares.

    Raises UsageError for an unknown name.
    """
    if name not in QUANTIZERS:
        raise UsageError(f"quantizer.name={name} is not one of {', '.join(QUANTIZERS)}")
    kind = QUANTIZERS[name]
    known = {field.name for field in dataclasses.fields(kind)}
    fields = {**settings, "codebook_size": codebook_size, "dim": dim, "mesh": mesh}
    quantizer: Any = kind(**{field: value for field, value in fields.items() if field in known})
    return quantizer


def check_settings(name: str, settings: Mapping) -> None:
    """Checks that no setting of another quantizer is given. Raises UsageError if one is."""
    for field, (others_value, owners) in OWN_FIELDS.items():
        if settings[field] and settings[field] != others_value and name not in owners:
            raise UsageError(
                f"quantizer.{field}={settings[field]} is a setting of quantizer.name={' and '.join(owners)}, "
                f"not of {name}"
            )
    if name == "ibq" and settings["entropy_logits"] == "distance":
        raise UsageError("quantizer.entropy_logits=distance is for vq and simvq; those of ibq are dot products")


def has_entropy_loss(settings: Mapping) -> bool:
    """Returns whether the quantizer with these settings, "name" among them, has an entropy loss."""
    return settings["name"] in WITH_ENTROPY or settings["entropy_logits"] != "own"


def check_trained_rows(name: str, what: str) -> None:
    """Checks that the codes are rows of a trained codebook. If not, raises UsageError, as `what` needs them."""
    if name not in WITH_TRAINED_ROWS:
        raise UsageError(f"{what} needs a trained codebook, as {' and '.join(WITH_TRAINED_ROWS)} have; this is {name}")


def fingerprint_fields(name: str, settings: Mapping) -> dict:
    """Returns the settings, besides sizes and parameters, that decide which code a latent gets.

    They are part of a tokenizer's fingerprint. Empty for IBQ as released, so that fingerprints in older token caches
    stay valid.
    """
    given = {field: settings[field] for field in DECIDING_FIELDS if field in settings}
    if name == "ibq":
        return {"l2_normalize": True} if given.get("l2_normalize") else {}
    return {"quantizer": name} | given
