"""Sparse probing: can a few latents tell what a token is, as well as a linear probe on the raw row can?

Labels come from Python's own `tokenize`: string, comment, keyword, number, definition name. Rows are
captured from the LM over whole files, so a token's label is exact. Owns labels, probes and AUC.

Definitions (Gurnee et al. 2023, arXiv:2305.01610; Gao et al. 2024, sec. 4.2):
    the k latents of a label: largest |mean where it holds - mean elsewhere| over the training rows, in units of
        the latent's standard deviation
    probe: logistic regression with L2 penalty 1e-3 on standardised inputs, by Newton's method
    auc: chance that a row with the label scores above one without (ties half), on files not trained on;
        auc_ood: on files of another origin

Shapes: N rows, D d_in, F d_sae, K inputs of a probe.
"""

import io
import keyword
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

LABELS = ("string", "comment", "keyword", "number", "definition name")
_STRINGS = {"STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END"}
_FEW = 20  # rows with and without a label that a probe needs on either side


@dataclass(frozen=True)
class LabelledRows:
    """Rows of tokens with their labels."""

    acts_ND: np.ndarray
    labels: Mapping[str, np.ndarray]
    """By name, bool [N]."""


def python_labels(text: str) -> list[tuple[int, int, str]]:
    """(start, end, label) of the labelled tokens of a Python file, in characters.

    Raises:
        SyntaxError, tokenize.TokenError: it is not Python.
    """
    starts = np.cumsum([0, *(len(line) + 1 for line in text.split("\n"))])
    found, before = [], ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        label = None
        if name in _STRINGS:
            label = "string"
        elif name == "COMMENT":
            label = "comment"
        elif name == "NUMBER":
            label = "number"
        elif name == "NAME":
            if before in ("def", "class"):
                label = "definition name"
            elif keyword.iskeyword(token.string):
                label = "keyword"
        before = token.string
        if label is not None:
            (row, column), (end_row, end_column) = token.start, token.end
            found.append((int(starts[row - 1]) + column, int(starts[end_row - 1]) + end_column, label))
    return found


def python_files(paths: Iterable[Path], limit: int) -> list[str]:
    """The texts of the first `limit` files that are Python of 1 to 100 kB; others are passed over."""

    def texts() -> Iterator[str]:
        for path in paths:
            try:
                yield path.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # not what is looked for

    return _python_of(texts(), limit)


def corpus_python(source: str, limit: int) -> list[str]:
    """The first `limit` Python texts of a corpus, given as `actcache.Corpus` takes it.

    Raises:
        CorpusError: there is no such corpus here.
    """
    from actcache.sources import Skipped, documents, locate_corpus
    from actcache.spec import Corpus

    found = documents(locate_corpus(Corpus(source)), Skipped())
    return _python_of((d.content for d in found if isinstance(d.content, str)), limit)


def _python_of(texts: Iterable[str], limit: int) -> list[str]:
    kept: list[str] = []
    for text in texts:
        if len(kept) == limit:
            break
        if not 1_000 <= len(text) <= 100_000 or "\r" in text or "\f" in text:
            continue
        try:
            python_labels(text)
        except (SyntaxError, tokenize.TokenError):
            continue
        kept.append(text)
    return kept


@torch.no_grad()
def labelled_rows(
    lm: Any, tokenizer: Any, texts: Sequence[str], site: str, context_size: int, n_rows: int
) -> LabelledRows:
    """Rows at a site over three windows of each text, `context_size` tokens behind BOS if there is one.

    Args:
        lm, tokenizer: the model; a tokenizer that knows offsets.
        texts: Python files.
        site: where.
        context_size: tokens.
        n_rows: stop once there are so many.
    """
    from actcache.capture import run_capture

    acts: list[np.ndarray] = []
    labels: dict[str, list[np.ndarray]] = {name: [] for name in LABELS}
    found = 0
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for text in texts:
        coded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
        width, n = context_size - len(bos), len(coded["input_ids"])
        kind_C = np.full(len(text) + 1, -1, np.int8)
        for start, end, name in python_labels(text):
            kind_C[start:end] = LABELS.index(name)
        for begin in sorted({0, n // 3, 2 * n // 3}):
            ids = coded["input_ids"][begin : begin + width]
            if not ids:
                continue
            input_ids_BT = torch.tensor([[*bos, *ids]], device=lm.device)
            acts_BTD = run_capture(lm.model, input_ids_BT, [site])[site]
            acts.append(acts_BTD[0, len(bos) :].float().cpu().numpy())
            # a byte-level token may begin with the space before a word: its last character decides
            ends_N = np.array(coded["offset_mapping"][begin : begin + width])[:, 1]
            kind_N = kind_C[np.maximum(ends_N - 1, 0)]
            for i, name in enumerate(LABELS):
                labels[name].append(kind_N == i)
            found += len(ids)
        if found >= n_rows:
            break
    if not acts:
        raise ValueError("no text gave a token; give Python files")
    return LabelledRows(
        np.concatenate(acts)[:n_rows],
        {name: np.concatenate(parts)[:n_rows] for name, parts in labels.items()},
    )


def sparse_probing(
    s: Any, train: LabelledRows, test: LabelledRows, ood: LabelledRows, ks: Sequence[int] = (1, 2, 5)
) -> dict[str, dict[str, Any]]:
    """AUC by label: of k latents and of the raw row ("dense"), on `test` and `ood`.

    A label with fewer than 20 rows on a side anywhere is given as {"skipped": why}.
    """
    rows = {"train": train, "test": test, "ood": ood}
    latents = {name: _latents(s, r.acts_ND) for name, r in rows.items()}
    found: dict[str, dict[str, Any]] = {}
    for label in train.labels:
        y = {name: r.labels[label] for name, r in rows.items()}
        few = [name for name, y_N in y.items() if min(y_N.sum(), (~y_N).sum()) < _FEW]
        if few:
            found[label] = {"skipped": f"fewer than {_FEW} rows with or without it in {', '.join(few)}"}
            continue
        best = best_latents(latents["train"], y["train"], max(ks))
        result: dict[str, Any] = {"latents": best.tolist()}
        for k in ks:
            chosen = {name: values[:, best[:k]] for name, values in latents.items()}
            result[f"k{k}"] = _scores(chosen, y)
        result["dense"] = _scores({name: r.acts_ND for name, r in rows.items()}, y)
        found[label] = result
    return found


@torch.no_grad()
def _latents(s: Any, acts_ND: np.ndarray) -> np.ndarray:
    device = next(iter(s.parameters()), torch.zeros(())).device
    parts = [
        s.encode(torch.from_numpy(acts_ND[i : i + 2048]).to(device)).float().cpu().numpy()
        for i in range(0, len(acts_ND), 2048)
    ]
    return np.concatenate(parts)


def best_latents(latents_NF: np.ndarray, y_N: np.ndarray, k: int) -> np.ndarray:
    """Numbers of the k latents whose means differ the most, in standard deviations, the best first."""
    difference_F = np.abs(latents_NF[y_N].mean(0) - latents_NF[~y_N].mean(0))
    spread_F = latents_NF.std(0)
    score_F = np.divide(difference_F, spread_F, out=np.zeros_like(spread_F), where=spread_F > 0)
    best: np.ndarray = np.argsort(-score_F, kind="stable")[:k]
    return best


def _scores(inputs: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray]) -> dict[str, float]:
    mean_K, std_K = inputs["train"].mean(0), inputs["train"].std(0)
    scaled = {name: (x - mean_K) / np.where(std_K > 0, std_K, 1) for name, x in inputs.items()}
    w_K, b = logistic_regression(scaled["train"], y["train"])
    return {
        "auc": auc(scaled["test"] @ w_K + b, y["test"]),
        "auc_ood": auc(scaled["ood"] @ w_K + b, y["ood"]),
    }


def logistic_regression(
    x_NK: np.ndarray, y_N: np.ndarray, penalty: float = 1e-3, steps: int = 30
) -> tuple[np.ndarray, float]:
    """Weights [K] and bias that minimise mean log loss + penalty / 2 ||w||^2, by damped Newton steps."""
    x = np.concatenate([x_NK.astype(np.float64), np.ones((len(x_NK), 1))], 1)
    ridge_K = np.full(x.shape[1], penalty)
    ridge_K[-1] = 1e-9
    w_K = np.zeros(x.shape[1])

    def loss(w: np.ndarray) -> float:
        z_N = x @ w
        return float(np.mean(np.logaddexp(0, z_N) - y_N * z_N) + (ridge_K * w * w).sum() / 2)

    now = loss(w_K)
    for _ in range(steps):
        p_N = 0.5 * (1 + np.tanh(x @ w_K / 2))
        gradient_K = x.T @ (p_N - y_N) / len(x) + ridge_K * w_K
        curvature_KK = (x * (p_N * (1 - p_N))[:, None]).T @ x / len(x) + np.diag(ridge_K)
        step_K = np.linalg.solve(curvature_KK, gradient_K)
        size = 1.0
        while size > 1e-6 and loss(w_K - size * step_K) > now:
            size /= 2
        w_K = w_K - size * step_K
        before, now = now, loss(w_K)
        if before - now < 1e-10:
            break
    return w_K[:-1], float(w_K[-1])


def auc(score_N: np.ndarray, y_N: np.ndarray) -> float:
    """Area under the ROC curve by ranks, ties counted half (Mann and Whitney 1947)."""
    _, index_N, n_U = np.unique(score_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(n_U) - (n_U - 1) / 2)[index_N]
    n_with, n_without = int(y_N.sum()), int((~y_N).sum())
    return float((rank_N[y_N].sum() - n_with * (n_with + 1) / 2) / (n_with * n_without))
