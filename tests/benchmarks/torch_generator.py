"""The generator in PyTorch, for the benchmarks to compare with."""

from collections.abc import Mapping

import numpy as np
import torch

from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.interop.torch_model import Generator, own_tensors


def torch_generator(model: GeneratorModel, tensors: Mapping[str, np.ndarray], dropout: float = 0.0) -> Generator:
    """Returns a PyTorch generator like `model`, with weights from `ibq_jax.Generator.to_torch`."""
    fields = "vocab_size", "grid", "num_classes", "num_layers", "num_heads", "num_kv_heads", "embed_dim"
    with torch.device("meta"):
        module = Generator(**{field: getattr(model, field) for field in fields}, dropout=dropout)
    state_dict = {name: torch.from_numpy(array) for name, array in tensors.items()}
    module.load_state_dict(own_tensors(module, state_dict), assign=True)
    return module.materialize().requires_grad_().train(dropout > 0)
