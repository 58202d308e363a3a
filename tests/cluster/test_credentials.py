"""Credentials: not sent where they would be kept, hidden in what is shown, read from files where the work is."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import ConfigError, KubeRay, Run
from cluster.credentials import Scrubbed, scrub, secret_variables
from cluster.kuberay import manifest
from cluster.ray_jobs import RayJobs
from cluster.slurm import script

ROOT = Path(__file__).parents[2]
PASSED = "correct-horse-battery"
RUN = Run(
    name="job", command=("python", "-c", "pass"), root="s3://b/p", env_files={"HF_TOKEN": "/run/hf token"}
)


def local_run(directory, code, **env_files):
    """Submit a line of Python to this machine; (what was printed, the attempt's directory)."""
    path = directory / "run.toml"
    lines = [
        'name = "job"',
        'backend = "local"',
        f'command = ["python", "-c", {json.dumps(code)}]',
        "[env_files]",
    ]
    path.write_text("\n".join([*lines, *(f"{n} = {json.dumps(str(p))}" for n, p in env_files.items())]))
    state = directory / "state"
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "submit", path, "--follow"],
        cwd=ROOT,
        env=os.environ | {"XDG_STATE_HOME": str(state)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, state / "actcache-runs/local/job-1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "x"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("OPENAI_API_KEY", "x"),
        ("DB", f"pg://me:{PASSED}@host/x"),
    ],
)
def test_ray_is_not_sent_a_credential_unless_the_run_accepts_it(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    run = Run(name="job", command=("a",), env=(name,))
    with pytest.raises(ConfigError, match=f"env would send {name}, and Ray keeps it in clear") as caught:
        RayJobs().request(run, 1)
    assert f'env_files = {{ {name} = "/run/secrets/..." }}' in str(caught.value)
    assert PASSED not in str(caught.value)
    assert "<from the environment>" in RayJobs().request(replace(run, env_in_clear=True), 1)


def test_ordinary_variables_are_sent(monkeypatch):
    names = (
        "TOKENIZERS_PARALLELISM",
        "AWS_ENDPOINT_URL",
        "HF_HOME",
        "RAY_AUTH_TOKEN_PATH",
        "KEYBOARD",
        "SSH_AUTH_SOCK",
    )
    for name in names:
        monkeypatch.setenv(name, "http://127.0.0.1:9000")
    assert secret_variables(names) == []


def test_of_env_files_only_names_and_paths_are_sent():
    sent = json.loads(RayJobs().request(RUN, 1))
    assert sent["entrypoint"] == "python -m cluster.env_files python -c pass"
    assert json.loads(sent["runtime_env"]["env_vars"]["ACTCACHE_ENV_FILES"]) == {"HF_TOKEN": "/run/hf token"}
    assert sent["runtime_env"]["worker_process_setup_hook"] == "cluster.env_files.load"
    with pytest.raises(ConfigError, match="put the names in env, their values in kuberay.secret"):
        manifest(replace(RUN, backend="kuberay", image="i", kuberay=KubeRay()), 1)


def test_a_slurm_script_reads_the_files_on_the_nodes(tmp_path):
    (tmp_path / "a file").write_text(PASSED + "\n")
    text = script(replace(RUN, backend="slurm", env_files={"HF_TOKEN": str(tmp_path / "a file")}), tmp_path)
    assert PASSED not in text
    lines = [line for line in text.splitlines() if "HF_TOKEN" in line]
    shown = subprocess.run(
        ["bash", "-c", "\n".join([*lines, "env"])], capture_output=True, text=True, check=True
    )
    assert f"HF_TOKEN={PASSED}\n" in shown.stdout
    lines[0] = lines[0].replace("a file", "none")
    assert subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True).returncode == 1


def test_a_run_has_what_its_files_say_and_its_log_does_not(tmp_path):
    (tmp_path / "hf").write_text(PASSED + "\n")
    code = "import os; print(len(os.environ['HF_TOKEN']), os.environ['HF_TOKEN'], 'api_key=' + 'open-sesame')"
    done, place = local_run(tmp_path, code, HF_TOKEN=tmp_path / "hf")
    assert done.stdout.endswith(f"\n{len(PASSED)} *** ***\njob-1 SUCCEEDED\n"), done.stdout + done.stderr
    for path in place.iterdir():
        assert PASSED not in path.read_text()
        assert "open-sesame" not in path.read_text().replace("'open-sesame'", "")  # the command has it


def test_a_file_that_is_not_there_ends_the_run_in_one_line(tmp_path):
    done, place = local_run(tmp_path, "print('ran')", HF_TOKEN=tmp_path / "none")
    assert (done.returncode, "ran\n" in done.stdout) == (1, False)
    assert done.stderr.startswith("error: job-1 FAILED: exit code 1, log ")
    assert (place / "log").read_text() == (
        f"error: HF_TOKEN is wanted from {tmp_path}/none, which cannot be read here: No such file or directory. "
        "Put it there, or correct env_files\n"
    )


def test_what_is_shown_is_scrubbed_also_where_a_line_comes_in_pieces(monkeypatch):
    monkeypatch.setenv("S3_SECRET", PASSED)
    shown = []
    write = Scrubbed(shown.append)
    for piece in ("a correct-ho", f"rse-battery b\nkey {'AKIA'}ABCDEFGH", "IJKLMNOP\nrest ", PASSED):
        write(piece)
    write.close()
    assert "".join(shown) == "a *** b\nkey ***\nrest ***"


def test_ordinary_lines_are_shown_as_they_are():
    for line in (
        "blocks 12/64  18 %  6,120 rows/s  0:03:12 to go",
        'env_files = { HF_TOKEN = "/run/secrets/..." }, or let the nodes have it',
        "special tokens: 50256, 50257; token: 17; tokens=131072",
        "s3://bucket/acts/stdlib-gpt2-stdlib-t256-fvu-0.001-dbba4a899ec4/manifest-000003.json",
        'File "/opt/venv/lib/python3.11/site-packages/actcache/driver.py", line 12, in harvest',
        "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    ):
        assert scrub(line) == line
