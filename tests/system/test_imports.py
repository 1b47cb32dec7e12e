"""The rooms of the house: a file imports from its own room or an earlier one, and some packages have one door."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ibq_jax"
ROOMS = (
    *("base", "ops", "data", "pretrained", "plan", "tokenizer", "autoregressive"),
    *("joint", "evaluate", "training", "interop", "api", "report", "sweep", "commands"),
)
DOORS = {
    "orbax": {"base/checkpoint.py"},
    "clu": {"training/fit.py"},
    "apache_beam": {"data/beam_map.py"},
    "torch": {"pretrained/tensor_files.py", "interop/torch_model.py", "interop/verify.py", "interop/graphs.py"},
    "huggingface_hub": {"interop/hub.py"},
}
TO_COPY = "interop/torch_model.py"  # PyTorch users take it as one file, so it may be longer, and needs nothing of ours
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imported(file: str) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def room(file: str) -> int:
    return ROOMS.index(file.split("/")[0].removesuffix(".py"))


@pytest.mark.parametrize("file", [file for file in FILES if file not in ("__init__.py", "__main__.py")])
def test_imports_point_to_earlier_rooms(file):
    for module in imported(file):
        parts = module.split(".")
        if parts[0] == "ibq_jax" and len(parts) > 1 and parts[1] in ROOMS:
            assert ROOMS.index(parts[1]) <= room(file), f"{file} imports {module}"


@pytest.mark.parametrize("package", DOORS)
def test_a_package_has_one_door(package):
    users = {file for file in FILES if any(module.split(".")[0] == package for module in imported(file))}
    assert users == DOORS[package]


def test_the_file_to_copy_needs_pytorch_alone():
    assert {module.split(".")[0] for module in imported(TO_COPY)} <= {*sys.stdlib_module_names, "torch", "safetensors"}


def test_no_file_is_called_utils_and_none_is_too_long():
    for file in FILES:
        assert not file.endswith("utils.py")
        limit = 500 if file == TO_COPY else 400
        assert len((PACKAGE / file).read_text().splitlines()) <= limit, f"{file} wants splitting"


def test_defaults_stand_in_configs():
    for file in FILES:
        assert "config.get(" not in (PACKAGE / file).read_text(), f"{file} has a default of its own"
