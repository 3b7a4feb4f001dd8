"""Stacks with small wheels in a folder, which the real uv installs without an index."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.wheel_member import wheel_member
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
_MODULE = "vllm/__init__.py"
# Patched by `fp8`, and read by the probe reasoning-field.
_READ = (
    "vllm/model_executor/layers/quantization/utils/w8a8_utils.py",
    "vllm/entrypoints/openai/engine/protocol.py",
)
# The wheel gate reads vllm/_C*.so. vLLM's own has 473 MB; this is the smallest of its extensions.
_REAL = {**dict(zip(_READ, _READ, strict=True)), "vllm/_C.abi3.so": "vllm/_flashmla_extension_C.abi3.so"}
_X86_64 = "x86_64-manylinux_2_39"


def tiny_stack(
    folder: Path,
    *,
    hash_is_right: bool = True,
    locked: bool = True,
    more: bytes = b"",
    more_packages: Sequence[str] = (),
) -> Path:
    """The stack's YAML file in `folder`, its wheel and lock beside it.

    `more`: content of the wheel's module that is not in RECORD. `more_packages`: empty ones, of which it needs none.
    """
    for package in more_packages:
        _wheel(folder, package, "1", {f"{package}.py": b""})
    digest = _wheel(folder, "vllm", "0.18.1", {_MODULE: b""}, {_MODULE: more})
    return _stack(folder, {"vllm==0.18.1": digest if hash_is_right else "0" * 64}, locked)


def small_stack(folder: Path, name: str = "tiny", *, works: bool = True) -> Path:
    """Like `tiny_stack`, with all that a rehearsal of `all` needs, and with vLLM's real file that `fp8` patches.

    Without `works`, vLLM's compiled extension is missing: the wheel gate rejects it.

    vLLM's whole wheel has 3,000 files and 1 GB: a test that installs it a hundred times would mostly wait for the disk.
    """
    files = {name: wheel_member("0.18.1", member, platform=_X86_64) for name, member in _REAL.items()}
    if not works:
        del files["vllm/_C.abi3.so"]
    locked = {"vllm==0.18.1": _wheel(folder, "vllm", "0.18.1", {_MODULE: f"NAME = {name!r}\n".encode(), **files})}
    for package, version in (("torch", "2.10.0+cu129"), ("triton", "3.6.0"), ("ray", "2.60.0")):
        locked[f"{package}=={version}"] = _wheel(folder, package, version, {f"{package}/__init__.py": b""})
    return _stack(folder, locked, name=name)


def _stack(folder: Path, hashes: Mapping[str, str], locked: bool = True, name: str = "tiny") -> Path:
    lock = "".join(f"{pin} \\\n    --hash=sha256:{digest}\n" for pin, digest in hashes.items())
    (folder / "tiny.lock").write_text(lock)
    text = _STACK.replace("name: tiny", f"name: {name}")
    (folder / "tiny.yaml").write_text(text if locked else text.replace("{lock: tiny.lock}", "{}"))
    return folder / "tiny.yaml"


def no_index(stack: Path) -> dict[str, str]:
    """Variables that limit uv to the stack's folder, whatever index this machine uses."""
    settings = stack.with_name("uv.toml")
    settings.write_text(f'no-index = true\nfind-links = ["{stack.parent}"]\n')
    unset = {name: "" for name in os.environ if name.startswith("UV_") and "INDEX" in name}
    return {**unset, "UV_CONFIG_FILE": str(settings), "XDG_CACHE_HOME": str(stack.parent / "cache")}


def _wheel(
    folder: Path, name: str, version: str, files: Mapping[str, bytes], unrecorded: Mapping[str, bytes] | None = None
) -> str:
    """Write a wheel and return its sha256; `unrecorded` replaces files after RECORD was made."""
    folder.mkdir(parents=True, exist_ok=True)
    described = f"{name}-{version}.dist-info"
    members = {
        **files,
        f"{described}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{described}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},{recorded_hash(data)},{len(data)}\n" for path, data in members.items())
    members |= {**(unrecorded or {}), f"{described}/RECORD": f"{record}{described}/RECORD,,\n".encode()}
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, data in members.items():
            wheel.writestr(zipfile.ZipInfo(member), data)
    return hashlib.sha256(path.read_bytes()).hexdigest()
