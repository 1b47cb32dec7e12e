"""Reads the frozen networks of a config's losses, and says in a run's first lines which losses are off without one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import replicated
from ibq_jax.pretrained import lpips
from ibq_jax.pretrained.frozen_nets import NETS, explain_missing_net, find_net
from ibq_jax.pretrained.weight_files import explain_absence, find_weights
from ibq_jax.tokenizer.net_losses import LPIPS_NET, Use, wanted_nets

LOSSES = {  # field of a loss's weight -> its name
    "loss.perceptual_weight": "perceptual loss",
    "loss.features_weight": "feature loss",
    "loss.logits_weight": "logit loss",
    "alignment.weight": "alignment",
    "discriminator.name": "discriminator",
    "joint.hidden_alignment.weight": "alignment of hidden states",
}


def load_nets(config: ConfigDict, mesh: Mesh, group: str = "", more: Sequence[Use] = ()) -> Mapping[str, dict]:
    """Reads the weights of all frozen networks that a config wants and that are on this machine, onto all devices.

    Says for each loss which file it uses, or that it is off and why.

    Args:
        config: a tokenizer's.
        mesh: of these devices.
        group: what stands before the names of its fields where the user writes them, such as "tokenizer.".
        more: uses of frozen networks that the config does not have.

    Raises:
        UsageError: a file that is named does not exist or holds another network, or the discriminator's is absent.
    """
    nets = {}
    for name, fields in wanted_nets(config, more).items():
        path, title, absence = _lpips(config, group) if name == LPIPS_NET else _frozen(config, name, group)
        uses = " and ".join(LOSSES[field] for field in fields)
        if path is not None:
            nets[name] = lpips.load_weights(path) if name == LPIPS_NET else NETS[name].load(path)
            print(f"{uses}: {title} from {path}")
        elif "discriminator.name" in fields:
            raise UsageError(f"{group}discriminator.net={name} is needed, but {absence}")
        else:
            print(f"{uses}: OFF, because {absence}")
    everywhere = replicated(mesh)

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, everywhere, lambda index: array[index])

    return jax.tree.map(place, nets)


def _lpips(config: ConfigDict, group: str) -> tuple[Path | None, str, str]:
    """Returns (the weights' path if they are here, the network in words, a clause that explains their absence)."""
    option = f"{group}loss.perceptual_file"
    path = find_weights(LPIPS_NET, config.loss.perceptual_file, option)
    return path, "LPIPS with VGG16", explain_absence(LPIPS_NET, option)


def _frozen(config: ConfigDict, name: str, group: str) -> tuple[Path | None, str, str]:
    """Returns the same for one of `NETS`."""
    option = f"{group}nets.{name}"
    return find_net(name, config.nets[name], option), NETS[name].title, explain_missing_net(name, option)
