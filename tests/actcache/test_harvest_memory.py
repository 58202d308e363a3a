"""What a Harvester holds does not grow with the blocks that it has run."""

import ctypes
import gc
from pathlib import Path

import pytest
from tiny_harvest import SITES, tiny_spec, write_corpus

from actcache.corpus import tokenise
from actcache.driver import resolve
from actcache.harvester import Harvester
from actcache.store import open_store

LIBC = ctypes.CDLL(None)
WARM_UP, N_BLOCKS, BLOCK_ROWS, D_MODEL = 40, 200, 1024, 32


def rss_bytes():
    gc.collect()
    LIBC.malloc_trim(0)  # what is free but not given back would hide what is kept
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


@pytest.mark.skipif(not hasattr(LIBC, "malloc_trim"), reason="reads memory from /proc, trimmed by glibc")
def test_memory_does_not_grow_over_200_blocks(tmp_path):
    write_corpus(tmp_path / "corpus", n_documents=1500)
    spec = tiny_spec(tmp_path, sites=SITES, block_rows=BLOCK_ROWS)
    resolved = resolve(spec)
    root = open_store(str(tmp_path / "root"))
    tokens = tokenise(spec, resolved.corpus, resolved.tokenizer, root, progress=False)
    harvester = Harvester(resolved.job(str(tmp_path / "root" / "dataset"), tokens.store.url, lm_batch=16))
    harvester.calibrate()
    before = 0
    for block in range(N_BLOCKS):
        if block == WARM_UP:
            before = rss_bytes()
        harvester.run_block("train", block, resolved.sites)
    # Less than if only the codes of one site of each block were kept, a tenth of what passes through.
    assert rss_bytes() - before < (N_BLOCKS - WARM_UP) * BLOCK_ROWS * D_MODEL
