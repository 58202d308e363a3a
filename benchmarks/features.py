"""Activations whose features are known: generators, and datasets of them that actcache's own writer made.

`toy_a` is the toy of SAELens' tutorial: orthogonal features that fire independently. `synth` is
SynthSAEBench (arXiv:2602.14687) scaled down sixteenfold: Zipf frequencies, a forest of features
whose children fire only with their parent and one sibling at a time, weakly correlated firing, more
features than dimensions. Both are written from those descriptions and draw nothing from SAELens.

`write` stores rows through actcache's driver, planner, codec and commits; only the forward pass of
the language model is replaced by the generator. A row is decided by the generator's seed and the
tokens of its sequence alone. The metrics say how much of the truth an SAE has found.

Shapes: N rows, F true features, L latents, D dimensions, S sequences, T tokens.
"""

import json
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "actcache"))

from replayed import Recorded
from tiny_models import save_tiny_lm

import actcache
import sae
from actcache.codec import Precision
from actcache.corpus import tokenise
from actcache.driver import Resolved, resolve
from actcache.harvester import Harvester
from actcache.store import Store, open_store
from sae.evals.geometry import mean_matched

SITE = "blocks.1.hook_resid_post"
_CONTEXT = 256
_BRANCHING = 4


@dataclass(frozen=True, kw_only=True)
class Features:
    """A dictionary and how its features fire; `sample` draws rows."""

    vectors_FD: Tensor
    """Unit norm."""
    bias_D: Tensor
    probability_F: Tensor
    """Of firing, before parents and siblings have their say."""
    mean_F: Tensor
    std_F: Tensor
    factor_FR: Tensor | None = None
    """Correlation of firing: the copula's covariance is factor factor^T + diagonal. None: independent."""
    levels: tuple[tuple[Tensor, Tensor], ...] = ()
    """From the roots down: (parents [P], their children [P, 4])."""
    exactly: int | None = None
    """This many features fire in each row, all equally likely, in place of each by its probability."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(activations of the features [n, F], rows [n, D])."""
        f = len(self.mean_F)
        value_NF = self.mean_F + self.std_F * torch.randn(n, f, generator=generator)
        acts_NF = torch.relu(value_NF) * self._firing(n, f, generator)
        for parents, children in self.levels:
            siblings = acts_NF[:, children.flatten()].view(n, *children.shape)
            draw = torch.rand(siblings.shape, generator=generator) * (siblings > 0)
            alone = torch.zeros_like(siblings).scatter(2, draw.argmax(2, keepdim=True), 1)
            strength_NP = acts_NF[:, parents] / self.mean_F[parents]
            acts_NF[:, children.flatten()] = (siblings * alone * strength_NP[:, :, None]).flatten(1)
        return acts_NF, acts_NF @ self.vectors_FD + self.bias_D

    def _firing(self, n: int, f: int, generator: torch.Generator) -> Tensor:
        if self.exactly is not None:
            chosen = torch.rand(n, f, generator=generator).topk(self.exactly, dim=1).indices
            return torch.zeros(n, f).scatter(1, chosen, 1)
        if self.factor_FR is None:
            return (torch.rand(n, f, generator=generator) < self.probability_F).float()
        own_F = (1 - self.factor_FR.square().sum(1)).sqrt()
        shared_NR = torch.randn(n, self.factor_FR.shape[1], generator=generator)
        gaussian_NF = shared_NR @ self.factor_FR.T + own_F * torch.randn(n, f, generator=generator)
        above_F = math.sqrt(2) * torch.erfinv(1 - 2 * self.probability_F)  # fires with that probability
        return (gaussian_NF > above_F).float()


def toy_a(exactly: int | None = None) -> Features:
    """16 orthogonal features in 32 dimensions, each active in a quarter of the rows: magnitude 1 +- 0.05."""
    g = torch.Generator().manual_seed(42)
    return Features(
        vectors_FD=torch.linalg.qr(torch.randn(32, 16, generator=g)).Q.T.contiguous(),
        bias_D=torch.zeros(32),
        probability_F=torch.full((16,), 0.25),
        mean_F=torch.ones(16),
        std_F=torch.full((16,), 0.05),
        exactly=exactly,
    )


def synth(n_features: int = 1024, d_in: int = 128, n_roots: int = 8, seed: int = 42) -> Features:
    """SynthSAEBench-16k with a sixteenth of its features and roots, in `d_in` dimensions."""
    g = torch.Generator().manual_seed(seed)
    vectors_FD = _orthogonalised(torch.randn(n_features, d_in, generator=g), steps=100, lr=3e-4)
    bias_D = torch.randn(d_in, generator=g)
    zipf_F = torch.arange(1, n_features + 1).float() ** -0.5
    share_F = (zipf_F - zipf_F[-1]) / (zipf_F[0] - zipf_F[-1])
    wanted_F = 5e-4 + (0.4 - 5e-4) * share_F
    levels = _forest(n_roots, depth=3)
    factor_FR = 0.1 * torch.randn(n_features, 25, generator=g)
    square_F = factor_FR.square().sum(1, keepdim=True)
    return Features(
        vectors_FD=vectors_FD,
        bias_D=0.5 * bias_D / bias_D.norm(),
        probability_F=_compensated(wanted_F, levels),
        mean_F=torch.linspace(5, 4, n_features),
        std_F=(0.5 + 0.5 * torch.randn(n_features, generator=g)).abs(),
        # what a feature has of its own is at least a hundredth
        factor_FR=torch.where(square_F > 0.99, factor_FR * (0.99 / square_F).sqrt(), factor_FR),
        levels=levels,
    )


def _forest(n_roots: int, depth: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Complete trees, numbered level by level."""
    levels, first, parents = [], n_roots, torch.arange(n_roots)
    for _ in range(depth):
        children = first + torch.arange(len(parents) * _BRANCHING).view(-1, _BRANCHING)
        levels.append((parents, children))
        first, parents = first + children.numel(), children.flatten()
    return tuple(levels)


def _compensated(wanted_F: Tensor, levels: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Probabilities by which features fire about as often as wanted, given parents and siblings."""
    found_F = wanted_F.clone()
    for parents, children in levels:
        siblings, parent = wanted_F[children], wanted_F[parents][:, None]
        others = siblings.sum(1, keepdim=True) - siblings
        found_F[children] = siblings / parent * (1 + others / parent)
    return found_F.clamp(max=1.0)


def _orthogonalised(vectors_FD: Tensor, steps: int, lr: float) -> Tensor:
    """Unit vectors with less overlap: Adam on the squares of their products and of |v|^2 - 1."""
    v = torch.nn.functional.normalize(vectors_FD, dim=1).requires_grad_()
    optimiser, n = torch.optim.Adam([v], lr=lr), len(v)
    with torch.enable_grad():
        for _ in range(steps):
            gram_FF = v @ v.T
            own_F = gram_FF.diagonal()
            loss = gram_FF.square().sum() - own_F.square().sum() + n * (own_F - 1).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return torch.nn.functional.normalize(v.detach(), dim=1)


def write(
    features: Features, directory: Path, n_rows: int, seed: int = 0, precision: str = "fp32"
) -> actcache.Dataset:
    """A dataset of these rows in `directory`; what is there already is taken.

    Raises:
        Conflict: it holds other rows.
    """
    planted = _Planted(features, directory, n_rows, seed, precision)
    store = open_store(str(directory / "dataset"))
    planted.harvest(store)
    return actcache.open(store.url)


class _Planted(Recorded):
    """A harvest whose forward pass is a generator."""

    def __init__(self, features: Features, directory: Path, n_rows: int, seed: int, precision: str) -> None:
        self.features, self.seed, d_in = features, seed, features.vectors_FD.shape[1]
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "tokens.jsonl").exists():
            save_tiny_lm(directory / "model", "gpt2", vocab_size=104, n_positions=_CONTEXT)
            rng = np.random.default_rng(seed)
            with open(directory / "tokens.jsonl", "w") as file:
                for start in range(0, n_rows, 65_536):
                    ids = rng.integers(5, 95, min(65_536, n_rows - start))  # no special token: each is a row
                    file.write(json.dumps({"input_ids": ids.tolist()}) + "\n")
        self.spec = actcache.Spec(
            model=str(directory / "model"),
            corpus=actcache.Corpus(
                str(directory / "tokens.jsonl"), token_field="input_ids", validation_share=0.0, test_share=0.0
            ),
            sites=(SITE,),
            context_size=_CONTEXT,
            n_tokens=n_rows,
            precision=precision,
            block_rows=65_536,
            chunk_rows=4096,
        )
        found = resolve(self.spec)
        self.resolved = replace(found, widths={SITE: d_in})
        self.tokens = tokenise(
            self.spec, found.corpus, found.tokenizer, open_store(str(directory)), progress=False
        )
        self.harvester = object.__new__(Harvester)
        kept = {"precision": Precision.parse(found.identity["precision"]), "d_in": {SITE: d_in}}
        self.harvester.__dict__ |= kept | {"tokens": self.tokens}

    def harvester_on(self, store: Store, resolved: Resolved) -> Harvester:
        harvester = object.__new__(_Generating)
        harvester.__dict__ |= self.harvester.__dict__ | {
            "features": self.features,
            "seed": self.seed,
            "store": store,
            "job": self.job(store.url),
        }
        harvester._start()
        return harvester


class _Generating(Harvester):
    features: Features
    seed: int

    def _forward(
        self, input_ids_ST: np.ndarray, sites: Any, length_S: np.ndarray, position_ids_ST: Any = None
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for s, ids_T in enumerate(input_ids_ST):
            own = torch.Generator().manual_seed(zlib.crc32(ids_T.astype("<i8").tobytes(), self.seed))
            yield s, {SITE: self.features.sample(len(ids_T), own)[1].numpy()[None]}


@torch.no_grad()
def draw(features: Features, n_rows: int, seed: int = 10**6) -> Iterator[tuple[Tensor, Tensor]]:
    """(which features are active, rows), in parts, of rows that no dataset holds."""
    g = torch.Generator().manual_seed(seed)
    for start in range(0, n_rows, 4096):
        acts_NF, x_ND = features.sample(min(4096, n_rows - start), g)
        yield acts_NF > 0, x_ND


@torch.no_grad()
def evaluate(
    s: "sae.SAE", features: Features, n_rows: int, drawn: Sequence[tuple[Tensor, Tensor]] | None = None
) -> dict[str, float]:
    """What SAELens' evaluation of synthetic data gives, over `draw(features, n_rows)`, or that already `drawn`.

    mcc: mean |cosine| of decoder rows and features, matched one to one as well as can be. f1: each
    latent as a detector of the feature nearest to it, mean over latents. explained_variance:
    1 - E|x - x^|^2 / (E|x|^2 - |E x|^2). l0, true_l0: active latents and features a row.
    """
    cosine_LF = torch.nn.functional.normalize(s.W_dec.float(), dim=1) @ features.vectors_FD.T
    nearest_L = cosine_LF.abs().argmax(1)
    both = fires = true = torch.zeros(len(nearest_L))
    squared = residual = l0 = true_l0 = 0.0
    total_D = torch.zeros(features.vectors_FD.shape[1], dtype=torch.float64)
    for active_NF, x_ND in draw(features, n_rows) if drawn is None else drawn:
        latents_NL = s.encode(x_ND)
        on_NL, truth_NL = latents_NL > 0, active_NF[:, nearest_L]
        both = both + (on_NL & truth_NL).sum(0)
        fires, true = fires + on_NL.sum(0), true + truth_NL.sum(0)
        residual += float((s.decode(latents_NL) - x_ND).double().square().sum())
        squared += float(x_ND.double().square().sum())
        total_D += x_ND.double().sum(0)
        l0, true_l0 = l0 + int(on_NL.sum()), true_l0 + int(active_NF.sum())
    variance = squared / n_rows - float((total_D / n_rows).square().sum())
    return {
        "mcc": mean_matched(cosine_LF.abs().numpy()),
        "f1": float((2 * both / (fires + true).clamp(min=1)).mean()),  # 2PR / (P + R)
        "explained_variance": 1 - residual / n_rows / variance,
        "l0": l0 / n_rows,
        "true_l0": true_l0 / n_rows,
        "dead": int((fires == 0).sum()),
    }
