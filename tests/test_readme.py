"""The README's commands and code blocks, run as they stand; only NAME is filled in."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks():
    """(language, code) of each block, in order, without those that need a cluster."""
    return [
        (m[1], m[2]) for m in BLOCK.finditer((ROOT / "README.md").read_text()) if "cluster submit" not in m[2]
    ]


def test_readme_blocks_run_in_order(tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(command, text):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    name = None
    for language, code in blocks():
        if "NAME" in code and name is None:
            name = json.loads(run(["actcache", "ls", "data", "--json"], "ls"))["name"]
        text = code.replace("NAME", name or "NAME")
        if language == "python":
            run([sys.executable, "-W", "error", "-c", text], text)
        else:
            run(["bash", "-euc", text], text)
    assert (tmp_path / "runs/first/report.html").stat().st_size > 50_000
    evaluated = json.loads((tmp_path / "runs/first/topk-1536-32/eval.json").read_text())
    assert evaluated["ce_recovered_zero"] > 0.8
    assert (tmp_path / "exported/cfg.json").exists()


def test_every_module_has_its_line():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## What is where") : text.index("## Where to go next")]
    for package in ("actcache", "sae"):
        for module in (ROOT / package).glob("*.py"):
            if not module.name.startswith("__"):
                assert f"`{module.name}`" in table or f"{package}/{module.name}`" in table, module.name


@pytest.mark.parametrize("target", ["demo", "test", "test-all"])
def test_make_targets_that_the_readme_names_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"make {target}" in (ROOT / "README.md").read_text()


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link
