"""The text of a golden file that tells where every parameter lies on a mesh."""

import json

import jax


def partition_specs_text(shardings) -> str:
    """One line per leaf of a tree of NamedSharding: its name, and the mesh axis of each dimension."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(shardings)
    specs = {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.spec) for path, leaf in leaves}
    lines = [f"{json.dumps(name)}: {json.dumps(spec)}" for name, spec in sorted(specs.items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"
