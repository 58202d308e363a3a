"""The process that evaluates beside a training: real ones, that finish, fail, are killed and lose their parent."""

import json
import os
import select
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from evaluated import Dying, Refusing, job_on

sys.path.insert(0, str(Path(__file__).parents[1] / "actcache"))

from tiny_harvest import tiny_spec

import actcache
import sae
from sae.evals.elsewhere import BackgroundProcess

SITE = "blocks.1.hook_resid_post"
_TIMEOUT_S = 120.0


def _cause(place: BackgroundProcess) -> str | None:
    place.begin(10)
    news = place.news(_TIMEOUT_S)
    assert news is not None
    return news.cause


def test_a_process_that_dies_is_told_with_its_last_words_and_replaced() -> None:
    place = BackgroundProcess(job_on(Dying()))
    for _ in range(2):
        assert _cause(place) == "the process that evaluates has ended by signal 9 (out of luck)"
    place.close()


def test_a_process_that_cannot_open_the_dataset_says_why_and_stays() -> None:
    place = BackgroundProcess(job_on(Refusing()))
    assert _cause(place) == "no such dataset any more"
    process = place._process
    assert _cause(place) == "no such dataset any more"
    assert place._process is process
    place.close()
    assert process is not None
    assert process.returncode is not None


def test_one_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    place = BackgroundProcess(job_on(None))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    cause = _cause(place)
    assert cause is not None
    assert cause.startswith("the process that evaluates could not be started ([Errno 2]")
    place.close()


def test_it_is_of_lower_priority_and_hears_no_ctrl_c_of_the_training() -> None:
    place = BackgroundProcess(job_on(Refusing()))
    assert _cause(place) is not None
    assert place._process is not None
    pid = place._process.pid
    assert os.getpriority(os.PRIO_PROCESS, pid) >= os.getpriority(os.PRIO_PROCESS, 0) + 10
    assert os.getpgid(pid) != os.getpgid(0)
    place.close()


PARENT = """
import sys, time
sys.path[:0] = {paths!r}
from evaluated import Refusing, job_on
from sae.evals.elsewhere import BackgroundProcess
place = BackgroundProcess(job_on(Refusing()))
place.begin(10)
place.news(600)
print(place._process.pid, flush=True)
time.sleep(600)
"""


def test_it_ends_with_a_training_that_is_killed() -> None:
    code = PARENT.format(paths=[p for p in sys.path if p])
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        watch = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            ended, _, _ = select.select([watch], [], [], _TIMEOUT_S)
            assert ended, "it outlived the training"
        finally:
            os.close(watch)


@pytest.mark.slow
def test_a_training_is_evaluated_beside_it_from_a_script_without_a_main_guard(tmp_path: Path) -> None:
    """The whole way by the command line's own call: another process, its LM, the files of the run."""
    ds = actcache.harvest(tiny_spec(tmp_path), root=str(tmp_path / "root"), engine="local", progress=False)
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import torch
        torch.set_num_threads(1)
        import actcache, sae
        stream = actcache.open({ds.url!r}).stream({SITE!r}, batch_size=256, metadata=False)
        evals = sae.EvalDuring(every_rows=2000, n_sequences=8, model={str(tmp_path / "tiny-gpt2")!r}, wait_s=250)
        training = sae.Training(n_rows=2000)
        sae.train(stream, sae.TopK(d_sae=32, k=4), training, out={str(tmp_path / "run")!r}, eval_every=evals)
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "run" / "topk-32-4" / "evals.jsonl").read_text().splitlines()
    found = json.loads(line)
    s = sae.load(tmp_path / "run" / "topk-32-4")
    wanted = sae.evaluate(s, ds, str(tmp_path / "tiny-gpt2"), n_sequences=8)
    assert (found["rows"], found["step"]) == (2000, 8)
    for figure in ("fvu", "l0", "ce_recovered_zero"):
        assert found[figure] == pytest.approx(wanted[figure], rel=1e-6)
