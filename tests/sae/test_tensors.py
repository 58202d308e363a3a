"""Local files are whole or absent; torn safetensors files are named."""

import os
from pathlib import Path

import pytest
import torch

from actcache.errors import CorruptObject, StoreError
from sae import tensors


def test_atomic_write_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in (b"one", b"two"):
        tensors.write_atomically(path, text)
        assert path.read_bytes() == text
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(StoreError, match="could not be written: No such file or directory"):
        tensors.write_atomically(tmp_path / "absent" / "a.json", b"")


def test_tensors_come_back_as_they_were_and_a_torn_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    given = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False])}
    tensors.write_tensors(path, given)
    found = tensors.read_tensors(path)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptObject, match=r"a\.safetensors is not a whole safetensors file"):
        tensors.read_tensors(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors does not exist; copy the whole"):
        tensors.read_tensors(tmp_path / "absent.safetensors")
