"""A stack with one tiny wheel in a folder, which the real uv installs without an index."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

from tests.support.wheel_record import recorded_hash

_STACK = """
name: tiny
summary: one tiny wheel
vllm: 0.18.1
python: "3.12"
requirements: [vllm==0.18.1]
nccl: {version: 2.28.9, tag: v2.28.9-1, commit: dbc86fd06e8b0c4517b95d8958a09ccacf9520c9}
platforms:
  aarch64: {lock: tiny.lock}
  x86_64: {lock: tiny.lock}
"""
_MEMBERS = {
    "vllm/__init__.py": b"",
    "vllm-0.18.1.dist-info/METADATA": b"Metadata-Version: 2.1\nName: vllm\nVersion: 0.18.1\n",
    "vllm-0.18.1.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}


def tiny_stack(folder: Path, *, hash_is_right: bool = True, locked: bool = True, more: bytes = b"") -> Path:
    """The stack's YAML file in `folder`, its wheel and lock beside it.

    `more`: content of the wheel's module that is not in RECORD.
    """
    folder.mkdir(parents=True)
    wheel = _wheel(folder, more)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest() if hash_is_right else "0" * 64
    (folder / "tiny.lock").write_text(f"vllm==0.18.1 \\\n    --hash=sha256:{digest}\n")
    text = _STACK if locked else _STACK.replace("{lock: tiny.lock}", "{}")
    (folder / "tiny.yaml").write_text(text)
    return folder / "tiny.yaml"


def no_index(stack: Path) -> dict[str, str]:
    """Variables that limit uv to the stack's folder, whatever index this machine uses."""
    settings = stack.with_name("uv.toml")
    settings.write_text(f'no-index = true\nfind-links = ["{stack.parent}"]\n')
    unset = {name: "" for name in os.environ if name.startswith("UV_") and "INDEX" in name}
    return {**unset, "UV_CONFIG_FILE": str(settings), "XDG_CACHE_HOME": str(stack.parent / "cache")}


def _wheel(folder: Path, more: bytes) -> Path:
    path = folder / "vllm-0.18.1-py3-none-any.whl"
    record = "".join(f"{name},{recorded_hash(data)},{len(data)}\n" for name, data in _MEMBERS.items())
    whole = {
        **_MEMBERS,
        "vllm/__init__.py": more,
        "vllm-0.18.1.dist-info/RECORD": f"{record}vllm-0.18.1.dist-info/RECORD,,\n".encode(),
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in whole.items():
            wheel.writestr(zipfile.ZipInfo(name), data)
    return path
