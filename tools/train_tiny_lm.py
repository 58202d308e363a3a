"""Train the small language model that ships with actcache, from nothing, on one CPU core.

    python tools/train_tiny_lm.py --minutes 60 --out DIR

The text is the standard library of the interpreter that runs this script, less the documents that
`split_of` holds out. The result is a plain `GPT2LMHeadModel` directory: weights (float32), a byte-level
BPE tokenizer and a model card (README.md) with the measured figures. The same command resumes a run
that was stopped; an existing tokenizer in DIR is kept, never retrained.

Shapes: B sequences, T tokens, N = B*T tokens, D d_model, V vocabulary.
"""

import argparse
import json
import logging
import math
import os
import platform
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actcache.corpus import split_of

logger = logging.getLogger("train_tiny_lm")

EOS = "<|endoftext|>"
EOS_ID = 0
VOCAB_SIZE = 4096
CONTEXT_SIZE = 256
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Documents:
    """The standard library's distinct sources by split, with what was left out."""

    texts: dict[str, list[str]]
    n_undecodable: int
    n_duplicates: int

    def size_bytes(self, split: str) -> int:
        return sum(len(text.encode("utf-8")) for text in self.texts[split])


def read_stdlib() -> Documents:
    """Every non-empty .py file under the interpreter's stdlib, tests included, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    n_undecodable = n_duplicates = 0
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            n_undecodable += 1
            continue
        if text in seen:
            n_duplicates += 1
        elif text:
            seen.add(text)
            texts[split_of(text)].append(text)
    return Documents(texts, n_undecodable, n_duplicates)


def train_tokenizer(texts: list[str], out: Path) -> None:
    """Write a byte-level BPE tokenizer (lossless, no prefix space, one special token) into `out`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        unk_token=EOS,
        model_max_length=CONTEXT_SIZE,
        clean_up_tokenization_spaces=False,
    )
    assert (fast.vocab_size, fast.eos_token_id) == (VOCAB_SIZE, EOS_ID)
    with staged(out) as staging:
        fast.save_pretrained(staging)
        path = staging / "tokenizer_config.json"  # the class name that transformers 4 knows as well
        fields = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(fields, indent=2) + "\n")


def tokenise(tokenizer: Any, texts: list[str]) -> np.ndarray:
    """One stream of token ids: each document followed by EOS."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([*document.ids, EOS_ID], dtype=np.uint16) for document in encoded])


def windows(stream: np.ndarray, starts: np.ndarray, context_size: int) -> tuple[Tensor, Tensor]:
    """Inputs BOS + 255 tokens of the stream, and as targets the 256 tokens from the same start."""
    targets_BT = stream[starts[:, None] + np.arange(context_size)].astype(np.int64)
    inputs_BT = np.concatenate([np.full((len(starts), 1), EOS_ID), targets_BT[:, :-1]], axis=1)
    return torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT)


def epoch_starts(stream: np.ndarray, context_size: int, seed: int, epoch: int) -> np.ndarray:
    """Window starts of one epoch: a random phase, no token twice, random order."""
    rng = np.random.default_rng([seed, epoch])
    starts = np.arange(rng.integers(context_size), len(stream) - context_size + 1, context_size)
    return rng.permutation(starts)


@dataclass
class Batches:
    """An endless, resumable sequence of batches; a change of context size begins a new epoch."""

    stream: np.ndarray
    batch_tokens: int
    seed: int
    epoch: int = -1
    cursor: int = 0
    context_size: int = 0
    starts: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def next(self, context_size: int) -> tuple[Tensor, Tensor]:
        n = self.batch_tokens // context_size
        if context_size != self.context_size or self.cursor + n > len(self.starts):
            self.epoch, self.cursor, self.context_size = self.epoch + 1, 0, context_size
            self.starts = epoch_starts(self.stream, context_size, self.seed, self.epoch)
        self.cursor += n
        return windows(self.stream, self.starts[self.cursor - n : self.cursor], context_size)

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "cursor": self.cursor, "context_size": self.context_size}

    def restore(self, state: dict[str, int]) -> None:
        self.epoch, self.cursor, self.context_size = state["epoch"], state["cursor"], state["context_size"]
        self.starts = epoch_starts(self.stream, self.context_size, self.seed, self.epoch)


def causal_attention(
    module: Any, query_BHTK: Tensor, key_BHTK: Tensor, value_BHTK: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Causal attention as two batched products; for training only, the saved model uses SDPA.

    For a head width of 32 the flash kernel's backward in bfloat16 takes 121 ms per layer and 8192
    tokens in windows of 128, this 35 ms (windows of 256: 124 and 80).
    """
    n_batch, n_heads, n_tokens, width = query_BHTK.shape
    flat = (n_batch * n_heads, n_tokens, width)
    mask_TT = torch.full((n_tokens, n_tokens), -math.inf, dtype=query_BHTK.dtype).triu(1)
    scores = torch.baddbmm(mask_TT, query_BHTK.reshape(flat), key_BHTK.reshape(flat).mT, alpha=width**-0.5)
    mixed = torch.softmax(scores, dim=-1) @ value_BHTK.reshape(flat)
    return mixed.view(query_BHTK.shape).transpose(1, 2), None


def new_model() -> Any:
    """A GPT-2 of 3.5 M parameters, untrained; residual projections start at zero."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=CONTEXT_SIZE,
        n_embd=192,
        n_layer=6,
        n_head=6,
        activation_function="gelu_pytorch_tanh",  # gelu_new in one kernel; unfused it costs a tenth of a step
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
    return model


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of a tied head, with its gradients, a chunk of tokens at a time.

    Logits of a whole batch are 134 MB in float32 and would go through memory several times;
    chunks of 512 tokens stay in cache.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, dtype: torch.dtype
    ) -> Tensor:
        head = head_VD.detach().to(dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_head_VD = torch.zeros_like(head_VD)
        loss = hidden_ND.new_zeros(())
        for start in range(0, len(hidden_ND), 512):
            chunk = slice(start, start + 512)
            hidden_cD = hidden_ND[chunk].detach().to(dtype)
            logits_cV = (hidden_cD @ head.T).float()
            picked_c1 = targets_N[chunk, None]
            probs_cV = torch.softmax(logits_cV, dim=-1)
            loss -= probs_cV.gather(1, picked_c1).log_().sum()
            probs_cV.scatter_add_(1, picked_c1, -torch.ones(picked_c1.shape))
            probs = probs_cV.to(dtype)
            grad_hidden_ND[chunk] = probs @ head
            grad_head_VD += probs.T @ hidden_cD
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
        return loss / len(hidden_ND)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors
        scale = grad_outputs[0] / len(grad_hidden_ND)
        return grad_hidden_ND.mul_(scale), grad_head_VD.mul_(scale), None, None


def batch_loss(model: Any, inputs_BT: Tensor, targets_BT: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden_BTD = model.transformer(inputs_BT, use_cache=False).last_hidden_state
    hidden_ND = hidden_BTD.float().flatten(0, 1)
    return HeadLoss.apply(hidden_ND, model.lm_head.weight, targets_BT.flatten(), dtype)


def orthogonalise(updates_KRC: Tensor) -> Tensor:
    """Five quintic Newton-Schulz iterations: singular values to about 1 (Jordan et al. 2024, "Muon")."""
    x = updates_KRC.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x.float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for the matrices of GPT-2 blocks.

    Unlike `torch.optim.Muon` it treats the query, key and value parts of `c_attn` as three matrices,
    and orthogonalises all matrices of one shape in one batched product.
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            pieces: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                momentum.lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(momentum, group["momentum"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                d_in, d_out = param.shape  # Conv1D: [in, out]
                width = d_in if d_out == 3 * d_in else d_out
                for target, piece in zip(param.split(width, 1), update.split(width, 1), strict=True):
                    wide = (target, piece) if d_in <= width else (target.mT, piece.mT)
                    pieces.setdefault(tuple(wide[0].shape), []).append(wide)
            for (n_rows, n_columns), pairs in pieces.items():
                steps = orthogonalise(torch.stack([piece for _, piece in pairs]))
                for (target, _), step in zip(pairs, steps, strict=True):
                    target.add_(step, alpha=-group["lr"] * math.sqrt(n_columns / n_rows))


def new_optimizers(model: Any, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; AdamW for embeddings, norms and biases."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    embeddings = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." not in name]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": embeddings}, {"params": vectors}]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay),
        torch.optim.AdamW(groups, args.adam_lr, betas=(0.9, 0.99), eps=1e-10, weight_decay=0.0, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out` whose files are then moved into `out`, one atomic rename each."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as staging:
        yield Path(staging)
        for path in Path(staging).iterdir():
            path.chmod(0o644)  # safetensors writes for the owner only
            os.replace(path, out / path.name)


def save_model(model: Any, out: Path) -> None:
    """Write config.json and model.safetensors (float32, tied) into `out`."""
    with staged(out) as staging:
        model.set_attn_implementation("sdpa")
        model.save_pretrained(staging)
        model.set_attn_implementation("causal_bmm")
        (staging / "generation_config.json").unlink(missing_ok=True)


@dataclass
class Clock:
    """Training time spent, summed over resumed runs; what the schedule is driven by."""

    budget_s: float
    spent_s: float = 0.0
    last: float = field(default_factory=time.monotonic)

    def tick(self) -> float:
        """Count the time since the last tick as spent; return the share of the budget used, 0 to 1."""
        now = time.monotonic()
        self.spent_s += now - self.last
        self.last = now
        return min(1.0, self.spent_s / self.budget_s)


def lr_factor(progress: float) -> float:
    """Warm up over 2 % of the time, hold to 30 %, then fall linearly to zero."""
    return min(1.0, (progress + 1e-3) / 0.02, (1.0 - progress) / 0.7)


@torch.no_grad()
def evaluate(model: Any, stream: np.ndarray, max_windows: int | None = None) -> float:
    """Mean cross-entropy in nats over `stream` in BOS + 255 windows, float32; each token is predicted once."""
    starts = np.arange(0, len(stream) - CONTEXT_SIZE + 1, CONTEXT_SIZE)[:max_windows]
    total = 0.0
    for batch in np.array_split(starts, math.ceil(len(starts) / 32)):
        inputs_BT, targets_BT = windows(stream, batch, CONTEXT_SIZE)
        total += batch_loss(model, inputs_BT, targets_BT, torch.float32).item() * len(batch)
    return total / len(starts)


def unigram_entropy(stream: np.ndarray) -> float:
    """Entropy in nats of the token frequencies of `stream` itself."""
    p = np.bincount(stream) / len(stream)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


@dataclass
class Run:
    """A training run: everything a checkpoint has to hold."""

    model: Any
    optimizers: list[torch.optim.Optimizer]
    batches: Batches
    clock: Clock
    step: int = 0
    tokens: int = 0

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "batches": self.batches.state(),
            "counters": [self.clock.spent_s, self.step, self.tokens],
        }
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)  # written by `save` above; executes nothing
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.batches.restore(state["batches"])
        self.clock.spent_s, self.step, self.tokens = state["counters"]


def train(run: Run, heldout: np.ndarray, checkpoint: Path, args: argparse.Namespace) -> None:
    """Steps until the time is spent; a line every 20 s, a checkpoint and a held-out figure every 5 min."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    parameters = list(run.model.parameters())
    smooth_loss, last_line, last_save = math.nan, time.monotonic(), time.monotonic()
    run.clock.last = time.monotonic()
    first_step_s, first_step_tokens = run.clock.spent_s, run.tokens
    while (progress := run.clock.tick()) < 1.0:
        context_size = CONTEXT_SIZE // 2 if progress < args.short_share else CONTEXT_SIZE
        inputs_BT, targets_BT = run.batches.next(context_size)
        loss = batch_loss(run.model, inputs_BT, targets_BT, dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.tokens += inputs_BT.numel()
        value = loss.item()
        smooth_loss = value if math.isnan(smooth_loss) else 0.95 * smooth_loss + 0.05 * value
        if time.monotonic() - last_line > 20:
            last_line = time.monotonic()
            rate = (run.tokens - first_step_tokens) / (run.clock.spent_s - first_step_s + 1e-9)
            left_min = (run.clock.budget_s - run.clock.spent_s) / 60
            logger.info(
                "step %d  %.2f M tokens  epoch %d  loss %.3f  %.0f tokens/s  %.1f min left",
                *(run.step, run.tokens / 1e6, run.batches.epoch, smooth_loss, rate, left_min),
            )
        if time.monotonic() - last_save > 300:
            last_save = time.monotonic()
            run.save(checkpoint)
            ce = evaluate(run.model, heldout, max_windows=96)
            logger.info("checkpoint at step %d: held-out CE %.3f nats", run.step, ce)


# -------------------------------------------------------------------------------------------- report

CARD = """\
---
license: other
license_name: psf-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, python, tiny]
---

# stdlib-gpt2

A GPT-2 of {parameters_m:.2f} M parameters that writes Python of a kind. It comes with actcache so that
tests, tutorials and benchmarks can harvest real activations without a download. It is good for nothing else.

| | |
|---|---|
| held-out cross-entropy | {ce:.4f} nats per token ({n_heldout:,} tokens of {n_heldout_documents} validation documents) |
| unigram entropy of the same tokens | {entropy:.4f} nats |
| **ratio** | **{ratio:.1%}** |
| bits per byte, held-out | {bits_per_byte:.4f} |
| tokens per byte, held-out | {tokens_per_byte:.4f} ({bytes_per_token:.2f} bytes a token) |

## Model

`GPT2LMHeadModel`: d_model 192, 6 layers, 6 heads, context 256, vocabulary 4096, tied embeddings, learned
positions, `gelu_pytorch_tanh`, no dropout; float32 safetensors. The tokenizer is a byte-level BPE (GPT-2's
splitting, no prefix space, lossless) trained on the training documents; `<|endoftext|>` (id 0) is its only
special token and serves as BOS, EOS and unknown.

## Text

The Python standard library, `.py` files of CPython {python} including its tests, without site-packages:
{n_documents:,} distinct documents that decode as UTF-8 ({n_undecodable} do not, {n_duplicates} were duplicates).
A document's split is decided by its content: `u = int.from_bytes(sha256(utf8).digest()[:8], "big") / 2**64`;
validation if u < 0.05, test if u < 0.10, else train. {train_documents:,} documents, {train_mb:.1f} MB,
{train_tokens:,} tokens were trained on; nothing was tuned on the test documents.
The text is under the PSF-2.0 licence (Python's own); some files carry permissive notices of
their authors besides, listed on Python's licence page.

## Packing: harvest it the same way

Documents are joined, each followed by EOS. A training sequence is **BOS + 255 tokens of that stream, at an
offset without regard to document boundaries**, so every sequence starts with `<|endoftext|>` at position 0,
and the figures above are measured so. Text without the leading BOS is off the training distribution.

## Training

{tokens_seen_m:.1f} M tokens ({epochs:.2f} epochs) in {steps:,} steps of {batch_tokens:,} tokens, {minutes:.0f} minutes on
{hardware}; {precision}; seed {seed}.
Muon (lr {muon_lr}, momentum 0.95, Nesterov, weight decay {weight_decay}; query, key and value apart) for the
blocks' matrices, AdamW (lr {adam_lr}, betas 0.9/0.99) for embeddings, norms and biases. Warm-up over 2 % of the
time, constant to 30 %, then linear to zero; gradient norm clipped at 1; windows of 128 tokens for the first
{short_share:.0%} of the time, then 256; no dropout. torch {torch}, transformers {transformers}.

    python tools/train_tiny_lm.py --minutes {minutes:.0f} --out DIR

The schedule follows the wall clock, so another machine gives another model of about the same quality. What was
tried first, in runs of 2 to 3.5 minutes: AdamW (lr 0.004) for all parameters 5.46 nats against 4.30 with Muon;
bfloat16 1.5 times the tokens per second of float32, and batched-product attention 1.3 times those of the
flash kernel on top.

## Limits

Small, trained on one library for about an hour, knows no natural language beyond docstrings and comments.
Later Python versions contain many of the held-out files with few changes: split by the rule above.
The split is by whole document, so held-out files that resemble training files (the tables of `encodings`, say)
stay in; they make the mean cross-entropy easier than that of wholly new Python.
"""

CARD_OPTIONS = ("batch_tokens", "minutes", "seed", "short_share", "muon_lr", "adam_lr", "weight_decay")


def measure(model: Any, documents: Documents, heldout: np.ndarray) -> dict[str, float]:
    """The held-out figures, by name."""
    ce, entropy = evaluate(model, heldout), unigram_entropy(heldout)
    tokens_per_byte = len(heldout) / documents.size_bytes("validation")
    return {
        "ce": ce,
        "entropy": entropy,
        "ratio": ce / entropy,
        "tokens_per_byte": tokens_per_byte,
        "bytes_per_token": 1 / tokens_per_byte,
        "bits_per_byte": ce * tokens_per_byte / math.log(2),
        "n_heldout": len(heldout),
        "n_heldout_documents": len(documents.texts["validation"]),
    }


def write_card(run: Run, documents: Documents, figures: dict[str, float], args: argparse.Namespace) -> None:
    import transformers

    train_tokens = len(run.batches.stream)
    card = CARD.format(
        **figures,
        **{name: getattr(args, name) for name in CARD_OPTIONS},
        parameters_m=run.model.num_parameters() / 1e6,
        python=platform.python_version(),
        n_documents=sum(map(len, documents.texts.values())),
        n_undecodable=documents.n_undecodable,
        n_duplicates=documents.n_duplicates,
        train_documents=len(documents.texts["train"]),
        train_mb=documents.size_bytes("train") / 1e6,
        train_tokens=train_tokens,
        tokens_seen_m=run.tokens / 1e6,
        epochs=run.tokens / train_tokens,
        steps=run.step,
        hardware=f"{args.threads} core{'s' * (args.threads > 1)} of a server CPU ({platform.machine()})",
        precision={"bf16": "bfloat16 autocast over float32 weights", "fp32": "float32"}[args.precision],
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    with staged(args.out) as staging:
        (staging / "README.md").write_text(card)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train actcache's bundled language model.")
    parser.add_argument("--minutes", type=float, default=60, help="training time, resumed runs together")
    parser.add_argument("--out", type=Path, required=True, help="model directory; a tokenizer in it is kept")
    parser.add_argument("--checkpoint", type=Path, help="default: OUT.checkpoint.pt, removed at the end")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="autocast or not")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.006)
    parser.add_argument("--weight-decay", type=float, default=0.02, help="of Muon's matrices")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--short-share", type=float, default=0.33, help="share of the time at 128 tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    from transformers import AttentionInterface, AutoTokenizer

    AttentionInterface.register("causal_bmm", causal_attention)
    documents = read_stdlib()
    if not (args.out / "tokenizer.json").exists():
        logger.info("training the tokenizer on %d documents", len(documents.texts["train"]))
        train_tokenizer(documents.texts["train"], args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    stream = tokenise(tokenizer, documents.texts["train"])
    heldout = tokenise(tokenizer, documents.texts["validation"])
    logger.info("%d training tokens, %d held-out tokens", len(stream), len(heldout))

    model = new_model()
    model.set_attn_implementation("causal_bmm")
    batches = Batches(stream, args.batch_tokens, args.seed)
    run = Run(model, new_optimizers(model, args), batches, Clock(60 * args.minutes))
    checkpoint = args.checkpoint or args.out.with_name(args.out.name + ".checkpoint.pt")
    if checkpoint.exists():
        run.load(checkpoint)
        logger.info("resuming at step %d, %.1f minutes in", run.step, run.clock.spent_s / 60)
    train(run, heldout, checkpoint, args)

    figures = measure(model, documents, heldout)
    save_model(model, args.out)
    write_card(run, documents, figures, args)
    checkpoint.unlink(missing_ok=True)
    logger.info(
        "held-out CE %(ce).4f nats, unigram entropy %(entropy).4f, ratio %(ratio).4f, "
        "%(bits_per_byte).4f bits per byte",
        figures,
    )


if __name__ == "__main__":
    main()
