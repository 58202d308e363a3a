"""SAELens 6 directories (github.com/jbloomAus/SAELens): `cfg.json` and `sae_weights.safetensors`.

Written: standard, topk, gated and jumprelu as themselves; batchtopk and matryoshka as `jumprelu`
with a constant threshold, for SAELens' `load_from_disk` knows no inference form of BatchTopK. Its
comparison is strict and ours is not, so the next float below is written. Read: those four, and
the training saves `batchtopk` and `matryoshka_batchtopk`.

Shapes: D = d_in, F = d_sae.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from actcache.errors import CorruptObject, FormatError

from ..core import EXTRA_TENSORS, SAE, TENSORS, read_json
from ..tensors import read_tensors, write_atomically, write_tensors
from .weights import BY_AVERAGE, add_to_pre_activations, at_or_above, strictly_above, to_unit_norm

_VERSION = "6.54.12"
"""The version whose reader the export was checked with; without one >= 6 SAELens converts old files."""
CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
_ARCHITECTURES = {
    "standard": "standard",
    "topk": "topk",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "matryoshka",
}
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def write(s: SAE, directory: Path, metadata: Mapping[str, Any]) -> None:
    tensors = {name: getattr(s, name) for name in TENSORS}
    if s.cfg["architecture"] == "gated":
        tensors |= {"b_mag": tensors.pop("b_enc"), "b_gate": s.b_gate, "r_mag": s.r_mag}
    cfg: dict[str, Any] = {
        "architecture": "jumprelu" if s.cfg["architecture"] in BY_AVERAGE else s.cfg["architecture"],
        "d_in": s.cfg["d_in"],
        "d_sae": s.cfg["d_sae"],
        "dtype": str(s.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": _metadata(s.cfg, metadata),
    }
    if cfg["architecture"] == "topk":
        cfg |= {"k": s.cfg["k"], "rescale_acts_by_decoder_norm": False}
    if s.threshold is not None:
        threshold = strictly_above(s.threshold.detach().cpu(), s.cfg["architecture"])
        tensors["threshold"] = threshold.expand(s.cfg["d_sae"])
    write_tensors(
        directory / WEIGHTS_FILE, {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    )
    write_atomically(directory / CONFIG_FILE, (json.dumps(cfg, indent=2) + "\n").encode())


def _metadata(cfg: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    dataset = cfg.get("dataset") or {}
    found = {
        "sae_lens_version": _VERSION,
        "sae_lens_training_version": None,
        "model_name": cfg.get("model"),
        "hook_name": cfg.get("site"),
        "context_size": cfg.get("context_size"),
        "prepend_bos": cfg.get("prepend_bos"),
        "dataset_path": dataset.get("url"),
        "written_by": f"actcache {cfg.get('actcache_version', '')}".strip(),
    }
    return {name: value for name, value in {**found, **given}.items() if value is not None}


def read(directory: Path) -> SAE:
    """Its options that only rescale (`apply_b_dec_to_input` off, `rescale_acts_by_decoder_norm`)
    are folded into the weights; encode and decode give the same values."""
    cfg = read_json(directory / CONFIG_FILE)
    name = cfg.get("architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise FormatError(
            f"{directory} holds a SAELens {name!r} SAE; this version reads {', '.join(_ARCHITECTURES)}"
        )
    _refuse_options(cfg, directory)
    architecture = _ARCHITECTURES[name]
    tensors = read_tensors(directory / WEIGHTS_FILE)
    renamed = {"b_enc": "b_mag"} if architecture == "gated" else {}  # of the values; ours is b_enc for both
    if architecture in BY_AVERAGE and "topk_threshold" in tensors:  # a training save
        renamed["threshold"] = "topk_threshold"
    names = [*TENSORS, *EXTRA_TENSORS.get(architecture, ())]
    missing = [renamed.get(n, n) for n in names if renamed.get(n, n) not in tensors]
    if missing or ("k" not in cfg and architecture == "topk"):
        raise CorruptObject(f"{directory} lacks {', '.join(missing) or 'k'}; copy it again")
    dtype = _dtype(cfg, directory)
    w = {n: tensors[renamed.get(n, n)].to(dtype) for n in names}
    if architecture in BY_AVERAGE:
        w["threshold"] = at_or_above(w["threshold"])
    metadata = cfg.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise CorruptObject(f"{directory} has metadata that is no object; copy it again")
    settings = {
        "architecture": architecture,
        "d_in": cfg.get("d_in"),
        "d_sae": cfg.get("d_sae"),
        "k": cfg.get("k"),
        "site": metadata.get("hook_name"),
        "dtype": cfg.get("dtype", "float32"),
        "model": metadata.get("model_name"),
        "context_size": metadata.get("context_size"),
        "prepend_bos": metadata.get("prepend_bos"),
        "loaded_from": "saelens",
        "saelens": cfg,
    }
    s = SAE(settings, **w, path=directory)
    if cfg.get("rescale_acts_by_decoder_norm"):
        to_unit_norm(s, threshold_too=False)
    if not cfg.get("apply_b_dec_to_input", True):
        add_to_pre_activations(s, s.b_dec @ s.W_enc)
    return s


def _refuse_options(cfg: Mapping[str, Any], directory: Path) -> None:
    for option in ("normalize_activations", "reshape_activations"):
        if cfg.get(option, "none") not in ("none", None):
            raise FormatError(
                f"{directory} sets {option} to {cfg[option]!r}; only 'none' is read. Fold it with SAELens first."
            )
    # before version 6: TopK was an activation function of `standard`, and values could be rescaled
    old = {
        name: cfg.get(name) for name in ("activation_fn", "activation_fn_str", "finetuning_scaling_factor")
    }
    for option, value in old.items():
        if value not in (None, False, "relu"):
            raise FormatError(
                f"{directory} was written by SAELens before version 6 and sets {option} to {value!r}; "
                "load and save it with SAELens 6 first"
            )


def _dtype(cfg: Mapping[str, Any], directory: Path) -> torch.dtype:
    name = str(cfg.get("dtype", "float32")).removeprefix("torch.")
    if name not in _DTYPES:
        raise FormatError(f"{directory} has dtype {name!r}; this version reads {', '.join(_DTYPES)}")
    return _DTYPES[name]
