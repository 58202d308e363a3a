"""A RUN.toml is read as written or refused in one line; no secret is ever repeated."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config import ConfigError, KubeRay, Run, Slurm, Workers, read_run

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
    assert run.entrypoint.startswith(f"python -m actcache harvest --root {ROOT}/deploy/ray/data --model ")
    assert "--workers 2" in run.entrypoint
    assert run.env == ()


def test_every_field_is_read(tmp_path):
    (tmp_path / "code").mkdir()
    extra = """
python = "/opt/bin/python"
num_cpus = 0.5
num_gpus = 1
env = ["A"]
env_files = { B = "/run/secrets/b" }
env_in_clear = true
working_dir = "code"
backend = "slurm"
root = "s3://b/p"
image = "i:1"
drain_s = 90
[workers]
count = 4
cpus = 8
gpus = 2
memory_gib = 32
[kuberay]
namespace = "ml"
service_account = "acts"
secret = "acts-env"
queue = "gpus"
retries = 5
spot = true
token_auth = false
[slurm]
partition = "gpu"
account = "us"
time = "01:00:00"
setup = "source venv/bin/activate"
"""
    assert run_of(tmp_path, MINIMAL + extra) == Run(
        name="acts",
        command=("actcache", "harvest"),
        python="/opt/bin/python",
        num_cpus=0.5,
        num_gpus=1,
        env=("A",),
        env_files={"B": "/run/secrets/b"},
        env_in_clear=True,
        working_dir=str(tmp_path / "code"),
        backend="slurm",
        root="s3://b/p",
        image="i:1",
        drain_s=90,
        workers=Workers(count=4, cpus=8, gpus=2, memory_gib=32),
        kuberay=KubeRay(
            namespace="ml",
            service_account="acts",
            secret="acts-env",
            queue="gpus",
            retries=5,
            spot=True,
            token_auth=False,
        ),
        slurm=Slurm(partition="gpu", account="us", time="01:00:00", setup="source venv/bin/activate"),
    )


PIPELINE = """
name = "sweep"
root = "out"
[workers]
count = 3
[[steps]]
name = "harvest"
num_cpus = 0
command = ["actcache", "harvest", "--root", "{root}", "--workers", "{workers}", "--site", "blocks.{4,8}.hook_resid_post"]
[[steps]]
name = "train"
needs = ["harvest"]
num_gpus = 1
command = ["python", "-m", "sae", "train", "--data", "{data:harvest}", "--out", "{root}/runs"]
"""


def test_a_pipeline_goes_to_one_process_with_places_filled_in_and_other_braces_kept(tmp_path):
    run = run_of(tmp_path, PIPELINE)
    root = str(tmp_path / "out")
    words = shlex.split(run.entrypoint)
    assert words[:3] == ["python", "-m", "cluster.steps"]
    told = json.loads(words[3])
    assert (told["name"], told["root"]) == ("sweep", root)
    harvest, train = told["steps"]
    assert harvest["command"][1:] == [
        "-m",
        "actcache",
        "harvest",
        "--root",
        root,
        "--workers",
        "3",
        "--site",
        "blocks.{4,8}.hook_resid_post",
    ]
    assert train["command"][-4:] == ["--data", "{data:harvest}", "--out", f"{root}/runs"]
    assert (train["needs"], train["num_cpus"], train["num_gpus"]) == (["harvest"], 1, 1)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'needs = ["harvest"]',
            'needs = ["harvst"]',
            r"steps\[1\] needs a step that is not there; the others are harvest",
        ),
        (
            'needs = ["harvest"]',
            'needs = ["train"]',
            r"steps\[1\] needs 'train', which does not come before it; put it before",
        ),
        (
            'name = "harvest"',
            'name = "harvest"\nneeds = ["train"]',
            r"steps\[0\] needs 'train', which .*let no two steps need each other",
        ),
        ('needs = ["harvest"]', "", r"steps\[1\] reads \{data:harvest\}; put 'harvest' in its needs"),
        ('name = "train"', 'name = "harvest"', r"steps\[1\].name must be one of a kind"),
        ("num_gpus = 1", "num_gpu = 1", r"no field is called 'steps\[1\].num_gpu'; did you mean 'num_gpus'?"),
        ("num_gpus = 1", "num_gpus = -1", r"steps\[1\].num_gpus is -1; it must be 0 or more"),
        ('root = "out"', "", "root is missing: a pipeline keeps its steps' records there"),
        ('root = "out"', 'root = "out"\ncommand = ["a"]', r"command and \[\[steps\]\] each say what to run"),
        ("count = 3", "count = 0", "workers.count is 0; it must be 1 or more"),
        ("count = 3", 'count = "3"', "workers.count is a string; it must be a whole number"),
        ("[workers]\ncount = 3", "workers = 3", "workers is a whole number; it must be a table"),
        ('"{root}/runs"', '"--password=correct-horse"', r"steps\[1\].command\[7\] looks like a secret"),
    ],
)
def test_a_mistake_in_a_pipeline_is_named(tmp_path, old, new, message):
    assert old in PIPELINE
    with pytest.raises(ConfigError, match=message) as caught:
        run_of(tmp_path, PIPELINE.replace(old, new))
    assert "correct-horse" not in str(caught.value)


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
        ('name = "acts"\ncommand = "actcache harvest"', "command is a string; it must be a list of strings"),
        (
            'name = "acts"\ncommand = ["a", 1]',
            "command is a list of other things; it must be a list of strings",
        ),
        (MINIMAL.replace("acts", "My Run"), "name must be at most 40 of a-z"),
        (MINIMAL + "num_cpus = true", "num_cpus is true or false; it must be a number"),
        (MINIMAL + "num_gpus = -1", "num_gpus is -1; it must be 0 or more"),
        (MINIMAL + "num_gpus = nan", "num_gpus is nan; it must be 0 or more"),
        (MINIMAL + 'env = ["A=1"]', r"env\[0\] is not a variable's name"),
        (MINIMAL + 'env_files = ["A"]', "env_files is a list; it must be a table of strings"),
        (MINIMAL + 'env_files = { A = "b" }', "env_files.A must be the full path of a file"),
        (
            MINIMAL + 'env = ["A"]\nenv_files = { A = "/b" }',
            "env_files.A must be a variable's name that env has not",
        ),
        (MINIMAL + 'working_dir = "nowhere"', "nowhere is not a directory"),
        (MINIMAL + 'backend = "k8s"', "backend is not one of local, ray, kuberay, slurm"),
        (MINIMAL + 'command_ = ["{root}"]', "no field is called 'command_'"),
        ('name = "a"\ncommand = ["a", "{root}"]', "command has {root}, and root is missing"),
        ('name = "a"\ncommand = ["a", "{data:b}"]', r"\{data:STEP\} is for \[\[steps\]\]"),
        ("name = ", r"run.toml is not TOML: Invalid value \(at .*\); correct it there"),
        (
            'name = "a"\nroot = "b"\nsteps = []',
            r"steps is empty; put in a \[\[steps\]\], or a command instead",
        ),
        (MINIMAL + "drain_s = 0.5", "drain_s is a number; it must be a whole number"),
        (
            MINIMAL + "env_files = { A = { b = 'c' } }",
            "env_files is a table of other things; it must be a table of strings",
        ),
        ("", "name is missing; put it in, docs/cluster.md has an example"),
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
    (tmp_path / "run.toml").write_text(MINIMAL + 'env = ["GREETED"]\n')
    done = cli("submit", str(tmp_path / "run.toml"), "--dry-run", GREETED="correct-horse")
    sent = json.loads(done.stdout)
    assert sent["entrypoint"] == "python -m actcache harvest"
    assert sent["runtime_env"]["env_vars"]["GREETED"] == "<from the environment>"
    assert "correct-horse" not in done.stdout + done.stderr


def test_a_variable_that_is_not_set_is_an_error(tmp_path):
    (tmp_path / "run.toml").write_text(MINIMAL + 'env = ["GREETED"]\n')
    done = cli("submit", str(tmp_path / "run.toml"), "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: env names GREETED, not set here")


def test_help_fits_a_screen():
    done = cli("--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) <= 24
