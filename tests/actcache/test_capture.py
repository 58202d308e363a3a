"""Capture, splice and loading on tiny real models; the values of the sites are in test_families.py."""

import copy
import json
import logging.handlers
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    D_MODEL,
    FAMILIES,
    N_BLOCKS,
    VOCAB_SIZE,
    block_of,
    save_tiny_lm,
    shared_model,
    tiny_gemma3_multimodal,
    tiny_model,
    tiny_tokenizer,
    tokens,
)
from torch import nn

from actcache.capture import (
    lm_config,
    load_lm,
    load_tokenizer,
    resolve_model,
    resolve_sites,
    run_capture,
    site_names,
    site_width,
    skeleton,
    splice,
)
from actcache.errors import SpecError

PARALLEL = ("gpt_neox",)
in_every_family = pytest.mark.parametrize("family", FAMILIES)


def captured(family):
    model = shared_model(family)
    return run_capture(model, tokens(), site_names(model))


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- capture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_forward_stops_after_the_deepest_site(family):
    model = tiny_model(family)
    ran = []
    blocks = [block_of(model, n) for n in range(N_BLOCKS)]
    watched = {"block 0": blocks[0], "mlp 1": blocks[1].mlp, "block 1": blocks[1], "block 2": blocks[2]}
    watched["logits"] = model.get_output_embeddings()
    for name, module in watched.items():
        module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))

    run_capture(model, tokens(), ["blocks.1.hook_resid_post", "hook_embed"])
    assert ran == ["block 0", "block 1", "mlp 1"]
    ran.clear()
    run_capture(model, tokens(), ["blocks.1.hook_attn_out"])
    assert ran == ["block 0", "block 1"]
    ran.clear()
    run_capture(model, tokens(), ["ln_final.hook_normalized"])
    assert ran == ["block 0", "block 1", "mlp 1", "block 2"]


@in_every_family
def test_captured_tensors_are_not_changed_by_the_rest_of_the_forward(family):
    model, ids = shared_model(family), tokens()
    at_hook_time = {}

    def copy_of(site):
        def fn(acts_BTD):
            at_hook_time[site] = acts_BTD.clone()
            return acts_BTD

        return fn

    names = site_names(model)
    with splice(model, {site: copy_of(site) for site in names}):
        acts = run_capture(model, ids, names)
    for site in names:
        assert torch.equal(acts[site], at_hook_time[site]), site


class InPlace(nn.Module):
    """Token ids to activations, with a ReLU that overwrites what the module before it returned."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input_ids):
        return self.relu(self.embed(input_ids))


def test_module_path_sites_survive_in_place_operations():
    model, ids = InPlace(), tokens()
    acts = run_capture(model, ids, ["embed:out", "relu:in", "relu:out"])
    assert (acts["embed:out"] < 0).any()
    assert torch.equal(acts["embed:out"], model.embed.weight[ids])
    assert torch.equal(acts["relu:in"], acts["embed:out"])
    assert torch.equal(acts["relu:out"], acts["embed:out"].clamp(min=0))


def test_module_path_sites_agree_with_the_named_ones():
    model, ids = shared_model("llama"), tokens()
    same = {
        "model.layers.1:in": "blocks.1.hook_resid_pre",
        "model.layers.1:out": "blocks.1.hook_resid_post",
        "model.layers.1.self_attn:in": "blocks.1.ln1.hook_normalized",  # passed by keyword
        "model.layers.1.self_attn:out": "blocks.1.hook_attn_out",  # first item of a tuple
        "model.layers.1.mlp.down_proj:in": "blocks.1.mlp.hook_post",
        "model:out": "ln_final.hook_normalized",  # first item of a ModelOutput
    }
    acts = run_capture(model, ids, [*same, *same.values()])
    for path, name in same.items():
        assert torch.equal(acts[path], acts[name]), path
    assert torch.equal(run_capture(model, ids, ["lm_head:out"])["lm_head:out"], logits_of(model, ids))


def test_head_dimensions_are_flattened():
    # Qwen 3's q_norm works on [B, T, heads, d_head].
    acts = run_capture(shared_model("qwen3"), tokens(), ["model.layers.0.self_attn.q_norm:out"])
    assert acts["model.layers.0.self_attn.q_norm:out"].shape == (2, 12, 64)


def test_capture_works_in_inference_mode_and_never_carries_a_graph():
    model, ids = tiny_model("llama").requires_grad_(True), tokens()
    plain = run_capture(model, ids, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
    assert not plain.requires_grad
    with torch.inference_mode():
        inside = run_capture(model, ids, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
    assert torch.equal(plain, inside)


def test_padding_mask_reaches_the_model():
    model, ids = shared_model("gpt2"), tokens()
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    site = "blocks.1.hook_resid_post"
    acts = run_capture(model, ids, [site], mask)[site]
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    assert torch.equal(acts, hidden)
    assert not torch.equal(acts, run_capture(model, ids, [site])[site])


def test_hooks_are_gone_after_success_stop_and_exceptions():
    model, ids = tiny_model("gpt2"), tokens()
    before = n_hooks(model)
    run_capture(model, ids, site_names(model))
    assert n_hooks(model) == before
    with pytest.raises(IndexError):
        run_capture(model, ids + VOCAB_SIZE, ["blocks.1.hook_resid_post"])
    assert n_hooks(model) == before
    with (
        pytest.raises(ZeroDivisionError),
        splice(model, {"blocks.0.hook_mlp_out": lambda x: x / 0 if 1 // 0 else x}),
    ):
        model(ids)
    assert n_hooks(model) == before
    with (
        pytest.raises(SpecError),
        splice(model, {"blocks.0.hook_mlp_out": lambda x: x, "blocks.9.hook_mlp_out": id}),
    ):
        pass
    assert n_hooks(model) == before


def test_a_site_that_the_forward_never_reaches_is_an_error():
    model = tiny_gemma3_multimodal()
    unused = "model.vision_tower:out"
    with pytest.raises(SpecError, match=r"without reaching model\.vision_tower:out"):
        run_capture(model, tokens(), ["blocks.0.hook_resid_post", unused])
    with (
        pytest.raises(SpecError, match=r"without reaching model\.vision_tower:out"),
        splice(model, {unused: lambda x: x}),
    ):
        model(tokens())


class Detour(nn.Module):
    """A model whose `side` module runs only when it is told so."""

    def __init__(self):
        super().__init__()
        self.embed, self.side, self.last = nn.Embedding(VOCAB_SIZE, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids, detour=True):
        x = self.embed(input_ids)
        return self.last(self.side(x) if detour else x)


def test_every_forward_must_reach_every_spliced_site_itself():
    model, ids = Detour(), tokens()
    with splice(model, {"side:out": torch.zeros_like}):
        model(ids)
        run_capture(model, ids, ["side:out"])
        with pytest.raises(SpecError, match="without reaching side:out"):
            model(ids, detour=False)


def test_a_place_without_a_batch_token_width_tensor_is_an_error():
    model = shared_model("llama")
    with pytest.raises(SpecError, match=r"rotary_emb:out .*must be .*2, 12"):
        run_capture(model, tokens(), ["model.rotary_emb:out"])
    with pytest.raises(SpecError, match="embed_tokens:in carries a tensor of shape"):
        run_capture(model, tokens(), ["model.embed_tokens:in"])


def test_multimodal_gemma3_is_captured_in_its_text_decoder():
    model, ids = tiny_gemma3_multimodal(), tokens()
    acts = run_capture(model, ids, site_names(model))
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(acts["blocks.1.hook_resid_post"], hidden[2])
    assert torch.equal(acts["ln_final.hook_normalized"], hidden[3])


@in_every_family
def test_site_names_are_in_the_order_in_which_the_forward_reaches_them(family):
    model, reached = shared_model(family), []
    names = site_names(model)
    with splice(model, {site: lambda x, site=site: reached.append(site) or x for site in names}):
        logits_of(model, tokens())
    assert reached == names


def test_no_site_at_all_is_an_error():
    for call in (resolve_sites, lambda model, sites: run_capture(model, tokens(), sites)):
        with pytest.raises(SpecError, match="no site was asked for"):
            call(shared_model("gpt2"), [])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3", "phi3", "gemma2"])
def test_site_width_is_that_of_the_captured_tensor(family):
    for site, acts_BTD in captured(family).items():
        assert site_width(shared_model(family), site) == acts_BTD.shape[-1]


# --- splice ----------------------------------------------------------------------------------


@in_every_family
def test_identity_splice_leaves_the_logits_bit_for_bit(family):
    model, ids = shared_model(family), tokens()
    clean = logits_of(model, ids)
    for site in resolve_sites(model, ["hook_embed", "blocks.1.**", "ln_final.hook_normalized"]):
        with splice(model, {site: lambda acts_BTD: acts_BTD}):
            assert torch.equal(logits_of(model, ids), clean), site
    with splice(model, dict.fromkeys(site_names(model), torch.clone)):
        assert torch.equal(logits_of(model, ids), clean)


@in_every_family
def test_splicing_anothers_residual_gives_anothers_logits(family):
    model, ids, other = shared_model(family), tokens(), tokens(seed=1)
    wanted = logits_of(model, other)
    for site in resolve_sites(model, ["blocks.{0,2}.hook_resid_{pre,post}", "ln_final.hook_normalized"]):
        acts_BTD = run_capture(model, other, [site])[site]
        with splice(model, {site: lambda _, new=acts_BTD: new}):
            assert torch.equal(logits_of(model, ids), wanted), site


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in PARALLEL])
def test_splicing_resid_mid_replaces_the_residual_and_not_only_what_ln2_reads(family):
    model, ids, other = shared_model(family), tokens(), tokens(seed=1)
    for n in range(N_BLOCKS):
        site = f"blocks.{n}.hook_resid_mid"
        acts_BTD = run_capture(model, other, [site])[site]
        seen = []
        with splice(model, {site: lambda x, seen=seen, new=acts_BTD: seen.append(x) or new}):
            spliced = logits_of(model, ids)
        assert torch.equal(spliced, logits_of(model, other))
        assert torch.equal(seen[-1], run_capture(model, ids, [site])[site])  # fn's argument stays as it was


@in_every_family
def test_splicing_zero_at_mlp_out_is_ablation_by_hand(family):
    model, ids = shared_model(family), tokens()
    by_hand = copy.deepcopy(model)
    mlp = block_of(by_hand, 1).mlp
    down = next(getattr(mlp, name) for name in ("c_proj", "dense_4h_to_h", "down_proj") if hasattr(mlp, name))
    for parameter in down.parameters():
        parameter.zero_()
    with splice(model, {"blocks.1.hook_mlp_out": torch.zeros_like}):
        spliced = logits_of(model, ids)
    assert torch.equal(spliced, logits_of(by_hand, ids))
    assert not torch.equal(spliced, logits_of(model, ids))


@in_every_family
def test_splicing_q_k_v_of_another_input_gives_its_z(family):
    model, ids, other = shared_model(family), tokens(), tokens(seed=1)
    sites = [f"blocks.0.attn.hook_{name}" for name in "qkv"]
    z = "blocks.0.attn.hook_z"
    theirs = run_capture(model, other, [*sites, z])
    with splice(model, {site: lambda _, new=theirs[site]: new for site in sites}):
        assert torch.equal(run_capture(model, ids, [z])[z], theirs[z])


def test_splices_at_several_sites_act_in_forward_order():
    model, ids = shared_model("gemma2"), tokens()
    seen = {}

    def shift(site, by):
        return lambda acts_BTD: seen.setdefault(site, acts_BTD.clone()) + by

    early, late = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"
    with splice(model, {late: shift(late, 2.0), early: shift(early, 1.0)}):
        acts = run_capture(model, ids, [early, late])
    clean = run_capture(model, ids, [early])[early]
    assert torch.equal(seen[early], clean)
    assert torch.equal(seen[late], clean + 1.0)
    assert torch.equal(acts[late], clean + 1.0 + 2.0)  # capture shows the replaced value
    assert torch.equal(acts[early], clean + 1.0)


def test_autograd_goes_through_a_splice():
    # resid_mid = resid_pre + attn_out, so a vector added at either has the same gradient.
    model, ids = shared_model("llama"), tokens()
    gradients = []
    for site in ("blocks.1.hook_attn_out", "blocks.1.hook_resid_mid"):
        vector = torch.zeros(D_MODEL, requires_grad=True)
        with splice(model, {site: lambda acts_BTD, vector=vector: acts_BTD + vector}):
            model(ids, labels=ids).loss.backward()
        gradients.append(vector.grad)
    assert gradients[0].abs().max() > 1e-3
    # A few float32 roundings: the same sums in another order.
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("replacement", "found"),
    [
        (lambda x: x[:, :1], r"\[2, 1, 32\] torch.float32"),
        (lambda x: x.double(), r"\[2, 12, 32\] torch.float64"),
        (lambda x: None, "NoneType"),
    ],
)
def test_a_replacement_that_does_not_fit_is_an_error(replacement, found):
    model = shared_model("gpt2")
    with (
        pytest.raises(SpecError, match=f"hook_mlp_out is {found}"),
        splice(model, {"blocks.0.hook_mlp_out": replacement}),
    ):
        model(tokens())


# --- loading ---------------------------------------------------------------------------------


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
from actcache.capture import load_lm, load_tokenizer, resolve_model
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
    (lm_dir / "model.safetensors").unlink()
    with pytest.raises(SpecError, match=r"cannot be loaded .*no file named model\.safetensors") as caught:
        load_lm(str(lm_dir))
    assert "\n" not in str(caught.value)


def test_an_impossible_device_is_refused(lm_dir):
    with pytest.raises(SpecError, match="cannot be put on device 'cuda:99'"):
        load_lm(str(lm_dir), device="cuda:99")


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
    for site in resolve_sites(bare, ["blocks.1.**"]):
        assert site_width(bare, site) == captured(family)[site].shape[-1]
