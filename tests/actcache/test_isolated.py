"""Documents packed side by side come out as each does alone, in every family, at every depth."""

import numpy as np
import pytest
import torch
from tiny_harvest import tiny_spec
from tiny_models import FAMILIES, N_BLOCKS, VOCAB_SIZE, shared_model, tiny_model

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


def test_a_model_that_lets_documents_mix_is_refused(monkeypatch):
    from transformers import masking_utils

    model = tiny_model("llama")
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(SpecError, match="does not keep documents in one sequence apart at blocks.2"):
        check_isolation(model, SITES[2:])
    with pytest.raises(SpecError, match="takes no position_ids"):
        check_isolation(torch.nn.Linear(1, 1), SITES)


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
