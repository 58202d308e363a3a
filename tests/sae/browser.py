"""A headless Chromium, driven in an environment of its own that is made once and kept.

The browser is the one that is installed, else that of the npm package `@sparticuz/chromium`.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from s3_servers import environment

PLAYWRIGHT = "playwright==1.65.2"
CHROMIUM = "@sparticuz/chromium@147.0.0"
_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class NoBrowser(Exception):
    """None is installed, and none could be."""


def run(script: str, *arguments: object, timeout_s: float = 300) -> Any:
    """What the script prints as JSON; its first argument is the browser.

    Raises:
        NoBrowser: says what was looked for.
    """
    python = environment(PLAYWRIGHT) / "python"
    command = [python, "-c", script, chromium(python.parents[2]), *map(str, arguments)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert out.returncode == 0, out.stderr[-4000:]
    return json.loads(out.stdout)


def chromium(cache: Path) -> Path:
    """The browser's executable."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is not None:
        return Path(found)
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise NoBrowser(f"no {', '.join(_NAMES)} on the PATH, and no node and npm to install {CHROMIUM}")
    folder = cache / "chromium"
    folder.mkdir(exist_ok=True)
    install = [npm, "install", "--no-audit", "--no-fund", "--prefix", folder, CHROMIUM]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        raise NoBrowser(f"npm could not install {CHROMIUM}: {done.stderr.strip().splitlines()[-1:]}")
    unpack = "import('@sparticuz/chromium').then(async (c) => console.log(await c.default.executablePath()))"
    out = subprocess.run([node, "-e", unpack], cwd=folder, capture_output=True, text=True)
    if out.returncode:
        raise NoBrowser(f"{CHROMIUM} could not be unpacked: {out.stderr.strip().splitlines()[-1:]}")
    return Path(out.stdout.strip())
