"""Interrupted runs continue to the same bits; a checkpoint that exists is complete."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sae
from actcache.errors import Conflict, CorruptObject, FormatError, StoreError
from actcache.store import LocalStore, Store, open_store
from sae.checkpoint import StoredCheckpoint
from sae.checkpoint_folder import Checkpoints
from sae.files import run_files
from sae.train import Trainer

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
    assert not (tmp_path / "checkpoints").exists()


def test_a_stream_that_can_not_restore_is_read_again_up_to_the_row(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        sae.train(Breaking(_acts(), after=29), CONFIGS, TRAINING, out=tmp_path)
    stream = Breaking(_acts())
    stream.restore = None  # type: ignore[assignment, method-assign]
    sae.train(stream, CONFIGS, TRAINING, out=tmp_path)
    assert _bits(tmp_path) == _bits(straight)


def _slow_run(tmp_path: Path) -> Path:
    """A script that trains CONFIGS into its argument, slowly."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
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

        sae.train(Slow(_acts()), CONFIGS, TRAINING, out=sys.argv[1])
        """)
    )
    return script


@pytest.mark.slow
def test_a_run_killed_by_sigkill_resumes_to_the_bit(straight: Path, tmp_path: Path) -> None:
    """A real process, killed at real moments, until one lifetime suffices."""
    script = _slow_run(tmp_path)
    out = tmp_path / "out"
    kills = rows = 0
    while kills < 3:
        process = subprocess.Popen([sys.executable, str(script), str(out)], stderr=subprocess.DEVNULL)
        while process.poll() is None and _stored_rows(out) <= rows:
            time.sleep(0.002)
        time.sleep(0.03 * kills)  # as the old one goes, between checkpoints, in a later step
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        stored = _checkpoint(open_store(out))
        assert stored is not None
        assert stored.rows > rows
        assert len(dict(stored)) == len(stored), "every byte of it is whole"
        rows = stored.rows
        kills += 1
    sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=out)
    assert _bits(out) == _bits(straight)
    assert _curves(out) == _curves(straight)


def _checkpoint(store: Store) -> StoredCheckpoint | None:
    return Checkpoints(store).newest()


def _stored_rows(out: Path) -> int:
    """Rows of the newest complete checkpoint of a local run; 0 if there is none."""
    return max((int(path.parent.name) for path in out.glob("checkpoints/*/done.json")), default=0)


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
    (part,) = tmp_path.glob("checkpoints/*/part-*")
    whole = part.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged, reason in ((bytes(flipped), "differs from its checksum"), (whole[:-9], "ends after")):
        part.write_bytes(damaged)
        with pytest.raises(CorruptObject, match=rf"{part.name} {reason}.*restore it from a copy, or remove"):
            sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=tmp_path)
    shutil.rmtree(part.parent)  # as the message says: from the start
    assert len(sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=tmp_path)) == len(CONFIGS)


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_directory_with_a_checkpoint_of_an_older_format_is_refused(tmp_path: Path, place: str) -> None:
    out = str(tmp_path) if place == "local" else "memory://sae-checkpoints/old"
    old = "checkpoint.safetensors" if place == "local" else "checkpoints/0000000000003000.safetensors"
    open_store(out).create(old, b"of a version that was never released")
    with pytest.raises(
        FormatError, match=rf"{old}\); this version reads format 3. Train into a new directory"
    ):
        sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=out)


def test_a_disk_that_refuses_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    """A real refusal by the kernel: a file-size limit between two parts."""
    script = textwrap.dedent("""
        import resource, signal, sys
        import torch
        from actcache.errors import StoreError
        from actcache.store import open_store
        from sae.checkpoint_folder import Checkpoints
        from sae.checkpoint_writer import CheckpointWriter, Piece
        store = open_store(sys.argv[1])
        writer, checkpoints = CheckpointWriter(store), Checkpoints(store)
        writer.begin({"w": Piece(torch.arange(10_000))}, 1)
        checkpoints.complete(1, {}, [writer.wait()])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        writer.begin({"w": Piece(torch.zeros(10_000))}, 2)
        try:
            writer.wait()
        except StoreError as error:
            print(error)
        stored = Checkpoints(store).newest()
        assert stored.rows == 1 and torch.equal(stored["w"], torch.arange(10_000))
        print(*[o.key for o in [*store.listing(""), *store.leftovers()]])
    """)
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    message, files = result.stdout.splitlines()
    assert message.startswith("a checkpoint could not be written: ")
    assert "0000000000000002/part-" in message
    assert "File too large" in message
    assert "The one before is intact" in message
    done, part = files.split()
    assert done == "checkpoints/0000000000000001/done.json"
    assert part.startswith("checkpoints/0000000000000001/part-")


def test_what_was_begun_before_an_error_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store answers only once the error goes up."""
    failed = threading.Event()
    original = LocalStore.create

    def create(self: LocalStore, key: str, data: bytes) -> bool:
        if "part-" in key:
            assert failed.wait(60)
        return original(self, key, data)

    class Failing(Breaking):
        def __iter__(self) -> Iterator:
            for i, batch in enumerate(super().__iter__()):
                if i == 11:  # 3,000 rows were trained on
                    failed.set()
                    raise Interrupted
                yield batch

    monkeypatch.setattr(LocalStore, "create", create)
    with pytest.raises(Interrupted):
        sae.train(Failing(_acts()), CONFIGS, TRAINING, out=tmp_path)
    stored = _checkpoint(open_store(tmp_path))
    assert stored is not None
    assert stored.rows == 3000


def test_a_store_that_refuses_ends_the_run_in_one_line_and_an_earlier_error_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = LocalStore.create

    def refuse(self: LocalStore, key: str, data: bytes) -> bool:
        if "6200/part-" in key:
            raise StoreError("refused")
        return original(self, key, data)

    monkeypatch.setattr(LocalStore, "create", refuse)
    with pytest.raises(
        StoreError, match="a checkpoint could not be written: refused. The one before is intact"
    ):
        sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=tmp_path)
    stored = _checkpoint(open_store(tmp_path))
    assert stored is not None
    assert stored.rows == 3000

    class Failing(Breaking):
        def __iter__(self) -> Iterator:
            for batch in super().__iter__():
                yield batch
                if (tmp_path / "checkpoints").exists() and trainer.keeper.writer.busy:  # type: ignore[union-attr]
                    raise Interrupted

    trainer = Trainer(Failing(_acts()), CONFIGS, TRAINING, start=[None] * 4, out=tmp_path)
    trainer.open(resume=True)
    with pytest.raises(Interrupted):
        trainer.run()
    assert "a checkpoint could not be written: refused" in caplog.text


def test_checkpoints_by_time_change_no_bit_and_a_run_may_go_on_with_others(
    straight: Path, tmp_path: Path
) -> None:
    by_time = replace(TRAINING, checkpoint_every_rows=None, checkpoint_every_s=1e-9)  # after every step
    with pytest.raises(Interrupted):
        sae.train(Breaking(_acts(), after=7), CONFIGS, by_time, out=tmp_path)
    stored = _checkpoint(open_store(tmp_path))
    assert stored is not None
    assert stored.rows == 7 * 300
    sae.train(Breaking(_acts()), CONFIGS, replace(TRAINING, checkpoint_every_s=None), out=tmp_path)
    assert _bits(tmp_path) == _bits(straight)
    assert _curves(tmp_path) == _curves(straight)


def _stored_bits(url: str, options: dict | None) -> dict[str, bytes]:
    files = run_files(url, options)
    return {name: files.read(f"{name}/weights.safetensors") or b"" for name in NAMES}


def _interrupted_run_at(url: str, options: dict | None, straight: Path) -> None:
    """Interrupt twice, once before the first checkpoint, resume: bits and curves of the local straight run."""
    for stop in (5, 29):
        with pytest.raises(Interrupted):
            sae.train(Breaking(_acts(), after=stop), CONFIGS, TRAINING, out=url, storage_options=options)
    files = run_files(url, options)
    done, part = (o.key for o in files.store.listing("checkpoints"))
    assert done == "checkpoints/0000000000006200/done.json"
    assert part.startswith("checkpoints/0000000000006200/part-")
    resumed = sae.train(Breaking(_acts()), CONFIGS, TRAINING, out=url, storage_options=options)
    assert _stored_bits(url, options) == _bits(straight)
    lines = (files.read(f"{NAMES[0]}/metrics.jsonl") or b"").splitlines()
    clock = ("rows_per_s", "stall_share")
    assert [{k: v for k, v in json.loads(x).items() if k not in clock} for x in lines] == _curves(straight)[0]
    assert files.store.listing("checkpoints") == []
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


def test_a_url_without_an_sae_is_one_clear_line() -> None:
    with pytest.raises(FileNotFoundError, match=r"memory://nowhere has no sae.json; give the URL of one SAE"):
        sae.load("memory://nowhere")
