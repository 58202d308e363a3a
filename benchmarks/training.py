"""SAE training steps: rows/s, where the time goes, and SAELens' own step on the same batches.

A line for each case. Variants take turns in one run, each for about `--seconds` at a time; figures are
medians. `sparse` is our step (gradients, projection, clipping, Adam, renormalisation, dead latents
counted and treated), `dense` the autograd step that it must equal, `saelens ...` SAELens' trainer.step
in a process of its own that waits meanwhile, with its flags (benchmarks/saelens_steps.py). All start
from the same weights, at a learning rate of 1e-5, so that a case stays what it is. *Half dead*: every
second latent has an encoder bias of -10 and is known to be dead, so AuxK (k_aux d_in / 2) works on it;
other architectures than the topk family have no dead latents here. Where a threshold decides, encoder
biases are such that `--l0` latents are active in a row.

`stages` are shares of the sparse step's time, taken in a run of its own: `encode` the matmul over all
latents, `select`, `loss` (decoding and error), `auxk` (its forward part), `gradients` (autograd, those
of AuxK too), `optimiser`; `rest` is what is left.

`--part sweep`: eight SAEs by one trainer, over the sum of their bare steps. `--part stream` (with
`--data`): a run fed by the reader, over the same run from memory.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "sae"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before tests/, whose folders have the packages' names

import numpy as np
import torch
from hardware import report
from safetensors.torch import save_file
from torch import Tensor

import actcache
import sae
import sae.step
from sae.architectures import Architecture
from sae.learner import Learner
from sae.training import Rules

ROOT = Path(__file__).parents[1]
D_IN, N_BATCHES = 192, 40
FLAGS = ("default", "onednn", "autocast")
_NEVER = 10**12


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line: an architecture, and what SAELens calls it."""

    config: Architecture
    theirs: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dead: bool = False
    selection: sae.encoder.Selection = "float32"


def cases(k: int, l0: int) -> list[Case]:
    """All of them: the rows of DESIGN section 6 first."""
    found = []
    for d_sae, dead in itertools.product((6144, 1536), (False, True)):
        for selection in ("float32", "bfloat16"):
            config: Architecture = sae.TopK(d_sae=d_sae, k=k)
            found.append(
                Case(config=config, theirs="topk", options={"k": k}, dead=dead, selection=selection)  # type: ignore[arg-type]
            )
        found.append(
            Case(config=sae.BatchTopK(d_sae=d_sae, k=k), theirs="batchtopk", options={"k": k}, dead=dead)
        )
    for d_sae in (6144, 1536):
        widths = [d_sae // 16, d_sae // 4, d_sae]
        options = {"k": k, "matryoshka_widths": widths}
        matryoshka = sae.Matryoshka(d_sae=d_sae, k=k, prefixes=tuple(widths))
        l1 = {"l1_coefficient": 1.0}
        found += [
            Case(config=matryoshka, theirs="matryoshka_batchtopk", options=options),
            Case(config=sae.Standard(d_sae=d_sae, l1_coefficient=1.0), theirs="standard", options=l1),
            Case(config=sae.Gated(d_sae=d_sae, l1_coefficient=1.0), theirs="gated", options=l1),
            Case(config=sae.JumpReLU(d_sae=d_sae, target_l0=l0), theirs="jumprelu"),
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="a dataset of d_in 192; rows of planted features by default")
    parser.add_argument(
        "--part", choices=("steps", "sweep", "stream"), action="append", help="default: steps"
    )
    parser.add_argument("--arch", action="append", help="architecture, repeatable; default: all")
    parser.add_argument("--d-sae", type=int, action="append", help="6144 or 1536; default: both")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--l0", type=int, default=32, help="active latents where a threshold decides")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn")
    parser.add_argument("--no-saelens", action="store_true", help="our steps alone")
    parser.add_argument("--quick", action="store_true", help="a smoke run; its figures mean nothing")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.seconds = 1, 0.0
    torch.set_num_threads(options.threads)
    batches_SND = batches(options.data, options.batch_size)
    chosen = [
        case
        for case in cases(options.k, options.l0)
        if (not options.arch or case.config.architecture in options.arch)
        and (not options.d_sae or case.config.d_sae in options.d_sae)
    ]
    parts = options.part or ["steps"]
    if "steps" in parts:
        with contextlib.ExitStack() as stack:
            peer = None if options.no_saelens else stack.enter_context(saelens(batches_SND, options.threads))
            for case in chosen:
                compare(case, batches_SND, peer, options)
    if "sweep" in parts:
        sweep(batches_SND, options)
    if "stream" in parts:
        stream(options)


def batches(url: str | None, batch_size: int) -> Tensor:
    """Rows of mean norm sqrt(d_in): a dataset's, or of 2,000 planted features of which 1 % are active."""
    n = N_BATCHES * batch_size
    if url is not None:
        dataset = actcache.open(url)
        acts_ND = dataset.read(dataset.sites[-1], slice(0, n))
        acts_ND = np.resize(acts_ND, (n, acts_ND.shape[1]))
    else:
        rng = np.random.default_rng(0)
        features_FD = rng.standard_normal((2000, D_IN)).astype(np.float32)
        acts_ND = 0.3 * rng.standard_normal((n, D_IN), np.float32)
        for part in np.array_split(np.arange(n), N_BATCHES):
            active = rng.random((len(part), 2000), np.float32) < 0.01
            acts_ND[part] += (active * rng.standard_exponential(active.shape, np.float32)) @ features_FD
    acts_ND *= np.float32(acts_ND.shape[1] ** 0.5 / np.linalg.norm(acts_ND, axis=1).mean())
    return torch.from_numpy(acts_ND).view(N_BATCHES, batch_size, -1)


def compare(case: Case, batches_SND: Tensor, peer: "Peer | None", options: argparse.Namespace) -> None:
    """Print one case's line."""
    shape = batches_SND[0]
    learners = {
        "sparse": learner(case, shape, options.l0),
        "dense": learner(replace(case, selection="float32"), shape, options.l0, "dense"),
    }
    turns: dict[str, Callable[[int], float]] = {
        name: stepping(one, batches_SND) for name, one in learners.items()
    }
    if peer is not None:
        peer.make(case, learners["sparse"])
        turns |= {f"saelens {flags}": peer.stepping(flags) for flags in FLAGS}
    rates = in_turns(turns, len(shape), options)
    own = learners["sparse"]
    fastest = max((rate for name, rate in rates.items() if name.startswith("saelens")), default=None)
    report(
        "training",
        arch=case.config.architecture,
        d_in=shape.shape[1],
        d_sae=case.config.d_sae,
        k=options.k if case.config.by_rank else None,
        l0=round(own.gradients(shape).n_active / len(shape), 1),
        half_dead=case.dead,
        n_dead=own.n_dead,
        selection=case.selection,
        batch_size=len(shape),
        threads=options.threads,
        rows_per_s=rates,
        over_dense=round(rates["sparse"] / rates["dense"], 2),
        over_saelens_default=None if peer is None else round(rates["sparse"] / rates["saelens default"], 2),
        over_saelens_best=None if fastest is None else round(rates["sparse"] / fastest, 2),
        stages=stages(own, batches_SND, 2 if options.quick else 20),
    )


def in_turns(
    turns: Mapping[str, Callable[[int], float]], batch_size: int, options: argparse.Namespace
) -> dict[str, int]:
    """Median rows/s of each, one turn after the other; a turn before the first shows how many steps it takes."""
    steps = {name: max(1, round(3 * options.seconds / turn(3))) for name, turn in turns.items()}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(options.repeats):
        for name, turn in turns.items():
            seconds[name].append(turn(steps[name]) / steps[name])
    return {name: round(batch_size / statistics.median(s)) for name, s in seconds.items()}


def learner(case: Case, x_ND: Tensor, l0: int, step: sae.step.StepKind = "sparse") -> Learner:
    """A learner in the middle of its run: half dead where that is the case, L0 as asked for."""
    rules = Rules(lr=1e-5, dead_after_rows=_NEVER, step=step, selection=case.selection)
    one = Learner(case.config, x_ND.shape[1], 1.0, rules, seed=0)
    p = one.parameters
    if not case.config.by_rank:
        pre_NF = x_ND[:256] @ p["W_enc_FD"].T
        threshold = torch.quantile(
            pre_NF.flatten()[:: max(1, pre_NF.numel() // 10**6)], 1 - l0 / case.config.d_sae
        )
        if "threshold_F" in p:
            threshold -= p["threshold_F"].mean()
        for name in ("b_enc_F", "b_mag_F"):
            if name in p:
                p[name] -= threshold
    if case.dead:
        p["b_enc_F"][::2] = -10  # of bfloat16 numbers near -100 many are equal, and all tie
        one.rows_since_fired_F[::2] = 2 * _NEVER
    return one


def stepping(one: Learner, batches_SND: Tensor) -> Callable[[int], float]:
    """A turn of n steps, in seconds."""
    coming = itertools.cycle(batches_SND)

    def turn(n: int) -> float:
        start = time.perf_counter()
        for x_ND in itertools.islice(coming, n):
            one.apply(one.gradients(x_ND), x_ND)
        return time.perf_counter() - start

    return turn


def stages(one: Learner, batches_SND: Tensor, n: int) -> dict[str, float]:
    """Share of each stage in n steps."""
    spent: dict[str, float] = {}

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

        return run

    kind, revive = type(one.config), one.config.revive
    places: list[tuple[Any, str, str]] = [
        (sae.step, "pre_activations", "encode"),
        (sae.step, "_view", "view"),
        (kind, "loss", "loss"),
        (torch.autograd, "grad", "gradients"),
        (Learner, "apply", "optimiser"),
    ]
    if isinstance(revive, sae.AuxK):
        places.append((sae.AuxK, "loss", "auxk"))
    with contextlib.ExitStack() as stack:
        for place, attribute, name in places:
            stack.enter_context(mock.patch.object(place, attribute, clocked(name, getattr(place, attribute))))
        whole = stepping(one, batches_SND)(n)
    spent["select"] = spent.pop("view") - spent.get("encode", 0.0)
    return {
        **{name: round(s / whole, 3) for name, s in sorted(spent.items())},
        "rest": round(1 - sum(spent.values()) / whole, 3),
        "ms_per_step": round(1e3 * whole / n, 2),
    }


class Peer:
    """SAELens in a process of its own, which waits while others run."""

    def __init__(self, process: "subprocess.Popen[str]", directory: Path) -> None:
        self._process, self._directory = process, directory

    def make(self, case: Case, ours: Learner) -> None:
        """A trainer of theirs, from our weights; the same latents are dead."""
        p = ours.parameters
        initial = {"W_enc": p["W_enc_FD"].T.contiguous(), "W_dec": p["W_dec_FD"].clone()}
        if case.theirs == "gated":
            initial |= {"b_gate": p["b_enc_F"].clone(), "b_mag": p["b_mag_F"].clone()}
        else:
            initial["b_enc"] = p["b_enc_F"].clone()
        path = self._directory / "initial.safetensors"
        save_file(initial, path)
        job = {
            "n_rows": 10**9,
            "batch_size": 4096,
            "lr": 1e-5,
            "architecture": case.theirs,
            "options": dict(case.options),
            "initial": str(path),
        }
        self._ask({"job": job, "dead": 2 if case.dead else 0})

    def stepping(self, flags: str) -> Callable[[int], float]:
        return lambda n: float(self._ask({"flags": flags, "steps": n})["seconds"])

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("SAELens' process ended; what it said is above")
        found: dict[str, Any] = json.loads(line)
        return found


@contextlib.contextmanager
def saelens(batches_SND: Tensor, threads: int) -> Iterator[Peer]:
    """SAELens' process, in the environment of the tests' peers (made at the first use)."""
    import peers

    settings = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    settings |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "batches.safetensors"
        save_file({"batches_SND": batches_SND.contiguous()}, file)
        process = subprocess.Popen(
            [peers.python(), Path(__file__).with_name("saelens_steps.py"), file, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | settings,
        )
        try:
            yield Peer(process, Path(temporary))
        finally:
            process.kill()
            process.wait()


def sweep(batches_SND: Tensor, options: argparse.Namespace) -> None:
    """Eight SAEs by one trainer, against the sum of their bare steps."""
    n, d_sae = batches_SND.shape[1], 1536
    configs: list[Architecture] = [
        kind(d_sae=d_sae, k=k) for kind in (sae.TopK, sae.BatchTopK) for k in (8, 16, 32, 64)
    ]
    n_rows = n * (4 if options.quick else N_BATCHES)
    acts_ND = batches_SND.reshape(-1, batches_SND.shape[2]).numpy()[:n_rows]
    training = sae.Training(n_rows=n_rows, lr=1e-5, lr_warmup_rows=0, dead_after_rows=_NEVER, log_every=20)

    def trained(_: int) -> float:
        timed = Timed(sae.ArrayStream(acts_ND, batch_size=n))
        sae.train(timed, configs, training)
        return timed.seconds_per_batch

    turns = {"trainer": trained}
    for i, config in enumerate(configs):
        one = learner(Case(config=config, theirs=""), batches_SND[0], options.l0)
        turns[f"bare {i}"] = stepping(one, batches_SND)
    steps = 2 if options.quick else 20
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(options.repeats):
        for name, turn in turns.items():
            seconds[name].append(turn(steps) / (1 if name == "trainer" else steps))
    median = {name: statistics.median(s) for name, s in seconds.items()}
    bare = sum(s for name, s in median.items() if name != "trainer")
    report(
        "training-sweep", saes=[f"{c.architecture}-{c.d_sae}-{c.sparsity}" for c in configs], batch_size=n,
        threads=options.threads, ms_per_batch=round(1e3 * median["trainer"], 2), ms_bare=round(1e3 * bare, 2),
        over_bare=round(median["trainer"] / bare, 3),
    )  # fmt: skip


def stream(options: argparse.Namespace) -> None:
    """End-to-end rows/s fed by the reader and from memory; what is missing of 1 is the stall."""
    if options.data is None:
        raise SystemExit("--part stream wants --data URL")
    dataset = actcache.open(options.data)
    site = dataset.sites[-1]
    n_rows = min(dataset.n_rows, 10 * options.batch_size if options.quick else 400_000)
    acts_ND = dataset.read(site, slice(0, n_rows))
    for d_sae, kind in itertools.product(options.d_sae or (6144, 1536), (sae.TopK, sae.BatchTopK)):
        training = sae.Training(n_rows=n_rows, lr=1e-3, dead_after_rows=_NEVER)
        sources = {
            "memory": lambda: sae.ArrayStream(acts_ND, batch_size=options.batch_size, epochs=1),
            "reader": lambda: dataset.stream(site, batch_size=options.batch_size, metadata=False),
        }
        rates: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(options.repeats):
            for name, source in sources.items():
                timed = Timed(source())
                sae.train(timed, kind(d_sae=d_sae, k=options.k), training)
                rates[name].append(options.batch_size / timed.seconds_per_batch)
        medians = {name: round(statistics.median(r)) for name, r in rates.items()}
        report(
            "training-stream", arch=kind.architecture, d_sae=d_sae, k=options.k, batch_size=options.batch_size,
            rows=n_rows, threads=options.threads, rows_per_s=medians,
            reader_over_memory=round(medians["reader"] / medians["memory"], 3),
        )  # fmt: skip


class Timed:
    """A stream that notes when its 3rd and last batches are taken: start-up is left out of the rate."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(self.source):
            if i == 2:
                self.start, self.first = time.perf_counter(), i
            yield batch
            self.stop, self.last = time.perf_counter(), i + 1

    @property
    def seconds_per_batch(self) -> float:
        return (self.stop - self.start) / (self.last - self.first)


if __name__ == "__main__":
    main()
