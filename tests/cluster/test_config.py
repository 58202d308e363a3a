"""A RUN.toml is read as written or refused in one line; no secret is ever repeated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import ConfigError, Run, read_run

ROOT = Path(__file__).parents[2]
MINIMAL = 'name = "acts"\ncommand = ["actcache", "harvest"]\n'


def run_of(directory, text):
    (directory / "run.toml").write_text(text)
    return read_run(directory / "run.toml")


def cli(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
    )


def test_the_example_is_a_usable_run():
    run = read_run(ROOT / "deploy/ray/run.toml")
    assert run.entrypoint.startswith("python -m actcache harvest --root s3://")
    assert run.env == ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def test_every_field_is_read(tmp_path):
    (tmp_path / "code").mkdir()
    extra = 'python = "/opt/bin/python"\nnum_cpus = 0.5\nnum_gpus = 1\nenv = ["A"]\nworking_dir = "code"\n'
    assert run_of(tmp_path, MINIMAL + extra) == Run(
        name="acts",
        command=("actcache", "harvest"),
        python="/opt/bin/python",
        num_cpus=0.5,
        num_gpus=1,
        env=("A",),
        working_dir=str(tmp_path / "code"),
    )


@pytest.mark.parametrize(
    ("command", "entrypoint"),
    [
        (("python", "-m", "sae", "train"), "/v/bin/python -m sae train"),
        (("actcache", "ls", "a b"), "/v/bin/python -m actcache ls 'a b'"),
        (("bash", "-c", "echo $HOME; python x"), "bash -c 'echo $HOME; python x'"),
    ],
)
def test_python_and_actcache_run_with_the_named_interpreter_and_no_shell(command, entrypoint):
    assert Run(name="a", command=command, python="/v/bin/python").entrypoint == entrypoint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "num_gpu = 1", "no field is called 'num_gpu'; did you mean 'num_gpus'?"),
        (MINIMAL + "zzz = 1", "no field is called 'zzz'; it can be name, command, steps"),
        ('name = "acts"', "command is missing"),
        ('name = "acts"\ncommand = []', "command is empty"),
        ('name = "acts"\ncommand = "actcache harvest"', "command is a str; it must be a list of strings"),
        ('name = "acts"\ncommand = ["a", 1]', "command is a tuple; it must be a list of strings"),
        (MINIMAL.replace("acts", "My Run"), "name must be at most 40 of a-z"),
        (MINIMAL + "num_cpus = true", "num_cpus is a bool; it must be a number"),
        (MINIMAL + "num_gpus = -1", "num_gpus is -1; it must be 0 or more"),
        (MINIMAL + "num_gpus = nan", "num_gpus is nan; it must be 0 or more"),
        (MINIMAL + 'env = ["A=1"]', r"env\[0\] is not a variable's name"),
        (MINIMAL + 'working_dir = "nowhere"', "nowhere is not a directory"),
        ("name = ", "run.toml: Invalid value"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        run_of(tmp_path, text)


def test_a_missing_file_is_one_line():
    done = cli("submit", "nowhere.toml", "--dry-run")
    assert done.returncode == 2
    assert done.stderr == "error: nowhere.toml cannot be read: No such file or directory\n"


SECRETS = [
    ["AKIA" + "ABCDEFGHIJKLMNOP"],
    ["--x", "wJalrXUtnFEMI/K7MDENG/bPxRfiCY" + "EXAMPLEKEY"],
    ["hf_" + "abcdefghijklmnopqrstuvwx"],
    ["--storage-option", "secret=correct-horse"],
    ["--hf-token", "correct-horse"],
    ["--password=correct-horse"],
    ['{"aws_secret_access_key": "correct-horse"}'],
    ["https://me:correct-horse@host/x"],
]


@pytest.mark.parametrize("arguments", SECRETS)
def test_a_secret_in_the_file_is_refused_and_not_repeated(tmp_path, arguments):
    with pytest.raises(ConfigError, match=r"command\[\d\] looks like a secret") as caught:
        run_of(tmp_path, f'name = "acts"\ncommand = {json.dumps(["actcache", *arguments])}')
    assert arguments[-1] not in str(caught.value)
    assert "correct-horse" not in str(caught.value)


def test_ordinary_arguments_are_not_taken_for_secrets():
    arguments = [
        "--tokens",
        "2000000000",
        "--max-tokens=100000000",
        "--text-field",
        "token",
        "--seed",
        "12345678",
    ]
    arguments += ["0123456789abcdef" * 2 + "01234567", "--root", "s3://bucket/acts/pythia-160m", "--site"]
    arguments += ["blocks.*.hook_resid_post", "endpoint_url=http://127.0.0.1:9000", "hf://datasets/a/b@v1.0"]
    arguments += [
        "/mnt/data/corpora/pile/shards2024/part01",
        "--no-token",
        "--tokenizer=EleutherAI/gpt-neox-20b",
    ]
    assert Run(name="acts", command=("actcache", *arguments)).command[1:] == tuple(arguments)


def test_dry_run_shows_all_that_would_be_sent_but_no_value_of_the_environment(tmp_path):
    (tmp_path / "run.toml").write_text(MINIMAL + 'env = ["KEY"]\n')
    done = cli("submit", str(tmp_path / "run.toml"), "--dry-run", KEY="correct-horse")
    sent = json.loads(done.stdout)
    assert sent["entrypoint"] == "python -m actcache harvest"
    assert sent["runtime_env"]["env_vars"]["KEY"] == "<from the environment>"
    assert "correct-horse" not in done.stdout + done.stderr


def test_a_variable_that_is_not_set_is_an_error(tmp_path):
    (tmp_path / "run.toml").write_text(MINIMAL + 'env = ["KEY"]\n')
    done = cli("submit", str(tmp_path / "run.toml"), "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: env names KEY, not set here")


def test_help_fits_a_screen():
    done = cli("--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) <= 24
