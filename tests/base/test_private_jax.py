"""Uses of JAX's private modules: a complete list, each with the versions that have it and the way out without it.

JAX may move or remove a private name in any release. The names listed here were seen in the VERSIONS below.
"""

import ast
import importlib
from pathlib import Path

import jax
import pytest

import ibq_jax

PACKAGE = Path(ibq_jax.__file__).parent
PRIVATE = ("jax._src", "jax.interpreters", "jaxlib")
VERSIONS = ("0.9.0", "0.10.2", "0.12.0.1")
WAY_OUT = {
    ("base/processes.py", "jax._src.distributed.global_state"): "see how orbax.checkpoint.multihost reaches the client "
    "of the job's key-value store in this version, and do the same"
}
METHODS = ("key_value_set", "key_value_dir_get", "wait_at_barrier")


def private_imports() -> set[tuple[str, str]]:
    """Returns (file of the package, private name of JAX that it imports)."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {(path.relative_to(PACKAGE).as_posix(), name) for name in names if name.startswith(PRIVATE)}
    return found


def test_no_other_private_name_of_jax_is_imported():
    assert private_imports() == set(WAY_OUT)


@pytest.mark.parametrize(("file", "name"), WAY_OUT)
def test_a_private_name_still_exists(file, name):
    module, _, attribute = name.rpartition(".")
    checked = f"{file} imports {name}, checked with jax {', '.join(VERSIONS)}, this is {jax.__version__}"
    try:
        state = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        pytest.fail(f"{checked}: it is gone; {WAY_OUT[file, name]}")
    assert hasattr(state, "client") and hasattr(state, "process_id"), f"{checked}: {WAY_OUT[file, name]}"
    client = importlib.import_module("jax._src.lib")._jax.DistributedRuntimeClient
    missing = [method for method in METHODS if not hasattr(client, method)]
    assert not missing, f"{checked}: its client lacks {', '.join(missing)}; {WAY_OUT[file, name]}"
