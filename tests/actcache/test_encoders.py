"""Encoders and state-space models by module path: which class loads them, padding, a whole harvest."""

import numpy as np
import pytest
import torch
import transformers
from tiny_harvest import tiny_spec, write_corpus
from tiny_models import save_tiny_lm, shared_model, tiny_config, tiny_model, tokens

import actcache
from actcache.capture import run_capture, site_names
from actcache.errors import SpecError
from actcache.lm import load_lm, skeleton

BERT_SITE, MAMBA_SITE = "bert.encoder.layer.1:out", "backbone.layers.1:out"


def hidden_state(model, input_ids, number):
    """One of Hugging Face's own `hidden_states`, float32 [T, D]; one sequence, without padding."""
    with torch.inference_mode():
        ids_BT = torch.from_numpy(input_ids.astype(np.int64))[None]
        return model(ids_BT, output_hidden_states=True).hidden_states[number][0].numpy()


@pytest.mark.parametrize(
    ("family", "site", "number"),
    [("bert", BERT_SITE, 2), ("mamba", MAMBA_SITE, 1)],  # Mamba's hidden_states begin after block 0
)
def test_rows_are_those_of_each_sequence_alone_the_short_last_one_included(tmp_path, family, site, number):
    write_corpus(tmp_path / "corpus", n_documents=30)
    spec = tiny_spec(tmp_path, family, sites=[site], n_tokens=10**6, precision="fp32")
    dataset = actcache.harvest(spec, str(tmp_path / "root"), lm_batch=8, progress=False)
    model = load_lm(spec.model).model
    rows = dataset.rows(slice(None))
    stored = dataset.read(site, slice(None))
    lengths = [len(dataset.context(sequence)) for sequence in range(dataset.n_sequences)]
    assert min(lengths) < spec.context_size  # or padding would not be tested
    for sequence in range(dataset.n_sequences):
        alone_TD = hidden_state(model, dataset.context(sequence), number)
        here = rows.sequence == sequence
        # A few float32 roundings of values of order 1: another batch, other kernels.
        np.testing.assert_allclose(stored[here], alone_TD[rows.position[here]], rtol=2e-5, atol=2e-5)


def test_fidelity_of_an_encoder_is_not_measured_and_the_dataset_is_complete(tmp_path):
    spec = tiny_spec(tmp_path, "bert", sites=[BERT_SITE], n_tokens=1024)
    dataset = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    losses = dataset.manifest.fidelity[BERT_SITE]
    assert [losses[name] for name in ("ce_clean", "ce_stored", "ce_change", "n_tokens")] == [None] * 3 + [0]
    assert dataset.manifest.complete
    again = actcache.harvest(spec, str(tmp_path / "root"), progress=False)
    assert again.manifest.version == dataset.manifest.version


def test_fidelity_of_a_causal_model_without_attention_is_measured(tmp_path):
    spec = tiny_spec(tmp_path, "mamba", sites=[MAMBA_SITE], n_tokens=1024)
    losses = actcache.harvest(spec, str(tmp_path / "root"), progress=False).manifest.fidelity[MAMBA_SITE]
    assert losses["n_tokens"] > 0
    assert losses["ce_change"] == losses["ce_stored"] - losses["ce_clean"] != 0


@pytest.mark.parametrize(
    ("family", "written_by", "loaded", "is_causal", "predicts"),
    [
        ("bert", "BertForMaskedLM", "BertForMaskedLM", False, False),
        ("bert", "BertModel", "BertModel", False, False),
        ("bert", "BertForSequenceClassification", "BertModel", False, False),
        ("mamba", "MambaForCausalLM", "MambaForCausalLM", True, True),
        ("llama", "LlamaForCausalLM", "LlamaForCausalLM", True, True),
        ("llama", "LlamaModel", "LlamaModel", True, False),
        ("llama", "LlamaForSequenceClassification", "LlamaModel", True, False),
    ],
)
def test_a_checkpoint_is_loaded_by_the_class_that_wrote_it_or_as_its_body(
    tmp_path, family, written_by, loaded, is_causal, predicts
):
    options = {"pad_token_id": 0} if written_by.endswith("Classification") else {}
    getattr(transformers, written_by)(tiny_config(family, **options)).save_pretrained(tmp_path)
    lm = load_lm(str(tmp_path))
    assert type(lm.model).__name__ == type(skeleton(str(tmp_path))).__name__ == loaded
    assert (lm.is_causal, lm.predicts_next_token) == (is_causal, predicts)


def test_a_body_has_the_sites_of_its_family(tmp_path):
    whole = shared_model("llama")
    whole.model.save_pretrained(tmp_path)
    body, site = load_lm(str(tmp_path)).model, "blocks.1.hook_resid_post"
    assert site_names(body) == site_names(whole)
    assert torch.equal(*(run_capture(model, tokens(), [site])[site] for model in (body, whole)))


def test_what_a_later_token_changes_agrees_with_is_causal(tmp_path):
    for family in ("bert", "mamba", "gpt2", "gemma3"):
        lm = load_lm(str(save_tiny_lm(tmp_path / family, family, tokenizer=False)))
        ids = tokens(batch=1)
        changed = ids.clone()
        changed[0, -1] = (ids[0, -1] + 1) % 90
        with torch.no_grad():
            before, after = (lm.model(x).logits[:, :-1] for x in (ids, changed))
        assert torch.equal(before, after) == lm.is_causal, family


def test_a_decoder_of_an_encoders_type_is_causal(tmp_path):
    model = transformers.BertLMHeadModel(tiny_config("bert", is_decoder=True))
    model.save_pretrained(tmp_path)
    assert load_lm(str(tmp_path)).predicts_next_token


@pytest.mark.parametrize(
    ("model_type", "sizes", "says"),
    [
        ("t5", {"d_model": 16, "num_layers": 1}, r"is an encoder-decoder \(t5\)"),
        ("vit", {"num_hidden_layers": 1, "hidden_size": 12}, "is a ViTModel, which reads pixel_values"),
        ("timesfm", {}, "which reads|no model that reads token ids"),
    ],
)
def test_a_model_that_reads_no_single_sequence_of_token_ids_is_one_clear_line(
    tmp_path, model_type, sizes, says
):
    transformers.AutoConfig.for_model(model_type, **sizes).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=says) as caught:
        skeleton(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_bert_attends_to_padding_unless_it_is_masked():
    model, ids = tiny_model("bert"), tokens()
    short = ids[:, :7]
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    alone = run_capture(model, short, [BERT_SITE])[BERT_SITE]
    masked = run_capture(model, ids, [BERT_SITE], mask)[BERT_SITE][:, :7]
    torch.testing.assert_close(masked, alone, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(run_capture(model, ids, [BERT_SITE])[BERT_SITE][:, :7], alone, atol=1e-2)
