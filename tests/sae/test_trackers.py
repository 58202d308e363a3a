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


TRAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_trackers import _train
from sae.trackers import make_trackers

out = Path(sys.argv[1])
_train(out / "train", "tensorboard", "wandb")
(out / "evals").mkdir()
for tracker in make_trackers(("tensorboard", "wandb"), out / "evals"):
    tracker.start({"saes": {"topk-8-2": {}}}, 0)
    tracker.log({"topk-8-2": {"loss": 0.9}}, 5)
    tracker.log({"topk-8-2": {"loss": 0.8}}, 9)
    tracker.log_evals({"topk-8-2": {"step": 4, "rows": 400, "split": "validation", "fvu": 0.5, "kl": None}}, 4)
    tracker.log({"topk-8-2": {"loss": 0.7}}, 10)
    tracker.close()
"""

SHOW = """
import json, sys
from pathlib import Path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2 as pb

def records(data):  # LevelDB's log: blocks of 32 KiB; crc (4 bytes), length (2), type (1), payload
    at, whole = 7, b""
    while at + 7 <= len(data):
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
            yield record

def shown(out):
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    curves = {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    (file,) = (out / "wandb").glob("offline-run-*/*.wandb")
    history, axes = [], {}
    for record in records(file.read_bytes()):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        elif record.WhichOneof("record_type") == "metric":
            axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
    return {"tensorboard": curves, "wandb": history, "axes": axes}

print(json.dumps({name: shown(Path(sys.argv[1]) / name) for name in ("train", "evals")}))
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
    for script in (TRAIN, SHOW):  # wandb writes out all that it holds when its process ends
        command = [python, "-c", script, out, Path(__file__).parent]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
    both = json.loads(done.stdout.splitlines()[-1])
    found = both["train"]
    for name in ("topk-16-2", "topk-8-2"):
        lines = [
            json.loads(line) for line in (out / "train" / name / "metrics.jsonl").read_text().splitlines()
        ]
        assert [x["step"] for x in lines] == [1, 3, 5, 7, 9, 10]
        for figure in ("loss", "l0", "fvu", "dead", "lr", "stall_share"):
            wanted = [[x["step"], x[figure]] for x in lines]
            shown = found["tensorboard"][f"{name}/{figure}"]
            np.testing.assert_allclose(np.array(shown), np.array(wanted), rtol=1e-6)
            of_wandb = [[h["_step"], h[f"{name}/{figure}"]] for h in found["wandb"]]
            np.testing.assert_allclose(np.array(of_wandb), np.array(wanted), rtol=1e-6)
    # of a step that lies behind the last: TensorBoard puts it there, wandb on an axis of its own
    evals = both["evals"]
    assert evals["tensorboard"]["topk-8-2/eval/fvu"] == [[4, 0.5]]
    assert evals["tensorboard"]["topk-8-2/eval/rows"] == [[4, 400.0]]
    assert {"topk-8-2/eval/kl", "topk-8-2/eval/split"}.isdisjoint(evals["tensorboard"])
    (line,) = [h for h in evals["wandb"] if "topk-8-2/eval/fvu" in h]
    assert (line["topk-8-2/eval/fvu"], line["topk-8-2/eval/step"]) == (0.5, 4)
    assert [h["topk-8-2/loss"] for h in evals["wandb"]] == [0.9, 0.8, 0.7]
    assert evals["axes"]["topk-8-2/eval/*"] == "topk-8-2/eval/step"
