"""Arrays in, arrays out: operations over very large vocabularies that never hold a [tokens, vocabulary] array."""

from ibq_jax.ops.index_backprop import IndexBackprop, index_backprop, nearest_codes

__all__ = ["IndexBackprop", "index_backprop", "nearest_codes"]
