"""A trained SAE: encode, decode, and the directory it lives in.

Owns the native directory, `sae.json` (settings, provenance, the checksum of the weights) and
`weights.safetensors`. Trains nothing, and knows no foreign format but by asking `sae.export`. The input scale of training is
folded into the weights, so everything here is in the units of the raw activations: a latent's
value is the length it adds along its unit-norm decoder row.

Shapes: N rows (any leading dimensions), D = d_in, F = d_sae.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actcache.errors import CorruptObject, FormatError, SpecError
from actcache.shard import crc32c

from .files import RunFiles, is_url, local_path, run_files
from .tensors import parse_tensors, serialise

FORMAT = 1
"""Version of the native directory."""

ARCHITECTURES = ("standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")
"""What this module can run."""

TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
EXTRA_TENSORS = {
    "gated": ("b_gate", "r_mag"),
    "jumprelu": ("threshold",),
    "batchtopk": ("threshold",),
    "matryoshka": ("threshold",),
}
"""What an architecture needs beside `TENSORS`."""

SETTINGS_FILE, WEIGHTS_FILE = "sae.json", "weights.safetensors"
_CHECKSUM = "weights_crc32c"
"""Key of the settings: the CRC-32C of the weights' file. Directories of earlier versions have none."""


class SAE(nn.Module):
    """`encode` gives latents, `decode` a reconstruction, calling it does both.

    Args:
        cfg: at least `architecture`, `d_in`, `d_sae`, and `k` for topk; `site`, `dataset` and
            what else is known of its making are kept as they are.
        W_enc: [D, F]
        b_enc: [F]
        W_dec: [F, D]
        b_dec: [D]; subtracted from the input and added to the output.
        threshold: [F] or a scalar; batchtopk and matryoshka are active at or above it, jumprelu above.
        b_gate: [F]; gated is active where (x - b_dec) W_enc + b_gate > 0; b_enc is then b_mag.
        r_mag: [F]; gated's magnitude is ReLU(exp(r_mag) (x - b_dec) W_enc + b_enc).
        path: the directory it was loaded from or saved to.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None
    b_gate: Tensor | None
    r_mag: Tensor | None

    def __init__(
        self,
        cfg: Mapping[str, Any],
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor | None = None,
        b_gate: Tensor | None = None,
        r_mag: Tensor | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.cfg = dict(cfg)
        self.path = None if path is None else Path(path)
        extra = {"threshold": threshold, "b_gate": b_gate, "r_mag": r_mag}
        _check(self.cfg, W_enc, b_enc, W_dec, b_dec, extra)
        for name, tensor in (("W_enc", W_enc), ("b_enc", b_enc), ("W_dec", W_dec), ("b_dec", b_dec)):
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        for name, buffer in extra.items():
            self.register_buffer(name, buffer)

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    def encode(self, acts_ND: Tensor | np.ndarray) -> Tensor:
        """Latents [..., F], not negative, in the SAE's dtype."""
        acts_ND = self._tensor(acts_ND, "d_in", "activations")
        hidden_NF = (acts_ND - self.b_dec) @ self.W_enc
        architecture = self.cfg["architecture"]
        if architecture == "gated":
            assert self.r_mag is not None, "checked when made"
            assert self.b_gate is not None, "checked when made"
            magnitude_NF = torch.relu(hidden_NF * self.r_mag.exp() + self.b_enc)
            return magnitude_NF * (hidden_NF + self.b_gate > 0)
        pre_NF = torch.relu(hidden_NF + self.b_enc)
        if architecture == "topk":
            values, columns = torch.topk(pre_NF, int(self.cfg["k"]), dim=-1, sorted=False)
            return torch.zeros_like(pre_NF).scatter_(-1, columns, values)
        if architecture == "standard":
            return pre_NF
        assert self.threshold is not None, "checked when made"
        active_NF = pre_NF > self.threshold if architecture == "jumprelu" else pre_NF >= self.threshold
        return pre_NF * active_NF

    def decode(self, latents_NF: Tensor | np.ndarray) -> Tensor:
        """Reconstruction [..., D]."""
        return self._tensor(latents_NF, "d_sae", "latents") @ self.W_dec + self.b_dec

    def forward(self, acts_ND: Tensor | np.ndarray) -> Tensor:
        return self.decode(self.encode(acts_ND))

    def save(self, path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        """Write the native directory; each file appears whole or not at all, the settings last.

        `path` is local or any fsspec URL. Only a local one becomes `self.path`.
        """
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        weights = serialise(tensors)
        head = {"format": FORMAT, _CHECKSUM: crc32c(weights)}
        settings = json.dumps({**head, **self.cfg}, indent=2, allow_nan=False) + "\n"
        files = run_files(path, storage_options)
        files.make([""])
        files.replace(WEIGHTS_FILE, weights)
        files.replace(SETTINGS_FILE, settings.encode())
        if not is_url(path):
            self.path = local_path(path)

    def digest(self) -> str:
        """sha256 of the weights: two SAEs with one digest compute the same."""
        sha = hashlib.sha256(str(self.cfg["architecture"]).encode())
        for name, tensor in sorted(self.state_dict().items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            sha.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def extra_repr(self) -> str:
        known = {name: self.cfg.get(name) for name in ("architecture", "d_in", "d_sae", "k", "site")}
        return ", ".join(f"{name}={value}" for name, value in known.items() if value is not None)

    def _tensor(self, values: Tensor | np.ndarray, width_name: str, what: str) -> Tensor:
        tensor = values if isinstance(values, Tensor) else torch.tensor(values)
        wanted = self.cfg[width_name]
        if tensor.shape[-1:] != (wanted,):
            raise ValueError(
                f"{what} have shape {tuple(tensor.shape)}; this SAE has {width_name} {wanted} "
                f"(site {self.cfg.get('site')}). Give [..., {wanted}]."
            )
        return tensor.to(self.device, self.dtype)


def load(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> SAE:
    """The SAE in a directory: ours, or SAELens' or dictionary_learning's. Executes nothing it reads.

    Ours may also be at an fsspec URL, to which `storage_options` go.

    Raises:
        FileNotFoundError: the directory holds no SAE; the message says what it holds, and lists
            the SAEs one level below.
        FormatError: it was written by a newer version, or is of a kind that is not known here.
        CorruptObject: a file is damaged.
    """
    files = run_files(path, storage_options)
    settings = files.read(SETTINGS_FILE)
    if settings is not None:
        return _load_native(files, settings, None if is_url(path) else local_path(path))
    if is_url(path):
        raise FileNotFoundError(
            f"{files.url} has no {SETTINGS_FILE}; give the URL of one SAE of a finished run, e.g. RUN/topk-6144-32"
        )
    directory = local_path(path)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise FileNotFoundError(f"{directory} {what}; give a directory written by sae.train or sae.export")
    from .export import FORMATS, foreign_below, load_foreign

    s = load_foreign(directory)
    if s is not None:
        return s
    runs = sorted(p.parent.name for p in directory.glob(f"*/{SETTINGS_FILE}"))
    below = runs or foreign_below(directory)
    names = sorted(p.name for p in directory.iterdir())[:5]
    hint = (
        f"it holds {'runs' if runs else 'SAEs'}: {', '.join(below)}. Name one."
        if below
        else f"it has {', '.join(names) or 'no files'}. Give a directory written by sae.train."
    )
    raise FileNotFoundError(
        f"{directory} has neither {SETTINGS_FILE} nor the files of {' or '.join(FORMATS)}; {hint}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CorruptObject: it is not one.
    """
    return parse_json(str(path), path.read_bytes())


def parse_json(where: str, data: bytes) -> dict[str, Any]:
    """A JSON object; `where` names it in messages.

    Raises:
        CorruptObject: it is not one.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptObject(f"{where} is not JSON ({error}); it was damaged. Write it again.") from error
    if not isinstance(value, dict):
        raise CorruptObject(f"{where} holds a {type(value).__name__}, not an object. Write it again.")
    return value


def _load_native(files: RunFiles, settings: bytes, path: Path | None) -> SAE:
    cfg = parse_json(f"{files.url}/{SETTINGS_FILE}", settings)
    found = cfg.pop("format", None)
    if found != FORMAT:
        raise FormatError(
            f"{files.url} holds SAE format {found}; this version reads {FORMAT}. Upgrade actcache."
        )
    where, data = f"{files.url}/{WEIGHTS_FILE}", files.read(WEIGHTS_FILE)
    if data is None:
        raise FileNotFoundError(f"{where} does not exist; copy the whole directory, or write it again")
    checksum = cfg.pop(_CHECKSUM, None)
    if checksum is not None and crc32c(data) != checksum:
        raise CorruptObject(
            f"{where} differs from the checksum in {SETTINGS_FILE}; restore both from a copy, or train it again"
        )
    tensors = parse_tensors(where, data)
    missing = set(TENSORS) - tensors.keys()
    if missing:
        raise CorruptObject(f"{where} lacks {', '.join(sorted(missing))}. Train or copy it again.")
    extra = {name for names in EXTRA_TENSORS.values() for name in names}
    known = {name: tensor for name, tensor in tensors.items() if name in (*TENSORS, *extra)}
    return SAE(cfg, **known, path=path)


def _check(
    cfg: dict[str, Any],
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    extra: Mapping[str, Tensor | None],
) -> None:
    missing = [name for name in ("architecture", "d_in", "d_sae") if name not in cfg]
    if missing:
        raise SpecError(f"the SAE's settings lack {', '.join(missing)}")
    architecture, d, f = cfg["architecture"], cfg["d_in"], cfg["d_sae"]
    if architecture not in ARCHITECTURES:
        raise FormatError(
            f"architecture {architecture!r} is not known; this version runs {', '.join(ARCHITECTURES)}"
        )
    if not (isinstance(d, int) and isinstance(f, int)):
        raise SpecError(f"d_in is {d!r} and d_sae {f!r}; both must be whole numbers")
    k = cfg.get("k")
    if architecture == "topk" and not (isinstance(k, int) and 1 <= k <= f):
        raise SpecError(f"a topk SAE has k {k!r}; it must be a whole number between 1 and d_sae = {f}")
    lacking = [name for name in EXTRA_TENSORS.get(architecture, ()) if extra[name] is None]
    if lacking:
        raise CorruptObject(
            f"a {architecture} SAE needs {' and '.join(lacking)}; its weights hold none. Copy them again."
        )
    shapes = {
        "W_enc": (W_enc, (d, f)),
        "b_enc": (b_enc, (f,)),
        "W_dec": (W_dec, (f, d)),
        "b_dec": (b_dec, (d,)),
        **{name: (tensor, (f,)) for name, tensor in extra.items() if tensor is not None},
    }
    for name, (tensor, wanted) in shapes.items():
        if tuple(tensor.shape) != wanted and not (name == "threshold" and tensor.ndim == 0):
            raise CorruptObject(
                f"{name} has shape {tuple(tensor.shape)}, but d_in {d} and d_sae {f} want {wanted}; "
                "settings and weights belong to different SAEs"
            )
