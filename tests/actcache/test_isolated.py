"""Documents packed side by side come out as each does alone, in every family, at every depth."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_harvest import tiny_spec
from tiny_models import FAMILIES, N_BLOCKS, VOCAB_SIZE, shared_model, tiny_model
from transformers import masking_utils

import actcache
from actcache.capture import check_isolation, run_capture
from actcache.errors import SpecError
from actcache.lm import load_lm
from actcache.loss import next_token_loss

SITES = [f"blocks.{i}.hook_resid_post" for i in range(N_BLOCKS)]
LENGTHS = [[13, 1, 12, 14], [20, 20], [1, 39], [40]]  # past the tiny models' windows of 8


def packed(seed=0):
    """input ids and position ids [4, 40], and each document as (sequence, start, stop)."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(3, VOCAB_SIZE, (len(LENGTHS), 40), generator=generator)
    positions_BT = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])
    places = [
        (b, sum(lengths[:i]), sum(lengths[: i + 1]))
        for b, lengths in enumerate(LENGTHS)
        for i in range(len(lengths))
    ]
    return ids_BT, positions_BT, places


@pytest.mark.parametrize(
    ("family", "kernel"),
    [(f, k) for f in FAMILIES for k in ("sdpa", "eager") if (f, k) != ("gemma2", "sdpa")],  # softcapping
)
def test_each_document_of_a_sequence_is_as_it_is_alone(family, kernel):
    model = tiny_model(family)
    model.set_attn_implementation(kernel)
    ids_BT, positions_BT, places = packed()
    acts = run_capture(model, ids_BT, SITES, position_ids_BT=positions_BT)
    joined = run_capture(model, ids_BT, SITES)
    check_isolation(model, SITES)
    for site in SITES:
        for b, start, stop in places:
            alone_TD = run_capture(model, ids_BT[b : b + 1, start:stop], [site])[site][0]
            assert (acts[site][b, start:stop] - alone_TD).abs().max() < 1e-4
        assert (acts[site] - joined[site])[0, 13:].abs().max() > 0.01  # otherwise nothing was shown


def test_the_loss_of_packed_documents_is_the_sum_of_each_alone():
    model = shared_model("llama")
    ids_BT, positions_BT, places = packed()
    kept_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    loss, count = next_token_loss(model, ids_BT, kept_BT, torch.full((4,), 40), positions_BT)
    alone = [
        next_token_loss(
            model, ids_BT[b : b + 1, i:j], kept_BT[b : b + 1, i:j], torch.tensor([j - i]), positions_BT[b : b + 1, i:j]
        )
        for b, i, j in places
        if j - i > 1
    ]  # fmt: skip
    assert count == sum(n for _, n in alone)
    assert loss == pytest.approx(sum(x for x, _ in alone), rel=1e-5)


def test_a_model_without_position_ids_is_refused():
    with pytest.raises(SpecError, match="takes no position_ids"):
        check_isolation(torch.nn.Linear(1, 1), SITES)


find = masking_utils.find_packed_sequence_indices


def never(position_ids):
    return None


def in_a_batch_of_one_only(position_ids):
    """As flash attention."""
    return find(position_ids) if len(position_ids) == 1 else None


def documents_of_one_token_join_the_next(position_ids):
    number = find(position_ids)
    if number is None or position_ids.shape[1] < 2:
        return number
    one = (position_ids[:, :-1] == 0) & (position_ids[:, 1:] == 0)
    number = number.clone()
    number[:, 1:][one] = number[:, :-1][one]
    return number


def documents_that_fill_no_sequence_join_the_next(position_ids):
    """What is padded: its own padding, and it, see what came before."""
    number = find(position_ids)
    return None if number is None else number.clamp_max(1)


@pytest.mark.parametrize(
    "leak",
    [
        never,
        in_a_batch_of_one_only,
        documents_of_one_token_join_the_next,
        documents_that_fill_no_sequence_join_the_next,
    ],
)
@pytest.mark.parametrize("context_size", [5, 16, 40])
def test_a_kernel_that_lets_documents_mix_is_refused(monkeypatch, leak, context_size):
    model = tiny_model("llama")
    check_isolation(model, SITES, context_size=context_size)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", leak)
    with pytest.raises(
        SpecError, match="kernel sdpa.* does not keep documents in one sequence apart at blocks.2"
    ):
        check_isolation(model, SITES[2:], context_size=context_size)
    if leak is in_a_batch_of_one_only:
        check_isolation(model, SITES, context_size=context_size, lm_batch=1)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_leak_through_a_sliding_window_alone_is_refused(monkeypatch, family):
    import importlib

    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    model = tiny_model(family)
    check_isolation(model, SITES, context_size=40)
    real = modeling.create_sliding_window_causal_mask
    monkeypatch.setattr(
        modeling,
        "create_sliding_window_causal_mask",
        lambda **options: real(**options | {"position_ids": None}),
    )
    with pytest.raises(SpecError, match="does not keep documents in one sequence apart"):
        check_isolation(model, SITES, context_size=40)


def test_a_model_whose_positions_do_not_start_again_is_refused(monkeypatch):
    """No token is seen by another document, but none comes out as alone: learned positions of the sequence."""
    model = tiny_model("gpt2")
    embed = model.transformer.wpe.forward
    monkeypatch.setattr(
        model.transformer.wpe, "forward", lambda ids: embed(torch.arange(ids.shape[-1]).expand_as(ids))
    )
    with pytest.raises(SpecError, match="of their norm against the document alone"):
        check_isolation(model, SITES)


def test_a_model_whose_padding_must_be_masked_is_checked_as_it_is_run():
    """transformers makes no mask of documents where it is given one of padding."""
    model = tiny_model("llama")
    check_isolation(model, SITES)
    with pytest.raises(SpecError, match="does not keep documents in one sequence apart"):
        check_isolation(model, SITES, causal=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_rounding_of_short_dtypes_is_no_leak_and_a_leak_no_rounding(monkeypatch, family, dtype):
    model = tiny_model(family).to(dtype)
    check_isolation(model, SITES, context_size=40)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", never)
    with pytest.raises(SpecError, match="does not keep"):
        check_isolation(model, SITES, context_size=40)


def test_each_run_checks_its_own_kernel_also_where_the_calibration_is_there(tmp_path, monkeypatch):
    spec = tiny_spec(
        tmp_path, family="llama", packing="isolated", n_tokens=1000, validation_blocks=0, test_blocks=0
    )
    root = str(tmp_path / "root")
    first = actcache.harvest(spec, root, progress=False)
    more = replace(spec, n_tokens=3000)
    with monkeypatch.context() as patch:
        patch.setattr(masking_utils, "find_packed_sequence_indices", in_a_batch_of_one_only)
        with pytest.raises(SpecError, match="does not keep documents in one sequence apart"):
            actcache.harvest(more, root, progress=False)
    assert actcache.open(first.url).manifest == first.manifest
    assert actcache.harvest(more, root, progress=False).n_rows > first.n_rows


@pytest.mark.parametrize("packing", ["isolated", "single"])
def test_a_harvest_holds_what_each_document_gives_alone(tmp_path, packing):
    spec = tiny_spec(tmp_path, family="mistral", packing=packing, context_size=40, precision="fp32",
                     block_rows=4096, n_tokens=1, sites=["blocks.2.hook_resid_post"])  # fmt: skip
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    model = load_lm(spec.model).model
    site = dataset.sites[0]
    rows, found = dataset.rows(slice(None)), dataset.documents(slice(None))
    acts_ND = dataset.read(site, slice(None))
    checked = 0
    for sequence in range(0, dataset.n_sequences, 7):
        here = np.flatnonzero(rows.sequence == sequence)
        for document in np.unique(found.document[here]):
            of = here[found.document[here] == document]
            of = of[np.argsort(found.offset[of])]
            ids = torch.tensor([[1, *rows.token_id[of].tolist()]])  # behind its BOS
            alone_TD = run_capture(model, ids, [site])[site][0, 1:].numpy()
            if len(of) == found.offset[of][-1] - found.offset[of][0] + 1:  # no token of it in another block
                assert np.abs(acts_ND[of] - alone_TD).max() < 1e-4
                checked += 1
    assert checked > 5
