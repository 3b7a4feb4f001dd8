"""Preflight checks: can this node be set up? All run, then any failure stops the run. Names are stable."""

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from sparkinstall.errors import NeedsRoot
from sparkinstall.facts import machine, qsfp
from sparkinstall.facts.changes import is_ours
from sparkinstall.facts.decisions import installed_stack
from sparkinstall.facts.gpu import first_gpu, gpu_or_complaint
from sparkinstall.node import Node, cuda_home
from sparkinstall.probes import Finding, Probe, failed, passed, skipped, vllm_arguments, warned
from sparkinstall.system import Reader

_GIB = 2**30
_FULL_DISK = 30 * _GIB
_PARTIAL_DISK = 4 * _GIB
_REBOOT_WANTED = "/run/reboot-required"
_LEFT = "not checked in a rehearsal; checked on the node"


def preflight(node: Node) -> Iterable[Probe]:
    """Yield every check, in a natural order."""
    # fmt: off
    yield Probe("machine", "a DGX Spark or a twin of it (GB10)", _machine, "node",
        "This tool's fixes are for a GB10. Nothing else is set up without `--ignore machine`.", needs_node=_LEFT)
    yield Probe("arch", "64-bit Arm", _arch, "node",
        "The wheels and the NCCL for a DGX Spark are for 64-bit Arm; they do not run here.", needs_node=_LEFT)
    yield Probe("os", "Ubuntu 24.04 (DGX OS 7)", _os, "node",
        "Another system has packages with other names and versions, none of them tested.", needs_node=_LEFT)
    yield Probe("driver", "NVIDIA driver 580", _driver, "node",
        "Without a working driver there is no CUDA, and vLLM does not start.", needs_node=_LEFT)
    yield Probe("sudo", "the use of sudo", _sudo, "node",
        "Parts that only root can read or change are left out.", needs_node=_LEFT, to_install=True)
    yield Probe("memory", "memory", _memory, "node",
        "Models meant for a DGX Spark do not fit.", needs_node=_LEFT)
    yield Probe("python", f"Python {node.stack.python}", lambda _: _python(node), "node",
        "vLLM's environment cannot be created.", to_install=True)
    yield Probe("cuda", "CUDA 13 toolkit", lambda on: _cuda(on, node), "node",
        "NCCL cannot be built for this GPU.", to_install=True, needs_node="" if _has_toolkit(node) else _LEFT)
    yield Probe("disk", "free disk", lambda on: _unless_shut(_disk, on, node), "node",
        "The installation or a model's download fails in the middle.", to_install=True)
    yield Probe("clock", "clock", _clock, "node",
        "Every download fails, because no certificate is valid at this time.")
    yield Probe("prefix", "a prefix that is free or ours", lambda on: _unless_shut(_prefix, on, node), "node",
        "sparkinstall does not change files of others, so it cannot set the node up.", to_install=True)
    if node.several:
        yield Probe("qsfp", "the QSFP port with the cable", lambda on: _qsfp(on, node), "node",
            "The nodes cannot use the fast link.", needs_node=_LEFT)
    # fmt: on
    if node.config.serving.model is not None:
        yield vllm_arguments.probe(node, node.config.serving.arguments)


def _qsfp(on: Reader, node: Node) -> Finding:
    port = qsfp.port_to_look_at(on, node)
    names = " + ".join(port.names)
    if len(port.twins) < 2:
        return warned(
            f"port {port.number}: {names} only",
            "a Spark's port has two halves: check whether the other is switched off",
        )
    spare = qsfp.unused_cable(on, node)
    return passed(f"port {port.number}: {names}" + (f"; {spare}" if spare else ""))


def _machine(on: Reader) -> Finding:
    if machine.has_gb10(on):
        return passed(machine.product(on) or "NVIDIA GB10")
    gpu = first_gpu(on)
    if gpu and machine.is_gb10(gpu.name):
        return passed(gpu.name)
    what, name = gpu.name if gpu else "no GB10 on the PCI bus", machine.product(on)
    return failed(
        f"{what} ({name})" if name else what,
        "sparkinstall is for a DGX Spark; on other machines, rehearse: `sparkinstall all --root ./node`",
        "NVIDIA GB10",
    )


def _arch(_: Reader) -> Finding:
    machine = platform.machine()
    if machine == "aarch64":
        return passed(machine)
    return failed(machine, "a DGX Spark is aarch64; rehearse with `--root ./node --platform aarch64`", "aarch64")


def _os(on: Reader) -> Finding:
    found = machine.os_release(on)
    name = ", ".join(filter(None, (found.get("PRETTY_NAME", "unknown"), machine.os_version(on))))
    if found.get("ID") == "ubuntu" and found.get("VERSION_ID") == "24.04":
        return passed(name)
    return failed(name, "use DGX OS 7 (Ubuntu 24.04), or continue at your own risk with `--ignore os`", "Ubuntu 24.04")


def _driver(on: Reader) -> Finding:
    gpu = gpu_or_complaint(on)
    if isinstance(gpu, str):
        found = f"nvidia-smi reports: {gpu}" if gpu else "nvidia-smi does not answer"
        return failed(found, _driver_hint(on, gpu), "580.x")
    if gpu.driver.split(".")[0] == "580":
        return passed(gpu.driver)
    return warned(gpu.driver, "use 580.x; another driver may work but is little tested", "580.x")


def _driver_hint(on: Reader, complaint: str) -> str:
    """Return a hint. A Spark ships with its driver; single driver packages installed by hand have broken GPUs."""
    if "version mismatch" in complaint or on.entry(_REBOOT_WANTED):
        return "reboot first (`sudo reboot`): an update is pending"
    return (
        "run NVIDIA's update, in the DGX Dashboard or with `sudo apt update && sudo apt dist-upgrade && "
        "sudo fwupdmgr refresh && sudo fwupdmgr upgrade`, then reboot. Do not install a single driver package"
    )


def _has_toolkit(node: Node) -> bool:
    """Whether a rehearsal can tell: nothing is built, or this machine has the node's architecture and a toolkit."""
    return node.config.nccl.mode == "wheel" or (not node.foreign and cuda_home(node) is not None)


def _cuda(on: Reader, node: Node) -> Finding:
    if node.config.nccl.mode == "wheel":
        return skipped("nothing is built here (nccl.mode: wheel)")
    home = cuda_home(node)
    if home is None:
        wheel = f"use `nccl.mode: wheel`{' with a stack whose NCCL is 2.29.3 or newer' if node.several else ''}"
        hint = f"`sudo apt install cuda-toolkit-13-0`, or set `nccl.cuda_home`, or {wheel}"
        return failed("no nvcc found", hint, "/usr/local/cuda")
    return _nvcc_finding(on, node, home)


def _nvcc_finding(on: Reader, node: Node, home: str) -> Finding:
    version = on.ask(f"{home}/bin/nvcc", "--version").out.rpartition("release ")[2].split(",")[0]
    known = on.ask(f"{home}/bin/nvcc", "--list-gpu-arch").out.split()
    wanted = f"compute_{node.config.nccl.arch.rstrip('af')}"
    if wanted not in known:
        return failed(
            f"nvcc {version} does not support {wanted}",
            "install CUDA 13.0 or newer, or set `nccl.arch` to one of "
            + ", ".join(each.removeprefix("compute_") for each in known),
            wanted,
        )
    return passed(f"{version} in {home}")


def _sudo(on: Reader) -> Finding:
    if os.geteuid() == 0 and os.environ.get("SUDO_USER"):
        return warned(
            "running as root through sudo: the link, the cache and the command go to root's home",
            "run it as yourself: sparkinstall asks sudo for the few commands that need it",
        )
    if os.geteuid() == 0:
        return passed("running as root")
    answer = on.ask("sudo", "-n", "true")
    if answer.ok:
        return passed("without a password")
    if answer.code == 127:
        return failed("sudo is not installed", "install it as root: `apt-get install sudo`", "sudo")
    said, hint = (
        answer.last_line,
        "let this user run commands with sudo (`sudo visudo`), then run the same command again",
    )
    if "password" in said or "authentication" in said:
        said, hint = "sudo asks for a password", "run `sudo -v` in this terminal, then the same command again"
    return failed(said or "sudo refuses this user", hint, "sudo without a password")


def _memory(on: Reader) -> Finding:
    info = machine.parse_meminfo(on.read("/proc/meminfo") or b"")
    gib = info.get("MemTotal", 0) / 2**20
    if gib >= 56:
        return passed(f"{gib:.1f} GiB")
    return failed(f"{gib:.1f} GiB", "check the machine: a DGX Spark has 128 GB (a few have 64)", "56 GiB or more")


def _python(node: Node) -> Finding:
    wanted = node.config.environment.python or f"python{node.stack.python}"
    if shutil.which(wanted):
        return passed(wanted)
    if node.partial:
        return passed(f"{platform.python_version()} is used instead (vLLM's wheel works with any)")
    if not node.rehearsal and node.config.environment.python is None:
        return passed(f"the step `packages` installs {wanted}")
    return failed(
        f"{wanted} is not installed",
        "install it, or set `environment.python` to another",
        f"Python {node.stack.python}",
    )


def _unless_shut(look: Callable[[Reader, Node], Finding], on: Reader, node: Node) -> Finding:
    """Return the finding of `look`, or the folder that cannot be read."""
    try:
        return look(on, node)
    except PermissionError as error:
        shut = _shut(Path(str(error.filename)))
    own = shut.stat().st_uid == os.geteuid()
    hint = f"`chmod u+rwx {shut}`, then again" if own else f"run this as the user to whom {shut} belongs"
    return failed(f"{shut} cannot be read", hint, "a folder that this user can read")


def _shut(path: Path) -> Path:
    """Return the outermost folder above `path` that this user cannot read."""
    return next((each for each in reversed(path.parents) if not os.access(each, os.R_OK | os.X_OK)), path.parent)


def _disk(on: Reader, node: Node) -> Finding:
    place = Path(on.real(node.prefix))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    wanted = _PARTIAL_DISK if node.partial else _FULL_DISK
    there = installed_stack(on, node.venv_stamp)
    if there == node.stack.name or free >= wanted:
        return passed(f"{free / _GIB:.0f} GiB free")
    beside = f", beside the environment of stack {there}" if there else ""
    return failed(
        f"{free / _GIB:.0f} GiB free below {place}{beside}",
        "free some space, or choose a larger disk with `prefix:` in the config",
        f"{wanted / _GIB:.0f} GiB",
    )


def _clock(_: Reader) -> Finding:
    # A clock that is years off makes every certificate invalid.
    made = os.stat(__file__).st_mtime
    if time.time() < made - 86400:
        return failed(
            time.strftime("%Y-%m-%d %H:%M"), "set it: `sudo timedatectl set-ntp true`", "after this tool was installed"
        )
    return passed(time.strftime("%Y-%m-%d %H:%M"))


def _prefix(on: Reader, node: Node) -> Finding:
    where = on.real(node.prefix)
    entry = on.entry(node.prefix)
    if entry is None:
        return passed(f"{where} is free")
    if not Path(where).is_dir():
        return failed(
            f"{where} is {entry.words}", "move it away, or choose another `prefix:` in the config", "a folder"
        )
    on.inside(node.venv)
    taken = [name for name in ("venv", "venvs", "nccl", "env") if on.entry(f"{node.prefix}/{name}")]
    try:
        foreign = [name for name in taken if not is_ours(on, f"{node.prefix}/{name}")]
    except (PermissionError, NeedsRoot):
        return failed(f"{where} was created by another user's sparkinstall", "run this as that user", "free, or ours")
    if foreign:
        return failed(
            f"{where} contains {', '.join(foreign)}, which no journal of ours lists",
            "move it away, or choose another `prefix:` in the config",
            "free, or created by sparkinstall",
        )
    return passed(f"{where} is ours" if taken else f"{where} is free")
