"""What `tests/arm/run` does and prints: sparkinstall on an emulated aarch64, from install.sh to the uninstall."""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from sparkinstall import elf, stacks
from sparkinstall.resources.nccl import version_number
from tests.arm import emulated, patient, stack
from tests.arm.emulated import Emulated
from tests.lab import arm64, commands, machine
from tests.support import nccl_source

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKOUT, TOOL = "/root/sparkinstall", "/root/.local/share/sparkinstall/tool"
STACKS, OUT, CONFIG = "srv/stacks", "srv/out", "etc/sparkinstall.yaml"
LEFT_OUT = (".git", ".venv", ".gpu", ".mypy_cache", ".ruff_cache", ".hypothesis", "__pycache__")
# What only a Spark has; every other check must pass.
IGNORED = ("machine", "os", "driver", "memory")
FUNCTIONS = "AllReduce Sum f32 RING SIMPLE"
# Probes that must pass here; others are printed as they are. `fp8-kernels` needs the driver's libcuda.so.1, and
# `wheel-files` knows the wheels for Python 3.12 whose RECORD is wrong.
REHEARSED = ("wheel-gate", "reasoning-field", "nccl-loaded")
WHOLE = (*REHEARSED, "imports", "triton-compiles", "host-ip")
VERSION_OF_NCCL = """
import ctypes, platform, sys
version, library = ctypes.c_int(), ctypes.CDLL(sys.argv[1])
library.ncclGetVersion(ctypes.byref(version))
print(platform.machine(), version.value)
"""


def masked(text: str) -> str:
    """Replace the version of the kernel, which under qemu-user is that of this machine."""
    return text.replace(os.uname().release, "KERNEL")


class Evidence:
    """Prints what was found, to the terminal and to a file, and counts what was not as expected."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.started, self.wrong = file, time.monotonic(), 0

    def say(self, text: str) -> None:
        for target in (sys.stdout, self.file):
            print(masked(text), file=target, flush=True)

    def title(self, text: str) -> None:
        self.say(f"\n== {text}  [{time.monotonic() - self.started:.0f} s]")

    def expect(self, what: str, wanted: object, found: object) -> None:
        right = wanted == found
        self.wrong += not right
        self.say(f"as expected: {what}: {found}" if right else f"NOT AS EXPECTED: {what}: {found} instead of {wanted}")


class Run:
    """One node: the emulated tree, the chosen stack, and what is said about them."""

    def __init__(self, node: Emulated, evidence: Evidence, name: str, full: bool, out: Path) -> None:
        self.node, self.evidence, self.name, self.full, self.out = node, evidence, name, full, out
        self.root = "/root/node" if not full else ""
        self.library = f"{self.root}/opt/sparkinstall/nccl/lib/libnccl.so.2"
        self.env = {
            **{key: value for key, value in machine.environment().items() if not key.endswith("FIND_LINKS")},
            "PATH": f"{emulated.COMPILERS}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": "", "UV_HTTP_TIMEOUT": "600",
        }  # fmt: skip

    def whole(self) -> None:
        """Every part in order; a part that cannot go on ends the run."""
        self.describe()
        self.bring()
        if self.full:
            self.install_shipped_lock()
        self.install_tool()
        self.preflight()
        self.install()
        self.look_at_nccl()
        if self.full:
            self.verify_again()
            self.uninstall()

    def describe(self) -> None:
        self.evidence.title("The emulated machine")
        release = platform.freedesktop_os_release()["PRETTY_NAME"]
        qemu = commands.run("qemu-aarch64-static", "--version").stdout.splitlines()[0]
        self.evidence.say(f"{datetime.now(UTC):%Y-%m-%d}; on {platform.machine()}, {os.cpu_count()} cores, {release}")
        self.evidence.say(f"{qemu}, -cpu {arm64.PROCESSOR}")
        for argv in (("uname", "-m"), ("python3", "-VV"), ("getconf", "GNU_LIBC_VERSION")):
            self.evidence.say(self.node.run(*argv).stdout.strip())
        self.evidence.say(self.node.run("sed", "-n", "s/^PRETTY_NAME=//p", "/etc/os-release").stdout.strip())
        for tool in (f"{emulated.COMPILERS}/g++", f"/{emulated.CUDA}/bin/nvcc"):
            said = self.node.run(tool, "--version").stdout.splitlines()
            found = next((line for line in said if "release" in line), said[0])
            self.evidence.say(f"an x86_64 program, compiling for aarch64: {found}")

    def bring(self) -> None:
        """Copy the checkout, the stack for this Python and NCCL's source into the node."""
        self.evidence.title(f"The stack {self.name}, for Python {arm64.PYTHON}")
        inside = self.node.root
        for folder in (STACKS, OUT, "srv/nccl"):
            (inside / folder).mkdir(parents=True)
        here = stack.write(self.name, inside / STACKS)
        for line in stack.differences(stacks.load(self.name), here):
            self.evidence.say(line)
        tarball = nccl_source.tarball()
        (inside / "srv/nccl" / tarball.name).write_bytes(tarball.read_bytes())
        nccl = {"source": f"/srv/nccl/{tarball.name}", "version": nccl_source.VERSION, "only_functions": FUNCTIONS}
        (inside / CONFIG).write_text(json.dumps({"stack": f"/{STACKS}/{here.name}.yaml", "nccl": nccl}))
        exclude = [f"--exclude={name}" for name in LEFT_OUT]
        (inside / CHECKOUT.lstrip("/")).mkdir(parents=True)
        pack, unpack = ["tar", "-c", *exclude, "-C", str(REPOSITORY), "."], ["tar", "-x", "-C", f"{inside}{CHECKOUT}"]
        packed = subprocess.run(pack, check=True, capture_output=True)
        subprocess.run(unpack, check=True, input=packed.stdout)

    def install_shipped_lock(self) -> None:
        """From outside: nothing is run of these wheels. Those that fit both Pythons stay in the node's cache."""
        self.evidence.title(f"The wheels that a Spark gets: the shipped lock of {self.name} for aarch64, from outside")
        with tempfile.TemporaryDirectory(dir=self.node.root / "srv") as root:
            # uv takes wheels for the stack's Python, whatever Python the venv has.
            chosen = ["--root", root, "--platform", stack.ARCH, "--full", "--stack", self.name]
            argv = [sys.executable, "-m", "sparkinstall", "all", *chosen, "--json", "--yes"]
            own_python = ["--set", f"environment.python={sys.executable}"]
            cache = {**os.environ, "XDG_CACHE_HOME": f"{self.node.root}/root/.cache", "PYTHONPATH": str(REPOSITORY)}
            done = subprocess.run([*argv, *own_python], capture_output=True, text=True, env=cache)
        answer = self.answer("shipped-lock", done.stdout)
        self.probes([probe for probe in answer["data"]["probes"] if probe["verdict"] != "skip"])
        self.must_pass(answer, ("wheel-gate", "reasoning-field", "wheel-files"))

    def install_tool(self) -> None:
        self.evidence.title("./install.sh --tool-only")
        self.show("./install.sh", "--tool-only", cwd=CHECKOUT)
        self.show(f"{TOOL}/bin/sparkinstall", "--version")

    def preflight(self) -> None:
        self.evidence.title("sparkinstall plan: the preflight")
        found = self.tool("plan", "plan")["data"]["preflight"]
        self.probes(found)
        failed = [check["name"] for check in found if check["verdict"] == "fail" and check["name"] not in IGNORED]
        self.evidence.expect("failed checks that do not concern the hardware", [], failed)

    def install(self) -> None:
        ignored = [word for name in IGNORED for word in ("--ignore", name)] if self.full else []
        if self.full:
            self.evidence.title("sparkinstall run packages environment --yes")
            self.tool("environment", "run", "packages", "environment", "--yes", *ignored)
            self.evidence.say("bytecode of the modules: compiled by the x86_64 Python of the same Debian")
            self.node.compile_bytecode("/opt/sparkinstall/venv/lib")
        how = "the whole stack" if self.full else "a rehearsal: vLLM's wheel alone"
        self.evidence.title(f"sparkinstall all --yes ({how})")
        answer = self.tool("all", "all", "--yes", *ignored)
        self.probes(answer["data"].get("probes", []))
        self.must_pass(answer, WHOLE if self.full else REHEARSED)

    def look_at_nccl(self) -> None:
        self.evidence.title(f"NCCL {nccl_source.VERSION}, built in it ({FUNCTIONS})")
        real = (self.node.root / self.library.lstrip("/")).resolve()
        self.evidence.say(f"{real.stat().st_size} bytes, build-id {elf.build_id(real)}")
        machine_of_elf = int.from_bytes(real.read_bytes()[18:20], "little")
        self.evidence.expect("machine of the ELF file (183: AArch64)", 183, machine_of_elf)
        self.evidence.expect("it has code for sm_121", True, "sm_121" in {code.arch for code in elf.gpu_code(real)})
        said = self.node.run("python3", "-c", VERSION_OF_NCCL, self.library).stdout.strip()
        self.evidence.expect("ncclGetVersion()", f"aarch64 {version_number(nccl_source.VERSION)}", said)

    def verify_again(self) -> None:
        self.evidence.title("sparkinstall verify --level node")
        answer = self.tool("verify", "verify", "--level", "node")
        self.probes(answer["data"].get("probes", []))
        drifted = [
            resource["key"]
            for check in answer["data"]["checks"]
            for resource in check["resources"]
            if resource["state"] not in ("ok", "node_only")
        ]
        self.evidence.expect("drift", [], drifted)

    def uninstall(self) -> None:
        self.evidence.title("sparkinstall uninstall --yes")
        answer = self.tool("uninstall", "uninstall", "--yes")
        self.evidence.expect("exit code", 0, answer["exit_code"])
        self.evidence.expect("/opt/sparkinstall exists", False, (self.node.root / "opt/sparkinstall").exists())

    def show(self, *argv: str, cwd: str = "/", env: Mapping[str, str] | None = None) -> None:
        for line in self.node.stream(*argv, env={**self.env, **(env or {})}, cwd=cwd):
            self.evidence.say(line.rstrip())

    def tool(self, name: str, verb: str, *argv: str) -> Any:
        """Run a verb with `--json`; show its progress; return the envelope, which is kept as NAME.json."""
        root = ("--root", self.root) if self.root else ()
        command = (f"{TOOL}/bin/python", f"{CHECKOUT}/{Path(patient.__file__).relative_to(REPOSITORY)}")
        file = f"/{OUT}/{name}.json"
        with contextlib.suppress(commands.CommandFailedError):
            self.show("sh", "-c", 'f=$1; shift; exec "$@" > "$f"', "sh", file, *command, verb, *root, "--json", *argv)
        return self.answer(name, (self.node.root / file.lstrip("/")).read_text())

    def answer(self, name: str, text: str) -> Any:
        """Keep an envelope as NAME.json, and say how it ended."""
        answer = json.loads(text)
        if answer["data"].get("probes"):
            (self.out / f"{name}.json").write_text(masked(json.dumps(answer["data"]["probes"], indent=1)) + "\n")
        self.evidence.say(f"{answer['command']}: {answer['status']}, exit {answer['exit_code']}")
        for error in answer["errors"]:
            self.evidence.say(f"  {json.dumps(error)}")
        return answer

    def must_pass(self, answer: Any, names: Sequence[str]) -> None:
        found = {probe["name"]: probe["verdict"] for probe in answer["data"].get("probes", [])}
        for name in names:
            self.evidence.expect(name, "pass", found.get(name))

    def probes(self, results: list[dict[str, Any]]) -> None:
        for probe in results:
            seconds = f"{probe['seconds']:7.1f} s" if "seconds" in probe else " " * 9
            self.evidence.say(f"  {probe['name']:<20} {probe['verdict']:<5}{seconds}  {probe['found']}")
            if probe["verdict"] in ("fail", "warn"):
                more = (key for key in ("expected", "hint") if probe.get(key))
                self.evidence.say("".join(f"  {'':<20} {key}: {probe[key]}\n" for key in more).rstrip("\n"))


@contextlib.contextmanager
def evidence(out: Path) -> Iterator[Evidence]:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "evidence.txt").open("w") as file:
        yield Evidence(file)


def main() -> int:
    """Run it; return 1 if something was not as expected."""
    parser = argparse.ArgumentParser(prog="tests/arm/run", description="sparkinstall on an emulated aarch64.")
    parser.add_argument("--full", action="store_true", help="install the whole stack and import it (90 minutes, 30 GB)")
    parser.add_argument("--stack", default=stacks.DEFAULT, choices=stacks.names())
    options = parser.parse_args()
    out = Path(os.environ.get("OUT") or REPOSITORY / ".arm")
    with evidence(out) as said, emulated.debian() as node:
        Run(node, said, options.stack, options.full, out).whole()
        said.title("The end")
        said.say(f"not as expected: {said.wrong}")
    return 1 if said.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
