"""Interrupted runs continue to the same bits; what is on the disk is whole or absent."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import sae
from actcache.errors import Conflict, CorruptObject, FormatError, StoreError
from sae import checkpoint
from sae.files import LocalFiles, RunFiles, StoredFiles, run_files

CONFIGS = [
    sae.TopK(d_sae=64, k=6, optimiser=sae.Optimiser(ema_decay=0.9)),
    sae.BatchTopK(d_sae=64, k=6),
    sae.Matryoshka(d_sae=64, k=6, n_random_prefixes=3),  # draws at each step
    sae.JumpReLU(d_sae=64, revive=sae.Resampling(every_rows=4000)),  # draws now and then
]
NAMES = ["topk-64-6", "batchtopk-64-6", "matryoshka-64-6", "jumprelu-64-1"]
TRAINING = sae.Training(n_rows=20_000, seed=1, dead_after_rows=1500, checkpoint_every_rows=3000, log_every=3)


class Interrupted(Exception):
    pass


class Breaking(sae.ArrayStream):
    """Fails after a number of batches."""

    def __init__(self, acts: np.ndarray, after: int | None = None) -> None:
        super().__init__(acts, batch_size=300, seed=5)
        self.after = after

    def __iter__(self) -> Iterator:
        for i, batch in enumerate(super().__iter__()):
            if i == self.after:
                raise Interrupted
            yield batch


def _acts() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_t(4, (5000, 20)).astype(np.float32) @ rng.standard_normal((20, 20)).astype(np.float32)


def _bits(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name / "weights.safetensors").read_bytes() for name in NAMES}


def _curves(directory: Path) -> list[list[dict]]:
    """Metrics without what depends on the clock."""
    curves = []
    for name in NAMES:
        lines = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
        curves.append([{k: v for k, v in x.items() if k not in ("rows_per_s", "stall_share")} for x in lines])
    return curves


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight")
    sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=out)
    return out


@pytest.mark.parametrize("stops", [[5], [29], [12, 7, 30]])
def test_a_resumed_run_equals_the_straight_one_to_the_bit(
    straight: Path, tmp_path: Path, stops: list[int]
) -> None:
    for stop in stops:
        with pytest.raises(Interrupted):
            sae.train(Breaking(_acts(), after=stop), CONFIGS, TRAINING, out=tmp_path)
    resumed = sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=tmp_path)
    assert _bits(tmp_path) == _bits(straight)
    assert _curves(tmp_path) == _curves(straight)
    for s, name in zip(resumed, NAMES, strict=True):
        loaded = sae.load(straight / name)
        assert torch.equal(s.W_enc, loaded.W_enc)
    assert not (tmp_path / checkpoint.CHECKPOINT_FILE).exists()


def test_a_stream_that_can_not_restore_is_read_again_up_to_the_row(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        sae.train(Breaking(_acts(), after=29), CONFIGS, TRAINING, out=tmp_path)
    stream = Breaking(_acts())
    stream.restore = None  # type: ignore[assignment, method-assign]
    sae.train(stream, CONFIGS, TRAINING, out=tmp_path)
    assert _bits(tmp_path) == _bits(straight)


def _slow_run(tmp_path: Path) -> Path:
    """A script that trains CONFIGS into its first argument, slowly; its second is the storage options."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import json, sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        torch.set_num_threads({torch.get_num_threads()})
        import sae
        from test_checkpoint import CONFIGS, TRAINING, Breaking, _acts

        class Slow(Breaking):
            def __iter__(self):
                for batch in super().__iter__():
                    time.sleep(0.02)
                    yield batch

        out, *options = sys.argv[1:]
        options = {{"storage_options": json.loads(options[0])}} if options else {{}}
        sae.train(Slow(_acts()), CONFIGS, TRAINING, out=out, **options)
        """)
    )
    return script


def test_a_run_killed_by_sigkill_resumes_to_the_bit(straight: Path, tmp_path: Path) -> None:
    """A real process, killed at real moments, until one lifetime suffices."""
    script = _slow_run(tmp_path)
    out = tmp_path / "out"
    kills = rows = 0
    while kills < 3:
        process = subprocess.Popen([sys.executable, str(script), str(out)], stderr=subprocess.DEVNULL)
        seen = _stamp(out)
        while process.poll() is None and _stamp(out) == seen:
            time.sleep(0.002)
        time.sleep(0.03 * kills)  # at the rename, between checkpoints, in a later step
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        stored = _checkpoint(out)  # never torn
        assert stored is not None
        assert stored[1]["rows"] > rows
        rows = stored[1]["rows"]
        kills += 1
    sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=out)
    assert _bits(out) == _bits(straight)
    assert _curves(out) == _curves(straight)


def _checkpoint(out: Path) -> tuple[dict, dict] | None:
    stored = LocalFiles(out).load_checkpoint()
    return None if stored is None else checkpoint.parse_checkpoint(*stored)


def _stamp(out: Path) -> int:
    try:
        return (out / checkpoint.CHECKPOINT_FILE).stat().st_ino
    except FileNotFoundError:
        return 0


def test_a_finished_run_is_returned_at_once(straight: Path) -> None:
    before = _bits(straight)
    stream = Breaking(_acts(), after=0)  # reading a single batch would raise
    saes = sae.train(stream, CONFIGS, TRAINING, out=straight)
    assert [s.path for s in saes] == [straight / name for name in NAMES]
    assert _bits(straight) == before


def test_other_settings_in_the_same_directory_are_named(straight: Path, tmp_path: Path) -> None:
    other = sae.Training(n_rows=20_000, seed=2, dead_after_rows=1500, checkpoint_every_rows=3000, log_every=3)
    with pytest.raises(Conflict, match=r"other settings \(training.seed: 1 -> 2\)"):
        sae.train(Breaking(_acts()), CONFIGS, other, out=straight)
    with pytest.raises(Conflict, match=r"saes.topk-64-6.revive.k_aux: None -> 7"):
        sae.train(
            Breaking(_acts()),
            [sae.TopK(d_sae=64, k=6, revive=sae.AuxK(k_aux=7)), *CONFIGS[1:]],
            TRAINING,
            out=straight,
        )
    with pytest.raises(Conflict, match=r"data.sites.activations.mean_norm"):
        sae.train(Breaking(2 * _acts()), CONFIGS, TRAINING, out=straight)
    with pytest.raises(Conflict, match="already holds a run and resume is off"):
        sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=straight, resume=False)
    with pytest.raises(Interrupted):
        sae.train(Breaking(_acts(), after=20), CONFIGS, TRAINING, out=tmp_path)
    with pytest.raises(Conflict, match=r"training\.seed"):
        sae.train(Breaking(_acts()), CONFIGS, other, out=tmp_path)


def test_a_damaged_checkpoint_is_named_and_not_trained_over(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        sae.train(Breaking(_acts(), after=20), CONFIGS, TRAINING, out=tmp_path)
    file = tmp_path / checkpoint.CHECKPOINT_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptObject, match=r"checkpoint.safetensors is not a whole safetensors file"):
        sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=tmp_path)
    checkpoint.write_tensors(file, {"a": torch.zeros(1)}, {"format": 99})
    with pytest.raises(FormatError, match="holds format 99; this version reads format 2"):
        sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=tmp_path)


def test_a_disk_that_refuses_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    """A real refusal by the kernel: a file-size limit between two writes."""
    script = textwrap.dedent("""
        import resource, signal, sys
        from pathlib import Path
        import torch
        from actcache.errors import StoreError
        from sae.checkpoint import checkpoint_bytes, parse_checkpoint
        from sae.files import LocalFiles
        out = Path(sys.argv[1])
        files = LocalFiles(out)
        files.save_checkpoint(checkpoint_bytes({"w": torch.arange(10_000)}, {"rows": 1}), 1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            files.save_checkpoint(checkpoint_bytes({"w": torch.zeros(10_000)}, {"rows": 2}), 2)
        except StoreError as error:
            print(error)
        tensors, state = parse_checkpoint(*files.load_checkpoint())
        assert state["rows"] == 1 and torch.equal(tensors["w"], torch.arange(10_000))
        print(*[p.name for p in out.iterdir()])
    """)
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    message, files = result.stdout.splitlines()
    assert "checkpoint.safetensors could not be written: File too large" in message
    assert files == "checkpoint.safetensors"


def test_atomic_write_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in (b"one", b"two"):
        checkpoint.write_atomically(path, text)
        assert path.read_bytes() == text
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(StoreError, match="could not be written: No such file or directory"):
        checkpoint.write_atomically(tmp_path / "absent" / "a.json", b"")


def test_differences_name_the_field() -> None:
    found, wanted = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert checkpoint.differences(found, wanted) == ["a.c: 2 -> 4", "d: 3 -> None", "e: None -> 5"]
    assert checkpoint.differences({"a": {"b": 1}}, {"c": {"d": 1}}) == [
        "a: present -> None",
        "c: None -> present",
    ]
    assert checkpoint.differences(found, found) == []


def _stored_bits(url: str, options: dict | None) -> dict[str, bytes]:
    files = run_files(url, options)
    return {name: files.read(f"{name}/weights.safetensors") or b"" for name in NAMES}


def _interrupted_run_at(url: str, options: dict | None, straight: Path) -> None:
    """Interrupt twice, once before the first checkpoint, resume: bits and curves of the local straight run."""
    for stop in (5, 29):
        with pytest.raises(Interrupted):
            sae.train(Breaking(_acts(), after=stop), CONFIGS, TRAINING, out=url, storage_options=options)
    files = run_files(url, options)
    assert isinstance(files, StoredFiles)
    assert files.has_checkpoint()
    assert [o.key for o in files.store.listing("checkpoints")] == ["checkpoints/0000000000006200.safetensors"]
    resumed = sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=url, storage_options=options)
    assert _stored_bits(url, options) == _bits(straight)
    lines = (files.read(f"{NAMES[0]}/metrics.jsonl") or b"").splitlines()
    clock = ("rows_per_s", "stall_share")
    assert [{k: v for k, v in json.loads(x).items() if k not in clock} for x in lines] == _curves(straight)[0]
    assert not files.has_checkpoint()
    again = sae.train(Breaking(_acts(), after=0), CONFIGS, TRAINING, out=url, storage_options=options)
    for name, s, found in zip(NAMES, resumed, again, strict=True):
        assert s.digest() == found.digest() == sae.load(f"{url}/{name}", options).digest()
        assert s.path is found.path is None
    other = sae.Training(n_rows=20_000, seed=2, dead_after_rows=1500, checkpoint_every_rows=3000, log_every=3)
    with pytest.raises(Conflict, match=r"training.seed: 1 -> 2"):
        sae.train(Breaking(_acts()), CONFIGS, other, out=url, storage_options=options)


def test_a_run_in_memory_resumes_to_the_bits_of_a_local_one(straight: Path) -> None:
    _interrupted_run_at("memory://sae-checkpoints/run", None, straight)


def test_a_run_on_s3_resumes_to_the_bits_of_a_local_one(straight: Path, s3: dict) -> None:
    _interrupted_run_at("s3://bucket/sae/run", s3, straight)


@pytest.mark.slow
def test_a_run_on_s3_killed_by_sigkill_resumes_to_the_bit(straight: Path, s3: dict, tmp_path: Path) -> None:
    """A real process over HTTP, killed before, within and between its writes to the store."""
    url = "s3://bucket/sae/killed"
    script = _slow_run(tmp_path)
    files = run_files(url, s3)
    rows = 0
    for kill in range(3):
        process = subprocess.Popen(
            [sys.executable, str(script), url, json.dumps(s3)], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and _stored_rows(files) <= rows and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.02 * kill)  # as the old checkpoint goes, between checkpoints, in a later step
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        stored = files.load_checkpoint()
        assert stored is not None
        assert checkpoint.parse_checkpoint(*stored)[1]["rows"] > rows  # never torn
        rows = _stored_rows(files)
    sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=url, storage_options=s3)
    assert _stored_bits(url, s3) == _bits(straight)
    assert not files.has_checkpoint()


def _stored_rows(files: RunFiles) -> int:
    """Rows of the newest checkpoint; 0 if there is none."""
    assert isinstance(files, StoredFiles)
    keys = [o.key for o in files.store.listing("checkpoints")]
    return max((int(Path(key).stem) for key in keys if key.endswith(".safetensors")), default=0)


def test_two_runs_at_one_url_can_not_mix_their_checkpoints() -> None:
    files = run_files("memory://sae-checkpoints/two")
    files.save_checkpoint(b"of one run", 3000)
    with pytest.raises(Conflict, match=r"checkpoints/0000000000003000.safetensors"):
        files.save_checkpoint(b"of another", 3000)
    assert files.load_checkpoint() == (
        "memory://sae-checkpoints/two/checkpoints/0000000000003000.safetensors",
        b"of one run",
    )


def test_a_store_that_fails_between_checkpoints_leaves_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    files = run_files("memory://sae-checkpoints/fails")
    assert isinstance(files, StoredFiles)
    files.save_checkpoint(b"whole", 3000)

    def refuse(key: str, data: bytes) -> bool:
        raise StoreError("refused")

    monkeypatch.setattr(files.store, "create", refuse)
    with pytest.raises(StoreError, match="refused"):
        files.save_checkpoint(b"never there", 6000)
    assert files.load_checkpoint() == (
        "memory://sae-checkpoints/fails/checkpoints/0000000000003000.safetensors",
        b"whole",
    )


def test_a_url_without_an_sae_is_one_clear_line() -> None:
    with pytest.raises(FileNotFoundError, match=r"memory://nowhere has no sae.json; give the URL of one SAE"):
        sae.load("memory://nowhere")
