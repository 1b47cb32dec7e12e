"""flax.traverse_util as it is used here: leaves are arrays of any kind, never the marker of an empty node."""

from collections.abc import Mapping
from typing import Any

def flatten_dict(xs: Mapping[Any, Any], keep_empty_nodes: bool = False, sep: str | None = None) -> dict[Any, Any]: ...
def unflatten_dict(xs: Mapping[Any, Any], sep: str | None = None) -> dict[Any, Any]: ...
