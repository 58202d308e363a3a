"""A dataset in memory with the surface of `actcache.open`, captured from a tiny random GPT-2.

It is the oracle of the evaluation tests: everything is a plain numpy array, built by the
definitions (rows = kept tokens, shuffled once) without the store, codec or reader.
Shapes: S sequences, T tokens, N rows, D d_model.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

BOS = 0


def tiny_gpt2(seed: int = 0, vocab_size: int = 64):
    """A random GPT-2 of two layers, eval mode, without gradients."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=32, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():  # far from uniform predictions, so that splicing costs something
            p.mul_(8.0) if p.dim() > 1 else None
    return model


def tiny_lm(seed: int = 0, vocab_size: int = 64):
    from actcache.lm import LM

    return LM(tiny_gpt2(seed, vocab_size), "tiny-gpt2", "0", "cpu", "float32")


@dataclass
class ToySplit:
    """One split: `input_ids` [S, T], `length` [S], `kept` [S, T], rows in a fixed random order."""

    name: str
    input_ids: np.ndarray
    length: np.ndarray
    kept: np.ndarray
    acts: dict[str, np.ndarray]
    row_sequence: np.ndarray
    row_position: np.ndarray
    parent: "ToyDataset | None" = None

    @property
    def n_rows(self) -> int:
        return len(self.row_sequence)

    @property
    def n_sequences(self) -> int:
        return len(self.input_ids)

    def read(self, site, index):
        acts_ND = self.acts[site][index].copy()
        acts_ND.flags.writeable = False  # the reader promises values, not memory to write into
        return acts_ND

    def rows(self, index):
        sequence, position = self.row_sequence[index], self.row_position[index]
        return SimpleNamespace(
            token_id=self.input_ids[sequence, position], sequence=sequence, position=position
        )

    def context(self, sequence):
        return self.input_ids[sequence, : self.length[sequence]]

    def sequences(self, index):
        return SimpleNamespace(
            input_ids=self.input_ids[index],
            length=self.length[index],
            kept=self.kept[index],
            position_ids=None,
        )


class ToySpec(dict):
    """The identity, of which only what the SAE side reads is there."""

    model, context_size, corpus = "tiny-gpt2", 16, "text of the model itself"

    def __init__(self, **identity) -> None:
        super().__init__(model={"id": "tiny-gpt2", "revision": "0", "lm_dtype": "float32"}, **identity)


@dataclass
class ToyDataset:
    """The train split's surface, with `split(name)` for the others."""

    splits: dict[str, ToySplit]
    sites: list[str]
    url: str = "memory://toy"
    id: str = "toy-dataset"
    spec: "ToySpec" = field(default_factory=lambda: ToySpec(precision="fvu:0.001"))

    @property
    def n_rows(self) -> int:
        return self.splits["train"].n_rows

    def split(self, name):
        return self.splits[name]

    def read(self, site, index):
        return self.splits["train"].read(site, index)

    def stats(self, site):
        acts_ND = self.splits["train"].acts[site].astype(np.float64)
        return {
            "mean": acts_ND.mean(0),
            "variance": acts_ND.var(0),
            "mean_norm": float(np.linalg.norm(acts_ND, axis=1).mean()),
            "max_abs": float(np.abs(acts_ND).max()),
            "n_rows": len(acts_ND),
            "fvu_core": 8.1e-4,
            "fvu_all": 9.0e-4,
            "rows_rescaled": 3,
            "bits_per_value": 5.1,
        }


def toy_split(lm, name, sites, *, n_sequences=20, n_tokens=16, seed=0) -> ToySplit:
    """Text of the model itself behind BOS, some sequences short, every kept token a row, rows shuffled."""
    rng = np.random.default_rng([seed, len(name)])
    input_ids = _sampled_text(lm.model, n_sequences, n_tokens, seed)
    length = np.where(rng.random(n_sequences) < 0.3, rng.integers(4, n_tokens, n_sequences), n_tokens)
    real = np.arange(n_tokens) < length[:, None]
    input_ids[~real] = BOS
    kept = real & (input_ids != BOS)
    mask = torch.from_numpy(real.astype(np.int64))
    out = lm.model(torch.from_numpy(input_ids), attention_mask=mask, output_hidden_states=True)
    sequence, position = np.nonzero(kept)
    order = rng.permutation(len(sequence))
    sequence, position = sequence[order], position[order]
    acts = {site: _resid_post(out, site)[sequence, position].numpy() for site in sites}
    return ToySplit(name, input_ids, length, kept, acts, sequence, position)


def _sampled_text(model, n_sequences, n_tokens, seed) -> np.ndarray:
    g = torch.Generator().manual_seed(seed)
    ids = torch.full((n_sequences, 1), BOS)
    while ids.shape[1] < n_tokens:
        p = model(ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=g)], 1)
    return ids.numpy()


def _resid_post(out, site) -> Tensor:
    """HF's own hidden states are the oracle: entry n + 1 leaves block n (but not the last: a norm follows)."""
    layer = int(site.removeprefix("blocks.").removesuffix(".hook_resid_post"))
    assert layer + 2 < len(out.hidden_states)
    return out.hidden_states[layer + 1]


def toy_dataset(lm, sites=("blocks.0.hook_resid_post",), **sizes) -> ToyDataset:
    names = ("train", "validation", "test")
    return ToyDataset(
        {name: toy_split(lm, name, list(sites), seed=i, **sizes) for i, name in enumerate(names)}, list(sites)
    )


class _Planted(nn.Module):
    """An SAE whose quality is known; `path` is where results may be stored."""

    def __init__(self, d_in: int, d_sae: int, site: str = "blocks.0.hook_resid_post") -> None:
        super().__init__()
        self.path = None
        self.cfg = {
            "architecture": type(self).__name__,
            "d_in": d_in,
            "d_sae": d_sae,
            "k": None,
            "site": site,
        }

    def forward(self, acts: Tensor) -> Tensor:
        return self.decode(self.encode(acts))


class IdentitySAE(_Planted):
    """Latents are the positive and negative parts: the reconstruction is exact."""

    def __init__(self, d_in: int, **kwargs) -> None:
        super().__init__(d_in, 2 * d_in, **kwargs)

    def encode(self, acts):
        return torch.cat([acts.relu(), (-acts).relu()], -1)

    def decode(self, latents):
        plus, minus = latents.chunk(2, -1)
        return plus - minus


class ConstantSAE(_Planted):
    """Whatever comes in, `value` [D] comes out; its latents never fire."""

    def __init__(self, value_D, **kwargs) -> None:
        super().__init__(len(value_D), 5, **kwargs)
        self.register_buffer("value_D", torch.as_tensor(value_D, dtype=torch.float32))

    def encode(self, acts):
        return acts.new_zeros(*acts.shape[:-1], 5)

    def decode(self, latents):
        return self.value_D.expand(*latents.shape[:-1], -1)


class RandomTopK(_Planted):
    """Random directions, the k largest positive projections kept: sparse and mediocre."""

    def __init__(self, d_in: int, d_sae: int = 40, k: int = 4, seed: int = 0, **kwargs) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        self.cfg["k"] = k
        g = torch.Generator().manual_seed(seed)
        W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)

    def encode(self, acts):
        pre = (acts @ self.W_dec.T).relu()
        top = pre.topk(self.cfg["k"], dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)

    def decode(self, latents):
        return latents @ self.W_dec
