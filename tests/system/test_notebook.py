"""The committed notebook: its cells compile, use names that the package has, and hold their outputs, without an error.

Nothing is executed here. After the quickstart, `jupyter execute --inplace examples/quickstart.ipynb` does that.
"""

import ast
import importlib
import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/quickstart.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
CODE = ["".join(cell["source"]) for cell in CELLS]
OUTPUTS = [output for cell in CELLS for output in cell["outputs"]]
SHEETS = 5  # images: reconstructions, changed codes, samples, completions, curves


def from_package() -> set[tuple[str, str]]:
    """Returns (module, name) of everything that the cells import from the package."""
    nodes = [node for code in CODE for node in ast.walk(ast.parse(code))]
    assert not any(alias.name.startswith("ibq_jax") for n in nodes if isinstance(n, ast.Import) for alias in n.names)
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ibq_jax")]
    return {(node.module or "", alias.name) for node in froms for alias in node.names}


def test_it_shows_the_public_api():
    assert {("ibq_jax", name) for name in ("Generator", "Tokenizer", "load_config", "train")} <= from_package()


@pytest.mark.parametrize(("module", "name"), sorted(from_package()))
def test_imported_names_exist_and_are_public(module, name):
    assert not name.startswith("_") and hasattr(importlib.import_module(module), name)


def test_cells_use_methods_that_exist():
    """Checks attributes of the tokenizer, the generator and the data set, whose classes are known without running."""
    from ibq_jax import Generator, Tokenizer
    from ibq_jax.data.pipeline import ImageSource

    classes = {"tokenizer": Tokenizer, "tiny": Tokenizer, "generator": Generator, "source": ImageSource}
    used = {
        (node.value.id, node.attr)
        for code in CODE
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in classes
    }
    assert {("tokenizer", "encode"), ("tokenizer", "decode"), ("generator", "sample")} <= used
    for variable, attribute in used - {("source", "class_names")}:  # that one is set in __init__
        assert not attribute.startswith("_") and hasattr(classes[variable], attribute), (variable, attribute)


def test_every_cell_ran_once_in_order_without_errors():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert all(output["output_type"] in ("stream", "display_data", "execute_result") for output in OUTPUTS)
    assert not any(output.get("name") == "stderr" for output in OUTPUTS)


def test_it_shows_images_and_stays_small():
    assert sum("image/png" in output.get("data", {}) for output in OUTPUTS) == SHEETS
    assert NOTEBOOK.stat().st_size < 700_000
