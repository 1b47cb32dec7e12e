"""Image tokenizers with large, wide, used codebooks (Index Backpropagation Quantization, arXiv 2412.02692) in JAX."""

__all__ = ["Generator", "Tokenizer"]


def __getattr__(name: str):
    if name in __all__:  # on first use: the command line lists its commands without importing JAX
        from ibq_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
