"""The Neuronpedia layout: its files and fields, and values that recomputation gives again."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_report import D_MODEL, D_SAE, HOSTILE, SITE, random_sae, word_tokenizer
from toy_dataset import tiny_lm, toy_dataset

from sae.evals import evaluate
from sae.report.dashboards import build
from sae.report.neuronpedia import write_neuronpedia
from sae.report.texts import TokenTexts

# SAEDashboard, sae_dashboard/neuronpedia/neuronpedia_export.py: the fields of its dataclasses
ACTIVATION = """id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId dataSource
    dataIndex dfaValues dfaTargetIndex dfaMaxValue createdAt lossValues logitContributions binMin binMax
    binContains qualifyingTokenIndex"""
FEATURE = """modelId layer index creatorId createdAt maxActApprox hasVector vector vectorLabel
    vectorDefaultSteerStrength hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices
    neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices correlated_neurons_pearson
    correlated_neurons_l1 correlated_features_indices correlated_features_pearson correlated_features_l1
    neg_str neg_values pos_str pos_values frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values
    logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist sourceSetName"""
MODEL = """id instruct creatorId displayNameShort displayName tlensId dimension visibility defaultSourceSetName
    defaultSourceId inferenceEnabled layers neuronsPerLayer createdAt owner updatedAt website"""
SOURCE = """id modelId setName creatorId hasDashboards inferenceEnabled inferenceHosts saelensConfig
    saelensRelease saelensSaeId hfRepoId hfFolderId visibility defaultOfModelId hasUmap hasUmapLogSparsity
    hasUmapClusters num_prompts num_tokens_in_prompt dataset notes createdAt"""
RELEASE = """name description creatorName creatorId visibility isNewUi featured descriptionShort urls
    creatorEmail creatorNameShort defaultSourceSetName defaultSourceId defaultUmapSourceIds createdAt"""
SOURCE_SET = """modelId name creatorId hasDashboards visibility description type creatorName urls creatorEmail
    releaseName defaultOfModelId defaultRange defaultShowBreaks showDfa showCorrelated showHeadAttribution
    showUmap createdAt"""


@pytest.fixture(scope="module")
def upload(tmp_path_factory):
    """(SAE, split, LM, tokenizer, folder) of a written upload."""
    path = tmp_path_factory.mktemp("upload")
    lm = tiny_lm()
    ds = toy_dataset(lm, n_sequences=40)
    s = random_sae(3)
    s.save(path / "topk-40-3")
    evaluate(s, ds)
    tokenizer = word_tokenizer([HOSTILE.get(i, f" word{i}") for i in range(64)])
    view = ds.split("validation")
    table = s.path / "latents.parquet"
    d = build(s, view, view.n_rows, table, n_latents=D_SAE, seed=0, W_U_VD=lm.model.lm_head.weight)
    folder = write_neuronpedia(d, s, ds, TokenTexts(tokenizer), path / "upload")
    assert folder == path / "upload" / "tiny-gpt2" / "0-res-topk-40-3"
    return s, view, lm, tokenizer, folder


def lines(path):
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in text.decode().splitlines()]


def test_files_and_fields_are_those_of_saedashboard(upload):
    folder = upload[-1]
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    wanted = {
        "release.jsonl": RELEASE,
        "model.jsonl": MODEL,
        "sourceset.jsonl": SOURCE_SET,
        "source.jsonl": SOURCE,
        "features/batch-0.jsonl.gz": FEATURE,
        "activations/batch-0.jsonl.gz": ACTIVATION,
    }
    assert found == sorted(wanted)
    for name, fields in wanted.items():
        rows = lines(folder / name)
        assert rows
        assert all(set(row) == set(fields.split()) for row in rows), name
    (source,) = lines(folder / "source.jsonl")
    assert source["id"] == folder.name
    assert source["num_prompts"] == 40


def test_features_are_what_the_weights_and_all_activations_give(upload):
    s, view, lm, tokenizer, folder = upload
    latents_NF = s.encode(view.read(SITE, slice(None))).numpy()
    W_U = lm.model.lm_head.weight.double().numpy()
    features = lines(folder / "features/batch-0.jsonl.gz")
    assert [f["index"] for f in features] == [str(i) for i in range(D_SAE)]
    for i, f in enumerate(features):
        values = latents_NF[:, i][latents_NF[:, i] > 0]
        assert f["frac_nonzero"] == len(values) / len(latents_NF)
        assert f["maxActApprox"] == pytest.approx(values.max(initial=0), rel=1e-5)
        assert f["vector"] == pytest.approx(s.W_dec[i].tolist(), rel=1e-5, abs=1e-9)
        assert sum(f["freq_hist_data_bar_heights"]) == len(values)
        logits = W_U @ s.W_dec[i].double().numpy()
        order = np.argsort(-logits)
        assert f["pos_values"] == pytest.approx(logits[order[:10]], abs=1e-4)
        assert f["neg_values"] == pytest.approx(logits[order[::-1][:10]], abs=1e-4)
        assert f["pos_str"] == [tokenizer.decode([int(t)]) for t in order[:10]]
        assert sum(f["logits_hist_data_bar_heights"]) == len(W_U)
        weights = s.W_dec[i].numpy()
        assert f["neuron_alignment_indices"] == np.argsort(-weights)[:3].tolist()
        share = np.abs(weights[f["neuron_alignment_indices"]]) / np.abs(weights).sum()
        assert f["neuron_alignment_l1"] == pytest.approx(share, rel=1e-4)


def test_activations_are_those_of_the_sae_on_the_very_tokens(upload):
    s, view, _, tokenizer, folder = upload
    rows = view.rows(slice(None))
    latents_NF = s.encode(view.read(SITE, slice(None))).numpy()
    activations = lines(folder / "activations/batch-0.jsonl.gz")
    assert len({a["id"] for a in activations}) == len(activations) > D_SAE
    text = {}
    for q in range(view.n_sequences):
        text[q] = [tokenizer.decode([int(t)]) for t in view.context(q)]
    for a in activations[::7]:
        assert len(a["tokens"]) == len(a["values"]) <= 32
        assert a["values"][a["maxValueTokenIndex"]] == a["maxValue"] == max(a["values"])
        peak = a["qualifyingTokenIndex"]
        i = int(a["index"])
        found = False
        near = np.isclose(latents_NF[:, i], a["values"][peak], rtol=1e-5, atol=0)
        for n in np.flatnonzero(near):
            q, p = int(rows.sequence[n]), int(rows.position[n])
            if text[q][max(0, p - peak) : p - peak + len(a["tokens"])] != a["tokens"]:
                continue
            at = {int(rows.position[m]): m for m in np.flatnonzero(rows.sequence == q)}
            wanted = [
                latents_NF[at[t], i] if (t := p - peak + c) in at else 0 for c in range(len(a["tokens"]))
            ]
            found |= a["values"] == pytest.approx(wanted, rel=1e-5)
        assert found, a
        if a["binMin"] == -1:
            assert a["binContains"] == -1
        else:
            assert a["binMin"] <= a["values"][peak] * (1 + 1e-5)
            assert a["values"][peak] <= a["binMax"] * (1 + 1e-5)
            values = latents_NF[:, i][latents_NF[:, i] > 0]
            inside = ((values >= a["binMin"]) & (values <= a["binMax"])).mean()
            assert a["binContains"] == pytest.approx(inside, abs=1.5 / len(values))


def test_an_sae_without_an_lm_leaves_logits_empty(upload, tmp_path):
    s, view, _, tokenizer, _ = upload
    d = build(s, view, view.n_rows, s.path / "latents.parquet", n_latents=D_SAE, seed=0)
    ds = toy_dataset(tiny_lm(), n_sequences=8)
    folder = write_neuronpedia(replace(d), s, ds, TokenTexts(tokenizer), tmp_path, creator_id="me")
    first = lines(folder / "features/batch-0.jsonl.gz")[0]
    assert first["pos_str"] == first["logits_hist_data_bar_heights"] == []
    assert first["creatorId"] == "me"
    assert len(first["vector"]) == D_MODEL
    assert torch.tensor(first["vector"]).norm() == pytest.approx(1, rel=1e-4)
