"""How far a run has come, by what it has stored: it needs no cluster.

Harvests are asked by `actcache harvest ... --progress --json`, training by `python -m sae progress ... --json`, each with
the arguments of the run; what has no such question (eval, report, others) by the records that cluster/steps.py
leaves under the root. `python -m cluster.progress JSON` exits with 0 where all is done, 1 where it is not.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .steps import is_harvest, read_records
from .training import is_training, run_directory

Step = dict[str, Any]
_UNASKED = "only harvests, training and the steps of a pipeline leave what says how far they are"
_QUICK = [
    "--storage-option",
    'actcache_retry={"deadline_s": 10}',
]  # a person waits; harvests themselves wait longer


def progress(run: Mapping[str, Any], python: str = sys.executable) -> list[Step]:
    """A dict for each step of a run, as `Run.as_json` gives it.

    `state` is done, partial, missing, failed, running or unknown. Harvests and training also have rows_done,
    rows_wanted, rate_rows_per_s and eta_s; harvests blocks_done, blocks_wanted, blocks_missing, quarantined; training
    with ranks world_size, spread and stall_by_rank.

    Args:
        run: its name, root and steps.
        python: the interpreter here that has actcache and sae.
    """
    many = len(run["steps"]) > 1
    records: dict[str, dict[str, Any]] = {}
    trouble = ""
    if many and run["root"]:
        try:
            records = read_records(run["root"], run["name"], quick=True)
        except Exception as err:  # whatever a file system raises; status goes on with the rest
            trouble = f"its records under {run['root']} cannot be read: {err}"
    runs = {s["name"]: out for s in run["steps"] if (out := run_directory(s["command"])) is not None}
    trained = _trained(list(runs.values()), run["steps"], python)
    found = []
    for step in run["steps"]:
        name, command = step["name"], step["command"]
        record = records.get(name, {})
        if is_harvest(command):
            found.append(
                {
                    "step": name,
                    **_harvested([python, "-m", "actcache", "harvest", *_QUICK, *_after(command, "harvest")]),
                }
            )
        elif name in runs:
            found.append({"step": name, **trained[runs[name]]})
        else:
            state = record.get("state", "missing" if many and not trouble else "unknown")
            why = record.get("error") or trouble or ("" if many else _UNASKED)
            found.append({"step": name, "state": state, "error": why or None})
    return found


def _after(command: Sequence[str], word: str) -> list[str]:
    return list(command[list(command).index(word) + 1 :])


def _ask(command: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """(JSON lines, why not)."""
    done = subprocess.run(list(command), capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return [], lines[-1].removeprefix("error: ")
    return [json.loads(line) for line in done.stdout.splitlines()], ""


def _harvested(command: Sequence[str]) -> dict[str, Any]:
    answer, why = _ask([*command, "--progress", "--json"])
    if not answer:
        return {"state": "unknown", "error": why}
    [one] = answer
    state = "done" if one["complete"] else "partial" if one["blocks_done"] else "missing"
    return {"state": state, **one}


def _trained(runs: Sequence[str], steps: Sequence[Step], python: str) -> dict[str, dict[str, Any]]:
    """By run directory; one process for all, since it imports torch."""
    if not runs:
        return {}
    options = [
        word
        for step in steps
        if is_training(step["command"])
        for first, second in zip(step["command"], step["command"][1:], strict=False)
        if first == "--storage-option"
        for word in (first, second)
    ]
    answer, why = _ask([python, "-m", "sae", "progress", *runs, *_QUICK, *options, "--json"])
    if not answer:
        return {run: {"state": "unknown", "error": why} for run in runs}
    return {
        one["path"]: one | {"state": "done" if one["state"] == "finished" else one["state"]} for one in answer
    }


def plans(run: Mapping[str, Any], python: str = sys.executable) -> list[tuple[str, str, bool]]:
    """(step, its `actcache plan` or why there is none, whether there is one) of each harvest."""
    found = []
    for step in run["steps"]:
        if is_harvest(step["command"]):
            asked = [python, "-m", "actcache", *_after(step["command"], "actcache"), "--dry-run"]
            done = subprocess.run(asked, capture_output=True, text=True)
            said = done.stderr.strip().splitlines() or [""]
            good = done.returncode == 0
            found.append(
                (step["name"], done.stdout.rstrip() if good else said[-1].removeprefix("error: "), good)
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all is done, 1 where something is not, 2 where only an exit code could tell."""
    [run] = sys.argv[1:] if arguments is None else arguments
    undone = [step for step in progress(json.loads(run)) if step["state"] != "done"]
    for step in undone:
        print(f"{step['step']}: {step['state']} {step.get('error') or ''}".rstrip())
    if not undone:
        return 0
    return 2 if all(step["state"] == "unknown" for step in undone) else 1


if __name__ == "__main__":
    sys.exit(main())
