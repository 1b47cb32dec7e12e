"""Parts of a tokenizer under their published names, for comparisons with the released code's tensors."""

from collections.abc import Mapping

import numpy as np

from ibq_jax.interop.tokenizer_names import (
    check_tokenizer,
    published_tensors,
    read_discriminator,
    shapes_of,
    to_torch_arrays,
)


def ema_to_torch(params: Mapping) -> dict[str, np.ndarray]:
    """Returns averaged parameters of the autoencoder under the names of published averages."""
    return to_torch_arrays(published_tensors({}, ema=params))


def discriminator_to_torch(variables: Mapping) -> dict[str, np.ndarray]:
    """Returns the discriminator's {"params", "batch_stats"} under their published names."""
    return to_torch_arrays(published_tensors({}, discriminator=variables))


def discriminator_from_torch(state_dict: Mapping[str, np.ndarray], published: Mapping) -> dict:
    """Returns the discriminator's {"params", "batch_stats"} from a published file's tensors."""
    check_tokenizer(shapes_of(state_dict), published, wanted="discriminator")
    return read_discriminator(state_dict.__getitem__, published)
