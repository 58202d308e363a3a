"""Features that are known, found again: our trainer beside SAELens' on the same batches, one JSON line a seed.

Toy A and SynthSAEBench scaled down (benchmarks/features.py), each written once into a dataset. Both
trainers read it in the same order, start from the same directions (ours with decoder rows of norm 1
where the architecture keeps them so, SAELens' always with 0.1, as each initialises), without input
scaling, warm-ups or decay, Adam at the same constant learning rate. Both SAEs are then measured by the
same function on rows of their own. The rest is each project's default: SAELens leaves decoder norms
free, weighs AuxK by 1, trains thresholds themselves and not their logarithms, and reaches inference
thresholds by averages of 100 batches.

A summary line follows: mean and standard deviation over seeds, and whether ours is within two
pooled standard deviations of SAELens' or better. `--quick` proves that it runs; its figures mean nothing.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "sae"))

import features
import peers
import torch
from hardware import report
from safetensors.torch import save_file

import actcache
import sae
from sae.architectures import Architecture
from sae.learner import Learner

ROOT = Path(__file__).parents[1]
BATCH_SIZE = 1024
METRICS = ("mcc", "f1", "explained_variance")


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One architecture on one set of features, as each project calls it."""

    ours: Architecture
    theirs: str
    options: Mapping[str, Any]
    lr: float = 1e-3
    exactly: int | None = None
    """toy-a: so many features fire in each row."""
    initial: Mapping[str, float] = field(default_factory=dict)
    """Parameters of SAELens' beside weights, all of one value."""


def toy_a() -> dict[str, Contest]:
    f, k = 16, 4
    widths = (4, 8, f)
    matryoshka = {"k": k, "matryoshka_widths": list(widths)}
    return {
        "standard": Contest(
            ours=sae.Standard(d_sae=f, l1_coefficient=0.05),
            theirs="standard",
            options={"l1_coefficient": 0.05},
        ),
        "gated": Contest(
            ours=sae.Gated(d_sae=f, l1_coefficient=0.05), theirs="gated", options={"l1_coefficient": 0.05}
        ),
        "batchtopk": Contest(ours=sae.BatchTopK(d_sae=f, k=k), theirs="batchtopk", options={"k": k}),
        "topk": Contest(ours=sae.TopK(d_sae=f, k=k), theirs="topk", options={"k": k}, exactly=k),
        "jumprelu": Contest(
            ours=sae.JumpReLU(d_sae=f, l0_coefficient=1), theirs="jumprelu", options={"l0_coefficient": 1.0}
        ),
        "matryoshka": Contest(
            ours=sae.Matryoshka(d_sae=f, k=k, prefixes=widths),
            theirs="matryoshka_batchtopk",
            options=matryoshka,
        ),
    }


def synth() -> dict[str, Contest]:
    f, k, lr = 256, 8, 3e-4
    widths = (8, 32, 128, f)
    matryoshka = {"k": k, "matryoshka_widths": list(widths)}
    return {
        "standard": Contest(
            ours=sae.Standard(d_sae=f, l1_coefficient=1.0),
            theirs="standard",
            options={"l1_coefficient": 1.0},
            lr=lr,
        ),
        "topk": Contest(ours=sae.TopK(d_sae=f, k=k), theirs="topk", options={"k": k}, lr=lr),
        "batchtopk": Contest(ours=sae.BatchTopK(d_sae=f, k=k), theirs="batchtopk", options={"k": k}, lr=lr),
        "jumprelu": Contest(
            ours=sae.JumpReLU(d_sae=f, l0_coefficient=1),
            theirs="jumprelu",
            options={"l0_coefficient": 1.0},
            lr=lr,
        ),
        "matryoshka": Contest(
            ours=sae.Matryoshka(d_sae=f, k=k, prefixes=widths),
            theirs="matryoshka_batchtopk",
            options=matryoshka,
            lr=lr,
        ),
    }


CONTESTS = {"toy-a": toy_a, "synth": synth}
ROWS = {"toy-a": 3_000_000, "synth": 5_000_000}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=list(CONTESTS), action="append", help="default: both")
    parser.add_argument("--arch", action="append", help="architecture, repeatable; default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--rows", type=int, help="rows to train on; default: 3 million toy-a, 5 million synth"
    )
    parser.add_argument("--keep", type=Path, help="directory for datasets and SAEs; default: a temporary one")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 40,960 rows, one seed")
    options = parser.parse_args()
    seeds = 1 if options.quick else options.seeds
    python = peers.python()
    with tempfile.TemporaryDirectory() as temporary:
        for data in options.data or CONTESTS:
            n_rows = 40 * BATCH_SIZE if options.quick else options.rows or ROWS[data]
            for name, contest in CONTESTS[data]().items():
                if not options.arch or name in options.arch:
                    run(data, name, contest, n_rows, seeds, (options.keep or Path(temporary)) / data, python)


def run(
    data: str, name: str, contest: Contest, n_rows: int, seeds: int, directory: Path, python: Path
) -> None:
    """One architecture: a line for each trainer and seed, then the summary."""
    truth = features.synth() if data == "synth" else features.toy_a(contest.exactly)
    written = directory / ("rows" if contest.exactly is None else f"rows-exactly-{contest.exactly}")
    dataset = features.write(truth, written, n_rows)
    found: dict[str, list[dict[str, float]]] = {"actcache": [], "saelens": []}
    for seed in range(seeds):
        out = directory / name / str(seed)
        trained = {
            "actcache": train_ours(dataset, contest, n_rows, seed),
            "saelens": train_theirs(dataset, contest, n_rows, seed, out, python),
        }
        for trainer, s in trained.items():
            metrics = features.evaluate(s, truth, 20_000 if n_rows < 10**6 else 100_000)
            found[trainer].append(metrics)
            rounded = {key: round(value, 4) for key, value in metrics.items()}
            report(
                "ground-truth", data=data, arch=name, trainer=trainer, seed=seed, rows=n_rows, lr=contest.lr, **rounded
            )  # fmt: skip
    report("ground-truth-summary", data=data, arch=name, rows=n_rows, seeds=seeds, **compared(found))


def compared(found: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """By metric: [mean, sd] of each trainer over seeds, and whether ours is not worse by two pooled sd."""
    lines: dict[str, Any] = {}
    for metric in (*METRICS, "l0"):
        values = {trainer: [m[metric] for m in runs] for trainer, runs in found.items()}
        sd = {trainer: statistics.stdev(v) if len(v) > 1 else 0.0 for trainer, v in values.items()}
        mean = {trainer: statistics.mean(v) for trainer, v in values.items()}
        lines[metric] = {trainer: [round(mean[trainer], 4), round(sd[trainer], 4)] for trainer in values}
        if metric in METRICS and len(found["actcache"]) > 1:
            pooled = math.sqrt((sd["actcache"] ** 2 + sd["saelens"] ** 2) / 2)
            lines[metric]["not_worse"] = mean["actcache"] >= mean["saelens"] - 2 * pooled
    return lines


def train_ours(dataset: actcache.Dataset, contest: Contest, n_rows: int, seed: int) -> sae.SAE:
    stream = dataset.stream(
        features.SITE,
        batch_size=BATCH_SIZE,
        seed=seed,
        epochs=math.ceil(n_rows / dataset.n_rows),
        metadata=False,
    )
    return sae.train(stream, contest.ours, training(contest, n_rows, seed))[0]


def training(contest: Contest, n_rows: int, seed: int) -> sae.Training:
    """SAELens' conditions: raw rows, constant learning rate, dead after 1000 steps, biases from 0."""
    return sae.Training(
        n_rows=n_rows,
        lr=contest.lr,
        seed=seed,
        betas=(0.9, 0.999),
        lr_warmup_rows=0,
        lr_decay=0.0,
        sparsity_warmup_rows=0,
        dead_after_rows=1001 * BATCH_SIZE,
        b_dec_init="zero",
        input_scale="none",
    )


def train_theirs(
    dataset: actcache.Dataset,
    contest: Contest,
    n_rows: int,
    seed: int,
    out: Path,
    python: Path,
    record: int = 0,
    norm: float = 0.1,
) -> Any:
    """SAELens' SAE, or with `record` what it wrote down of its first steps."""
    out.mkdir(parents=True, exist_ok=True)
    d_in = dataset.d_in(features.SITE)
    p = Learner(contest.ours, d_in, 1.0, training(contest, n_rows, seed).rules(contest.ours), seed).parameters
    W_dec = norm * torch.nn.functional.normalize(p["W_dec_FD"], dim=1)
    initial = {"W_enc": W_dec.T.contiguous(), "W_dec": W_dec}
    initial |= {name: torch.full((contest.ours.d_sae,), value) for name, value in contest.initial.items()}
    save_file(initial, out / "initial.safetensors")
    job = {
        "url": dataset.url,
        "site": features.SITE,
        "batch_size": BATCH_SIZE,
        "n_rows": n_rows,
        "epochs": math.ceil(n_rows / dataset.n_rows),
        "order_seed": seed,
        "lr": contest.lr,
        "architecture": contest.theirs,
        "options": dict(contest.options),
        "initial": str(out / "initial.safetensors"),
        "out": str(out),
        "record": record,
    }
    (out / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("saelens_trainer.py")
    settings = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, script, out / "job.json"], env=os.environ | settings, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"SAELens' trainer failed:\n{done.stderr[-4000:]}")
    return out / "recorded.safetensors" if record else sae.load(out)


if __name__ == "__main__":
    main()
