"""How long the dashboards of a report take, and in how much memory.

One SAE over one split, as `python -m sae report` has it: the pass that encodes, spills and picks
places, the assembly of snippets, then neighbours, packing and the page's size. The reference is the
same rows read and encoded, and nothing else (`encode_sparse`), in the same process. Prints a JSON line.
The SAE is trained on some rows first unless one is named.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import report
from rows import SITE, open_or_harvest

import sae
from actcache.lm import load_tokenizer
from sae import snippets
from sae.codes import encode_sparse
from sae.report.dashboards import Dashboards, nearest_latents
from sae.report.payload import blocks
from sae.report.texts import TokenTexts
from sae.select import Scratch

TARGET_S = 180
"""6,144 latents over 2 M rows on 2 cores."""


def trained(ds: Any, d_sae: int, k: int, n_rows: int, out: Path) -> sae.SAE:
    """An SAE that has seen enough rows to fire as SAEs do."""
    stream = ds.stream(SITE, batch_size=2048, metadata=False)
    training = sae.Training(n_rows=min(n_rows, ds.n_rows), lr=1e-3)
    return sae.train(stream, [sae.TopK(d_sae=d_sae, k=k)], training, out=out)[0]


def encode_only(s: sae.SAE, ds: Any, n_rows: int) -> None:
    """The reference: what no pass over the rows can do without."""
    scratch = Scratch()
    for start in range(0, n_rows, snippets._CHUNK_ROWS):
        acts_ND = ds.read(s.cfg["site"], slice(start, min(start + snippets._CHUNK_ROWS, n_rows)))
        encode_sparse(s, torch.from_numpy(acts_ND), scratch)


def timed(work: Any) -> tuple[Any, float, float]:
    """(result, seconds, CPU seconds of this process)."""
    start, cpu = time.monotonic(), time.process_time()
    result = work()
    return result, time.monotonic() - start, time.process_time() - cpu


def peak_mib() -> float:
    """Of this process since `forget_peak`; ru_maxrss would count the process that started it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", help="URL of a dataset with blocks.3.hook_resid_post of the bundled LM")
    parser.add_argument("--root", type=Path, default=Path("bench-data"), help="where one is harvested")
    parser.add_argument("--sae", type=Path, help="directory of an SAE; default: one is trained")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--train-rows", type=int, default=500_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ds = open_or_harvest(options.dataset, options.root, options.rows)
    n_rows = min(options.rows, ds.n_rows)
    with tempfile.TemporaryDirectory() as folder:
        s = (
            sae.load(options.sae)
            if options.sae
            else trained(ds, options.d_sae, options.k, options.train_rows, Path(folder) / "run")
        )
        encode_only(s, ds, min(n_rows, 65_536))  # warm
        _, encode_s, encode_cpu_s = timed(lambda: encode_only(s, ds, n_rows))
        forget_peak()
        before = peak_mib()
        found, collect_s, collect_cpu_s = timed(lambda: snippets.collect(s, ds, n_rows))
        after = peak_mib()
    columns = {"density": found.fires / n_rows, "max_activation": found.largest}
    texts = TokenTexts(load_tokenizer(ds.spec.model))

    def pack() -> list[str]:
        ids, cosines = nearest_latents(s.W_dec, found.latents)
        return blocks(Dashboards(s.cfg["d_sae"], found, columns, ids, cosines, None), texts, 0)

    packed, pack_s, _ = timed(pack)
    report(
        "snippets",
        rows=n_rows,
        d_sae=s.cfg["d_sae"],
        l0=float(found.fires.sum() / n_rows),
        snippets=int(found.starts[-1]),
        threads=options.threads,
        collect_s=round(collect_s, 2),
        target_s=TARGET_S,
        encode_only_s=round(encode_s, 2),
        cpu_ratio_to_encode_only=round(collect_cpu_s / encode_cpu_s, 3),
        peak_mib_before=round(before),
        peak_mib_after=round(after),
        pack_s=round(pack_s, 2),
        page_mib=round(sum(map(len, packed)) / 2**20, 2),
        living=int(np.count_nonzero(found.fires)),
    )


if __name__ == "__main__":
    main()
