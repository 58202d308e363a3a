"""dictionary_learning directories (github.com/saprmarks/dictionary_learning): `ae.pt` and `config.json`.

`ae.pt` is a state dict, read by torch's restricted unpickler (`weights_only`: tensors and
numbers, no code). Written, in float32, and read: all six architectures. A batchtopk threshold is
written one float lower, for the comparison is strict there and not here.

Shapes: D = d_in, F = d_sae.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache.errors import CorruptObject, FormatError, SpecError

from ..core import SAE, TENSORS, read_json
from ..tensors import write_atomically
from .weights import (
    BY_AVERAGE,
    add_to_pre_activations,
    at_or_above,
    layer_of,
    strictly_above,
    to_unit_norm,
)

WEIGHTS_FILE, CONFIG_FILE = "ae.pt", "config.json"


@dataclass(frozen=True)
class _Class:
    """A `dict_class` of dictionary_learning: whose it is, and what its tensors are called there."""

    architecture: str
    trainer: str
    tensors: Mapping[str, str]
    """Our name to theirs. `.weight` of a torch Linear is the transpose of ours."""


_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_PLAIN = {name: name for name in TENSORS}
_THRESHOLD = {"threshold": "threshold"}
_GATED = {"b_enc": "mag_bias", "b_gate": "gate_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"}
_CLASSES = {
    "AutoEncoder": _Class("standard", "StandardTrainer", _LINEAR | {"b_dec": "bias"}),
    "GatedAutoEncoder": _Class("gated", "GatedSAETrainer", _LINEAR | _GATED),
    "JumpReluAutoEncoder": _Class("jumprelu", "JumpReluTrainer", _PLAIN | _THRESHOLD),
    "AutoEncoderTopK": _Class("topk", "TopKTrainer", _LINEAR | {"b_dec": "b_dec"}),
    "BatchTopKSAE": _Class("batchtopk", "BatchTopKTrainer", _LINEAR | {"b_dec": "b_dec"} | _THRESHOLD),
    "MatryoshkaBatchTopKSAE": _Class("matryoshka", "MatryoshkaBatchTopKTrainer", _PLAIN | _THRESHOLD),
    # of the April 2024 update; read only, for AutoEncoder says the same
    "AutoEncoderNew": _Class("standard", "StandardTrainer", _LINEAR | {"b_dec": "decoder.bias"}),
}
_B_DEC_NOT_SUBTRACTED = ("JumpReluAutoEncoder", "AutoEncoderNew")


def write(s: SAE, directory: Path, metadata: Mapping[str, Any]) -> None:
    cfg = s.cfg
    dict_class = next(name for name, c in _CLASSES.items() if c.architecture == cfg["architecture"])
    kind = _CLASSES[dict_class]
    w = {name: getattr(s, name).detach().cpu().float() for name in kind.tensors}
    if "threshold" in w:
        w["threshold"] = strictly_above(w["threshold"], cfg["architecture"])
        if cfg["architecture"] in BY_AVERAGE and w["threshold"].numel() > 1:
            raise SpecError(
                f"this {cfg['architecture']} SAE has a threshold for each latent; dictionary_learning has "
                "one for all. Export it to saelens."
            )
    if dict_class in _B_DEC_NOT_SUBTRACTED:
        w["b_enc"] = w["b_enc"] - w["b_dec"] @ w["W_enc"]
    if "threshold" in w and dict_class == "JumpReluAutoEncoder":
        w["threshold"] = w["threshold"].expand(cfg["d_sae"])
    state = {
        theirs: (w[ours].T if theirs.endswith(".weight") else w[ours]).contiguous()
        for ours, theirs in kind.tensors.items()
    }
    trainer: dict[str, Any] = {
        "trainer_class": kind.trainer,
        "dict_class": dict_class,
        "activation_dim": cfg["d_in"],
        "dict_size": cfg["d_sae"],
        "lr": cfg.get("lr"),
        "steps": cfg.get("steps"),
        "seed": (cfg.get("training") or {}).get("seed"),
        "device": "cpu",
        "layer": layer_of(metadata.get("hook_name", cfg.get("site"))),
        "lm_name": metadata.get("model_name", cfg.get("model")),
        "wandb_name": None,
        "submodule_name": metadata.get("hook_name", cfg.get("site")),
    }
    if cfg["architecture"] in ("topk", *BY_AVERAGE):
        trainer["k"] = _positive(cfg.get("k"), "k")
        state["k"] = torch.tensor(trainer["k"], dtype=torch.int32)
        state.setdefault("threshold", torch.tensor(-1.0))
    if cfg["architecture"] == "matryoshka":
        trainer["group_sizes"] = _group_sizes(cfg)
        state["group_sizes"] = torch.tensor(trainer["group_sizes"])
    buffer = {
        "d_submodule": cfg["d_in"],
        "ctx_len": metadata.get("context_size", cfg.get("context_size")),
        "written_by": f"actcache {cfg.get('actcache_version', '')}".strip(),
    }
    stream = io.BytesIO()
    torch.save(state, stream)
    write_atomically(directory / WEIGHTS_FILE, stream.getvalue())
    config = json.dumps({"trainer": trainer, "buffer": buffer}, indent=4) + "\n"
    write_atomically(directory / CONFIG_FILE, config.encode())


def read(directory: Path) -> SAE:
    """As its own `load_dictionary` gives it: AutoEncoder's decoder is brought to unit norm."""
    if not (directory / CONFIG_FILE).exists():
        raise FormatError(
            f"{directory} has {WEIGHTS_FILE} but no {CONFIG_FILE}, which says what it is; copy the whole directory"
        )
    config = read_json(directory / CONFIG_FILE)
    trainer, buffer = config.get("trainer"), config.get("buffer") or {}
    if not isinstance(trainer, dict) or not isinstance(buffer, dict):
        raise FormatError(
            f"{directory / CONFIG_FILE} has no object 'trainer' as dictionary_learning writes it"
        )
    dict_class = trainer.get("dict_class")
    if not isinstance(dict_class, str) or dict_class not in _CLASSES:
        raise FormatError(
            f"{directory} holds a dictionary_learning {dict_class!r}; this version reads {', '.join(_CLASSES)}"
        )
    kind = _CLASSES[dict_class]
    state = _read_pt(directory / WEIGHTS_FILE)
    missing = [
        f"{theirs} of floating point"
        for theirs in kind.tensors.values()
        if theirs not in state or not state[theirs].is_floating_point()
    ]
    if missing:
        raise CorruptObject(f"{directory / WEIGHTS_FILE} lacks {', '.join(missing)}; copy it again")
    w = {
        ours: state[theirs].T.contiguous()
        if theirs.endswith(".weight") and state[theirs].ndim == 2
        else state[theirs]
        for ours, theirs in kind.tensors.items()
    }
    k = trainer.get("k")
    if k is None and "k" in state and state["k"].numel() == 1:
        k = int(state["k"])
    settings: dict[str, Any] = {
        "architecture": kind.architecture,
        "d_in": trainer.get("activation_dim", w["b_dec"].numel()),
        "d_sae": trainer.get("dict_size", w["b_enc"].numel()),
        "k": k,
        "site": trainer.get("submodule_name"),
        "dtype": str(w["W_dec"].dtype).removeprefix("torch."),
        "model": trainer.get("lm_name"),
        "context_size": buffer.get("ctx_len"),
        "loaded_from": "dictionary_learning",
        "dictionary_learning": config,
    }
    if kind.architecture in BY_AVERAGE:
        if w["threshold"].numel() == 1 and float(w["threshold"]) < 0:
            raise FormatError(
                f"{directory} has no threshold yet ({float(w['threshold']):g}): it was saved before its "
                "training set one. Train it for longer."
            )
        w["threshold"] = at_or_above(w["threshold"])
    s = SAE(settings, **w, path=directory)
    if dict_class in _B_DEC_NOT_SUBTRACTED:
        add_to_pre_activations(s, s.b_dec @ s.W_enc)
    if dict_class == "AutoEncoder":
        to_unit_norm(s)
    return s


def _read_pt(path: Path) -> dict[str, Tensor]:
    """A state dict from a file that torch.save wrote; nothing in the file is executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its parsers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CorruptObject(
            f"{path} is not a file of tensors alone ({type(error).__name__}: {reason}); it was damaged, or "
            "holds objects that would run code. Ask its author for a state dict."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CorruptObject(f"{path} is no state dict of tensors; save `ae.state_dict()`")
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        # a file of a few bytes can claim a tensor of any size by strides of 0
        if not plain or tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise CorruptObject(
                f"{path} holds less data than its {name} {tuple(tensor.shape)}; copy it again"
            )
    return dict(state)


def _positive(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf:
        raise SpecError(f"{name} is {value!r}; dictionary_learning needs a whole number from 1 on")
    return round(value)


def _group_sizes(cfg: Mapping[str, Any]) -> list[int]:
    """Latents between one Matryoshka prefix and the next; a single group where prefixes were drawn."""
    from ..architectures import Matryoshka

    d_sae, given = int(cfg["d_sae"]), cfg.get("prefixes")
    prefixes: Sequence[int] = (d_sae,)
    if "prefixes" in cfg and not cfg.get("n_random_prefixes"):
        config = Matryoshka(d_sae=d_sae, k=1, prefixes=None if given is None else tuple(given))
        prefixes = config.moment(1.0, torch.Generator()).prefixes
    return [end - start for start, end in zip((0, *prefixes), prefixes, strict=False)]
