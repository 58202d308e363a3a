"""Loading: which model, revision, dtype and tokenizer; tiny real models from disk."""

import json
import logging.handlers
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, VOCAB_SIZE, save_tiny_lm, shared_model, tiny_model, tiny_tokenizer, tokens

from actcache.capture import resolve_sites, run_capture, site_names, site_width
from actcache.errors import SpecError
from actcache.lm import lm_config, load_lm, load_tokenizer, resolve_model, skeleton

in_every_family = pytest.mark.parametrize("family", FAMILIES)


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def lm_dir(tmp_path):
    return save_tiny_lm(tmp_path / "tiny-llama")


def test_load_lm_gives_the_saved_model_ready_for_capture(lm_dir):
    lm = load_lm(str(lm_dir))
    ids = tokens()
    assert torch.equal(logits_of(lm.model, ids), logits_of(shared_model("llama"), ids))
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert (lm.n_layers, lm.d_model, lm.vocab_size, lm.max_context) == (3, 32, VOCAB_SIZE, 64)
    assert (lm.model_id, lm.device, lm.lm_dtype, lm.attn_implementation) == (
        "tiny-llama",
        "cpu",
        "float32",
        "sdpa",
    )
    assert lm.revision.startswith("sha256:")


def test_the_dtype_is_the_one_asked_for_whatever_the_checkpoint_has(tmp_path):
    half = tiny_model("gpt2").half()
    half.save_pretrained(tmp_path)
    for lm_dtype in ("float32", "bfloat16", "float16"):
        lm = load_lm(str(tmp_path), lm_dtype=lm_dtype)
        for name, parameter in lm.model.named_parameters():
            assert parameter.dtype == getattr(torch, lm_dtype)
            if lm_dtype == "float32":
                assert torch.equal(parameter, half.get_parameter(name).float())
    with pytest.raises(SpecError, match="lm_dtype is 'fp32'; it must be one of float32, bfloat16, float16"):
        load_lm(str(tmp_path), lm_dtype="fp32")


def test_gemma2_keeps_its_attention_softcapping(tmp_path):
    save_tiny_lm(tmp_path, "gemma2", attn_logit_softcapping=0.5)
    lm = load_lm(str(tmp_path))
    assert lm.attn_implementation == "eager"
    ids = tokens()
    assert torch.equal(
        logits_of(lm.model, ids), logits_of(tiny_model("gemma2", attn_logit_softcapping=0.5), ids)
    )
    assert not torch.equal(logits_of(lm.model, ids), logits_of(shared_model("gemma2"), ids))


def test_loading_is_silent_and_leaves_transformers_settings_alone(lm_dir, capfd):
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    capfd.readouterr()
    load_lm(str(lm_dir))
    load_tokenizer(str(lm_dir))
    assert capfd.readouterr() == ("", "")
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before


def test_eos_at_the_end_of_a_batch_is_not_taken_for_padding(tmp_path):
    save_tiny_lm(tmp_path, "gpt2", pad_token_id=2)
    lm = load_lm(str(tmp_path))
    ids = tokens()
    ids[:, -1] = 2
    warned = logging.handlers.BufferingHandler(capacity=100)
    logging.getLogger("transformers").addHandler(warned)
    run_capture(lm.model, ids, ["blocks.0.hook_resid_post"])
    logging.getLogger("transformers").removeHandler(warned)
    assert not warned.buffer


def test_revision_of_a_directory_follows_its_content_and_not_its_place(lm_dir, tmp_path):
    source, model_id, revision = resolve_model(str(lm_dir))
    assert (source, model_id) == (str(lm_dir), "tiny-llama")
    moved = lm_dir.rename(tmp_path / "elsewhere")
    (moved / "README.md").write_text("not part of the model")
    assert resolve_model(str(moved)) == (str(moved), "elsewhere", revision)
    assert load_lm(str(moved), revision=revision).revision == revision

    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert resolve_model(str(moved))[2] != revision
    with pytest.raises(SpecError, match=r"holds revision sha256:.*, wanted sha256:"):
        load_lm(str(moved), revision=revision)


def test_hub_ids_resolve_to_the_commit_in_the_cache_when_offline(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--lab--tiny"
    save_tiny_lm(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    script = """
from actcache.lm import load_lm, load_tokenizer, resolve_model
from actcache.errors import SpecError
lm = load_lm("lab/tiny")
print(lm.model_id, lm.revision, lm.d_model, len(load_tokenizer("lab/tiny")), *resolve_model("lab/tiny"))
try:
    load_lm("lab/other")
except SpecError as err:
    print(err)
"""
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=env,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.stderr == ""
    found, refused = run.stdout.splitlines()
    assert found == f"lab/tiny {commit} 32 96 lab/tiny lab/tiny {commit}"
    assert refused.startswith("no directory 'lab/other', and no such model in the hub's cache")


def test_bundled_names_resolve_inside_the_package():
    source, model_id, _ = resolve_model("bundled:stdlib-gpt2")
    assert model_id == "bundled:stdlib-gpt2"
    assert Path(source).parts[-3:] == ("actcache", "bundled", "stdlib-gpt2")
    for name in ("bundled:nonesuch", "bundled:../bundled/stdlib-gpt2", "bundled:"):
        with pytest.raises(SpecError, match="in this package; it has bundled:stdlib-gpt2"):
            resolve_model(name)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("./no/such/dir", "no model directory './no/such/dir'"),
        ("", "no model directory ''"),
        ("two words", "no directory 'two words', and it is no hub id either"),
    ],
)
def test_a_model_that_is_not_there_is_one_clear_line(model, says):
    for load in (load_lm, load_tokenizer, lm_config, resolve_model):
        with pytest.raises(SpecError, match=says) as caught:
            load(model)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_not_whole_is_refused(lm_dir):
    weights = load_file(lm_dir / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, lm_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpecError, match=r"lacks weights for 1 tensors \(model.layers.1.mlp.up_proj.weight\)"):
        load_lm(str(lm_dir))
    whole = (lm_dir / "model.safetensors").read_bytes()
    (lm_dir / "model.safetensors").write_bytes(whole[:1000])  # as a download that was cut off leaves it
    with pytest.raises(SpecError, match="cannot be loaded .*header"):
        load_lm(str(lm_dir))
    (lm_dir / "model.safetensors").unlink()
    with pytest.raises(SpecError, match=r"cannot be loaded .*no file named model\.safetensors") as caught:
        load_lm(str(lm_dir))
    assert "\n" not in str(caught.value)


def test_an_impossible_device_is_refused(lm_dir):
    with pytest.raises(SpecError, match="cannot be put on device 'cuda:99'"):
        load_lm(str(lm_dir), device="cuda:99")
    with pytest.raises(SpecError, match="'meta', where nothing is computed"):
        load_lm(str(lm_dir), device="meta")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_model_without_its_tokenizer_is_refused(tmp_path, family):
    # Transformers makes up an empty tokenizer for gpt2 and gemma2, and raises for llama.
    save_tiny_lm(tmp_path, family, tokenizer=False)
    with pytest.raises(SpecError, match="is a model without the tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_load_tokenizer_gives_the_saved_one(lm_dir):
    text = "def f(x): return x"
    tokenizer = load_tokenizer(str(lm_dir))
    assert tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@in_every_family
def test_sites_and_widths_are_known_without_weights(tmp_path, family):
    model = shared_model(family)
    model.config.save_pretrained(tmp_path)
    bare = skeleton(str(tmp_path))
    assert lm_config(str(tmp_path)).model_type == model.config.model_type
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert site_names(bare) == site_names(model)
    acts = run_capture(model, tokens(), site_names(model))
    for site in resolve_sites(bare, ["blocks.1.**"]):
        assert site_width(bare, site) == acts[site].shape[-1]
