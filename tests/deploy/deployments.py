"""What the files of deploy/ say: their documents, the commands in them, and schemas made strict."""

import gzip
import json
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import yaml

from cluster.config import Run, read_run

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERAY = sorted((DEPLOY / "kuberay").glob("ray*.yaml"))
RUNS = sorted(DEPLOY.glob("*/*.toml"))
"""What `python -m cluster submit` takes."""


def document(path: Path) -> dict[str, Any]:
    """The one YAML document of a file."""
    return yaml.safe_load(path.read_text())


def cluster_spec(found: dict[str, Any]) -> dict[str, Any]:
    """The RayCluster's spec of a RayJob or RayCluster."""
    return found["spec"].get("rayClusterSpec") or found["spec"]


def strict_schema(kind: str) -> dict[str, Any]:
    """KubeRay's schema of "RayJob" or "RayCluster" as JSON Schema that refuses unknown fields."""
    name = f"ray.io_{kind.lower()}s.v1.json.gz"
    schema = json.loads(gzip.decompress((Path(__file__).parent / "schemas" / name).read_bytes()))
    return _strict(schema)


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out = {}
    for key, value in schema.items():
        # names of fields are no keywords: a field may be called "default"
        named = key == "properties"
        out[key] = {k: _strict(v) for k, v in value.items()} if named else _strict(value)
    fields = schema.get("properties")
    if isinstance(fields, dict) and "type" in schema:
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
        with_defaults = {k for k, v in fields.items() if "default" in v}
        if "required" in schema:
            out["required"] = [k for k in schema["required"] if k not in with_defaults]
        if fields.keys() >= {"apiVersion", "kind", "metadata"}:
            out["properties"]["metadata"] = _METADATA
    if schema.get("x-kubernetes-int-or-string"):
        out = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    return out


_METADATA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


def commands() -> dict[str, list[str]]:
    """By where it stands: each command of ours in deploy/ and its pages, as arguments."""
    found = {}
    for path in KUBERAY:
        if "entrypoint" in (spec := document(path)["spec"]):
            found[path.name] = shlex.split(spec["entrypoint"])
    for path in (DEPLOY / "skypilot/harvest.yaml", *sorted((ROOT / "docs/deploy").glob("*.md"))):
        text = document(path)["run"] if path.suffix == ".yaml" else blocks(path.read_text())
        for i, line in enumerate(text.replace("\\\n", " ").splitlines()):
            if words := _ours(line):
                found[f"{path.name}:{i}"] = words
    for path, run in runs().items():
        for step in run.all_steps:
            words = run.program(step.command)
            if words[1:4] == ["-m", "sae", "report"]:
                words[4] = str(ROOT)  # it wants a directory that is there
            found[f"{path}: {step.name}"] = words
    text = (DEPLOY / "slurm/harvest.sbatch").read_text()
    what, how = (re.search(rf"^{name}=\((.*?)^\)", text, re.M | re.S) for name in ("WHAT", "HOW"))
    assert what is not None
    assert how is not None
    arrays = [shlex.split(_plain(array.group(1))) for array in (what, how)]
    found["harvest.sbatch, harvest"] = ["actcache", "harvest", *arrays[0], *arrays[1]]
    found["harvest.sbatch, plan"] = ["actcache", "plan", *arrays[0], "--json"]
    return found


def runs() -> dict[str, Run]:
    """By where it stands: each RUN.toml in deploy/ and in docs/cluster.md."""
    found = {str(path.relative_to(ROOT)): read_run(path) for path in RUNS}
    page = (ROOT / "docs/cluster.md").read_text()
    with tempfile.TemporaryDirectory() as directory:
        for i, text in enumerate(re.findall(r"^```toml\n(.*?)^```", page, re.M | re.S)):
            (Path(directory) / "run.toml").write_text(text)
            found[f"docs/cluster.md, block {i}"] = read_run(Path(directory) / "run.toml")
    return found


def blocks(markdown: str) -> str:
    """The indented lines, which are commands."""
    return "\n".join(line[4:] for line in markdown.splitlines() if line.startswith("    "))


def _ours(line: str) -> list[str]:
    start = re.search(r"(?:^|[\s/])(?=(?:actcache|python -m (?:actcache|sae|cluster)) )", line)
    if not start:
        return []
    text = re.split(r"\s(?:\|\||&&|\||>|#)(?:\s|$)", line[start.end() :].rstrip("'"))[0]
    return shlex.split(_plain(text))


def _plain(text: str) -> str:
    """A number in place of the shell's arithmetic, a word in place of its variables."""
    text = re.sub(r'"?\$\(\([^)]*\)\)"?', "2", text)
    return re.sub(r"\$\{?[A-Z_a-z]+\}?", "word", text)
