"""TensorBoard and Weights & Biases get what metrics.jsonl gets; what is missing is named before training."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import sae
from actcache.errors import SpecError
from sae import trackers

ROOT = Path(__file__).parents[2]


def _train(out: Path | str | None, *log: str) -> None:
    acts = np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32)
    stream = sae.ArrayStream(acts, batch_size=100)
    training = sae.Training(n_rows=1000, log_every=2)
    sae.train(stream, [sae.TopK(d_sae=16, k=2), sae.TopK(d_sae=8, k=2)], training, out=out, log=log)


def test_a_log_that_can_not_be_kept_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.raises(SpecError, match="log 'tensorbord' is not known; did you mean tensorboard?"):
        _train(out, "tensorbord")
    monkeypatch.setattr(trackers.WeightsAndBiases, "package", "absent_package")
    with pytest.raises(
        SpecError, match="needs the package absent_package, which is not installed: pip install"
    ):
        _train(out, "wandb")
    monkeypatch.setattr(trackers.TensorBoard, "package", "json")
    for place in ("memory://trackers/run", None):
        with pytest.raises(SpecError, match="log tensorboard writes into a local run directory, and out is"):
            _train(place, "tensorboard")
    assert not out.exists()


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_trackers import _train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

out = Path(sys.argv[1])
_train(out, "tensorboard", "wandb")
events = EventAccumulator(str(out / "tensorboard"))
events.Reload()
curves = {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
from wandb.proto import wandb_internal_pb2 as pb
(file,) = (out / "wandb").glob("offline-run-*/*.wandb")
data, at, whole, history = file.read_bytes(), 7, b"", []
while at + 7 <= len(data):  # LevelDB's log: blocks of 32 KiB; crc (4 bytes), length (2), type (1), payload
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
        continue
    size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
    whole += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # whole, or its last part
        record = pb.Record()
        record.ParseFromString(whole)
        whole = b""
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
print(json.dumps({"tensorboard": curves, "wandb": history}))
"""


@pytest.mark.slow
def test_both_libraries_hold_the_curves_of_metrics_jsonl(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "tensorboard", "wandb"], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # torch and the rest are those that run this test, behind what was just installed
    behind = tmp_path / "venv" / "lib" / version / "site-packages" / "behind.pth"
    behind.write_text(sysconfig.get_path("purelib") + "\n")
    out = tmp_path / "out"
    settings = {"PYTHONPATH": str(ROOT), "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | settings
    command = [python, "-c", SCRIPT, out, Path(__file__).parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("topk-16-2", "topk-8-2"):
        lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        assert [x["step"] for x in lines] == [1, 3, 5, 7, 9, 10]
        for figure in ("loss", "l0", "fvu", "dead", "lr", "stall_share"):
            wanted = [[x["step"], x[figure]] for x in lines]
            shown = found["tensorboard"][f"{name}/{figure}"]
            np.testing.assert_allclose(np.array(shown), np.array(wanted), rtol=1e-6)
            of_wandb = [[h["_step"], h[f"{name}/{figure}"]] for h in found["wandb"]]
            np.testing.assert_allclose(np.array(of_wandb), np.array(wanted), rtol=1e-6)
