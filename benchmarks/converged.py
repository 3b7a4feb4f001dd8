"""`all` on a converged node, compared with pyinfra and Ansible, which declare the same resources.

Their declarations follow from sparkinstall's report of the rehearsal, so that the lists are always the same. All three
leave out Debian packages, which are node only in a rehearsal.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environments import Environment
from benchmarks.timing import Command, Spread, in_turns
from sparkinstall.patches import revert
from sparkinstall.steps.fp8 import cutlass_patch

OURS, SEARCHED = "sparkinstall all", "`sparkinstall all`, with the search for garbage at its end"
RENDERED = "`sparkinstall all`, with every template rendered"
PYINFRA, PYINFRA_UV = "pyinfra", "pyinfra, `uv.packages` for the pin"
ANSIBLE, ANSIBLE_PIP = "ansible-playbook", "ansible-playbook, `pip` for the pin"

# The same run without `gc.freeze` of __main__.py shows what it saves.
_SEARCHING = "import gc; gc.freeze = lambda: None; from sparkinstall.__main__ import main; main()"

# The same run without the record of the last rendering (resources/template.py) shows what that saves.
_RENDERING = """
from sparkinstall.__main__ import main
from sparkinstall.resources.files import File
from sparkinstall.resources.template import Template, render

def check(self, on):
    values = {**self.values(on), "path": on.real(self.path)}
    return File(self.path, render(self.template, values), self.mode).check(on)

Template.check = check
main()
"""


@dataclass(frozen=True)
class Declared:
    """The resources of a converged rehearsal, as real paths."""

    root: Path
    venv: Path
    pin: str
    dist_info: Path
    link: Path
    contents: tuple[Path, ...]
    rendered: tuple[Path, ...]

    @property
    def count(self) -> int:
        return 2 + len(self.contents) + len(self.rendered)


def measure(
    tool: Environment, pyinfra: Environment, ansible: Environment, work: Path, rounds: int
) -> tuple[dict[str, Spread], int]:
    """Seconds by tool, and the number of resources that each of them checks."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    declared = _converged_node(tool, work / "node")
    commands = {
        OURS: Command((tool.program("sparkinstall"), "all", "--root", str(declared.root))),
        SEARCHED: Command((tool.python, "-c", _SEARCHING, "all", "--root", str(declared.root))),
        RENDERED: Command((tool.python, "-c", _RENDERING, "all", "--root", str(declared.root))),
        PYINFRA: _pyinfra(pyinfra, declared, work / "pyinfra", _pyinfra_folder(declared)),
        PYINFRA_UV: _pyinfra(pyinfra, declared, work / "pyinfra-uv", _pyinfra_uv(declared), tool),
        ANSIBLE: _ansible(ansible, declared, work / "ansible", _ansible_folder(declared)),
        ANSIBLE_PIP: _ansible(ansible, declared, work / "ansible-pip", _ansible_pip(declared)),
    }
    for name, command in commands.items():
        _require_that_it_restores(name, command, declared)
    return in_turns(commands, rounds), declared.count


def _converged_node(tool: Environment, root: Path) -> Declared:
    # With a patched file, whatever this stack needs.
    chosen = ("--set", "nccl.mode=wheel", "--set", "fp8.fallback=on")
    install = (tool.program("sparkinstall"), "all", "--root", str(root), *chosen, "--json")
    Command(install).run()
    report = json.loads(Command(install).run())
    if report["data"]["changed"]:
        raise RuntimeError("the second `sparkinstall all` changed something")
    keys = [each["key"].partition(":") for step in report["data"]["steps"] for each in step["resources"]]
    declared = _declared(root, {kind: [path for k, _, path in keys if k == kind] for kind, _, _ in keys})
    # Ansible's pip module needs pip in the environment; sparkinstall ignores it.
    Command((tool.program("uv"), "pip", "install", "-q", "--python", str(declared.venv), "pip")).run()
    return declared


def _declared(root: Path, keys: dict[str, list[str]]) -> Declared:
    def real(path: str) -> Path:
        return root / path.lstrip("/")

    (venv,), (link,), (patched,) = keys["venv"], keys["link"], keys["patch"]
    (site,) = real(venv).glob("lib/python3.*/site-packages")
    (dist_info,) = site.glob("vllm-*.dist-info")
    return Declared(
        root=root,
        venv=real(venv),
        pin=dist_info.name.removesuffix(".dist-info").replace("-", "=="),
        dist_info=dist_info,
        link=real(link),
        contents=(site / patched, real(venv).parent / "fp8.json"),
        rendered=tuple(real(path) for path in keys["file"]),
    )


def _sources(declared: Declared, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Each declared file, and the source below `folder` from which the other tool creates it."""
    folder.mkdir()
    for path in declared.contents:
        shutil.copy(path, folder / path.name)
        yield path, folder / path.name
    for path in declared.rendered:
        template = folder / f"{path.name}.j2"
        template.write_text(path.read_text().replace(str(declared.root), "{{ root }}"))
        yield path, template


def _pyinfra(
    peer: Environment, declared: Declared, folder: Path, pin: str, uv_from: Environment | None = None
) -> Command:
    lines = ["from pyinfra.operations import files, uv", pin]
    lines.append(f"files.link(path={str(declared.link)!r}, target={str(declared.venv)!r})")
    for path, source in _sources(declared, folder):
        if path in declared.rendered:
            values = f"mode={_mode(path)!r}, root={str(declared.root)!r}"
            lines.append(f"files.template(src={str(source)!r}, dest={str(path)!r}, {values})")
        else:
            lines.append(f"files.put(src={str(source)!r}, dest={str(path)!r}, mode={_mode(path)!r})")
    (folder / "deploy.py").write_text("\n".join(lines) + "\n")
    env = {"PATH": f"{uv_from.folder}/bin:/usr/bin:/bin", "VIRTUAL_ENV": str(declared.venv)} if uv_from else {}
    return Command((peer.program("pyinfra"), "-y", "@local", "deploy.py"), env, folder)


def _mode(path: Path) -> str:
    return f"{path.stat().st_mode & 0o7777:o}"


def _pyinfra_folder(declared: Declared) -> str:
    return f"files.directory(path={str(declared.dist_info)!r})"


def _pyinfra_uv(declared: Declared) -> str:
    return f"uv.packages(packages=[{declared.pin!r}])"


def _ansible(peer: Environment, declared: Declared, folder: Path, pin: dict[str, Any]) -> Command:
    tasks = [pin, {"file": {"state": "link", "path": str(declared.link), "src": str(declared.venv)}}]
    for path, source in _sources(declared, folder):
        if path in declared.rendered:
            tasks.append({"template": {"src": str(source), "dest": str(path), "mode": f"0{_mode(path)}"}})
        else:
            tasks.append({"copy": {"src": str(source), "dest": str(path), "mode": f"0{_mode(path)}"}})
    play = {
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "vars": {"ansible_python_interpreter": peer.python, "root": str(declared.root)},
        "tasks": [{f"ansible.builtin.{module}": values for module, values in task.items()} for task in tasks],
    }
    # JSON is YAML.
    (folder / "play.yml").write_text(json.dumps([play], indent=2))
    env = {
        "ANSIBLE_HOME": str(folder / "home"),
        "ANSIBLE_PIPELINING": "1",
        "ANSIBLE_LOCALHOST_WARNING": "0",
        "LC_ALL": "C.UTF-8",
    }
    return Command((peer.program("ansible-playbook"), "-i", "localhost,", "play.yml"), env, folder)


def _ansible_folder(declared: Declared) -> dict[str, Any]:
    return {"file": {"state": "directory", "path": str(declared.dist_info)}}


def _ansible_pip(declared: Declared) -> dict[str, Any]:
    # The module always runs `pip install`, which would otherwise install the 9 GB that a rehearsal leaves out.
    return {"pip": {"name": declared.pin, "virtualenv": str(declared.venv), "extra_args": "--no-deps"}}


def _require_that_it_restores(name: str, command: Command, declared: Declared) -> None:
    """Change every file and the link: a tool that does not restore all of them does not do the same work."""
    before = _state(declared)
    patched, decision = declared.contents
    # sparkinstall accepts only two contents of this file.
    patched.write_bytes(revert(patched.read_bytes(), cutlass_patch().known(patched.read_bytes())))
    for path in (decision, *declared.rendered, declared.link):
        path.unlink()
    command.run()
    if _state(declared) != before:
        raise RuntimeError(f"{name} did not restore what was changed")


def _state(declared: Declared) -> list[str]:
    paths = (*declared.contents, *declared.rendered)
    files = [f"{_mode(path)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths]
    return [*files, str(declared.link.readlink())]
