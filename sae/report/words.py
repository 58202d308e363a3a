"""Sentences and numbers of the report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from actcache.progress import format_bytes
from sae.report.entries import Entry

ARCHITECTURES = {
    "standard": "ReLU",
    "gated": "Gated",
    "jumprelu": "JumpReLU",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "matryoshka": "Matryoshka",
}

LATENT_COLUMNS = {  # of latents.parquet: how it is called, what it means
    "density": ("frequency", "share of the rows on which it fires"),
    "max_activation": ("largest activation", "over those rows"),
    "mean_activation": ("mean when active", "its mean activation over the rows on which it fires"),
    "fires": ("rows", "on which it fires"),
    "prompts": ("sequences", "in which it fires"),
    "positional_score": (
        "positional score",
        "share of its variance that the position in the sequence explains: near 1 it tells where, near 0 what",
    ),
    "partner": ("partner", "the latent that fires most with it"),
    "partner_overlap": (
        "partner's overlap",
        "rows on which both fire over rows on which either does (Jaccard)",
    ),
    "nearest": ("nearest", "the latent with the nearest decoder direction"),
    "nearest_cosine": ("nearest cosine", "cosine between the decoder directions of the two"),
    "encoder_decoder_cosine": ("encoder to decoder", "cosine between its encoder and its decoder direction"),
    "logit_mean": ("logit mean", "mean of its effects on the logits of all tokens"),
    "logit_std": ("logit std", "their standard deviation"),
    "logit_skew": ("logit skew", "their skewness: positive where it raises a few tokens much"),
    "logit_kurtosis": (
        "logit kurtosis",
        "their excess kurtosis: 0 for a normal distribution, high where few tokens are meant",
    ),
    "token_set": ("kind of token", "whose logits it raises or lowers most, as a kind"),
    "token_set_score": (
        "of that kind",
        "how far it raises (positive, at most 1) or lowers all tokens of that kind",
    ),
}


def architecture(cfg: Mapping[str, Any]) -> str:
    """The published name of an SAE's architecture."""
    name = str(cfg.get("architecture"))
    return ARCHITECTURES.get(name, name)


def lead(entries: Sequence[Entry], ds: Any) -> str:
    """What was trained, on what, in one sentence."""
    n = len(entries)
    sites = sorted({e.site for e in entries if e.site})
    n_stopped = sum(e.stopped is not None for e in entries)
    rows = {e.cfg["rows"] for e in entries if "rows" in e.cfg and (n == 1 or e.stopped is None)}
    model = (
        ds.spec.model if ds is not None else next((e.cfg["model"] for e in entries if e.cfg.get("model")), "")
    )
    if n == 1:
        d_sae, kind = entries[0].cfg.get("d_sae"), architecture(entries[0].cfg)
        size = f" of {d_sae:,} latents" if d_sae else ""
        sentence = f"A {kind} sparse autoencoder{size}"
    else:
        sentence = f"{_in_words(n)} sparse autoencoders"
    if len(rows) == 1:
        sentence += f", trained on {_count(rows.pop())} activation rows"
    if n_stopped and n > 1:
        sentence += f" ({n_stopped} of them stopped at rungs, on fewer)"
    if model:
        sentence += f" of {model}"
    if sites:
        sentence += f" at {' and '.join(sites) if len(sites) < 3 else f'{len(sites)} sites'}"
    return sentence + "."


def best(entries: Sequence[Entry]) -> str:
    """How good the best one is; empty without an evaluation."""
    measured = [e for e in entries if e.figure("fvu") is not None and e.figure("l0") is not None]
    if not measured:
        return ""
    with_lm = [e for e in measured if e.figure("ce_recovered_zero") is not None]
    if with_lm:
        chosen = max(with_lm, key=lambda e: e.figure("ce_recovered_zero") or 0)
    else:
        chosen = min(measured, key=lambda e: e.figure("fvu") or 0)
    where = f" at {chosen.site}" if len({e.site for e in entries}) > 1 else ""
    name = "it" if len(entries) == 1 else f"{chosen.short_name}{where}"
    d_sae = chosen.cfg.get("d_sae") or (chosen.result or {}).get("sae", {}).get("d_sae")
    of = f" of {d_sae:,}" if d_sae else ""
    text = f"With {chosen.figure('l0'):.1f}{of} latents active on a row, {name} "
    left = with_error(100 * (chosen.figure("fvu") or 0), _times(chosen.error("fvu"), 100), 3)
    text += f"leaves {left} % of the variance unexplained"
    if with_lm:
        share = with_error(
            100 * (chosen.figure("ce_recovered_zero") or 0), _times(chosen.error("ce_recovered_zero"), 100)
        )
        text += f" and recovers {share} % of the loss that zeros in its place would cost"
    return text + (", the most in this run." if with_lm and len(entries) > 1 else ".")


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def with_error(value: float, error: float | None, digits: int = 4) -> str:
    """`0.0312 ± 0.0014`: two digits of the error and as many decimals; `digits` digits without one."""
    if error is None or not error > 0 or not math.isfinite(error):
        return significant(value, digits)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{decimals}f} ± {error:.{decimals}f}"


def percent(share: float) -> str:
    """Two significant digits below 10 %, one decimal above; `96.8 %`, `0.031 %`."""
    value = 100 * share
    return f"{value:.1f} %" if abs(value) >= 10 or value == 0 else f"{value:.2g} %"


def significant(value: float, digits: int = 3) -> str:
    """Three significant digits without an exponent where that is short: `0.000947`, `12.3`."""
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def _in_words(n: int) -> str:
    words = ("Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")
    return words[n - 2] if 2 <= n < 2 + len(words) else str(n)


def _count(n: float) -> str:
    return f"{n / 1e6:.3g} million" if n >= 1e6 else f"{n:,.0f}"


def dataset_card(ds: Any) -> dict[str, Any] | None:
    """What the dataset says of itself: facts (term, value) and a row for each site."""
    if ds is None:
        return None
    identity, manifest = ds.spec, getattr(ds, "manifest", None)
    model, tokens = identity.get("model", {}), identity.get("tokens", {})
    provenance = getattr(manifest, "provenance", {}) or {}
    splits = getattr(manifest, "splits", {}) or {"train": {"n_rows": ds.n_rows}}
    order = sorted(splits, key=lambda name: -splits[name]["n_rows"])
    rows = ", ".join(f"{splits[name]['n_rows']:,} {name}" for name in order if splits[name]["n_rows"])
    revision = str(model.get("revision", "")).removeprefix("sha256:")[:12]
    bos = ", BOS first" if tokens.get("bos_token_id") is not None else ""
    facts = [
        ("Language model", f"{ds.spec.model} ({revision})"),
        ("Corpus", str(ds.spec.corpus)),
        ("Context", f"{ds.spec.context_size} tokens{bos}"),
        ("Rows", rows),
        ("Precision", f"{identity.get('precision', '')}, LM in {model.get('lm_dtype', '')}"),
    ]
    if hasattr(ds, "size_bytes"):
        size = sum(ds.split(name).size_bytes() for name, size in splits.items() if size["n_rows"])
        facts.append(("Size on disk", f"{format_bytes(size)} with tokens and row metadata"))
    if provenance.get("rows_per_s"):
        rate = f"{provenance['rows_per_s']:,.0f} rows/s with {provenance.get('workers', 1)} worker(s)"
        facts.append(("Last harvest", f"{rate} on {provenance.get('device', 'cpu')}"))
    facts += [("Dataset", ds.id[:12]), ("Address", ds.url)]
    fidelity = getattr(manifest, "fidelity", {}) or {}
    sites = [{**ds.stats(site), "site": site, **fidelity.get(site, {})} for site in ds.sites]
    for row in sites:
        row["d_in"] = len(row["mean"])
    return {"facts": [(term, value) for term, value in facts if value], "sites": sites}
