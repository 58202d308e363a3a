"""SAE training steps on a GPU: rows/s, memory, and the encoder matmul's share. Needs no Ray and no SAELens.

A line for each width, architecture and selection. `sparse` is our step; `dense` a plain one on the same
GPU: all latents by two matmuls under bfloat16 autocast, float32 weights, `torch.topk`, autograd, clipping
and fused Adam, as peers do it. Both train from the same weights on the same random batches, in
turns; figures are medians. `matmul_ms` is the encoder matmul alone, in the dtype of the selection.
First the sparse step is held against the dense oracle in float32 (`wrong` is the largest relative
difference of a gradient). On a machine without a GPU: `--device cpu --quick`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from hardware import report
from torch import Tensor

import sae
from sae.architectures import Architecture
from sae.encoder import pre_activations
from sae.learner import Learner
from sae.training import Rules

_NEVER = 10**12


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--d-in", type=int, default=2304)
    parser.add_argument("--d-sae", type=int, action="append", help="default: 16384, 65536, 131072")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of each turn")
    parser.add_argument("--quick", action="store_true", help="small shapes; its figures mean nothing")
    options = parser.parse_args()
    if options.quick:
        options.d_in, options.d_sae, options.batch_size, options.k = 32, [512], 64, 8
        options.repeats = options.steps = 2
    for d_sae in options.d_sae or (16_384, 65_536, 131_072):
        configs: list[tuple[Architecture, sae.encoder.Selection]] = [
            (sae.TopK(d_sae=d_sae, k=options.k), "bfloat16"),
            (sae.TopK(d_sae=d_sae, k=options.k), "float32"),
            (sae.BatchTopK(d_sae=d_sae, k=options.k), "float32"),
            (sae.JumpReLU(d_sae=d_sae, target_l0=options.k), "float32"),
        ]
        for config, selection in configs:
            compare(config, selection, options)


def compare(config: Architecture, selection: sae.encoder.Selection, options: argparse.Namespace) -> None:
    """Print one case's line."""
    g = torch.Generator().manual_seed(0)
    batches = [
        torch.randn(options.batch_size, options.d_in, generator=g).to(options.device) for _ in range(4)
    ]
    wrong = difference(config, batches[0], options.device)
    one = learner(config, batches[0], selection, options.device)
    turns = {"sparse": lambda n: steps(one, batches, n)}
    if config.architecture == "topk":
        plain = Plain(one, options.k)
        turns["dense"] = lambda n: plain.steps(batches, n)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    peak: dict[str, float] = {}
    for name, turn in turns.items():
        if options.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        turn(2)
        peak[name] = torch.cuda.max_memory_allocated() / 2**30 if options.device != "cpu" else 0.0
    for _ in range(options.repeats):
        for name, turn in turns.items():
            seconds[name].append(timed(lambda turn=turn: turn(options.steps), options.device) / options.steps)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    centred_ND = batches[0] - one.parameters["b_dec_D"]
    encode = lambda: pre_activations(centred_ND, one.parameters, selection, one.scratch)  # noqa: E731
    encode()
    matmul = statistics.median(timed(encode, options.device) for _ in range(10))
    report(
        "gpu-training", arch=config.architecture, d_in=options.d_in, d_sae=config.d_sae, k=options.k,
        batch_size=options.batch_size, selection=selection, device=device_name(options.device), torch=torch.__version__,
        wrong=wrong, rows_per_s={name: round(options.batch_size / s) for name, s in median.items()},
        ms={name: round(1e3 * s, 2) for name, s in median.items()}, matmul_ms=round(1e3 * matmul, 2),
        matmul_share=round(matmul / median["sparse"], 3), peak_gib={n: round(p, 1) for n, p in peak.items()},
    )  # fmt: skip


def learner(
    config: Architecture, x_ND: Tensor, selection: sae.encoder.Selection, device: str, kind: str = "sparse"
) -> Learner:
    """In the middle of its run; where a threshold decides, biases are such that about k latents are active."""
    rules = Rules(lr=1e-5, dead_after_rows=_NEVER, step=kind, selection=selection)  # type: ignore[arg-type]
    one = Learner(config, x_ND.shape[1], 1.0, rules, seed=0, device=device)
    if not config.by_rank:
        pre_NF = x_ND[:64] @ one.parameters["W_enc_FD"].T
        k = int(config.sparsity) * len(pre_NF)
        one.parameters["b_enc_F"] -= torch.topk(pre_NF.flatten(), k).values[-1]
    return one


def difference(config: Architecture, x_ND: Tensor, device: str) -> float:
    """Largest difference of a gradient from the dense oracle's, over the oracle's norm; 256 rows, float32."""
    x_ND = x_ND[:256]
    found, wanted = (
        learner(config, x_ND, "float32", device, kind).gradients(x_ND).gradients for kind in ("sparse", "dense")
    )  # fmt: skip
    return max(
        float((found[n] - wanted[n]).norm() / wanted[n].norm().clamp_min(1e-12))
        for n in ("W_enc_FD", "W_dec_FD", "b_dec_D")
    )


def steps(one: Learner, batches: list[Tensor], n: int) -> None:
    for i in range(n):
        x_ND = batches[i % len(batches)]
        one.apply(one.gradients(x_ND), x_ND)


class Plain:
    """TopK over all latents, by autograd."""

    def __init__(self, like: Learner, k: int) -> None:
        self.k = k
        self.p = {name: tensor.clone().requires_grad_() for name, tensor in like.parameters.items()}
        self.optimiser = torch.optim.Adam(self.p.values(), lr=1e-5, fused=True)

    def steps(self, batches: list[Tensor], n: int) -> None:
        p = self.p
        for i in range(n):
            x_ND = batches[i % len(batches)]
            with torch.autocast(x_ND.device.type, torch.bfloat16):
                pre_NF = F.linear(x_ND - p["b_dec_D"], p["W_enc_FD"], p["b_enc_F"])
                top = torch.topk(pre_NF, self.k)
                latents_NF = torch.zeros_like(pre_NF).scatter(1, top.indices, top.values.relu())
                recon_ND = latents_NF @ p["W_dec_FD"] + p["b_dec_D"]
            loss = (recon_ND.float() - x_ND).square().sum(1).mean()
            self.optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(p.values()), 1.0)
            self.optimiser.step()
            with torch.no_grad():
                p["W_dec_FD"] /= p["W_dec_FD"].norm(dim=1, keepdim=True)


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds until all that the call began has ended."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device != "cpu" else "cpu"


if __name__ == "__main__":
    main()
