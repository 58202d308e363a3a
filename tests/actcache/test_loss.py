"""The LM's loss comes in pieces of rows, after all rows are committed; where it cannot be had, that is a warning."""

import numpy as np
import pytest
import torch
from tiny_harvest import SITES, tiny_spec
from tiny_models import FAMILIES, shared_model, tiny_gemma3_multimodal, tiny_model, tokens
from torch.nn.functional import cross_entropy

import actcache
from actcache import loss
from actcache.capture import splice
from actcache.errors import SpecError
from actcache.harvester import Harvester
from actcache.loss import next_token_loss
from actcache.manifest import latest_version

LENGTHS = torch.tensor([20, 20, 7, 1])


def batch():
    kept_BT = torch.rand(4, 20, generator=torch.Generator().manual_seed(0)) > 0.2
    return tokens(batch=4, length=20), kept_BT, LENGTHS


def whole_loss(model, ids_BT, kept_BT, length_B):
    """From the logits of the whole batch at once."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    inside_BT = torch.arange(ids_BT.shape[1]) + 1 < length_B[:, None]
    counted_BT = (kept_BT & inside_BT)[:, :-1]
    total = cross_entropy(logits_BTV[:, :-1][counted_BT].double(), ids_BT[:, 1:][counted_BT], reduction="sum")
    return float(total), int(counted_BT.sum())


@pytest.mark.parametrize("family", [*FAMILIES, "mamba", "gemma3 with images"])
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_the_loss_in_pieces_is_that_of_all_logits_at_once(monkeypatch, family, rows):
    model = tiny_gemma3_multimodal() if " " in family else shared_model(family)
    vocab_size = model.config.get_text_config().vocab_size
    monkeypatch.setattr(loss, "PIECE_VALUES", rows * vocab_size)
    sizes = []
    hook = model.get_output_embeddings().register_forward_hook(lambda m, a, out: sizes.append(out.numel()))
    with torch.inference_mode():
        total, n = next_token_loss(model, *batch())
        hook.remove()
        expected, n_expected = whole_loss(model, *batch())
    assert n == n_expected > 20
    assert total == pytest.approx(expected, rel=1e-5)
    assert max(sizes) <= rows * vocab_size
    assert not model._forward_pre_hooks
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_the_body_runs_once_and_what_is_spliced_in_counts(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(loss, "PIECE_VALUES", 96)
    runs = []
    hook = model.model.layers[0].register_forward_hook(lambda *a: runs.append(1))
    with torch.inference_mode(), splice(model, {SITES[0]: lambda acts_BTD: acts_BTD * 0.5}):
        spliced, _ = next_token_loss(model, *batch())
        assert len(runs) == 1
        expected, _ = whole_loss(model, *batch())
    hook.remove()
    clean, _ = next_token_loss(model, *batch())
    assert spliced == pytest.approx(expected, rel=1e-5)
    assert abs(clean - spliced) > 0.1
    assert "forward" not in model.model.__dict__
    site = {"model.layers.0.mlp:out": lambda x: x}
    model.model.layers[0].forward = lambda hidden, *args, **kwargs: hidden  # the site is not reached any more
    with pytest.raises(SpecError, match="without reaching"), splice(model, site):
        next_token_loss(model, *batch())


def test_rows_are_committed_before_the_loss_is_measured_and_a_failure_is_a_warning(
    tmp_path, monkeypatch, caplog
):
    spec, seen = tiny_spec(tmp_path), []

    def fails(self, site):
        manifest = actcache.open(self.store.url).manifest
        seen.append(manifest.splits["train"]["n_blocks"])
        if site == SITES[0]:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return real(self, site)

    real = Harvester.fidelity
    with monkeypatch.context() as patch:
        patch.setattr(Harvester, "fidelity", fails)
        dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    assert seen == [3, 3]
    assert f"{SITES[0]}: the LM's loss with stored values could not be measured: [enforce fail" in caplog.text
    assert dataset.n_rows == 3072
    assert "ce_change" not in dataset.manifest.fidelity[SITES[0]]
    assert "ce_change" in dataset.manifest.fidelity[SITES[1]]
    assert not dataset.manifest.complete
    version = dataset.manifest.version
    with monkeypatch.context() as patch:  # again: no version is made for nothing
        patch.setattr(Harvester, "fidelity", fails)
        assert actcache.harvest(spec, str(tmp_path / "root"), progress=False).manifest.version == version
    measured = []
    monkeypatch.setattr(
        Harvester, "fidelity", lambda self, site: (measured.append(site), real(self, site))[1]
    )
    again = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    assert measured == [SITES[0]]
    assert again.manifest.complete
    assert np.array_equal(again.read(SITES[0], slice(None)), dataset.read(SITES[0], slice(None)))


@pytest.mark.parametrize("found", [(0.0, 0), (float("nan"), 10), (float("inf"), 10)])
def test_a_loss_that_is_no_number_is_noted_as_unknown(tmp_path, monkeypatch, found):
    """Sequences without a next token, or an LM whose float16 logits overflow: the rows are committed all the same."""
    monkeypatch.setattr(loss, "next_token_loss", lambda *a: found)
    dataset = actcache.harvest(tiny_spec(tmp_path), str(tmp_path / "root"), progress=False)
    assert dataset.manifest.complete
    for site in SITES:
        assert dataset.manifest.fidelity[site]["ce_change"] is None
    assert latest_version(dataset._shared.store) == 2
