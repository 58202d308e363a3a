"""SAEs in other projects' formats; the only file that knows foreign names.

SAELens 6 (github.com/jbloomAus/SAELens): a directory with `cfg.json` and
`sae_weights.safetensors`. Written: standard, topk, gated and jumprelu as themselves; batchtopk and
matryoshka as `jumprelu` with a constant threshold, for SAELens' `load_from_disk` knows no
inference form of BatchTopK. Its jumprelu is active strictly above the threshold and theirs at or
above it, so the next float below is written. Read: standard, topk, gated, jumprelu.

Shapes: D = d_in, F = d_sae.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.errors import CorruptObject, FormatError

from .checkpoint import read_tensors, write_atomically, write_tensors
from .core import EXTRA_TENSORS, SAE, TENSORS, read_json

FORMATS = ("saelens",)

_SAELENS_VERSION = "6.54.12"
"""The version whose reader the export was checked with; without one >= 6 SAELens converts old files."""
_CONFIG_FILE, _WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
_READABLE = ("standard", "topk", "gated", "jumprelu")
_AS_JUMPRELU = ("batchtopk", "matryoshka")
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def export(s: SAE, format: str, out: str | os.PathLike[str], **metadata: Any) -> Path:
    """Write `s` into the directory `out` for another project; returns the directory.

    Args:
        s: the SAE.
        format: "saelens".
        out: the directory; files of the same names in it are replaced.
        metadata: facts that readers of the format look for and that take precedence over what
            `s.cfg` knows: model_name, hook_name, context_size, prepend_bos, neuronpedia_id.

    Raises:
        ValueError: an unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not known; there is {', '.join(FORMATS)}")
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(s, name) for name in TENSORS}
    if s.cfg["architecture"] == "gated":
        tensors |= {"b_mag": tensors.pop("b_enc"), "b_gate": s.b_gate, "r_mag": s.r_mag}
    cfg: dict[str, Any] = {
        "architecture": "jumprelu" if s.cfg["architecture"] in _AS_JUMPRELU else s.cfg["architecture"],
        "d_in": s.cfg["d_in"],
        "d_sae": s.cfg["d_sae"],
        "dtype": str(s.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": _saelens_metadata(s.cfg, metadata),
    }
    if cfg["architecture"] == "topk":
        cfg |= {"k": s.cfg["k"], "rescale_acts_by_decoder_norm": False}
    if s.threshold is not None:
        tensors["threshold"] = _saelens_threshold(s)
    write_tensors(
        directory / _WEIGHTS_FILE, {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    )
    write_atomically(directory / _CONFIG_FILE, (json.dumps(cfg, indent=2) + "\n").encode())
    return directory


def load_saelens(path: str | os.PathLike[str]) -> SAE:
    """The SAE in a SAELens directory, for inference.

    Its options that only rescale (`apply_b_dec_to_input` off, `rescale_acts_by_decoder_norm`)
    are folded into the weights; encode and decode give the same values.

    Raises:
        FormatError: an architecture or normalisation that can not be represented here.
        CorruptObject: a file is damaged or missing a tensor.
    """
    directory = Path(path)
    cfg = read_json(directory / _CONFIG_FILE)
    architecture = cfg.get("architecture")
    if architecture not in _READABLE:
        raise FormatError(
            f"{directory} holds a SAELens {architecture!r} SAE; this version reads {', '.join(_READABLE)}"
        )
    for option in ("normalize_activations", "reshape_activations"):
        if cfg.get(option, "none") not in ("none", None):
            raise FormatError(
                f"{directory} sets {option} to {cfg[option]!r}; only 'none' is read. Fold it with SAELens first."
            )
    tensors, _ = read_tensors(directory / _WEIGHTS_FILE)
    bias = "b_mag" if architecture == "gated" else "b_enc"  # of the values; ours is b_enc for both
    names = ["W_enc", bias, "W_dec", "b_dec", *EXTRA_TENSORS.get(architecture, ())]
    missing = [name for name in names if name not in tensors]
    if missing or ("k" not in cfg and architecture == "topk"):
        raise CorruptObject(f"{directory} lacks {', '.join(missing) or 'k'}; copy it again")
    w = {name: tensors[name].to(_dtype(cfg, directory)) for name in names}
    w["b_enc"] = w.pop(bias)
    _fold(w, cfg)
    metadata = cfg.get("metadata") or {}
    settings = {
        "architecture": architecture,
        "d_in": cfg.get("d_in"),
        "d_sae": cfg.get("d_sae"),
        "k": cfg.get("k"),
        "site": metadata.get("hook_name"),
        "dtype": cfg.get("dtype", "float32"),
        "model": metadata.get("model_name"),
        "context_size": metadata.get("context_size"),
        "loaded_from": "saelens",
        "saelens": cfg,
    }
    return SAE(settings, **w, path=directory)


def _fold(w: dict[str, Tensor], cfg: Mapping[str, Any]) -> None:
    """SAELens' options, turned into weights of the plain formula."""
    if cfg.get("rescale_acts_by_decoder_norm"):
        norms_F = torch.linalg.vector_norm(w["W_dec"], dim=1)
        w["W_enc"], w["b_enc"] = w["W_enc"] * norms_F, w["b_enc"] * norms_F
        w["W_dec"] = w["W_dec"] / norms_F[:, None]
    if not cfg.get("apply_b_dec_to_input", True):
        hidden_F = w["b_dec"] @ w["W_enc"]
        if "b_gate" in w:
            w["b_gate"] = w["b_gate"] + hidden_F
            hidden_F = hidden_F * w["r_mag"].exp()
        w["b_enc"] = w["b_enc"] + hidden_F


def _saelens_threshold(s: SAE) -> Tensor:
    """[F], for a strict comparison."""
    assert s.threshold is not None
    threshold_F = s.threshold.detach().cpu().expand(s.cfg["d_sae"])
    if s.cfg["architecture"] not in _AS_JUMPRELU:
        return threshold_F
    # threshold 0 stays 0: a latent of value 0 is not active whatever the comparison
    below_F = torch.nextafter(threshold_F, torch.tensor(-torch.inf, dtype=threshold_F.dtype))
    return torch.where(threshold_F > 0, below_F, threshold_F)


def _saelens_metadata(cfg: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    dataset = cfg.get("dataset") or {}
    found = {
        "sae_lens_version": _SAELENS_VERSION,
        "sae_lens_training_version": None,
        "model_name": cfg.get("model"),
        "hook_name": cfg.get("site"),
        "context_size": cfg.get("context_size"),
        "prepend_bos": cfg.get("prepend_bos"),
        "dataset_path": dataset.get("url"),
        "written_by": f"actcache {cfg.get('actcache_version', '')}".strip(),
    }
    return {name: value for name, value in {**found, **given}.items() if value is not None}


def _dtype(cfg: Mapping[str, Any], directory: Path) -> torch.dtype:
    name = str(cfg.get("dtype", "float32")).removeprefix("torch.")
    if name not in _DTYPES:
        raise FormatError(f"{directory} has dtype {name!r}; this version reads {', '.join(_DTYPES)}")
    return _DTYPES[name]
