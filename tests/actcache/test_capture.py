"""Capture and splice on tiny real models; the values of the sites are in test_families.py."""

import copy

import pytest
import torch
from tiny_models import (
    D_MODEL,
    FAMILIES,
    N_BLOCKS,
    VOCAB_SIZE,
    block_of,
    shared_model,
    tiny_gemma3_multimodal,
    tiny_model,
    tokens,
)
from torch import nn

from actcache.capture import resolve_sites, run_capture, site_names, site_width, splice
from actcache.errors import SpecError
from actcache.families import find_tap

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


def modules_run(model, forward):
    """Paths of the leaf modules that `forward` runs to their end, in order."""
    ran = []
    leaves = [(path, module) for path, module in model.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(lambda *_, path=path: ran.append(path)) for path, module in leaves]
    forward()
    for hook in hooks:
        hook.remove()
    return ran


@in_every_family
def test_forward_runs_no_module_past_the_deepest_site(family):
    model, ids = tiny_model(family), tokens()
    whole = modules_run(model, lambda: model(ids))
    assert whole[-1] == "lm_head"
    for site in site_names(model):
        tap = find_tap(model, site)
        inside = [i for i, path in enumerate(whole) if f"{path}.".startswith(f"{tap.module}.")]
        n_needed = inside[0] if tap.side == "in" else inside[-1] + 1
        assert modules_run(model, lambda site=site: run_capture(model, ids, [site])) == whole[:n_needed], site


@in_every_family
def test_many_sites_cost_one_pass_to_the_deepest(family):
    model, ids = tiny_model(family), tokens()
    deepest = modules_run(model, lambda: run_capture(model, ids, ["blocks.1.hook_resid_post"]))
    sites = [site for site in site_names(model) if site.startswith(("hook_embed", "blocks.0.", "blocks.1."))]
    assert modules_run(model, lambda: run_capture(model, ids, sites[::-1])) == deepest


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
    for site in site_names(model):
        with splice(model, {site: lambda acts_BTD: acts_BTD}):
            assert torch.equal(logits_of(model, ids), clean), site
    with splice(model, dict.fromkeys(site_names(model), torch.clone)):
        assert torch.equal(logits_of(model, ids), clean)


@in_every_family
def test_splicing_what_was_captured_changes_nothing_and_zeros_change_the_logits(family):
    model, ids = shared_model(family), tokens()
    clean, acts = logits_of(model, ids), captured(family)
    for site, acts_BTD in acts.items():
        with splice(model, {site: lambda _, new=acts_BTD: new}):
            assert torch.equal(logits_of(model, ids), clean), site
        with splice(model, {site: torch.zeros_like}):
            assert (logits_of(model, ids) - clean).abs().max() > 1e-3, site
    with splice(model, {site: lambda _, new=new: new for site, new in acts.items()}):
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


def test_an_inner_splice_sees_what_the_outer_one_put_there_and_ends_before_it():
    model, ids, site = shared_model("llama"), tokens(), "blocks.1.hook_mlp_out"
    clean = run_capture(model, ids, [site])[site]
    seen = []
    with splice(model, {site: lambda x: x + 1.0}):
        with splice(model, {site: lambda x: seen.append(x.clone()) or x * 2.0}):
            inner = run_capture(model, ids, [site])[site]
        outer = run_capture(model, ids, [site])[site]
    assert torch.equal(seen[0], clean + 1.0)
    assert torch.equal(inner, (clean + 1.0) * 2.0)
    assert torch.equal(outer, clean + 1.0)
    assert torch.equal(run_capture(model, ids, [site])[site], clean)


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
