"""What a person gets wrong on the command line is one line: found, wanted, what helps; and a code that is not 0."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ray_cluster import free_ports

from cluster import __main__ as command_line

RUN = 'name = "job"\nbackend = "local"\n'
PIPELINE = (
    'name = "job"\nbackend = "local"\nroot = "out"\n[[steps]]\nname = "a"\ncommand = ["no-such-program"]\n'
)
PIPELINE += '[[steps]]\nname = "b"\nneeds = ["a"]\ncommand = ["python", "-c", "pass"]\n'


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free_ports(1)[0]}")


@pytest.fixture
def call(environment, monkeypatch, capsys):
    """Runs `python -m cluster ...` here: (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["cluster", *map(str, arguments)])
        code = command_line.main()
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def followed(environment):
    """The same of `submit PATH --follow`, in a process of its own, which leaves its child behind."""

    def followed(path):
        command = [sys.executable, "-m", "cluster", "submit", str(path), "--follow"]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    return followed


def write(directory, text, name="run.toml"):
    (directory / name).write_text(text)
    return directory / name


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:8265", "'127.0.0.1:8265' is not http://HOST:PORT of a job server, usually port 8265"),
        ("http://", "'http://' is not http://HOST:PORT"),
        ("http://127.0.0.1:99999", "is not http://HOST:PORT"),
        ("ftp://127.0.0.1:21", "is not http://HOST:PORT"),
    ],
)
def test_an_address_that_is_none(call, address, message):
    code, out, err = call("list", "--address", address)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "address", "message"),
    [
        ("RAY_ADDRESS", "127.0.0.1:NNNN", "nothing is reached at 127.0.0.1:NNNN, from RAY_ADDRESS: Connection refused; give"),
        ("RAY_ADDRESS", "ray://127.0.0.1:NNNN", "nothing is reached at ray://127.0.0.1:NNNN, from RAY_ADDRESS: "),
        ("RAY_API_SERVER_ADDRESS", "head", "RAY_API_SERVER_ADDRESS is head, which is no http://HOST:PORT; give --address"),
        ("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:99999", "RAY_API_SERVER_ADDRESS is http://127.0.0.1:99999, which is no"),
    ],
)  # fmt: skip
def test_a_variable_with_an_address_that_is_none_is_named_at_once(
    call, monkeypatch, variable, address, message
):
    port = str(free_ports(1)[0])
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.setenv(variable, address.replace("NNNN", port))
    code, out, err = call("list")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: " + message.replace("NNNN", port))


def test_what_is_wrong_with_the_file_comes_before_what_is_wrong_with_the_cluster(call, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for command in ("submit", "preflight"):
        code, out, err = call(
            command, write(tmp_path, RUN + 'command = ["a"]\nroot = "s3://b/x"\n'), "--backend", "kuberay"
        )
        assert (code, out) == (2, "")
        assert err.startswith("error: image is missing: kuberay runs an image with ray, actcache and sae"), (
            command
        )
    path = write(tmp_path, 'name = "job"\ncommand = ["actcache", "harvest"]\nenv = ["NOT_SET_ANYWHERE"]\n')
    assert call("submit", path)[2].startswith("error: env names NOT_SET_ANYWHERE, not set here; export it")
    code, out, err = call("preflight", path)
    assert (code, out) == (2, "")
    assert err == "error: root is missing, so there is no place to check; put root in RUN.toml\n"


def test_a_file_is_known_by_its_path_too(call, followed, tmp_path):
    path = write(tmp_path, RUN + 'command = ["python", "-c", "print(17)"]\n', "described")
    assert followed(path)[1].endswith("17\njob-1 SUCCEEDED\n")
    assert call("logs", path)[1] == "17\n"
    code, _, err = call("status", tmp_path / "none")
    assert (code, err) == (2, f"error: {tmp_path}/none cannot be read: No such file or directory\n")


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_a_run_that_is_not_known(call, command):
    code, out, err = call(command, "nothing", "--backend", "local")
    assert (code, out) == (1, "")
    assert err == "error: this cluster knows no run 'nothing'; see `python -m cluster list`\n"


def test_an_attempt_that_is_not_there(call, followed, tmp_path):
    path = write(tmp_path, RUN + 'command = ["python", "-c", "pass"]\n')
    assert followed(path)[0] == 0
    for command in ("status", "logs"):
        code, out, err = call(command, path, "--attempt", 7)
        assert (code, out) == (1, "")
        assert err == "error: this cluster knows no job-7; see `python -m cluster list`\n"
    assert call("logs", path, "--attempt", -1)[0] == 2
    assert call("stop", path)[:2] == (0, "job-1 was already SUCCEEDED\n")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (RUN + 'command = ["no-such-program", "x"]\n', "step job: no-such-program: No such file or directory"),
        (RUN + 'python = "/nowhere/python"\ncommand = ["python", "x"]\n', "step job: /nowhere/python: No such file"),
        (RUN + 'command = ["/etc"]\n', "step job: /etc: Permission denied"),
        (PIPELINE, "step a: no-such-program: No such file or directory"),
    ],
)  # fmt: skip
def test_a_command_that_is_not_there_is_one_line_of_the_log(followed, tmp_path, text, line):
    code, out, err = followed(write(tmp_path, text))
    assert code == 1
    submitted, said = out.splitlines()
    assert submitted.startswith("submitted job-1")
    assert said.startswith(f"error: {line}")
    assert "on this machine; correct its command, or python" in said
    assert err.startswith("error: job-1 FAILED: exit code 1, log ")


def test_a_root_that_can_hold_no_records_is_one_line(call, followed, tmp_path):
    (tmp_path / "out").write_text("a file")
    code, out, err = followed(write(tmp_path, PIPELINE))
    assert code == 1
    assert out.splitlines()[1].startswith(f"error: the steps' records under {tmp_path}/out cannot be ")
    assert len(out.splitlines()) == 2
    assert "Traceback" not in out + err
    state = json.loads(call("status", tmp_path / "run.toml", "--json")[1])
    assert {step["state"] for step in state["steps"]} <= {"unknown", "missing"}


def test_a_single_command_without_progress_says_why_it_has_none(call, followed, tmp_path):
    path = write(tmp_path, RUN + 'command = ["python", "-c", "pass"]\n')
    assert followed(path)[0] == 0
    assert call("status", path)[1].endswith(
        "\njob  unknown\n     only harvests, training and the steps of a pipeline leave what says how far they are\n"
    )


SECRET = "hf_" + "abcdefghijklmnopqrstuvwx"
STEP = 'root = "out"\n[[steps]]\nname = "a"\ncommand = ["a"]\n'
ONE = 'command = ["a"]\n'
PLACES = {
    "name": f'name = "{SECRET}"\n{ONE}',
    "command": f'name = "a"\ncommand = ["a", "{SECRET}"]\n',
    "python": f'name = "a"\n{ONE}python = "{SECRET}"\n',
    "image": f'name = "a"\n{ONE}image = "{SECRET}"\n',
    "root": f'name = "a"\n{ONE}root = "{SECRET}"\n',
    "root, as a password": f'name = "a"\n{ONE}root = "s3://me:{SECRET}@b/x"\n',
    "working_dir": f'name = "a"\n{ONE}working_dir = "{SECRET}"\n',
    "backend": f'name = "a"\n{ONE}backend = "{SECRET}"\n',
    "env": f'name = "a"\n{ONE}env = ["{SECRET}"]\n',
    "env, with its name": f'name = "a"\n{ONE}env = ["HF_TOKEN={SECRET}"]\n',
    "env, as a table": f'name = "a"\n{ONE}[env]\nHF_TOKEN = "{SECRET}"\n',
    "env_files": f'name = "a"\n{ONE}env_files = {{ HF_TOKEN = "{SECRET}" }}\n',
    "env_files, as a path": f'name = "a"\n{ONE}env_files = {{ HF_TOKEN = "/{SECRET}" }}\n',
    "env_files, as a name": f'name = "a"\n{ONE}env_files = {{ {SECRET} = "/run/x" }}\n',
    "kuberay": f'name = "a"\n{ONE}[kuberay]\nsecret = "{SECRET}"\n',
    "slurm": f'name = "a"\n{ONE}[slurm]\nsetup = "export HF_TOKEN={SECRET}"\n',
    "a step's name": f'name = "a"\n{STEP.replace(chr(34) + "a" + chr(34), chr(34) + SECRET + chr(34))}',
    "a step's needs": f'name = "a"\n{STEP}needs = ["{SECRET}"]\n',
    "a step's command": f'name = "a"\n{STEP}[[steps]]\nname = "b"\ncommand = ["a", "--x={SECRET}"]\n',
    "a field's name": f'name = "a"\n{ONE}{SECRET} = 1\n',
    "a table's field's name": f'name = "a"\n{ONE}[workers]\n{SECRET} = 1\n',
    "an unknown field": f'name = "a"\n{ONE}tokn = "{SECRET}"\n',
    "a number": f'name = "a"\n{ONE}num_cpus = "{SECRET}"\n',
    "what is no TOML": f'name = "a"\ncommand = ["a", "{SECRET}"\n',
    "a value without quotes": f'name = "a"\n{ONE}HF_TOKEN = {SECRET}\n',
}


@pytest.mark.parametrize("place", PLACES)
def test_a_secret_is_refused_wherever_it_is_and_never_shown(call, tmp_path, place):
    path = write(tmp_path, PLACES[place])
    for arguments in (("submit", path, "--dry-run"), ("status", path), ("preflight", path)):
        code, out, err = call(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith(f"error: {path}")
        assert err.count("\n") == 1
        assert SECRET not in err


def test_a_store_out_of_reach_is_said_by_status_within_a_bound(call, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mine")
    path = write(tmp_path, PIPELINE.replace('"out"', '"s3://bucket/x"'))
    code, out, _ = call("status", path, "--json")
    assert code == 0
    for step in json.loads(out)["steps"]:
        assert step["state"] == "unknown"
        assert step["error"].startswith("its records under s3://bucket/x cannot be read: ")
