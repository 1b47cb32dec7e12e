"""State dicts written by torch.save and read without PyTorch; errors for harmful and damaged files."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained.state_dict_pickle import OLDER_FORM, STORAGES, read_state_dict

torch = pytest.importorskip("torch")
both_forms = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])


def save(path: Path, content, zipped: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_read(path: Path, tensors: dict) -> None:
    found = read_state_dict(path)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        is_bfloat16 = tensor.dtype == torch.bfloat16
        expected = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if is_bfloat16 else tensor.numpy()
        assert found[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(found[name], expected, err_msg=name, strict=True)


@both_forms
def test_every_dtype_is_read_as_it_is(tmp_path, zipped):
    dtypes = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    assert len(dtypes) == len(STORAGES)
    values = torch.tensor([[0.0, 1.0, 2.5], [100.0, 0.0, 17.0]])
    tensors = {dtype: values.to(getattr(torch, dtype)) for dtype in dtypes}
    assert_read(save(tmp_path / "x.pth", tensors, zipped), tensors)


@both_forms
def test_views_of_one_storage_keep_their_strides_and_share_memory(tmp_path, zipped):
    base = torch.arange(24.0)
    tensors = {
        "whole": base,
        "matrix": base.view(4, 6),
        "transposed": base.view(2, 3, 4).permute(2, 0, 1),
        "every third, from the fifth": base[4::3],
        "one number": base[7],
        "expanded": base[:3, None].expand(3, 5),
        "empty": base[:0].view(0, 3),
        "empty, at the end": base[24:],
        "empty, of no storage": torch.zeros(3, 0),
    }
    path = save(tmp_path / "x.pth", tensors, zipped)
    assert_read(path, tensors)
    found = read_state_dict(path)
    assert np.shares_memory(found["whole"], found["transposed"])
    assert not found["whole"].flags.writeable


@both_forms
def test_the_state_dict_of_a_module_is_read(tmp_path, zipped):
    """It is an OrderedDict with the modules' versions as an attribute."""
    state_dict = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict()
    assert state_dict._metadata
    assert_read(save(tmp_path / "x.pth", state_dict, zipped), state_dict)


class Harmful:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@both_forms
def test_an_object_that_would_run_code_is_refused_by_its_name(tmp_path, zipped):
    content = {"a": torch.ones(2), "b": Harmful(tmp_path / "trace")}
    path = save(tmp_path / "x.pth", content, zipped)
    with pytest.raises(UsageError, match=r"x.pth: holds an object of type '\w+.open', which is not read"):
        read_state_dict(path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("place", ["format", "system", "content", "keys"])
def test_no_pickle_of_the_older_form_can_run_code(tmp_path, place):
    harm = Harmful(tmp_path / "trace")
    pickles = {"format": None, "system": {"little_endian": True}, "content": {}, "keys": []} | {place: harm}
    parts = [OLDER_FORM if part is None else pickle.dumps(part, protocol=2) for part in pickles.values()]
    (tmp_path / "x.pth").write_bytes(b"".join(parts))
    with pytest.raises(UsageError, match=r"x.pth: (holds an object|cut short, damaged, or not)"):
        read_state_dict(tmp_path / "x.pth")
    assert not (tmp_path / "trace").exists()


class Forged:
    """A tensor with any offset, shape and strides in a storage of six float32 elements."""

    def __init__(self, offset, shape, strides):
        self.place = offset, shape, strides

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (torch.zeros(6)._typed_storage(), *self.place, False, OrderedDict())


@both_forms
def test_a_forged_tensor_within_its_storage_is_read(tmp_path, zipped):
    """Without this, the refusals below could have another reason."""
    assert read_state_dict(save(tmp_path / "x.pth", {"a": Forged(1, (5,), (1,))}, zipped))["a"].shape == (5,)


@both_forms
@pytest.mark.parametrize(
    "place",
    [
        (0, (7,), (1,)),
        (2, (5,), (1,)),
        (0, (2, 3), (4, 1)),
        (6, (), ()),
        (-1, (2,), (1,)),
        (5, (3,), (-1,)),
        (0, (-2,), (1,)),
        (0, (2, 3), (1,)),
        (0, (5,), (2**60,)),  # four times that, in bytes, is 0 in 64 bits
        (0, (2**40, 2**40), (0, 0)),
        (0, (2.5,), (1,)),
    ],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path, zipped, place):
    path = save(tmp_path / "x.pth", {"a": Forged(*place)}, zipped)
    with pytest.raises(UsageError, match=r"x.pth: cut short, damaged, or not"):
        read_state_dict(path)


def replace_in_pickle(path: Path, old: bytes, new: bytes) -> None:
    """Replaces bytes in either format, and recomputes an archive's checksums."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = next(name for name in members if name.endswith("/data.pkl"))
        assert members[name].count(old) == 1
        members[name] = members[name].replace(old, new)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    else:
        content = path.read_bytes()
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))


@both_forms
@pytest.mark.parametrize("elements", [5, 7])
def test_a_storage_of_another_size_than_the_pickle_says_is_refused(tmp_path, zipped, elements):
    path = save(tmp_path / "x.pth", {"a": torch.zeros(6)[:2]}, zipped)
    end = b"t" if zipped else b"N"  # end of the tuple, or the None in place of a view of the storage
    replace_in_pickle(path, b"K\x06" + end, b"K\x06" + end)
    assert read_state_dict(path)["a"].size == 2
    replace_in_pickle(path, b"K\x06" + end, b"K" + bytes([elements]) + end)
    with pytest.raises(UsageError, match=r"x.pth: cut short, damaged, or not"):
        read_state_dict(path)


def test_a_view_of_a_storage_as_early_pytorch_wrote_it_is_refused(tmp_path):
    path = save(tmp_path / "x.pth", {"a": torch.zeros(6)}, False)
    replace_in_pickle(path, b"K\x06N", b"K\x06K\x01")
    with pytest.raises(UsageError, match=r"x.pth: cut short, damaged, or not"):
        read_state_dict(path)


def test_no_memory_is_allocated_for_a_storage_with_a_huge_declared_size(tmp_path):
    """Both declarations of six elements are changed to 2**56; the file does not have the bytes."""
    path = save(tmp_path / "x.pth", {"a": torch.zeros(6, dtype=torch.int8)}, False)
    replace_in_pickle(path, b"K\x06N", pickle.dumps(2**56, protocol=2)[2:-1] + b"N")
    content, stored = path.read_bytes(), (6).to_bytes(8, "little") + bytes(6)
    assert content.endswith(stored)
    path.write_bytes(content.removesuffix(stored) + (2**56).to_bytes(8, "little") + bytes(6))
    with pytest.raises(UsageError, match=r"x.pth: cut short") as raised:
        read_state_dict(path)
    assert "ends beyond the file" in str(raised.value.__cause__)


@both_forms
def test_a_file_cut_short_anywhere_is_refused(tmp_path, zipped):
    content = save(tmp_path / "x.pth", {"a": torch.arange(6.0), "b": torch.tensor(3)}, zipped).read_bytes()
    cut = tmp_path / "cut.pth"
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        with pytest.raises(UsageError, match=r"cut.pth: cut short, damaged, or not"):
            read_state_dict(cut)


def test_foreign_bytes_are_refused(tmp_path):
    path, random = tmp_path / "x.pth", np.random.default_rng(0)
    for size in (1, 100, 10_000):
        for head in (b"", OLDER_FORM[:20], b"PK\x03\x04"):
            path.write_bytes(head + random.bytes(size))
            with pytest.raises(UsageError, match=r"x.pth: cut short, damaged, or not"):
                read_state_dict(path)


def test_a_compressed_archive_is_refused(tmp_path):
    """It could unpack to a thousand times its size."""
    path = save(tmp_path / "x.pth", {"a": torch.zeros(6)}, True)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    with pytest.raises(UsageError, match=r"y.pth: cut short, damaged, or not"):
        read_state_dict(tmp_path / "y.pth")


@both_forms
@pytest.mark.parametrize(
    "content", [[1, 2], {"epoch": 3}, {7: torch.ones(2)}, {"state_dict": {"a": torch.ones(2)}}, torch.ones(2)]
)
def test_anything_but_a_dictionary_of_tensors_is_refused(tmp_path, zipped, content):
    with pytest.raises(UsageError, match=r"x.pth: not a state_dict"):
        read_state_dict(save(tmp_path / "x.pth", content, zipped))


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"x.pth: no such file"):
        read_state_dict(tmp_path / "x.pth")
