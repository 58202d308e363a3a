"""The native directory of an SAE: what was saved is loaded, or refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sae
from actcache.errors import CorruptObject
from sae.files import run_files


def _sae() -> sae.SAE:
    g = torch.Generator().manual_seed(0)
    cfg = {"architecture": "standard", "d_in": 6, "d_sae": 9, "site": "blocks.1.hook_resid_post"}
    weights = {"W_enc": (6, 9), "b_enc": (9,), "W_dec": (9, 6), "b_dec": (6,)}
    return sae.SAE(cfg, **{name: torch.randn(shape, generator=g) for name, shape in weights.items()})


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_flipped_bit_anywhere_in_the_weights_is_found(tmp_path: Path, place: str) -> None:
    where = str(tmp_path) if place == "local" else "memory://core/flipped"
    s, files = _sae(), run_files(where)
    s.save(where)
    assert sae.load(where).digest() == s.digest()
    assert sae.load(where).cfg == s.cfg
    whole = files.read("weights.safetensors")
    assert whole is not None
    rng = np.random.default_rng(0)
    for at in rng.choice(len(whole), 12, replace=False):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.integers(8)
        files.replace("weights.safetensors", bytes(damaged))
        with pytest.raises(CorruptObject, match=r"weights.safetensors differs from the checksum in sae.json"):
            sae.load(where)
    files.replace("weights.safetensors", whole)
    assert sae.load(where).digest() == s.digest()


def test_a_directory_without_a_checksum_loads_and_gets_one_when_saved_again(tmp_path: Path) -> None:
    s, settings = _sae(), tmp_path / "sae.json"
    s.save(tmp_path)
    old = json.loads(settings.read_text())
    del old["weights_crc32c"]
    settings.write_text(json.dumps(old))
    found = sae.load(tmp_path)
    assert found.digest() == s.digest()
    found.save(tmp_path)
    assert "weights_crc32c" in json.loads(settings.read_text())
