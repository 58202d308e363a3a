"""SAEs inside a forward pass: nothing changes until a latent is edited, and then what the edit says."""

import pytest
import torch
from toy_dataset import IdentitySAE, RandomTopK, tiny_lm

import sae
from actcache.capture import run_capture
from actcache.errors import SpecError

SITE, LATER = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
D_MODEL = 24


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 64, (3, 10), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(lm, ids):
    return lm.model(ids, use_cache=False).logits


def test_with_the_error_term_and_no_edit_the_logits_are_the_same(lm, ids):
    clean = logits(lm, ids)
    with sae.splice(lm, {SITE: RandomTopK(D_MODEL), LATER: RandomTopK(D_MODEL, seed=1)}) as spliced:
        assert torch.equal(logits(lm, ids), clean)
    assert spliced.latents[SITE].shape == (3, 10, 40)
    assert torch.equal(logits(lm, ids), clean)


def test_without_it_the_model_goes_on_with_the_reconstruction(lm, ids):
    s = RandomTopK(D_MODEL)
    acts = run_capture(lm.model, ids, [SITE])[SITE]
    with sae.splice(lm.model, {SITE: s}, use_error_term=False) as spliced:
        seen = run_capture(lm.model, ids, [SITE])[SITE]
    assert torch.equal(seen, s(acts))
    assert torch.equal(spliced.latents[SITE], s.encode(acts))
    with sae.splice(lm.model, {SITE: IdentitySAE(D_MODEL)}, use_error_term=False):
        assert torch.allclose(logits(lm, ids), logits(lm, ids))


def test_an_edit_changes_the_stream_by_its_share_of_the_decoder(lm, ids):
    s = RandomTopK(D_MODEL)
    acts = run_capture(lm.model, ids, [SITE])[SITE]
    latents = s.encode(acts)
    latent = int(latents.sum((0, 1)).argmax())
    with sae.splice(lm, {SITE: s}) as spliced:
        spliced.edits[SITE] = lambda f: f * (torch.arange(f.shape[-1]) != latent)
        seen = run_capture(lm.model, ids, [SITE])[SITE]
    expected = acts - latents[..., latent, None] * s.W_dec[latent]
    assert torch.allclose(seen, expected, atol=1e-4 * float(acts.abs().max()))
    assert not torch.allclose(seen, acts)


def test_only_the_positions_asked_for_are_replaced(lm, ids):
    where = torch.zeros(3, 10, dtype=torch.bool)
    where[:, 4:] = True
    acts = run_capture(lm.model, ids, [SITE])[SITE]
    s = RandomTopK(D_MODEL)
    with sae.splice(lm, {SITE: s}, use_error_term=False, where_BT=where):
        seen = run_capture(lm.model, ids, [SITE])[SITE]
    assert torch.equal(seen[:, :4], acts[:, :4])
    assert torch.equal(seen[:, 4:], s(acts)[:, 4:])


def test_wrong_widths_edits_and_masks_are_named(lm, ids):
    with pytest.raises(SpecError, match="24 wide, its SAE 7"), sae.splice(lm, {SITE: RandomTopK(7)}):
        logits(lm, ids)
    with (
        pytest.raises(SpecError, match="no SAE is"),
        sae.splice(lm, {SITE: RandomTopK(D_MODEL)}, edits={LATER: lambda f: f}),
    ):
        logits(lm, ids)
    with (
        pytest.raises(SpecError, match="it must be"),
        sae.splice(lm, {SITE: RandomTopK(D_MODEL)}, edits={SITE: lambda f: f[..., :3]}),
    ):
        logits(lm, ids)
    mask = torch.ones(1, 1, dtype=torch.bool)
    with (
        pytest.raises(SpecError, match="where_BT has shape"),
        sae.splice(lm, {SITE: RandomTopK(D_MODEL)}, where_BT=mask),
    ):
        logits(lm, ids)
