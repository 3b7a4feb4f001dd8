"""The hub's own client, huggingface_hub, in the versions of the stacks, each in a folder of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from uv import find_uv_bin

from tests.lab import cache, commands
from tests.support import pins

SECONDS = 1200


def versions() -> list[str]:
    """The versions that the shipped stacks pin."""
    return sorted(pins.locks_with("huggingface-hub"))


def installed(version: str) -> Path:
    """The folder with a version of the client, for PYTHONPATH."""

    lines = pins.constraints(pins.locks_with("huggingface-hub")[version])

    def build(place: Path) -> None:
        argv = [find_uv_bin(), "pip", "install", "--quiet", "--no-progress", "--python", sys.executable]
        where = ("--target", str(place), *pins.written(place, lines))
        commands.run(*argv, *where, f"huggingface_hub=={version}", timeout=SECONDS)

    return cache.kept(f"huggingface-hub-{version}", (version, sys.version, lines), build)


def printed(version: str, code: str, **env: str) -> Any:
    """What a program prints as JSON at its end; it has the client's functions for downloads and its scan."""
    imported = "import json\nfrom huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download\n"
    found = subprocess.run(
        [sys.executable, "-c", imported + code],
        env={**os.environ, "PYTHONPATH": str(installed(version)), "HF_HUB_DISABLE_XET": "1", **env},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])
