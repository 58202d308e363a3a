"""How the LM runs, which is no part of a dataset's identity: compiled, spread over devices."""

import copy
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_harvest import tiny_spec
from tiny_models import N_BLOCKS, save_tiny_lm, tiny_model, tokens
from torch import nn
from venvs import make_venv

import actcache
from actcache import lm
from actcache.capture import compile_around, run_capture, splice
from actcache.errors import SpecError

ROOT = Path(__file__).parents[2]


def needs_compiler(test):
    # torch._inductor warns of itself on import
    test = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")(test)
    return pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")(
        test
    )


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("family", "sites", "n_compiled"),
    [
        ("gpt2", ["blocks.1.hook_resid_post"], N_BLOCKS),
        ("llama", ["blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"], N_BLOCKS),  # in block 1, its MLP
    ],
)
def test_compiled_blocks_give_the_same_sites_within_rounding(family, sites, n_compiled):
    model, ids = tiny_model(family), tokens()
    eager = copy.deepcopy(model)
    assert compile_around(model, sites) == n_compiled
    acts, wanted = (run_capture(m, ids, sites) for m in (model, eager))
    for site in sites:
        # Sums of up to 128 products of values of order 1, in another order, over up to three blocks.
        torch.testing.assert_close(acts[site], wanted[site], rtol=6e-5, atol=6e-5)
        logits = []
        for m in (model, eager):
            with splice(m, {site: torch.zeros_like}), torch.no_grad():
                logits.append(m(ids).logits)
        torch.testing.assert_close(*logits, rtol=6e-5, atol=6e-5)
    assert any(not torch.equal(acts[site], wanted[site]) for site in sites)  # or nothing was compiled


@pytest.mark.slow
@needs_compiler
def test_a_compiled_harvest_is_the_same_dataset_within_rounding(tmp_path):
    spec = tiny_spec(tmp_path, n_tokens=1024, precision="fp32")
    eager = actcache.harvest(spec, str(tmp_path / "eager"), progress=False)
    compiled = actcache.harvest(spec, str(tmp_path / "compiled"), compile=True, progress=False)
    assert Path(compiled.url).name == Path(eager.url).name  # one identity
    assert (eager.manifest.provenance["compile"], compiled.manifest.provenance["compile"]) == (False, True)
    for site in eager.sites:
        np.testing.assert_allclose(
            compiled.read(site, slice(None)), eager.read(site, slice(None)), rtol=6e-5, atol=6e-5
        )


def test_a_site_inside_a_block_keeps_its_hooks_when_the_rest_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward.__self__) or forward)
    model = tiny_model("llama")
    layers = model.model.layers
    assert compile_around(model, ["blocks.1.mlp.hook_post", "blocks.2.hook_resid_pre"]) == 3
    assert compiled == [layers[0], layers[1].self_attn, layers[2]]
    with pytest.raises(SpecError, match="Sequential has no list of blocks"):
        compile_around(nn.Sequential(nn.Linear(2, 2)), ["0:out"])


def test_device_auto_without_accelerate_is_one_clear_line(tmp_path, monkeypatch):
    directory = save_tiny_lm(tmp_path, tokenizer=False)
    monkeypatch.setattr(lm, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match="accelerate, which is not installed; pip install accelerate"):
        lm.load_lm(str(directory), device="auto")


ACCELERATE = """
import sys
import torch
from accelerate import dispatch_model
from actcache import lm
from actcache.capture import run_capture, site_names, splice
from actcache.errors import SpecError

directory, folder = sys.argv[1:]
whole = lm.load_lm(directory).model
auto = lm.load_lm(directory, device="auto")
print(auto.device, next(auto.model.parameters()).device)
ids = torch.arange(24).reshape(2, 12)
spread = lm.load_lm(directory).model
places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
places |= {"model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
spread = dispatch_model(spread, places, main_device="cpu", offload_dir=folder)
for model in (auto.model, spread):
    for _ in range(2):  # the first pass is left half way, with the weights of a block loaded
        acts, wanted = (run_capture(m, ids, site_names(m)[:-1]) for m in (model, whole))
        assert all(torch.equal(acts[site], wanted[site]) for site in wanted)
    for site in ("blocks.1.hook_resid_mid", "blocks.1.mlp.hook_post", "blocks.2.hook_resid_pre"):
        logits = []
        for m in (model, whole):
            with splice(m, {site: torch.zeros_like}), torch.no_grad():
                logits.append(m(ids).logits)
        assert torch.equal(*logits), site
try:
    lm._spread_over("big", spread)
except SpecError as err:
    print(err)
"""


@pytest.mark.slow
def test_a_model_spread_by_accelerate_has_the_same_sites_and_offloading_is_refused(tmp_path):
    directory = save_tiny_lm(tmp_path / "lm", tokenizer=False)
    packages = ("torch", "transformers", "accelerate", "numpy", "numcodecs", "google-crc32c")
    python = make_venv(tmp_path / "venv", *packages)
    run = subprocess.run(
        [python, "-c", ACCELERATE, directory, tmp_path / "offload"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    placed, refused = run.stdout.splitlines()
    device, of_weights = placed.split()
    assert device == of_weights
    assert refused.startswith("the model 'big' does not fit on the GPUs that this process sees (")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("lm_dtype", ["bfloat16", "float16"])
def test_a_16_bit_lm_is_stored_as_it_computes(tmp_path, family, lm_dtype):
    """Every stored value is one of that dtype, and is the LM's own of a sequence alone within its rounding."""
    precision = {"bfloat16": "bf16", "float16": "fp16"}[lm_dtype]
    site, dtype = "blocks.1.hook_resid_post", getattr(torch, lm_dtype)
    spec = tiny_spec(
        tmp_path, family, sites=[site], n_tokens=1024, lm_dtype=lm_dtype, precision=precision,
        validation_blocks=0, test_blocks=0,
    )  # fmt: skip
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    exact = actcache.harvest(replace(spec, precision="fp32"), str(tmp_path / "root"), progress=False)
    stored = dataset.read(site, slice(None))
    assert np.array_equal(stored, exact.read(site, slice(None)))  # 16 bits lost nothing
    loaded = lm.load_lm(spec.model, lm_dtype=lm_dtype)
    assert loaded.model.dtype == dtype
    rows = dataset.rows(slice(None))
    for sequence in np.unique(rows.sequence)[:20]:
        input_ids = torch.from_numpy(dataset.context(int(sequence)).astype(np.int64))[None]
        with torch.inference_mode():
            alone = run_capture(loaded.model, input_ids, [site])[site][0].float().numpy()
        mine = rows.sequence == sequence
        # sums in another order, rounded to 8 or 11 bits after each of two blocks' sums
        rounding = 8 * torch.finfo(dtype).eps * np.abs(alone).max()
        assert np.abs(stored[mine] - alone[rows.position[mine]]).max() <= rounding
