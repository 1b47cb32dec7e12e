"""Reading named arrays: formats, types, and errors for files that are not what they seem."""

import builtins

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained.tensor_files import read_tensors

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([1.5, -2.0], np.float16),
    "brain": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "count": np.array(7, np.int64),
}


def assert_tensors(found: dict[str, np.ndarray]) -> None:
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array)


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    assert_tensors(read_tensors(tmp_path / "x.safetensors"))


def test_npz(tmp_path):
    np.savez(tmp_path / "x.npz", **TENSORS)
    assert_tensors(read_tensors(str(tmp_path / "x.npz")))


@pytest.mark.parametrize("suffix", ["pth", "pt", "ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_pickled(tmp_path, suffix, zipped, wrapped):
    torch = pytest.importorskip("torch")
    content = {name: torch.from_numpy(array) for name, array in TENSORS.items() if name != "brain"}
    content["brain"] = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    content = {"state_dict": content, "epoch": 3} if wrapped else content
    torch.save(content, tmp_path / f"x.{suffix}", _use_new_zipfile_serialization=zipped)
    assert_tensors(read_tensors(tmp_path / f"x.{suffix}"))


def test_a_parameter_with_requires_grad_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "x.pt")
    np.testing.assert_array_equal(read_tensors(tmp_path / "x.pt")["a"], np.ones(2))


class Exploit:
    def __reduce__(self):
        return print, ("code of a stranger runs",)


def test_a_pickle_cannot_run_code(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": Exploit()}, tmp_path / "x.ckpt")
    with pytest.raises(UsageError, match=r"x.ckpt: holds an object of type \S*print, which is not read"):
        read_tensors(tmp_path / "x.ckpt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": [1]}])
def test_a_pickle_without_named_tensors_is_refused(tmp_path, content):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="neither a dictionary of tensors nor a checkpoint"):
        read_tensors(tmp_path / "x.pt")


@pytest.fixture
def without_pytorch(monkeypatch):
    import_module = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return import_module(name, *args, **kwargs)

    return lambda: monkeypatch.setattr(builtins, "__import__", without_torch)


def test_without_pytorch_the_error_for_a_file_that_needs_it_says_what_to_install(tmp_path, without_pytorch):
    torch = pytest.importorskip("torch")
    torch.save({"state_dict": {"weight": torch.ones(2)}, "epoch": 3}, tmp_path / "x.ckpt")
    without_pytorch()
    with pytest.raises(UsageError, match=r"not a state_dict.*pip install -r requirements-torch.txt"):
        read_tensors(tmp_path / "x.ckpt")


@pytest.mark.parametrize("zipped", [True, False])
def test_without_pytorch_a_plain_state_dict_is_read(tmp_path, without_pytorch, zipped):
    """torchvision's and pytorch-fid's files are plain state dicts."""
    torch = pytest.importorskip("torch")
    tensors = {"weight": torch.arange(6.0).reshape(2, 3).T, "count": torch.tensor(7)}
    torch.save(tensors, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    without_pytorch()
    read = read_tensors(tmp_path / "x.pth")
    np.testing.assert_array_equal(read["weight"], np.arange(6.0, dtype=np.float32).reshape(2, 3).T, strict=True)
    assert read["count"] == 7 and read.keys() == tensors.keys()


def whole_file(path, suffix: str) -> bytes:
    if suffix == "safetensors":
        save_file(TENSORS, path)
    elif suffix == "npz":
        np.savez(path, **TENSORS)
    else:
        torch = pytest.importorskip("torch")
        torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=suffix == "pt")
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pt", "pth"])
@pytest.mark.parametrize("damage", ["empty", "half", "last bytes", "text", "magic only", "another format"])
def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path, suffix, damage):
    path = tmp_path / f"x.{suffix}"
    content = whole_file(path, suffix)
    other = whole_file(tmp_path / "other.npz", "npz") if suffix == "safetensors" else b"\x93NUMPY\x01\x00v\x00{}"
    damaged = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "last bytes": content[:-20],
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "magic only": content[:4],
        "another format": other,
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(UsageError, match=f"x.{suffix}: cut short, or not an? ") as raised:
        read_tensors(path)
    assert "\n" not in str(raised.value)


def test_object_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UsageError, match=r"x.npz"):
        read_tensors(tmp_path / "x.npz")


def test_a_type_that_numpy_does_not_have_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch_file

    save_torch_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="a type that NumPy does not have"):
        read_tensors(tmp_path / "x.safetensors")


def test_absent_and_unnamed_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"absent.npz: no such file"):
        read_tensors(tmp_path / "absent.npz")
    with pytest.raises(UsageError, match=r"weights.bin: .*must end in one of .safetensors, .npz"):
        read_tensors(tmp_path / "weights.bin")
