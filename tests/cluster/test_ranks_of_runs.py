"""[train] in RUN.toml: what is added to a training's command, what its ranks take, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import ConfigError, Run, Workers, read_run
from cluster.kuberay import manifest
from cluster.slurm import script
from cluster.training import Ranks, Train, ranks_of, with_ranks, without_ranks
from sae.spread import spread_of

TRAIN = ("python", "-m", "sae", "train", "--d-sae", "8", "--out", "s3://b/runs/x")
PIPELINE = """
name = "sweep"
root = "out"
[workers]
count = 2
[train]
workers = 4
cpus = 2
spread = "latents"
[[steps]]
name = "harvest"
num_cpus = 0
command = ["actcache", "harvest", "--root", "{root}", "--workers", "{workers}"]
[[steps]]
name = "train"
needs = ["harvest"]
command = ["python", "-m", "sae", "train", "--data", "{data:harvest}", "--out", "{root}/runs/x"]
[[steps]]
name = "eval"
needs = ["train"]
command = ["python", "-m", "sae", "eval", "{root}/runs/x"]
"""


def run_of(directory, text):
    (directory / "run.toml").write_text(text)
    return read_run(directory / "run.toml")


def one(train=None, *more, **fields):
    return Run(name="job", command=(*TRAIN, *more), root="s3://b/p", train=train, **fields)


def test_options_are_added_to_trainings_alone_and_their_step_reserves_nothing(tmp_path):
    told = json.loads(run_of(tmp_path, PIPELINE).as_json())["steps"]
    added = ["--workers", "4", "--gpus-per-worker", "0", "--cpus-per-worker", "2", "--spread", "latents"]
    out = str(tmp_path / "out/runs/x")
    assert told[1]["command"][4:] == ["--data", "{data:harvest}", "--out", out, *added]
    assert told[0]["command"][-2:] == ["--workers", "2"]
    assert told[2]["command"] == ["python", "-m", "sae", "eval", out]
    assert [step["num_cpus"] for step in told] == [0, 0, 1]


def test_options_that_the_command_gives_come_first():
    train = Train(workers="2..8", gpus=1, spread="rows")
    command = with_ranks((*TRAIN, "--workers=3", "--spread", "saes"), train)
    assert command == [*TRAIN, "--workers=3", "--spread", "saes", "--gpus-per-worker", "1", "--cpus-per-worker", "1"]  # fmt: skip
    assert ranks_of(command) == Ranks(least=3, most=3, cpus=1, gpus=1)
    assert without_ranks(command) == list(TRAIN)
    assert with_ranks(command, None) == command
    eval_command = ["python", "-m", "sae", "eval", "x", "--workers", "3"]
    assert with_ranks(eval_command, train) == without_ranks(eval_command) == eval_command
    assert ranks_of(eval_command) is None
    assert ranks_of(TRAIN) is None


@pytest.mark.parametrize(
    ("ranks", "nodes", "room"),
    [
        (Ranks(least=4, most=4, cpus=1, gpus=0), [(2, 0), (1, 0)], 3),
        (Ranks(least=4, most=4, cpus=1, gpus=0), [(16, 0)], 4),
        (Ranks(least=2, most=8, cpus=4, gpus=1), [(8, 4), (7, 1), (64, 0)], 3),
        (Ranks(least=2, most=2, cpus=3, gpus=0), [(2, 0), (2, 0), (2, 0)], 0),  # none is cut in two
    ],
)
def test_room_is_counted_node_by_node(ranks, nodes, room):
    assert ranks.room(nodes) == room
    assert f"room for {room} on" in ranks.beside(nodes)


def test_ranks_say_what_they_take_in_all():
    assert str(Ranks(least=1, most=1, cpus=1, gpus=0)) == "1 rank of 1 CPU"
    assert str(Ranks(least=4, most=4, cpus=2, gpus=1)) == (
        "4 ranks of 1 GPU and 2 CPUs, 4 GPUs and 8 CPUs in all"
    )
    found = Ranks(least=2, most=8, cpus=1, gpus=0).beside([(3, 0), (1, 1)])
    assert (
        found
        == "2 to 8 ranks of 1 CPU, at least 2 CPUs in all; room for 4 on 2 nodes with 1 GPU and 4 CPUs together"
    )


@pytest.mark.parametrize("world", [1, 2, 4, 6])
@pytest.mark.parametrize(
    "spread",
    ["saes", "latents", "rows", "rows=2,latents=2", "rows=3, latents=2", "rows=1,latents=1", "lanes", "rows=2", "SAES", ""],
)  # fmt: skip
def test_a_spread_is_taken_where_the_training_itself_takes_it(world, spread):
    def good(ask, error):
        try:
            ask()
        except error:
            return False
        return True

    ours = good(lambda: one(Train(workers=world, spread=spread)), ConfigError)
    assert ours == good(lambda: spread_of(spread, world, n_saes=world), ValueError)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("workers = 4", "workers = 0", "train.workers is 0 to 0; it must be at least 1"),
        ("workers = 4", 'workers = "8..2"', "train.workers is 8 to 2; it must be at least 1, and the least comes first"),
        ("workers = 4", 'workers = "2-8"', 'train.workers is no number of ranks; give one, or .* as "2..8"'),
        ("workers = 4", "workers = 2.5", 'train.workers is a number; it must be a whole number, or a text such as "2..8"'),
        ("workers = 4", "workers = true", "train.workers is true or false; it must be a whole number"),
        ("workers = 4\n", "", "train.workers is missing"),
        ("workers = 4", "worker = 4", "no field is called 'train.worker'; did you mean 'workers'?"),
        ("cpus = 2", "cpus = 0", "train.cpus is 0; it must be 1 or more"),
        ("cpus = 2", "gpus = 2", "train.gpus is 2; a rank trains on one GPU, so give 0 or 1"),
        ('"latents"', '"lanes"', "train.spread is none of saes, latents, rows and rows=R,latents=L; give one of them"),
        ('"latents"', '"rows=2,latents=4"', "train.spread is of 8 ranks, and there are 4; R x L must be all of them"),
        ('workers = 4\ncpus = 2\nspread = "latents"', 'workers = "2..8"\nspread = "rows=2,latents=2"', "train.spread is of 4 ranks, and there are 2 to 8"),
        ('"train", "--data"', '"train", "--workers", "x", "--data"', r"steps\[1\].command: --workers is no number of ranks"),
        ('"train", "--data"', '"train", "--gpus-per-worker=two", "--data"', r"steps\[1\].command: --gpus-per-worker is no whole number"),
        ('name = "train"', 'name = "train"\nnum_gpus = 1', r"steps\[1\].num_gpus is 1, but this training's ranks reserve their own \(4 ranks of 2 CPUs, 8 CPUs in all\); take num_gpus out"),
        ('name = "train"', 'name = "train"\nnum_cpus = 2', r"steps\[1\].num_cpus is 2, but .* take num_cpus out"),
        ('"sae", "train"', '"sae", "trian"', r"\[train\] is for `python -m sae train`, and no command here is that; take it out"),
        ("[train]", "[[train]]", "train is a list; it must be a table"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_field(tmp_path, old, new, message):
    assert old in PIPELINE
    with pytest.raises(ConfigError, match=message) as caught:
        run_of(tmp_path, PIPELINE.replace(old, new))
    assert "\n" not in str(caught.value)


def test_a_training_whose_own_command_has_workers_is_held_to_the_same():
    assert one(None, "--workers", "2").trainings() == {"job": Ranks(least=2, most=2, cpus=1, gpus=0)}
    with pytest.raises(ConfigError, match="^num_gpus is 1, but this training's ranks reserve their own"):
        one(None, "--workers", "2", num_gpus=1)
    assert one(None, num_gpus=1).trainings() == {}


@pytest.mark.parametrize(
    ("train", "workers", "n"),
    [
        (Train(workers=4, gpus=1), Workers(count=1, cpus=4, gpus=1), 4),
        (Train(workers=4, gpus=1), Workers(count=8, cpus=4, gpus=1), 8),  # the harvest's are more
        (Train(workers="2..12", gpus=1, cpus=2), Workers(count=1, cpus=8, gpus=8), 3),  # 4 by the CPUs
        (Train(workers=3), Workers(count=1, cpus=2), 2),
    ],
)
def test_pods_and_slurm_nodes_are_as_many_as_harvest_or_ranks_need(train, workers, n):
    run = one(train, workers=workers, image="i")
    [group] = manifest(run, 1)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (n, n, n)
    text = script(run, Path("/shared/job-1"))
    assert f"#SBATCH --nodes={n}\n" in text
    assert f"srun --nodes={n} --ntasks={n} " in text
    assert f"--min-nodes {n} " in text


@pytest.mark.parametrize("make", [lambda run: manifest(run, 1), lambda run: script(run, Path("/x"))])
def test_a_rank_that_fits_no_pod_or_node_is_refused(make):
    run = one(Train(workers=2, gpus=1, cpus=8), workers=Workers(cpus=4, gpus=1), image="i")
    said = (
        "a rank of job takes 1 GPU and 8 CPUs, and one of .workers. has 1 GPU and 4 CPUs; raise cpus or gpus"
    )
    with pytest.raises(ConfigError, match=said):
        make(run)


def test_pods_train_into_a_url():
    local = replace(one(Train(workers=2), image="i"), command=(*TRAIN[:-1], "{root}/x"), root="s3://b")
    assert manifest(local, 1)
    for command in ((*TRAIN[:-1], "runs/x"), (*TRAIN[:-2], "--out=/runs/x")):
        with pytest.raises(
            ConfigError, match="--out of job is a directory, which pods do not share; give a URL"
        ):
            manifest(replace(local, command=command), 1)
