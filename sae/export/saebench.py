"""SAEBench (github.com/adamkarvonen/SAEBench): the object its evaluations take as a custom SAE.

Checked against the interface of version 0.6.0 (`custom_saes/base_sae.py`, `evals/core/main.py`).
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actcache.errors import SpecError

from ..core import SAE
from .weights import layer_of, to_unit_norm


@dataclass
class SAEBenchConfig:
    """What SAEBench looks for in an SAE's `.cfg`; it sets attributes of its own on it."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = ""
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = "relu"
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = ""
    device: str = ""
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SAEBenchSAE(nn.Module):
    """An SAE with the surface that SAEBench wants of a custom one; made by `for_saebench`.

    encode takes [B, D] and [B, L, D]. `to(device=, dtype=)` converts and `device`, `dtype` follow.
    """

    def __init__(self, s: SAE, cfg: SAEBenchConfig) -> None:
        super().__init__()
        self.sae, self.cfg = s, cfg

    @property
    def device(self) -> torch.device:
        return self.sae.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.dtype

    @property
    def W_enc(self) -> Tensor:
        return self.sae.W_enc

    @property
    def W_dec(self) -> Tensor:
        return self.sae.W_dec

    @property
    def b_enc(self) -> Tensor:
        return self.sae.b_enc

    @property
    def b_mag(self) -> Tensor:
        """Gated's bias of the magnitudes."""
        return self.sae.b_enc

    @property
    def b_dec(self) -> Tensor:
        return self.sae.b_dec

    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.sae.decode(feature_acts)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


_ARCHITECTURES = {"batchtopk": "batch_topk", "matryoshka": "matryoshka_batch_topk"}


def for_saebench(
    s: SAE, *, model_name: str | None = None, hook_name: str | None = None, hook_layer: int | None = None
) -> SAEBenchSAE:
    """A copy of `s` to pass to SAEBench's evaluations as `selected_saes=[(name, it)]`.

    Decoder rows are brought to unit norm, as SAEBench wants, where that changes nothing but the
    unit of the latents; not for topk, whose choice would change.

    Args:
        s: the SAE.
        model_name: the model as TransformerLens calls it, e.g. "gpt2-small". None: as `s.cfg` has it.
        hook_name: where activations come from, in TransformerLens' words. None: the SAE's site.
        hook_layer: the model's block. None: the number in `hook_name`.

    Raises:
        SpecError: one of the three is not known and not given.
    """
    model_name, hook_name = model_name or s.cfg.get("model"), hook_name or s.cfg.get("site")
    hook_layer = layer_of(hook_name) if hook_layer is None else hook_layer
    found: dict[str, Any] = {"model_name": model_name, "hook_name": hook_name, "hook_layer": hook_layer}
    lacking = [name for name, value in found.items() if value is None]
    if lacking:
        raise SpecError(f"SAEBench needs {', '.join(lacking)}, which this SAE does not record; give it")
    copy = SAE(s.cfg, **{name: t.detach().clone() for name, t in s.state_dict().items()})
    if s.cfg["architecture"] != "topk":
        to_unit_norm(copy)
    prepend_bos = s.cfg.get("prepend_bos")
    return SAEBenchSAE(
        copy,
        SAEBenchConfig(
            **found,
            d_in=s.cfg["d_in"],
            d_sae=s.cfg["d_sae"],
            architecture=_ARCHITECTURES.get(s.cfg["architecture"], s.cfg["architecture"]),
            context_size=s.cfg.get("context_size"),
            prepend_bos=True if prepend_bos is None else prepend_bos,
            dtype=str(s.dtype).removeprefix("torch."),
            device=str(s.device),
        ),
    )
