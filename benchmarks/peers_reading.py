"""Shuffled reading of the same rows by actcache, SAELens, MosaicML streaming and LitData, rows/s.

Each peer gets an environment of its own under --work, made here, its own copy of the rows in float32 in
the format that it documents, and what its documentation and source offer for a high rate of small samples
of one size. Local disk; batches of 4096 rows as one float32 tensor. The readers take turns, pass by pass,
and medians are printed: a JSON line for each setting, then one of ratios to actcache.

Two forms of a sample, since the libraries' cost is by sample:

- `row`, like for like: each row is a sample, so that rows are shuffled as such.
- `run`, friendliest: a sample is --run consecutive stored rows, a batch a few samples. What is lost: a
  run is never mixed, in no epoch. Here its rows are a random draw from a block of 131,072 because actcache
  stored them so; in rows that the peer's own writer got from an LM they would be neighbours in one text.

The settings:

- actcache: `ds.stream(site, batch_size=4096)`, with and without row metadata, which no peer gives.
- SAELens: `ActivationsStore` over cached activations (`save_to_disk`, contexts of 256 rows), a mixing
  buffer of 64 batches of 16 prompts; form `row` is its default mixing fraction 0.5, `run` is fraction 0,
  where rows come in stored order.
- MosaicML streaming: MDS without compression or hashes, `ndarray:float32:...` of fixed size (no size
  header, no pickle), shards of 64 MiB, `shuffle=True` (py1e), one canonical node, nothing to download.
- LitData: `TokensLoader`, its loader of items of one size: values without headers, memory-mapped, one
  `torch.frombuffer` a sample; chunks of 64 MB, `shuffle=True`, `StreamingDataLoader`.
- The last two with 0, 1 and 2 worker processes (--workers), samples joined by one call for a batch; the
  best count is compared.

A pass of actcache is an epoch from its start. A pass of a peer ends after --pass-rows rows, and its rate
is the better of that from the start and that after the first batch, which leaves its preparations out.
"""

import argparse
import importlib.machinery
import importlib.metadata
import json
import shutil
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 256
BATCH = 4096
FORMS = ("row", "run")
SETTLE_S = 3.0
"""Before each pass: the workers of a loader whose pass was cut short go on for a while."""
REPLY = "@@"
"""Begins a child's line that is meant for us; libraries print too."""
PEERS = {
    "saelens": ["torch==2.13.0", "sae-lens"],
    "mosaicml": ["torch==2.13.0", "mosaicml-streaming"],
    "litdata": ["torch==2.13.0", "litdata"],
}
PACKAGES = {"saelens": "sae-lens", "mosaicml": "mosaicml-streaming"}
Pass = Callable[[int], Iterator[Any]]
"""Starts a shuffled pass with so many workers and gives its batches."""


@dataclass
class Reader:
    """One setting of one library, and what its passes took."""

    name: str
    settings: dict[str, Any]
    take: Callable[[], dict[str, Any]]
    """Reads a pass."""
    passes: list[dict[str, Any]] = field(default_factory=list)

    def line(self) -> dict[str, Any]:
        """Medians of the passes, the first left out."""
        kept = self.passes[1:]
        middle = {
            key: statistics.median(p[key] for p in kept)
            for key in ("rows_per_s", "after_first_per_s", "first_batch_s")
        }
        best = middle["rows_per_s"]
        if self.name != "actcache":
            best = max(best, middle["after_first_per_s"])
        return {
            "reader": self.name,
            **self.settings,
            "rows_per_s": round(middle["rows_per_s"]),
            "after_first_rows_per_s": round(middle["after_first_per_s"]),
            "compared_rows_per_s": round(best),
            "compared_mval_per_s": round(best * kept[-1]["d_in"] / 1e6, 1),
            "first_batch_s": round(middle["first_batch_s"], 3),
            "rows_a_pass": kept[-1]["rows"],
            "passes": len(kept),
        }


def timed(batches: Iterator[Any], pass_rows: int | None) -> dict[str, Any]:
    """Read a pass, or as many of its rows; the first batch must be what the comparison is about."""
    start = time.perf_counter()
    n_rows, first_s, first_rows = 0, 0.0, 0
    for batch in batches:
        if not n_rows:
            first_s, first_rows = time.perf_counter() - start, len(batch)
            d_in = batch.shape[1]
            assert batch.shape == (BATCH, d_in), batch.shape
            assert str(batch.dtype).endswith("float32"), batch.dtype
        n_rows += len(batch)
        if pass_rows is not None and n_rows >= pass_rows:
            break
    took = time.perf_counter() - start
    return {
        "rows": n_rows,
        "d_in": d_in,
        "rows_per_s": n_rows / took,
        "after_first_per_s": (n_rows - first_rows) / (took - first_s),
        "first_batch_s": first_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", help="URL, e.g. demo-out/datasets/NAME; one is harvested by default")
    parser.add_argument("--work", type=Path, default=Path("peers-reading"), help="environments and copies")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=FORMS)
    parser.add_argument("--rows", type=int, default=2**22, help="the peers' copies; multiples of 4096 count")
    parser.add_argument("--pass-rows", type=int, default=2**20, help="a peer's pass ends here")
    parser.add_argument("--passes", type=int, default=5, help="of each reader, after one that is not counted")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="of the peers' loaders")
    parser.add_argument("--run", type=int, default=64, help="rows of a sample of form run; divides 4096")
    parser.add_argument("--child", nargs=3, metavar=("PEER", "FORM", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run < 1 or BATCH % options.run:
        parser.error(f"--run is {options.run}; it must divide {BATCH}, e.g. 64")
    if options.child:
        serve(options)
        return
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """Prepare the copies, read in turns, print."""
    from hardware import report
    from rows import open_or_harvest

    from actcache import interop

    options.work.mkdir(parents=True, exist_ok=True)
    dataset = open_or_harvest(options.dataset, options.work / "datasets", options.rows)
    site = dataset.sites[-1]
    n_rows = min(options.rows, dataset.n_rows) // BATCH * BATCH
    rows = options.work / f"{dataset.id[:12]}-{n_rows}.npy"
    if not rows.exists():
        part = rows.with_suffix(".part.npy")
        part.unlink(missing_ok=True)
        interop.export_npy(dataset, site, part, stop=n_rows)
        part.rename(rows)

    def streamed(metadata: bool) -> Iterator[Any]:
        for batch in dataset.stream(site, batch_size=BATCH, metadata=metadata):
            yield batch[site]

    readers = [
        Reader("actcache", {"metadata": metadata}, lambda m=metadata: timed(streamed(m), None))
        for metadata in (True, False)
    ]
    children = [Child(peer, form, rows, options) for peer in options.peers for form in options.forms]
    try:
        for child in children:
            readers += child.readers()
        for i in range(options.passes + 1):
            for reader in readers:
                time.sleep(SETTLE_S)
                took = reader.take()
                reader.passes.append(took)
                shown = f"{reader.name} {reader.settings} {took['rows_per_s']:,.0f} rows/s"
                print(f"pass {i} of {options.passes}: {shown}", file=sys.stderr)
    finally:
        for child in children:
            child.close()
    lines = [reader.line() for reader in readers]
    for line in lines:
        report("peers_reading", **line, peer_versions=versions_of(line["reader"], children))
    report("peers_reading", reader="ratios", rows=n_rows, actcache_rows=dataset.n_rows, **ratios(lines))


def ratios(lines: list[dict[str, Any]]) -> dict[str, float]:
    """actcache with metadata over the best workers' count of each peer and form."""
    best: dict[str, float] = {}
    for line in lines:
        if line["reader"] != "actcache":
            name = f"{line['reader']}_{line['form']}"
            best[name] = max(best.get(name, 0.0), line["compared_rows_per_s"])
    ours = next(line["compared_rows_per_s"] for line in lines if line.get("metadata"))
    return {f"actcache_over_{name}": round(ours / rate, 2) for name, rate in best.items()}


class Child:
    """A process in a peer's environment that reads when told to, between others' passes."""

    def __init__(self, peer: str, form: str, rows: Path, options: argparse.Namespace) -> None:
        self.peer, self.form = peer, form
        self._workers = [0] if peer == "saelens" else options.workers
        python = make_environment(options.work / f"venv-{peer}", PEERS[peer])
        flags = {"work": options.work, "pass-rows": options.pass_rows, "run": options.run}
        self._command = [str(python), __file__, "--child", peer, form, str(rows)]
        self._command += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        self._log = options.work / f"{peer}-{form}.log"
        self._last: int | None = None
        self._start()

    def _start(self) -> None:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.about = self._reply()  # the copy is written

    def readers(self) -> list[Reader]:
        """One for each count of workers."""
        found = []
        for workers in self._workers:
            settings = {"form": self.form, **self.about["settings"]}
            if self.peer != "saelens":
                settings["workers"] = workers
            found.append(Reader(self.peer, settings, lambda w=workers: self._pass(w)))
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _pass(self, workers: int) -> dict[str, Any]:
        if self.peer == "mosaicml" and self._last not in (None, workers):
            self.close()  # a worker forked after a pass without workers waits for ever for that one's threads
            self._start()
        self._last = workers
        assert self._process.stdin is not None
        print(workers, file=self._process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(REPLY):
                return dict(json.loads(line.removeprefix(REPLY)))
        last = self._log.read_text().strip().splitlines()[-1:]
        raise SystemExit(f"{self.peer}, form {self.form}, ended: {''.join(last)}; see {self._log}")


def versions_of(reader: str, children: list[Child]) -> dict[str, str]:
    return next((child.about["versions"] for child in children if child.peer == reader), {})


def make_environment(directory: Path, packages: list[str]) -> Path:
    """python of the environment; made if it is not there."""
    python = directory.absolute() / "bin" / "python"
    if not (directory / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        for package in packages:  # torch first: the CPU build that it pins stays
            subprocess.run([python, "-m", "pip", "install", "-q", package, packages[0]], check=True)
        (directory / "made").touch()
    return python


def serve(options: argparse.Namespace) -> None:
    """In the peer's environment: write the rows its way, then a pass for each line of stdin."""
    peer, form, rows = options.child
    acts_ND = np.load(rows, mmap_mode="r")
    directory = options.work / f"{peer}-{Path(rows).stem}"
    samples = 1 if form == "row" else options.run
    prepare = {"saelens": saelens, "mosaicml": mosaicml, "litdata": litdata}[peer]
    settings, take = prepare(acts_ND, directory, samples)
    known = ("numpy", "torch", PACKAGES.get(peer, peer))
    versions = {name: importlib.metadata.version(name) for name in known}
    print(REPLY + json.dumps({"settings": settings, "versions": versions}), flush=True)
    for line in sys.stdin:
        with closing(take(int(line))) as batches:  # type: ignore[type-var]
            print(REPLY + json.dumps(timed(batches, options.pass_rows)), flush=True)


def written(directory: Path, write: Callable[[], None]) -> None:
    """Write a copy once; one that was left half written is written again."""
    if not (directory / "made").exists():
        shutil.rmtree(directory, ignore_errors=True)
        write()
        (directory / "made").touch()


def saelens(acts_ND: np.ndarray, directory: Path, samples: int) -> tuple[dict[str, Any], Pass]:
    import datasets
    import torch
    from sae_lens.training.activations_store import ActivationsStore

    n_rows, d_in = acts_ND.shape
    mixing = 0.5 if samples == 1 else 0.0

    def write() -> None:
        features = datasets.Features({"site": datasets.Array2D(shape=(CONTEXT, d_in), dtype="float32")})

        def contexts() -> Iterator[dict[str, np.ndarray]]:
            for i in range(0, n_rows, CONTEXT):
                yield {"site": acts_ND[i : i + CONTEXT]}

        cache = directory.with_suffix(".cache")
        made = datasets.Dataset.from_generator(contexts, features=features, cache_dir=str(cache))
        made.save_to_disk(directory)
        shutil.rmtree(cache)

    def take(workers: int) -> Iterator[Any]:
        store = ActivationsStore(
            model=torch.nn.Module(),
            dataset=None,
            streaming=False,
            hook_name="site",
            hook_head_index=None,
            context_size=CONTEXT,
            d_in=d_in,
            n_batches_in_buffer=64,
            total_training_tokens=n_rows,
            store_batch_size_prompts=16,
            train_batch_size_tokens=BATCH,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            cached_activations_path=str(directory),
            activations_mixing_fraction=mixing,
        )
        for _ in range(n_rows // BATCH):
            yield store.next_batch().reshape(BATCH, d_in)

    written(directory, write)
    return {"mixing": mixing}, take


def mosaicml(acts_ND: np.ndarray, directory: Path, samples: int) -> tuple[dict[str, Any], Pass]:
    _stand_in_for_torchvision()
    import streaming
    from torch.utils.data import DataLoader

    n_rows, d_in = acts_ND.shape
    directory = directory.with_name(f"{directory.name}-{samples}")
    shape = f"{d_in}" if samples == 1 else f"{samples},{d_in}"

    def write() -> None:
        with streaming.MDSWriter(out=str(directory), columns={"acts": f"ndarray:float32:{shape}"}) as out:
            for i in range(0, n_rows, samples):
                rows_ND = np.array(acts_ND[i : i + samples])
                out.write({"acts": rows_ND[0] if samples == 1 else rows_ND})

    written(directory, write)
    streaming.base.util.clean_stale_shared_memory()
    of_batch = BATCH // samples
    dataset = streaming.StreamingDataset(
        local=str(directory), shuffle=True, batch_size=of_batch, num_canonical_nodes=1
    )

    def take(workers: int) -> Iterator[Any]:
        yield from DataLoader(dataset, batch_size=of_batch, num_workers=workers, collate_fn=_Joined(d_in))

    return {"rows_a_sample": samples, "shuffle": "py1e"}, take


def _stand_in_for_torchvision() -> None:
    """streaming imports torchvision for its image classes; its wheels do not load beside a CPU-only torch."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("", ".datasets", ".transforms", ".transforms.functional", ".io"):
            module = types.ModuleType(f"torchvision{name}")
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
            module.__getattr__ = _placeholder  # type: ignore[method-assign]
            sys.modules[f"torchvision{name}"] = module


def _placeholder(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def litdata(acts_ND: np.ndarray, directory: Path, samples: int) -> tuple[dict[str, Any], Pass]:
    import litdata as lit

    n_rows, d_in = acts_ND.shape

    def write() -> None:
        lit.optimize(
            fn=_Rows(acts_ND.filename),
            inputs=list(range(0, n_rows, BATCH)),
            output_dir=str(directory),
            chunk_bytes="64MB",
            num_workers=1,
            item_loader=lit.TokensLoader(block_size=d_in),
        )

    def take(workers: int) -> Iterator[Any]:
        loader = lit.TokensLoader(block_size=samples * d_in)
        dataset = lit.StreamingDataset(str(directory), item_loader=loader, shuffle=True)
        yield from lit.StreamingDataLoader(
            dataset, batch_size=BATCH // samples, num_workers=workers, collate_fn=_Joined(d_in)
        )

    written(directory, write)
    return {"rows_a_sample": samples}, take


class _Joined:
    """Samples as one tensor [B, D], by one call; loaders copy it to their processes."""

    def __init__(self, d_in: int) -> None:
        self.d_in = d_in

    def __call__(self, batch: list[Any]) -> Any:
        import torch

        if isinstance(batch[0], torch.Tensor):
            return torch.cat(batch).reshape(-1, self.d_in)
        return torch.from_numpy(np.concatenate([sample["acts"] for sample in batch]).reshape(-1, self.d_in))


class _Rows:
    """The values of BATCH rows as one item, for TokensLoader; litdata calls it in a process of its own."""

    def __init__(self, path: Any) -> None:
        self.path = str(path)

    def __call__(self, start: int) -> Any:
        import torch

        acts_ND = np.load(self.path, mmap_mode="r")
        return torch.from_numpy(np.array(acts_ND[start : start + BATCH])).reshape(-1)


if __name__ == "__main__":
    main()
