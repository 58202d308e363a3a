"""The command line: what a person sees, and one clear line with a non-zero code when it goes wrong."""

import json

import pytest
from command_line import actcache_cli, actcache_here, harvest_arguments
from tiny_harvest import SITES, tiny_spec


def test_harvest_twice_then_look_at_it(tmp_path):
    arguments = harvest_arguments(tiny_spec(tmp_path), tmp_path / "root")
    first = actcache_cli(*arguments, "--json")
    assert first.returncode == 0, first.stderr
    described = json.loads(first.stdout)
    assert described["rows"]["train"] == 1024
    assert list(described["sites"]) == [SITES[0]]
    assert "harvest: 100 %" in first.stderr
    second = actcache_cli(*arguments)
    assert "cache hit" in second.stderr
    assert "harvest:" not in second.stderr
    listed = actcache_here("ls", tmp_path / "root")
    assert described["url"].split("/")[-1] in listed.stdout
    info = actcache_here("info", described["url"])
    assert "FVU core" in info.stdout
    assert SITES[0] in info.stdout
    verified = actcache_here("verify", described["url"], "--deep")
    assert verified.returncode == 0
    assert "objects read whole, crc32c right: " in verified.stdout


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--site", "blocks.1.hook_resid_pots"], 2, "blocks.1.hook_resid_post"),
        (["--context-size", "4000"], 2, "takes at most"),
        (["--precision", "int4"], 2, "precision is 'int4'"),
        (["--tokenz", "10"], 2, "Did you mean"),
        (["--tokens", "many"], 2, "not a valid integer"),
        (["--corpus", "nothing/here/*.txt"], 2, "no file matches"),
        (["--model", "nothing/here"], 2, "nothing/here"),
        (["--root", "/proc/nowhere"], 1, "/proc/nowhere"),
        (["--root", ""], 2, "'' names no place"),
        (["--root", "s3://"], 2, "'s3://' names no place"),
        (["--lm-dtype", "float23"], 2, "must be one of float32"),
        (["--packing", "isolate"], 2, "did you mean 'isolated'"),
        (["--token-field", "ids"], 2, "which have no field 'ids'"),
        (["--device", "gpu9"], 2, "gpu9"),
        (["--workers", "2", "--engine", "local"], 2, "the local engine runs one"),
        (["--workers", "0"], 2, "workers is 0"),
        (["--gpus-per-worker", "nan"], 2, "gpus_per_worker is nan"),
        (["--cpus-per-worker", "-1"], 2, "num_cpus is -1"),
        (["--worker-label", "pool=a"], 2, "give --engine ray too"),
        (["--worker-resource", "pool=nan"], 2, "must be a number above 0"),
        (["--buffer", "inf"], 2, "give a number of GiB above 0"),
        (["--block-rows", "10000000000"], 2, "must not exceed 2147483648"),
        (["--seed", str(2**63)], 2, "seed is 9223372036854775808"),
        (["--max-tokens", str(2**63)], 2, "below 2^63"),
    ],
)
def test_bad_input_is_one_line_and_a_non_zero_code(tmp_path, change, code, message):
    done = actcache_here(*harvest_arguments(tiny_spec(tmp_path), tmp_path / "root"), *change)
    assert done.returncode == code
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], done.stderr
    assert message in lines[-1]


def test_a_corpus_that_keeps_no_row_is_one_line(tmp_path):
    spec = tiny_spec(tmp_path)
    for file in (tmp_path / "corpus").iterdir():
        file.write_text("\n")
    done = actcache_cli(*harvest_arguments(spec, tmp_path / "root"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: corpus")
    assert "holds no text" in done.stderr


def test_nothing_there_is_said(tmp_path):
    for command in ("info", "verify", "ls"):
        done = actcache_here(command, tmp_path / "absent")
        assert done.returncode == 1
        assert done.stderr.startswith("error: no")
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [[], ["harvest"], ["plan"], ["ls"], ["info"], ["verify"], ["gc"], ["rm"]])
def test_every_command_has_help(command):
    done = actcache_here(*command, "--help")
    assert done.returncode == 0
    assert len(done.stdout) > 200
