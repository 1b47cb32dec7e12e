"""Array operations over very large vocabularies that never hold an array [tokens, vocabulary]."""

from ibq_jax.ops.cross_entropy import cross_entropy, weighted_cross_entropy
from ibq_jax.ops.embedding_lookup import embedding_lookup
from ibq_jax.ops.index_backprop import IndexBackprop, index_backprop, nearest_codes

__all__ = [
    "IndexBackprop",
    "cross_entropy",
    "embedding_lookup",
    "index_backprop",
    "nearest_codes",
    "weighted_cross_entropy",
]
