"""Every named site against arithmetic that does not use the hooks, and how names and globs resolve.

Equalities are exact (`torch.equal`) where both sides run the same operations in the same order;
elsewhere the tolerance is a few float32 roundings of the values compared.
"""

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from tiny_models import D_MODEL, FAMILIES, N_BLOCKS, block_of, shared_model, tokens
from torch import nn
from torch.nn import functional

from actcache.capture import run_capture
from actcache.errors import SpecError
from actcache.families import resolve_sites, site_names

GEMMA = ("gemma2", "gemma3")
PARALLEL = ("gpt_neox",)
in_every_family = pytest.mark.parametrize("family", FAMILIES)


def captured(family):
    model = shared_model(family)
    return run_capture(model, tokens(), site_names(model))


def close(a, b):
    # Both sides are float32 sums of up to 128 products of values of order 1, in different order.
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


# --- residual stream -------------------------------------------------------------------------


@in_every_family
def test_resid_sites_are_the_hidden_states_of_hugging_face(family):
    model, ids = shared_model(family), tokens()
    acts = captured(family)
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    for n in range(N_BLOCKS):
        assert torch.equal(acts[f"blocks.{n}.hook_resid_pre"], hidden[n])
    for n in range(N_BLOCKS - 1):
        assert torch.equal(acts[f"blocks.{n}.hook_resid_post"], hidden[n + 1])
    # Hugging Face's last hidden state lies after the final norm.
    assert torch.equal(acts["ln_final.hook_normalized"], hidden[N_BLOCKS])


@in_every_family
def test_each_block_adds_attn_out_and_mlp_out_to_the_residual(family):
    acts = captured(family)
    for n in range(N_BLOCKS):
        pre, attn, mlp, post = (
            acts[f"blocks.{n}.hook_{part}"] for part in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        if family in PARALLEL:
            assert torch.equal(post, mlp + attn + pre)
        else:
            mid = acts[f"blocks.{n}.hook_resid_mid"]
            assert torch.equal(mid, pre + attn)
            assert torch.equal(post, mid + mlp)


@in_every_family
def test_embed_is_the_token_embedding_scaled_in_gemma(family):
    model, ids = shared_model(family), tokens()
    weight = model.get_input_embeddings().weight
    acts = captured(family)
    scale = D_MODEL**0.5 if family in GEMMA else 1.0
    close(acts["hook_embed"], weight[ids] * scale)
    positions = model.get_decoder().wpe.weight[: ids.shape[1]] if family in ("gpt2", "gpt_neo") else 0.0
    close(acts["blocks.0.hook_resid_pre"], acts["hook_embed"] + positions)


# --- norms, attention, MLP, written out ------------------------------------------------------


def norm(module, x):
    """A norm's whole output, from its weights."""
    if isinstance(module, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias
    eps = getattr(module, "variance_epsilon", None) or module.eps
    gain = 1 + module.weight if "Gemma" in type(module).__name__ else module.weight
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def affine(module, x):
    """`x W + b` of a Linear, or of GPT-2's Conv1D with its transposed weight."""
    weight = module.weight.T if isinstance(module, nn.Linear) else module.weight
    return x @ weight + (0 if getattr(module, "bias", None) is None else module.bias)


def norms_of(family, block):
    if family in ("gpt2", "gpt_neo"):
        return block.ln_1, block.ln_2
    if family in GEMMA:
        return block.input_layernorm, block.pre_feedforward_layernorm
    return block.input_layernorm, block.post_attention_layernorm


@in_every_family
def test_normalized_sites_are_the_norms_with_their_weights(family):
    model, acts = shared_model(family), captured(family)
    for n in range(N_BLOCKS):
        ln1, ln2 = norms_of(family, block_of(model, n))
        close(acts[f"blocks.{n}.ln1.hook_normalized"], norm(ln1, acts[f"blocks.{n}.hook_resid_pre"]))
        read = "resid_pre" if family in PARALLEL else "resid_mid"
        close(acts[f"blocks.{n}.ln2.hook_normalized"], norm(ln2, acts[f"blocks.{n}.hook_{read}"]))
    decoder = model.get_decoder()
    last = next(
        getattr(decoder, name) for name in ("ln_f", "final_layer_norm", "norm") if hasattr(decoder, name)
    )
    close(acts["ln_final.hook_normalized"], norm(last, acts[f"blocks.{N_BLOCKS - 1}.hook_resid_post"]))


def qkv_by_hand(family, block, x):
    if family == "gpt2":
        return affine(block.attn.c_attn, x).split(D_MODEL, dim=-1)
    if family.startswith("gpt_neox"):
        heads = affine(block.attention.query_key_value, x).unflatten(-1, (4, 3, D_MODEL // 4))
        return tuple(heads[..., part, :].flatten(2) for part in range(3))
    attn = block.attn.attention if family == "gpt_neo" else block.self_attn
    if family == "phi3":
        return affine(attn.qkv_proj, x).split([32, 16, 16], dim=-1)
    return affine(attn.q_proj, x), affine(attn.k_proj, x), affine(attn.v_proj, x)


@in_every_family
def test_q_k_v_are_projections_of_ln1_before_rotation(family):
    model, acts = shared_model(family), captured(family)
    for n in range(N_BLOCKS):
        by_hand = qkv_by_hand(family, block_of(model, n), acts[f"blocks.{n}.ln1.hook_normalized"])
        for name, value in zip("qkv", by_hand, strict=True):
            close(acts[f"blocks.{n}.attn.hook_{name}"], value)


@in_every_family
def test_z_is_v_weighted_by_the_attention_that_hugging_face_reports(family):
    model, ids, acts = shared_model(family), tokens(), captured(family)
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the others report no attention
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(kernel)
    for n in range(N_BLOCKS):
        v, z = (acts[f"blocks.{n}.attn.hook_{name}"] for name in "vz")
        d_head = 16 if family in (*GEMMA, "qwen3") else 8
        v_BTHd = v.unflatten(-1, (-1, d_head)).repeat_interleave(z.shape[-1] // v.shape[-1], dim=2)
        close(z, torch.einsum("bhqk,bkhd->bqhd", attentions[n], v_BTHd).flatten(2))


@in_every_family
def test_attn_out_is_the_output_projection_of_z(family):
    model, acts = shared_model(family), captured(family)
    for n in range(N_BLOCKS):
        block = block_of(model, n)
        if family == "gpt2":
            project = block.attn.c_proj
        elif family == "gpt_neo":
            project = block.attn.attention.out_proj
        elif family.startswith("gpt_neox"):
            project = block.attention.dense
        else:
            project = block.self_attn.o_proj
        out = affine(project, acts[f"blocks.{n}.attn.hook_z"])
        if family in GEMMA:
            out = norm(block.post_attention_layernorm, out)
        close(acts[f"blocks.{n}.hook_attn_out"], out)


def mlp_by_hand(family, block, x):
    """(pre, post, out) of the MLP, from its weights."""
    mlp = block.mlp
    if family in ("gpt2", "gpt_neo"):
        pre = affine(mlp.c_fc, x)
        post = functional.gelu(pre, approximate="tanh")
        return pre, post, affine(mlp.c_proj, post)
    if family.startswith("gpt_neox"):
        pre = affine(mlp.dense_h_to_4h, x)
        post = functional.gelu(pre)
        return pre, post, affine(mlp.dense_4h_to_h, post)
    if family == "phi3":
        pre, up = affine(mlp.gate_up_proj, x).chunk(2, dim=-1)
    else:
        pre, up = affine(mlp.gate_proj, x), affine(mlp.up_proj, x)
    post = (functional.gelu(pre, approximate="tanh") if family in GEMMA else functional.silu(pre)) * up
    out = affine(mlp.down_proj, post)
    return pre, post, norm(block.post_feedforward_layernorm, out) if family in GEMMA else out


@in_every_family
def test_mlp_sites_are_the_mlp_written_out(family):
    model, acts = shared_model(family), captured(family)
    for n in range(N_BLOCKS):
        pre, post, out = mlp_by_hand(family, block_of(model, n), acts[f"blocks.{n}.ln2.hook_normalized"])
        close(acts[f"blocks.{n}.mlp.hook_pre"], pre)
        close(acts[f"blocks.{n}.mlp.hook_post"], post)
        close(acts[f"blocks.{n}.hook_mlp_out"], out)


# --- names -----------------------------------------------------------------------------------


@in_every_family
def test_every_family_has_every_name_of_the_page(family):
    page = (Path(__file__).parents[2] / "docs" / "sites.md").read_text()
    names = re.findall(r"^\| `([\w.]*hook_\w+)` \|", page, re.MULTILINE)
    assert len(names) == 15
    if family in PARALLEL:
        names.remove("blocks.N.hook_resid_mid")
    in_block = [name.replace("blocks.N.", "blocks.1.") for name in names if ".N." in name]
    found = site_names(shared_model(family))
    assert [name for name in found if name.startswith("blocks.1.")] == in_block
    assert [name for name in found if "blocks." not in name] == [name for name in names if ".N." not in name]


def test_globs_and_braces_expand_in_forward_order():
    model = shared_model("llama")
    assert resolve_sites(model, ["blocks.*.hook_resid_post"]) == [
        f"blocks.{n}.hook_resid_post" for n in range(3)
    ]
    assert resolve_sites(model, ["blocks.{2,0}.hook_mlp_out", "blocks.{0..1}.hook_resid_pre"]) == [
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_mlp_out",
        "blocks.1.hook_resid_pre",
        "blocks.2.hook_mlp_out",
    ]
    assert resolve_sites(model, ["blocks.[1-2].attn.hook_?"]) == [
        f"blocks.{n}.attn.hook_{name}" for n in (1, 2) for name in "qkvz"
    ]
    assert resolve_sites(model, ["blocks.1.*"]) == [
        f"blocks.1.hook_{name}" for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    ]
    assert len(resolve_sites(model, ["blocks.1.**"])) == 13
    assert resolve_sites(model, ["**"]) == site_names(model)
    assert resolve_sites(model, "hook_embed") == ["hook_embed"]


def test_globs_work_on_module_paths_and_duplicates_collapse():
    model = shared_model("gpt2")
    assert resolve_sites(
        model, ["transformer.h.*:out", "blocks.2.hook_resid_pre", "transformer.h.1:out"]
    ) == [
        "blocks.2.hook_resid_pre",
        "transformer.h.0:out",
        "transformer.h.1:out",
        "transformer.h.2:out",
    ]
    assert resolve_sites(model, ["transformer.h.{0,2}.mlp:{in,out}"]) == [
        f"transformer.h.{n}.mlp:{side}" for n in (0, 2) for side in ("in", "out")
    ]


@pytest.mark.parametrize(
    ("site", "says"),
    [
        ("blocks.1.hook_resid_pots", "Near names: blocks.1.hook_resid_post"),
        ("blocks.7.hook_resid_post", "its blocks are 0 to 2"),
        ("blocks.01.hook_resid_post", "has no site"),
        ("blocks.{}.hook_resid_post", "has no site"),
        ("blocks.*.hook_resid_pots", "has no site"),
        ("blocks.[2-1].hook_resid_post", "not a valid glob"),
        ("transformer.h.1.mpl:out", "Near names: transformer.h.1.mlp:out"),
        ("transformer.h.1.mlp:upwards", "Near names: transformer.h.1.mlp:"),
        ("transformer.h.9:out", "has no site"),
    ],
)
def test_unknown_sites_are_errors_that_name_what_is_near(site, says):
    model = shared_model("gpt2")
    with pytest.raises(SpecError, match="\\A.*" + says) as caught:
        resolve_sites(model, [site])
    assert "\n" not in str(caught.value)
    with pytest.raises(SpecError):
        run_capture(model, tokens(), [site])


@pytest.mark.parametrize("site", ["blocks.1.hook_resid_mid", "blocks.*.hook_resid_mid"])
def test_parallel_residual_says_why_there_is_no_resid_mid(site):
    with pytest.raises(SpecError, match="run in parallel"):
        resolve_sites(shared_model("gpt_neox"), [site])
    assert resolve_sites(shared_model("gpt_neox_sequential"), [site])


def test_a_model_of_no_known_family_has_only_module_paths():
    model = nn.Sequential(OrderedDict(embed=nn.Embedding(9, 4), relu=nn.ReLU()))
    assert site_names(model) == []
    assert resolve_sites(model, ["*:out"]) == ["embed:out", "relu:out"]
    with pytest.raises(SpecError, match="name a module path with :in or :out, such as embed:out"):
        resolve_sites(model, ["blocks.0.hook_resid_post"])
