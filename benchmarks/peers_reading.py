"""Shuffled reading of the same rows by actcache, SAELens, MosaicML streaming and LitData, rows/s.

Each peer gets an environment of its own under --work, made here, its own copy of the rows in float32
in the format that it documents, and the settings below; each runs in one process tree on the same
machine, in turns, and the median of --passes whole epochs is printed, after one that is not counted.

- actcache: `ds.stream(site, batch_size=4096)`, with and without row metadata.
- SAELens: `ActivationsStore` over cached activations (`save_to_disk`, rows of whole contexts), its
  default mixing fraction 0.5 and a buffer of 64 batches of 16 prompts; mixing 0 is shown too.
- MosaicML streaming: MDS, one sample a row (`ndarray:float32:D`), no compression, `shuffle=True`
  (py1e), a `DataLoader` with `batch_size=4096` and --workers workers.
- LitData: `optimize` with 64 MB chunks, one sample a row, `shuffle=True`, `StreamingDataLoader` with
  --workers workers.
"""

import argparse
import importlib.machinery
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 256
BATCH = 4096
PEERS = {
    "saelens": ["torch==2.13.0", "sae-lens"],
    "mosaicml": ["torch==2.13.0", "mosaicml-streaming"],
    "litdata": ["torch==2.13.0", "litdata"],
}
Epoch = Callable[[], Iterator[int]]
"""Starts one shuffled pass and gives the rows of each batch."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="a dataset, e.g. that of `make demo`: demo-out/datasets/NAME")
    parser.add_argument("--work", type=Path, default=Path("peers-reading"), help="environments and copies")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--rows", type=int, default=131_072, help="at most; a multiple of 256 is taken")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="of the peers' loaders")
    parser.add_argument("--child", choices=list(PEERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options)
        return
    import actcache
    from actcache import interop

    dataset = actcache.open(options.url)
    site = dataset.sites[-1]
    options.work.mkdir(parents=True, exist_ok=True)
    n_rows = min(options.rows, dataset.n_rows) // CONTEXT * CONTEXT
    rows = options.work / "rows.npy"
    rows.unlink(missing_ok=True)
    interop.export_npy(dataset, site, rows, stop=n_rows)
    for metadata in (False, True):

        def epoch(metadata: bool = metadata) -> Iterator[int]:
            return map(len, dataset.stream(site, batch_size=BATCH, metadata=metadata))

        figures = {"metadata": metadata, "rows": dataset.n_rows, "d_in": dataset.d_in(site)}
        print_line("actcache", figures | measured(epoch, dataset.d_in(site), options.passes))
    for peer in options.peers:
        python = make_environment(options.work / f"venv-{peer}", PEERS[peer])
        flags = ["--work", options.work, "--passes", options.passes, "--workers", options.workers]
        command = [python, __file__, options.url, "--child", peer, *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print_line(peer, {"failed": done.stderr.strip().splitlines()[-1:]})
        else:
            print(done.stdout.strip(), flush=True)


def make_environment(directory: Path, packages: list[str]) -> Path:
    """python of the environment; made if it is not there."""
    python = directory.absolute() / "bin" / "python"
    if not (directory / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (directory / "made").touch()
    return python


def measured(epoch: Epoch, d_in: int, passes: int) -> dict[str, float]:
    """Rates of the median pass; the first is not counted."""
    rates, first = [], []
    for _ in range(passes + 1):
        start = time.perf_counter()
        n_rows = 0
        for n in epoch():
            if not n_rows:
                first.append(time.perf_counter() - start)
            n_rows += n
        rates.append(n_rows / (time.perf_counter() - start))
    rate = statistics.median(rates[1:])
    return {
        "rows_per_s": round(rate),
        "mval_per_s": round(rate * d_in / 1e6, 1),
        "first_batch_s": round(statistics.median(first[1:]), 3),
        "rows_a_pass": n_rows,
    }


def print_line(name: str, figures: dict[str, Any]) -> None:
    package = {"saelens": "sae-lens", "mosaicml": "mosaicml-streaming"}.get(name, name)
    versions = {}
    for known in (package, "numpy", "torch"):
        try:
            versions[known] = importlib.metadata.version(known)
        except importlib.metadata.PackageNotFoundError:
            continue
    print(
        json.dumps({"benchmark": "peers_reading", "reader": name, **figures, "versions": versions}),
        flush=True,
    )


def run_child(options: argparse.Namespace) -> None:
    """In the peer's environment: write the rows its way, read them, print."""
    acts_ND = np.load(options.work / "rows.npy", mmap_mode="r")
    directory = options.work / f"data-{options.child}"
    prepare = {"saelens": saelens, "mosaicml": mosaicml, "litdata": litdata}[options.child]
    for settings, epoch in prepare(acts_ND, directory, options.workers):
        figures = {"rows": len(acts_ND), "d_in": acts_ND.shape[1], **settings}
        print_line(options.child, figures | measured(epoch, acts_ND.shape[1], options.passes))


def saelens(acts_ND: np.ndarray, directory: Path, workers: int) -> Iterator[tuple[dict[str, Any], Epoch]]:
    import datasets
    import torch
    from sae_lens.training.activations_store import ActivationsStore

    n_rows, d_in = acts_ND.shape
    if not directory.exists():
        features = datasets.Features({"site": datasets.Array2D(shape=(CONTEXT, d_in), dtype="float32")})
        sequences = np.asarray(acts_ND).reshape(-1, CONTEXT, d_in)
        parts = [
            datasets.Dataset.from_dict({"site": sequences[i : i + 64]}, features=features)
            for i in range(0, len(sequences), 64)
        ]
        datasets.concatenate_datasets(parts).save_to_disk(directory)
    for mixing in (0.5, 0.0):

        def epoch(mixing: float = mixing) -> Iterator[int]:
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
                yield len(store.next_batch())

        yield {"mixing": mixing}, epoch


def mosaicml(acts_ND: np.ndarray, directory: Path, workers: int) -> Iterator[tuple[dict[str, Any], Epoch]]:
    _stand_in_for_torchvision()
    import streaming
    from torch.utils.data import DataLoader

    d_in = acts_ND.shape[1]
    if not directory.exists():
        columns = {"acts": f"ndarray:float32:{d_in}"}
        with streaming.MDSWriter(out=str(directory), columns=columns) as out:
            for row in acts_ND:
                out.write({"acts": np.asarray(row)})
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(
        local=str(directory), shuffle=True, batch_size=BATCH, num_canonical_nodes=1
    )
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)
    yield {"workers": workers, "shuffle": "py1e"}, lambda: (len(batch["acts"]) for batch in loader)


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


def litdata(acts_ND: np.ndarray, directory: Path, workers: int) -> Iterator[tuple[dict[str, Any], Epoch]]:
    import litdata as lit

    if not directory.exists():
        lit.optimize(
            fn=_Rows(acts_ND.filename),
            inputs=[(i, min(i + 8192, len(acts_ND))) for i in range(0, len(acts_ND), 8192)],
            output_dir=str(directory),
            chunk_bytes="64MB",
            num_workers=1,
        )
    dataset = lit.StreamingDataset(str(directory), shuffle=True)
    loader = lit.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0
    )
    yield {"workers": workers}, lambda: (len(batch) for batch in loader)


class _Rows:
    """The rows of a range, one sample each; litdata calls it in a process of its own."""

    def __init__(self, path: Any) -> None:
        self.path = str(path)

    def __call__(self, span: tuple[int, int]) -> Iterator[np.ndarray]:
        acts_ND = np.load(self.path, mmap_mode="r")
        for row in range(*span):
            yield np.array(acts_ND[row])


if __name__ == "__main__":
    main()
