"""A disk that fills in the middle of a harvest: one clear line, a failing exit code, earlier commits intact."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import actcache
from actcache.verify import verify

sys.path.insert(0, str(Path(__file__).parent / "actcache"))

pytestmark = pytest.mark.slow

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """The arguments of a tiny harvest, and the dataset that it gives undisturbed."""
    from tiny_harvest import tiny_spec

    directory = tmp_path_factory.mktemp("material")
    spec = tiny_spec(directory)
    arguments = ["--model", spec.model, "--corpus", spec.corpus.source, "--site", SITE]
    arguments += ["--context-size", "16", "--block-rows", "1024"]
    whole = harvest(arguments, directory / "whole", 4000)
    assert whole.returncode == 0, whole.stderr
    return arguments, directory / "whole"


def harvest(arguments, root, n_tokens, limit_kib=None):
    """`actcache harvest` in a process that can write no file above `limit_kib`."""
    command = [sys.executable, "-m", "actcache", "harvest", "--root", root, "--tokens", n_tokens, *arguments]
    limit = "unlimited" if limit_kib is None else limit_kib
    script = f'ulimit -f {limit}; exec "$@"'
    return subprocess.run(["bash", "-c", script, "-", *map(str, command)], capture_output=True, text=True)


def opened(root):
    (entry,) = actcache.list_datasets(str(root))
    return actcache.open(f"{root}/{entry.name}")


def check_failure_and_resumption(root, whole, failed, rerun):
    """After `failed`: an error in one line, the first block readable; after `rerun()`: the whole dataset."""
    assert failed.returncode == 1
    *_, last = failed.stderr.splitlines()
    assert last.startswith("error: ")
    assert "Traceback" not in failed.stderr
    assert "space left" in last or "too large" in last.lower()
    whole = opened(whole)
    partial = opened(root)
    assert 1024 <= partial.n_rows < whole.n_rows
    rows = slice(0, partial.n_rows)
    assert np.array_equal(partial.read(SITE, rows), whole.read(SITE, rows))
    done = rerun()
    assert done.returncode == 0, done.stderr
    complete = opened(root)
    assert complete.manifest.complete
    assert np.array_equal(complete.read(SITE, slice(None)), whole.read(SITE, slice(None)))
    assert np.array_equal(complete.rows(slice(None)).sequence, whole.rows(slice(None)).sequence)
    verify(complete, deep=True, progress=False)
    assert not [name for _, _, names in os.walk(root) for name in names if "tmp" in name], "files left behind"


def test_a_file_that_cannot_be_written_whole_stops_the_harvest_and_a_rerun_completes(material, tmp_path):
    arguments, whole = material
    assert harvest(arguments, tmp_path, 1024).returncode == 0
    codes = Path(opened(tmp_path).url, "train", SITE, "codes", "c", "0", "0")
    failed = harvest(arguments, tmp_path, 4000, limit_kib=codes.stat().st_size // 2048)
    check_failure_and_resumption(tmp_path, whole, failed, lambda: harvest(arguments, tmp_path, 4000))


def test_a_full_file_system_stops_the_harvest_and_a_rerun_completes(material, tmp_path):
    arguments, whole = material
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs root and CAP_SYS_ADMIN")
    try:
        assert harvest(arguments, disk, 1024).returncode == 0
        used = os.statvfs(disk)
        used_kib = (used.f_blocks - used.f_bfree) * used.f_frsize // 1024
        subprocess.run(["mount", "-o", f"remount,size={used_kib + 40}k", disk], check=True)
        failed = harvest(arguments, disk, 4000)

        def rerun():
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            return harvest(arguments, disk, 4000)

        check_failure_and_resumption(disk, whole, failed, rerun)
    finally:
        subprocess.run(["umount", disk], check=True)
