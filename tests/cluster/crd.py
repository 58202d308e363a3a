"""KubeRay's CRDs as strict JSON Schema: an unknown field is an error, as it is for `kubectl --validate=strict`."""

from pathlib import Path
from typing import Any

import yaml

FOLDERS = [parent / "shared/schemas/kuberay" for parent in Path(__file__).resolve().parents]


def schema(kind: str) -> dict[str, Any] | None:
    """Of `rayjobs` or `rayclusters`, version v1; None where the CRDs are not on this machine."""
    for folder in FOLDERS:
        path = folder / f"ray.io_{kind}.yaml"
        if path.exists():
            versions = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]["versions"]
            found = next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
            return _strict(found)
    return None


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    new = {name: _strict(value) for name, value in node.items()}
    if node.get("x-kubernetes-int-or-string") is True:
        new.pop("type", None)
        new["type"] = ["integer", "string"]
    if isinstance(node.get("properties"), dict) and "additionalProperties" not in node:
        with_defaults = {n for n, p in node["properties"].items() if isinstance(p, dict) and "default" in p}
        if isinstance(node.get("required"), list):
            new["required"] = [name for name in node["required"] if name not in with_defaults]
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            new["additionalProperties"] = False
    return new
