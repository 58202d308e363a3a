"""Training by several ranks beside one process: rows/s, bytes over the network, memory; and a model of GPUs.

`--part rate`: runs of a TopK SAE on one dataset, each read by the reader: one process with `--world` threads
(the reference), and `--world` ranks of one thread each that share it, by latents and by rows. They take turns;
the figure is the median of the ratios of each turn. Steps 3 to the last are timed. Bytes are those that the
loopback interface counted, beside what the layout's formula says; start-up is left out of both.

`--part memory`: weights, gradients' owners' moments and peak memory of a rank at `--wide`, by latents.

`--part ray`: the same run by `sae.train(workers=1)`: its rate beside the plain one, and how long Ray takes to start.

`--part model`: a step on 8 to 64 GPUs by arithmetic: matmuls at a share of peak, collectives at a share of the
link's bandwidth. It says where latents and rows cross, not what a cluster does.

Ranks are processes on gloo.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before tests/, whose folders have the packages' names

import torch
from hardware import report

import actcache
import sae
from sae.spread import Layout, spread_of
from sae.train import Trainer

WARM = 3
"""Steps that are not timed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("rate", "memory", "ray", "model"), action="append")
    parser.add_argument("--data", help="a dataset; 400,000 planted rows of d_in 192 by default")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--wide", type=int, default=65_536)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--arch", choices=("topk", "batchtopk"), default="topk")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke run; its figures mean nothing")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.steps, options.wide, options.d_sae = 1, WARM + 2, 1024, 512
    parts = options.part or ["rate", "memory", "ray", "model"]
    if parts != ["model"]:
        options.data = options.data or planted(options)
    for part in parts:
        {"rate": rate, "memory": memory, "ray": by_ray, "model": model}[part](options)


def planted(options: argparse.Namespace) -> str:
    """A dataset of planted features in a temporary folder that later runs find again."""
    import features

    n_rows = 20_000 if options.quick else 400_000
    folder = Path(tempfile.gettempdir()) / f"actcache-distributed-{n_rows}"
    dataset = features.write(features.synth(n_features=2048, d_in=192), folder, n_rows, precision="fvu:1e-3")
    return dataset.url


def rate(options: argparse.Namespace) -> None:
    """Rows/s of each layout over those of one process, and bytes a step."""
    variants: dict[str, tuple[int, str | None]] = {"one process": (1, None)}
    variants |= {spread: (options.world, spread) for spread in ("latents", "rows")}
    rates: dict[str, list[float]] = {name: [] for name in variants}
    sent: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.repeats):
        for name, (world, spread) in variants.items():
            threads = options.world // world
            found = on_ranks(world, _timed, options, spread, threads)[0]
            rates[name].append(options.batch_size / found["seconds_per_step"])
            sent[name].append(found["bytes_per_step"])
    d_in = found["d_in"]
    for name, (world, _) in variants.items():
        ratios = [a / b for a, b in zip(rates[name], rates["one process"], strict=True)]
        expected = _bytes(name, world, options.batch_size, d_in, options.d_sae, options.k, code_bytes=1)
        report(
            "distributed-training", layout=name, arch=options.arch, world=world, d_in=d_in,
            d_sae=options.d_sae, k=options.k, batch_size=options.batch_size,
            rows_per_s=round(statistics.median(rates[name])),
            over_one_process=round(statistics.median(ratios), 3), ratios=[round(r, 3) for r in ratios],
            mb_per_step=round(statistics.median(sent[name]) / 1e6, 3), mb_by_formula=round(expected * world / 1e6, 3),
        )  # fmt: skip


def memory(options: argparse.Namespace) -> None:
    """What a rank holds when latents are sharded, beside one process."""
    for world in (1, options.world):
        ranks = on_ranks(world, _held, options, "latents" if world > 1 else None)
        held, peak = (max(rank[key] for rank in ranks) for key in ("state_bytes", "peak_bytes"))
        report(
            "distributed-training-memory", world=world, d_sae=options.wide, d_in=ranks[0]["d_in"],
            weights_and_adam_mib=round(held / 2**20, 1), peak_mib_of_a_rank=round(peak / 2**20, 1),
        )  # fmt: skip


def by_ray(options: argparse.Namespace) -> None:
    """The distributed path at world 1 beside the plain trainer, and Ray Train's start-up."""
    rates: dict[str, list[float]] = {"plain": [], "ray": []}
    started = []
    for _ in range(max(1, options.repeats // 2)):
        for name in rates:
            with tempfile.TemporaryDirectory() as out:
                dataset = actcache.open(options.data)
                training = sae.Training(n_rows=options.steps * options.batch_size, lr=1e-3, log_every=5)
                stream = dataset.stream(batch_size=options.batch_size, epochs=100, metadata=False)
                begun = time.perf_counter()
                torch.set_num_threads(options.world)
                extra = {"workers": 1, "cpus_per_worker": options.world} if name == "ray" else {}
                sae.train(stream, sae.TopK(d_sae=options.d_sae, k=options.k), training, out=out, **extra)
                took = time.perf_counter() - begun
                file = next(Path(out).glob("*/metrics.jsonl"))
                lines = [json.loads(line) for line in file.read_text().splitlines()]
                found = statistics.median(line["rows_per_s"] for line in lines[1:])
                rates[name].append(found)
                if name == "ray":
                    started.append(took - training.n_rows / found)
    ratios = [a / b for a, b in zip(rates["ray"], rates["plain"], strict=True)]
    report(
        "distributed-training-ray", workers=1, d_sae=options.d_sae, threads=options.world,
        rows_per_s={name: round(statistics.median(r)) for name, r in rates.items()},
        over_plain=round(statistics.median(ratios), 3), ratios=[round(r, 3) for r in ratios],
        start_and_end_s=round(statistics.median(started), 1),
    )  # fmt: skip


class _Clocked(Trainer):
    """Notes the time and the loopback's counter after each step."""

    def _train_batch(self, *arguments: Any) -> Any:
        found = super()._train_batch(*arguments)
        self.__dict__.setdefault("marks", []).append((time.perf_counter(), _loopback_bytes()))
        return found


def _trainer(options: argparse.Namespace, spread: str | None, d_sae: int, steps: int) -> _Clocked:
    import torch.distributed as dist

    world = dist.get_world_size() if dist.is_initialized() else 1
    dataset = actcache.open(options.data)
    stream = dataset.stream(batch_size=options.batch_size, epochs=100, metadata=False)
    kind = {"topk": sae.TopK, "batchtopk": sae.BatchTopK}[options.arch]
    training = sae.Training(n_rows=steps * options.batch_size, lr=1e-3, log_every=20)
    layout = Layout(spread_of(spread, world, 1)) if spread else None
    return _Clocked(
        stream, [kind(d_sae=d_sae, k=options.k)], training, start=[None], layout=layout, tell=lambda _: None
    )


def _timed(options: argparse.Namespace, spread: str | None, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    trainer = _trainer(options, spread, options.d_sae, options.steps)
    with torch.enable_grad():
        trainer.run()
    (begun, before), (ended, after) = trainer.marks[WARM - 1], trainer.marks[-1]
    steps = len(trainer.marks) - WARM
    return {
        "seconds_per_step": (ended - begun) / steps,
        "bytes_per_step": (after - before) / steps,
        "d_in": trainer.learners[0].d_in,
    }


def _held(options: argparse.Namespace, spread: str | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    trainer = _trainer(options, spread, options.wide, 3)
    with torch.enable_grad():
        trainer._loop(iter(trainer.stream), _Silent())  # type: ignore[arg-type]
    learner = trainer.learners[0]
    tensors = list(learner.parameters.values())
    tensors += [t for p in learner.updated.values() for t in learner.optimiser.state[p].values()]
    return {
        "state_bytes": sum(t.nbytes for t in tensors),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "d_in": learner.d_in,
    }


class _Silent:
    def advance(self, n: int, **fields: object) -> None:
        """Show nothing."""


def _bytes(layout: str, world: int, n: int, d: int, f: int, k: int, code_bytes: int) -> float:
    """Bytes that each rank sends a step, by ring collectives."""
    around = (world - 1) / world
    if layout == "latents":
        rows = n * (d * code_bytes + 4) * around  # codes and scales of its own rows, to all others
        candidates = 4 * n * k * (world - 1)
        reconstructions = 2 * 4 * n * d * around
        return rows + candidates + reconstructions + 2 * 4 * d * around
    if layout == "rows":
        return (
            2 * 4 * 2 * f * d * around + 2 * f * around
        )  # gradients to their owners, weights back; who fired
    return 0.0


def _loopback_bytes() -> int:
    """Bytes that the loopback interface has sent, by all processes of this machine."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What each of `world` fresh processes returned."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, folder, function, args), nprocs=world)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    Path(folder, f"{rank}.json").write_text(json.dumps(function(*args)))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


PEAK = {"bfloat16": 989e12, "tf32": 494e12}  # H100 SXM, dense
MEMORY, NVLINK, NETWORK = 3.35e12, 450e9, 50e9  # bytes/s: HBM3; a GPU's NVLink; its 400 Gb/s between nodes
REACHED_MATMUL, REACHED_LINK, LATENCY = 0.6, 0.7, 20e-6
COLLECTIVES, NODE = 6, 8  # of a step; GPUs that NVLink joins


def model(options: argparse.Namespace) -> None:
    """Seconds a step of each layout, by the bytes of `_bytes` and the passes of a sparse step."""
    shapes = ((4096, 2304, 16_384), (4096, 2304, 131_072), (8192, 4096, 131_072), (32_768, 4096, 131_072))
    for n, d, f in shapes:
        for world in (1, 8, 16, 64):
            nodes = max(1, world // NODE)
            meshes = {
                "latents": (1, world),
                "rows": (world, 1),
                "rows between nodes": (nodes, world // nodes),
            }
            found = {name: _step(n, d, f, options.k, *mesh) for name, mesh in meshes.items()}
            report("distributed-training-model", arithmetic=True, n=n, d_in=d, d_sae=f, world=world, **found)


def _step(n: int, d: int, f: int, k: int, islands: int, ranges: int) -> dict[str, float]:
    world = islands * ranges
    matmul = 2 * n * d * f / world / (PEAK["bfloat16"] * REACHED_MATMUL)
    sparse = 6 * 2 * n * k / world * d * 4 / MEMORY  # decoding, its gradients, those of the encoder
    update = 14 * 4 * 2 * f / world * d / MEMORY  # passes of Adam, projection and norms over the weights
    inside = _bytes("latents", ranges, n // islands, d, f, k, code_bytes=1) if ranges > 1 else 0.0
    between = _bytes("rows", islands, n, d, f // ranges, k, code_bytes=1) if islands > 1 else 0.0
    talk = inside / (_link(ranges) * REACHED_LINK) + between / (_link(world) * REACHED_LINK)
    talk += LATENCY * COLLECTIVES if world > 1 else 0
    return {
        "step_ms": round(1e3 * (matmul + sparse + update + talk), 2),
        "network_ms": round(1e3 * talk, 2),
        "gb": round((inside + between) / 1e9, 3),
    }


def _link(gpus: int) -> float:
    return NVLINK if gpus <= NODE else NETWORK


if __name__ == "__main__":
    main()
