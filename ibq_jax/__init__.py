"""Image tokenizers with large, wide, used codebooks (Index Backpropagation Quantization, arXiv 2412.02692) in JAX."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ibq_jax.api import Generator, Tokenizer
    from ibq_jax.base.config import load_config
    from ibq_jax.training.train import train

__version__ = "0.2.0"
_HOMES = {
    "Generator": "ibq_jax.api",
    "Tokenizer": "ibq_jax.api",
    "load_config": "ibq_jax.base.config",
    "train": "ibq_jax.training.train",
}
__all__ = ["Generator", "Tokenizer", "load_config", "train"]


def __getattr__(name: str):
    if name in _HOMES:  # on first use: the command line lists its commands without importing JAX
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
