"""Array operations over very large vocabularies that never hold an array [tokens, vocabulary]."""

from ibq_jax.ops.cross_entropy import cross_entropy, weighted_cross_entropy
from ibq_jax.ops.embedding_lookup import embedding_lookup
from ibq_jax.ops.index_backprop import IndexBackprop, SoftLookup, index_backprop, nearest_codes, soft_lookup

__all__ = [
    "IndexBackprop",
    "SoftLookup",
    "cross_entropy",
    "embedding_lookup",
    "index_backprop",
    "nearest_codes",
    "soft_lookup",
    "weighted_cross_entropy",
]
