"""Dashboards in Neuronpedia's upload layout, as SAEDashboard's `neuronpedia_export.py` writes it.

    {directory}/{model}/{layer}-{set}/ release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl,
        features/batch-N.jsonl.gz, activations/batch-N.jsonl.gz

Owns the mapping of our values to those fields; computes only what has no other home: the decoder
weights that point most along single neurons. Fields that need what a dashboard does not hold
(correlations, direct feature attribution, losses) are empty, as they are there by default.
Texts are whole tokens, values float32 to six digits. `binMin`, `binMax`, `binContains` are those
of SAEDashboard: -1, the largest activation, -1 for the strongest; for the others the interval, of
`_INTERVALS` equal ones from 0 to the largest, and the share of activations in it.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sae.report.dashboards import Dashboards
from sae.report.texts import TokenTexts
from sae.snippets import BEFORE, BINS

_BATCH = 128  # latents of a file
_INTERVALS = 8
_ALIGNED = 3  # neurons
_KINDS = {"resid": "res", "mlp": "mlp", "attn": "att", "hook_z": "att"}


def write_neuronpedia(
    d: Dashboards,
    s: Any,
    ds: Any,
    texts: TokenTexts,
    directory: Path,
    *,
    split: str = "validation",
    creator_id: str = "",
    creator_name: str = "",
) -> Path:
    """Write the layout and return the source's folder.

    Args:
        d: the dashboards.
        s: the SAE.
        ds: the dataset that they were made on.
        texts: of its tokens.
        directory: the layout's root.
        split: of the dataset.
        creator_id: Neuronpedia's id of the uploader; fill it in before uploading.
        creator_name: their name.
    """
    site = str(s.cfg["site"])
    name = Path(s.path).name if s.path else f"{s.cfg['architecture']}-{s.cfg['d_sae']}"
    model, set_name = _slug(ds.spec.model), f"{_kind(site)}-{_slug(name)}"
    source = f"{_layer(site)}-{set_name}"
    now = datetime.now(UTC).isoformat()
    common = {"creatorId": creator_id, "createdAt": now}
    folder = Path(directory) / model / source
    folder.mkdir(parents=True, exist_ok=True)
    described = f"{name} at {site} of {ds.spec.model}"
    _write_lines(folder / "release.jsonl", [_release(set_name, described, creator_name) | common])
    _write_lines(folder / "model.jsonl", [_model(model) | common | {"updatedAt": now}])
    _write_lines(folder / "sourceset.jsonl", [_source_set(model, set_name, described, creator_name) | common])
    n_prompts = int(ds.split(split).n_sequences)
    _write_lines(
        folder / "source.jsonl",
        [_source(model, source, set_name, ds, n_prompts) | common],
    )
    shared = {"modelId": model, "layer": source, **common}
    for kind in ("features", "activations"):
        (folder / kind).mkdir(exist_ok=True)
    for number, first in enumerate(range(0, len(d.latents), _BATCH)):
        batch = range(first, min(first + _BATCH, len(d.latents)))
        features = (
            {**shared, "hookName": site, "sourceSetName": set_name, **_feature(d, s, i, texts)} for i in batch
        )
        _write_lines(folder / "features" / f"batch-{number}.jsonl.gz", features)
        activations = ({**shared, **row} for i in batch for row in _activations(d, i, texts, source))
        _write_lines(folder / "activations" / f"batch-{number}.jsonl.gz", activations)
    return folder


# Rows of the two large files


def _feature(d: Dashboards, s: Any, i: int, texts: TokenTexts) -> dict[str, Any]:
    n = d.snippets
    decoder = s.W_dec[int(d.latents[i])].detach().float().cpu().numpy() if hasattr(s, "W_dec") else None
    row: dict[str, Any] = {
        "index": str(int(d.latents[i])),
        "maxActApprox": _number(n.largest[i]),
        "hasVector": decoder is not None,
        "vector": [] if decoder is None else _numbers(decoder),
        "vectorLabel": None,
        "vectorDefaultSteerStrength": _number(n.largest[i]) if decoder is not None else 10,
        "topkCosSimIndices": [] if d.nearest_ids is None else d.nearest_ids[i].tolist(),
        "topkCosSimValues": [] if d.nearest is None else _numbers(d.nearest[i]),
        "frac_nonzero": int(n.fires[i]) / max(n.n_rows, 1),
        "freq_hist_data_bar_heights": n.histogram[i].tolist(),
        "freq_hist_data_bar_values": _centres(0.0, float(n.largest[i])),
        "decoder_weights_dist": [],
    }
    row |= {
        f"correlated_{what}_{field}": []
        for what in ("neurons", "features")
        for field in ("indices", "pearson", "l1")
    }
    row |= {f"neuron_alignment_{field}": [] for field in ("indices", "values", "l1")}
    if decoder is not None:
        largest = np.argsort(-decoder, kind="stable")[:_ALIGNED]
        norm = max(float(np.abs(decoder).sum()), float(np.finfo(np.float32).tiny))
        row["neuron_alignment_indices"] = largest.tolist()
        row["neuron_alignment_values"] = _numbers(decoder[largest])
        row["neuron_alignment_l1"] = _numbers(np.abs(decoder[largest]) / norm)
    for field in ("neg", "pos"):
        row |= {f"{field}_str": [], f"{field}_values": []}
    row |= {"logits_hist_data_bar_heights": [], "logits_hist_data_bar_values": []}
    if d.logits is not None:
        for field, ids, values in (
            ("pos", d.logits.top_ids, d.logits.top),
            ("neg", d.logits.bottom_ids, d.logits.bottom),
        ):
            row[f"{field}_str"] = [texts.raw(int(token)) for token in ids[i]]
            row[f"{field}_values"] = _numbers(values[i])
        row["logits_hist_data_bar_heights"] = d.logits.histogram[i].tolist()
        row["logits_hist_data_bar_values"] = _centres(float(d.logits.bottom[i, 0]), float(d.logits.top[i, 0]))
    return row


def _activations(d: Dashboards, i: int, texts: TokenTexts, source: str) -> Iterator[dict[str, Any]]:
    n, latent = d.snippets, int(d.latents[i])
    first, stop = int(n.starts[i]), int(n.starts[i + 1])
    largest = float(n.largest[i])
    for row in range(first, stop):
        inside = n.token_ids[row] >= 0
        values = n.values[row][inside]
        interval = min(int(float(n.value[row]) / largest * _INTERVALS), _INTERVALS - 1)
        width = BINS // _INTERVALS
        count = int(n.histogram[i, interval * width : (interval + 1) * width].sum())
        strongest = row < first + n.n_top[i]
        place = f"{source} {latent} {n.sequence[row]} {n.position[row]}"
        yield {
            "id": "c" + hashlib.sha256(place.encode()).hexdigest()[:24],
            "tokens": [texts.raw(int(token)) for token in n.token_ids[row][inside]],
            "index": str(latent),
            "maxValue": _number(values.max()),
            "maxValueTokenIndex": int(values.argmax()),
            "minValue": _number(values.min()),
            "values": _numbers(values),
            "dataSource": None,
            "dataIndex": None,
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "lossValues": [],
            "logitContributions": None,
            "binMin": -1 if strongest else _number(interval * largest / _INTERVALS),
            "binMax": _number(largest) if strongest else _number((interval + 1) * largest / _INTERVALS),
            "binContains": -1 if strongest else count / max(int(n.histogram[i].sum()), 1),
            "qualifyingTokenIndex": int(np.flatnonzero(inside).searchsorted(BEFORE)),
        }


# The four small ones


def _release(name: str, described: str, creator_name: str) -> dict[str, Any]:
    return {
        "name": name,
        "description": described,
        "descriptionShort": described,
        "creatorName": creator_name,
        "creatorNameShort": creator_name,
        "creatorEmail": None,
        "visibility": "PUBLIC",
        "isNewUi": False,
        "featured": False,
        "urls": [],
        "defaultSourceSetName": None,
        "defaultSourceId": None,
        "defaultUmapSourceIds": [],
    }


def _model(model: str) -> dict[str, Any]:
    return {
        "id": model,
        "instruct": model.endswith("-it"),
        "displayNameShort": model,
        "displayName": model,
        "tlensId": None,
        "dimension": None,
        "visibility": "PUBLIC",
        "defaultSourceSetName": None,
        "defaultSourceId": None,
        "inferenceEnabled": False,
        "layers": 0,
        "neuronsPerLayer": 0,
        "owner": "",
        "website": None,
    }


def _source_set(model: str, name: str, described: str, creator_name: str) -> dict[str, Any]:
    return {
        "modelId": model,
        "name": name,
        "hasDashboards": True,
        "visibility": "PUBLIC",
        "description": described,
        "type": "",
        "creatorName": creator_name,
        "urls": [],
        "creatorEmail": None,
        "releaseName": name,
        "defaultOfModelId": None,
        "defaultRange": 1,
        "defaultShowBreaks": True,
        "showDfa": False,
        "showCorrelated": False,
        "showHeadAttribution": False,
        "showUmap": False,
    }


def _source(model: str, source: str, set_name: str, ds: Any, n_prompts: int) -> dict[str, Any]:
    return {
        "id": source,
        "modelId": model,
        "setName": set_name,
        "hasDashboards": True,
        "inferenceEnabled": False,
        "inferenceHosts": [],
        "saelensConfig": None,
        "saelensRelease": None,
        "saelensSaeId": None,
        "hfRepoId": None,
        "hfFolderId": None,
        "visibility": "PUBLIC",
        "defaultOfModelId": None,
        "hasUmap": False,
        "hasUmapLogSparsity": False,
        "hasUmapClusters": False,
        "num_prompts": n_prompts,
        "num_tokens_in_prompt": int(ds.spec.context_size),
        "dataset": str(ds.spec.corpus),
        "notes": None,
    }


# Names and numbers


def _layer(site: str) -> str:
    found = re.search(r"\d+", site)
    return found[0] if found else "0"


def _kind(site: str) -> str:
    return next((kind for part, kind in _KINDS.items() if part in site), _slug(site))


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "unnamed"


def _number(value: Any) -> float:
    return float(f"{float(value):.6g}")


def _numbers(values: Iterable[Any]) -> list[float]:
    return [_number(value) for value in values]


def _centres(low: float, high: float) -> list[float]:
    return _numbers(low + (np.arange(BINS) + 0.5) * (high - low) / BINS)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data, 5, mtime=0) if path.suffix == ".gz" else data)
