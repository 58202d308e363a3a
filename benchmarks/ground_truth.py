"""Features that are known, found again: our trainer beside SAELens' on the same batches, one JSON line a seed.

Toy A and SynthSAEBench scaled down (benchmarks/features.py), each written once into a dataset. Both
trainers read it in the same order, start from the same directions (SAELens with encoder and decoder of
norm 0.1, ours with decoder rows of norm 1 where the architecture keeps them so, and an encoder of 0.1
in the TopK family), without input scaling, warm-ups or decay, Adam at the same constant learning rate. Both SAEs are then measured by the
same function on rows of their own. The rest is each project's default: SAELens leaves decoder norms
free, weighs AuxK by 1, lets gated's last term move the decoder, and reaches inference thresholds by
averages of 100 batches. Gated's coefficient is each project's own, since SAELens' 0.05 leaves ours
at an L0 of 14; all others are the same.

A summary line follows: mean and standard deviation over seeds, and whether ours is within two
pooled standard deviations of SAELens' or better. `--quick` proves that it runs; its figures mean nothing.
With `--keep DIR` a run that was killed goes on with the SAEs that are missing.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "sae"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before tests/, whose folders have the packages' names

import features
import peers
import torch
from hardware import report
from safetensors.torch import save_file

import actcache
import sae
from sae.architectures import Architecture, config_to_dict
from sae.learner import Learner

ROOT = Path(__file__).parents[1]
BATCH_SIZE = 1024
SMALL = 0.1  # norm of the first encoder weights, as SAELens starts from
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
    ranked = {"d_sae": f, "k": k, "encoder_norm": SMALL}
    return {
        "standard": Contest(
            ours=sae.Standard(d_sae=f, l1_coefficient=0.05),
            theirs="standard",
            options={"l1_coefficient": 0.05},
        ),
        "gated": Contest(
            ours=sae.Gated(d_sae=f, l1_coefficient=0.7), theirs="gated", options={"l1_coefficient": 0.05}
        ),
        "batchtopk": Contest(ours=sae.BatchTopK(**ranked), theirs="batchtopk", options={"k": k}),
        "topk": Contest(ours=sae.TopK(**ranked), theirs="topk", options={"k": k}, exactly=k),
        "jumprelu": Contest(
            ours=sae.JumpReLU(d_sae=f, l0_coefficient=1), theirs="jumprelu", options={"l0_coefficient": 1.0}
        ),
        "matryoshka": Contest(
            ours=sae.Matryoshka(**ranked, prefixes=widths),
            theirs="matryoshka_batchtopk",
            options=matryoshka,
        ),
    }


def synth() -> dict[str, Contest]:
    f, k, lr = 256, 8, 3e-4
    widths = (8, 32, 128, f)
    matryoshka = {"k": k, "matryoshka_widths": list(widths)}
    ranked = {"d_sae": f, "k": k, "encoder_norm": SMALL}
    return {
        "standard": Contest(
            ours=sae.Standard(d_sae=f, l1_coefficient=1.0),
            theirs="standard",
            options={"l1_coefficient": 1.0},
            lr=lr,
        ),
        "topk": Contest(ours=sae.TopK(**ranked), theirs="topk", options={"k": k}, lr=lr),
        "batchtopk": Contest(ours=sae.BatchTopK(**ranked), theirs="batchtopk", options={"k": k}, lr=lr),
        "jumprelu": Contest(
            ours=sae.JumpReLU(d_sae=f, l0_coefficient=5),
            theirs="jumprelu",
            options={"l0_coefficient": 5.0},
            lr=1e-3,  # at 3e-4 no threshold gets high enough in this run
        ),
        "matryoshka": Contest(
            ours=sae.Matryoshka(**ranked, prefixes=widths),
            theirs="matryoshka_batchtopk",
            options=matryoshka,
            lr=lr,
        ),
    }


CONTESTS = {"toy-a": toy_a, "synth": synth}
ROWS = {"toy-a": 3_000_000, "synth": 2_000_000}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=list(CONTESTS), action="append", help="default: both")
    parser.add_argument("--arch", action="append", help="architecture, repeatable; default: all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--rows", type=int, help="rows to train on; default: 3 million toy-a, 2 million synth"
    )
    parser.add_argument(
        "--keep", type=Path, help="directory for datasets and SAEs, from which a killed run goes on"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: 40,960 rows, one seed")
    options = parser.parse_args()
    torch.set_num_threads(1)  # SAEs this small are slower on two
    with tempfile.TemporaryDirectory() as temporary:
        for data in options.data or CONTESTS:
            n_rows = 40 * BATCH_SIZE if options.quick else options.rows or ROWS[data]
            chosen = {n: c for n, c in CONTESTS[data]().items() if not options.arch or n in options.arch}
            directory = (options.keep or Path(temporary)) / f"{data}-{n_rows}"
            run(data, chosen, n_rows, 1 if options.quick else options.seeds, directory)


def run(data: str, contests: Mapping[str, Contest], n_rows: int, seeds: int, directory: Path) -> None:
    """All architectures on one set of features: a line for each trainer and seed, and summaries.

    SAELens trains in a process of its own while ours trains here. What is finished in `directory` is kept.
    """
    truths, datasets = {}, {}
    for exactly in {c.exactly for c in contests.values()}:
        truths[exactly] = features.synth() if data == "synth" else features.toy_a(exactly)
        written = directory / ("rows" if exactly is None else f"rows-exactly-{exactly}")
        datasets[exactly] = features.write(truths[exactly], written, n_rows)
    places = {
        (name, seed): (c, datasets[c.exactly], directory / name / str(seed))
        for name, c in contests.items()
        for seed in range(seeds)
    }
    jobs = [
        their_job(dataset, c, n_rows, seed, out / "saelens")
        for (_, seed), (c, dataset, out) in places.items()
    ]
    with jobs_running(jobs):
        for (_, seed), (c, dataset, out) in places.items():
            keep_ours(dataset, c, n_rows, seed, out / "actcache")
    n_drawn = 20_000 if n_rows < 10**6 else 100_000
    drawn = {exactly: list(features.draw(truth, n_drawn)) for exactly, truth in truths.items()}
    for name, c in contests.items():
        found: dict[str, list[dict[str, float]]] = {"actcache": [], "saelens": []}
        for seed, trainer in itertools.product(range(seeds), found):
            s = sae.load(places[name, seed][2] / trainer)
            metrics = features.evaluate(s, truths[c.exactly], n_drawn, drawn[c.exactly])
            found[trainer].append(metrics)
            rounded = {key: round(value, 4) for key, value in metrics.items()}
            report(
                "ground-truth", data=data, arch=name, trainer=trainer, seed=seed, rows=n_rows, lr=c.lr, **rounded
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


def keep_ours(dataset: actcache.Dataset, contest: Contest, n_rows: int, seed: int, out: Path) -> None:
    """Our SAE in `out`, unless it is there."""
    settings = {
        "dataset": dataset.id,
        "config": config_to_dict(contest.ours),
        "training": asdict(training(contest, n_rows, seed)),
    }
    if not done(out, settings):
        train_ours(dataset, contest, n_rows, seed).save(out)
        (out / "done.json").write_text(json.dumps(settings))


def done(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a run with these settings ended in `out`."""
    marker = out / "done.json"
    return marker.exists() and json.loads(marker.read_text()) == json.loads(json.dumps(settings))


def train_theirs(
    dataset: actcache.Dataset, contest: Contest, n_rows: int, seed: int, out: Path, record: int, norm: float
) -> Path:
    """What SAELens wrote down of its first `record` steps; decoder rows start with this norm."""
    with jobs_running([their_job(dataset, contest, n_rows, seed, out, record, norm)]):
        pass
    return out / "recorded.safetensors"


def their_job(
    dataset: actcache.Dataset,
    contest: Contest,
    n_rows: int,
    seed: int,
    out: Path,
    record: int = 0,
    norm: float = 0.1,
) -> dict[str, Any]:
    """What benchmarks/saelens_trainer.py is asked for; the first weights are written to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    d_in = dataset.d_in(features.SITE)
    p = Learner(contest.ours, d_in, 1.0, training(contest, n_rows, seed).rules(contest.ours), seed).parameters
    W_dec = norm * torch.nn.functional.normalize(p["W_dec_FD"], dim=1)
    initial = {"W_enc": W_dec.T.contiguous(), "W_dec": W_dec}
    initial |= {name: torch.full((contest.ours.d_sae,), value) for name, value in contest.initial.items()}
    save_file(initial, out / "initial.safetensors")
    return {
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


@contextlib.contextmanager
def jobs_running(jobs: Sequence[dict[str, Any]]) -> Iterator[None]:
    """SAELens' trainer on the jobs that are not done, in one process beside the caller; waits for its end."""
    waiting = [job for job in jobs if not done(Path(job["out"]), job)]
    if not waiting:
        yield
        return
    paths = [Path(job["out"]) / "job.json" for job in waiting]
    for path, job in zip(paths, waiting, strict=True):
        path.write_text(json.dumps(job))
    script = Path(__file__).with_name("saelens_trainer.py")
    settings = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [peers.python(), script, *paths], env=os.environ | settings, stdout=log, stderr=log
        )
        try:
            yield
            process.wait()
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"SAELens' trainer failed:\n{log.read()[-4000:]}")


if __name__ == "__main__":
    main()
