"""What is started with the env file, and what runs: real processes and real libraries, each broken on purpose too."""

import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sparkinstall import elf
from sparkinstall.facts.env_file import assignments
from sparkinstall.node import Node
from sparkinstall.probes import Finding, services
from sparkinstall.resources.template import quoted, render
from sparkinstall.services import env_units
from sparkinstall.system.local import LocalReader
from tests.support.nodes import node_of

SOURCE = """
int ncclGetVersion(int *version) { *version = %d; return 0; }
__attribute__((section(".nv_fatbin"), used)) static const unsigned char code[] = { %s };
"""


def library(path: Path, version: int = 22809, arch: int = 121) -> Path:
    """What calls itself NCCL of that version, with an (empty) cubin for one architecture."""
    entry = struct.pack("<HHIQ12xI8xQ", 2, 1, 64, 0, arch, 0).ljust(64, b"\0")
    container = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entry)) + entry
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_suffix(".c")
    source.write_text(SOURCE % (version, ", ".join(map(str, container))))
    made = path.with_name(f"{path.name}.new")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,--build-id", "-o", made, source], check=True)
    os.replace(made, path)
    return path


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node whose environment is a bare one and whose env file is the step's own template."""
    node = node_of(tmp_path)
    programs = tmp_path / node.venv.lstrip("/") / "bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(sys.executable)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    (tmp_path / node.env_folder.lstrip("/")).mkdir(parents=True)
    write_env(node, tmp_path, ours(tmp_path))
    return node


def ours(root: Path) -> Path:
    return root / "opt/sparkinstall/nccl/lib/libnccl.so.2"


def write_env(node: Node, root: Path, nccl: Path | str, **more: Any) -> None:
    values = {
        "path": node.env_file, "stack": "test", "venv": str(root / node.venv.lstrip("/")), "library": str(nccl),
        "cuda_home": "/usr/local/cuda", "disabled_kernels": [], "fp8_why": "", "hub_offline": True, **more,
    }  # fmt: skip
    (root / node.env_file.lstrip("/")).write_bytes(render("single-node.env.j2", values))


def looked(node: Node, root: Path, name: str) -> Finding:
    probe = next(probe for probe in services.probes(node) if probe.name == name)
    return probe.look(LocalReader(str(root)))


# --- nccl-preload


def test_a_process_that_starts_with_the_env_file_has_our_nccl(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    found = looked(node, tmp_path, "nccl-preload")
    assert found.verdict == "pass", found
    build = str(elf.build_id(ours(tmp_path)))
    assert found.found == f"2.28.9, {ours(tmp_path).resolve()}, build-id {build[:12]}, code for sm_121"
    assert found.expected == f"{ours(tmp_path)}, build-id {build}"


def test_a_second_nccl_in_the_path_changes_nothing(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    library(tmp_path / "second/libnccl.so.2", 22907)
    env = tmp_path / node.env_file.lstrip("/")
    env.write_text(env.read_text().replace("set -a\n", f'set -a\nLD_LIBRARY_PATH="{tmp_path}/second"\n', 1))
    assert looked(node, tmp_path, "nccl-preload").verdict == "pass"


def test_a_second_nccl_that_is_preloaded_before_ours_is_told(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    second = library(tmp_path / "second/libnccl.so.2", 22907)
    write_env(node, tmp_path, f"{second}:{ours(tmp_path)}")
    found = looked(node, tmp_path, "nccl-preload")
    assert found.verdict == "fail"
    assert found.found == f"{second}, build-id {elf.build_id(second)}"


def test_a_preload_of_a_file_that_is_not_there_is_told(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    write_env(node, tmp_path, tmp_path / "gone/libnccl.so.2")
    found = looked(node, tmp_path, "nccl-preload")
    assert found.verdict == "fail"
    assert "cannot be preloaded" in found.found and "gone/libnccl.so.2" in found.found
    assert "sparkinstall all" in found.hint


def test_an_env_file_that_names_no_nccl_is_told(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    write_env(node, tmp_path, "")
    found = looked(node, tmp_path, "nccl-preload")
    assert (found.verdict, found.found) == ("fail", "a process started with the env file did not load NCCL")


def test_another_version_is_told(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path), 22907)
    found = looked(node, tmp_path, "nccl-preload")
    assert (found.verdict, found.found, found.expected) == ("fail", "it reports version 2.29.7", "2.28.9")


def test_code_for_another_gpu_is_a_warning(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path), arch=120)
    found = looked(node, tmp_path, "nccl-preload")
    assert found.verdict == "warn"
    assert "code for sm_120" in found.found and found.expected == "code for sm_121"


def test_an_environment_that_is_gone_is_told(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    (tmp_path / node.venv.lstrip("/") / "bin/activate").unlink()
    found = looked(node, tmp_path, "nccl-preload")
    assert found.verdict == "fail"
    assert "python: not found" in found.found


def test_where_no_nccl_was_built_it_depends_on_the_place(node: Node, tmp_path: Path) -> None:
    assert looked(node, tmp_path, "nccl-preload").verdict == "skip"
    foreign = replace(node, platform="aarch64", machine="x86_64")
    assert "aarch64" in looked(foreign, tmp_path, "nccl-preload").found
    (tmp_path / node.env_file.lstrip("/")).unlink()
    assert looked(node, tmp_path, "nccl-preload").verdict == "fail"


# --- the services as they run


def serving_node(root: Path, role: str = "single", **settings: Any) -> Node:
    return replace(node_of(root, role, serving__model="/srv/model", **settings), rehearsal=False)


@contextmanager
def service(root: Path, env: Mapping[str, str], *libraries: Path, unit: str = "vllm.service") -> Iterator[int]:
    """A real process with these variables and libraries; beneath `root` it stands as one of the unit."""
    program = "import ctypes, sys; [ctypes.CDLL(each) for each in sys.argv[1:]]; print(flush=True); sys.stdin.read()"
    run = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, libraries)],
        env=dict(env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert run.stdout is not None and run.stdout.readline()
        record(root, run.pid, unit)
        yield run.pid
    finally:
        run.communicate(b"")
        shutil.rmtree(root / f"proc/{run.pid}", ignore_errors=True)


def record(root: Path, pid: int, unit: str) -> None:
    """The process's own files as they are now, but for the control group, which only systemd could give it."""
    folder = root / f"proc/{pid}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("environ", "maps", "stat"):
        (folder / name).write_bytes(Path(f"/proc/{pid}/{name}").read_bytes())
    (folder / "cgroup").write_text(f"0::/system.slice/{unit}\n")


def variables(node: Node, root: Path) -> dict[str, str]:
    """As systemd gives them to the service."""
    of_file = assignments((root / node.env_file.lstrip("/")).read_bytes())
    return {**of_file, "LD_PRELOAD": "", "HOME": "/home/spark", "INVOCATION_ID": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def served(node: Node, tmp_path: Path) -> Node:
    """The variables without LD_PRELOAD: of what a process is started with, its name decides nothing here."""
    write_env(node, tmp_path, "")
    return serving_node(tmp_path)


def test_a_service_that_was_started_with_the_file_is_let_alone(served: Node, tmp_path: Path) -> None:
    env = {name: value for name, value in variables(served, tmp_path).items() if name != "LD_PRELOAD"}
    with service(tmp_path, env):
        found = looked(served, tmp_path, "running-env")
    assert (found.verdict, found.found) == ("pass", "vllm.service: as in the env file")


def test_what_changed_since_the_start_is_told_with_the_restart(served: Node, tmp_path: Path) -> None:
    env = {name: value for name, value in variables(served, tmp_path).items() if name != "LD_PRELOAD"}
    old = {**env, "CUDA_HOME": "/usr/local/cuda-12.8", "VLLM_DISABLED_KERNELS": "CutlassFP8ScaledMMLinearKernel"}
    del old["RAY_memory_usage_threshold"]
    with service(tmp_path, old):
        found = looked(served, tmp_path, "running-env")
    assert found.verdict == "warn"
    assert found.found == (
        "vllm.service was started with CUDA_HOME=/usr/local/cuda-12.8 (the file says /usr/local/cuda), "
        "no RAY_memory_usage_threshold, VLLM_DISABLED_KERNELS=CutlassFP8ScaledMMLinearKernel (the file has none)"
    )
    assert found.hint.startswith("`sudo systemctl restart vllm.service`")


def test_what_a_service_sets_for_its_own_children_is_its_own_matter(served: Node, tmp_path: Path) -> None:
    env = {name: value for name, value in variables(served, tmp_path).items() if name != "LD_PRELOAD"}
    with service(tmp_path, env):
        # So that the clock of /proc, of 10 ms, tells which came first.
        time.sleep(0.05)
        with service(tmp_path, {**env, "CUDA_HOME": "/elsewhere"}):
            assert looked(served, tmp_path, "running-env").verdict == "pass"


def test_a_secret_is_named_and_not_shown() -> None:
    secret = services.difference("RAY_AUTH_TOKEN_PATH", "/opt/old-token", "/opt/token")
    assert secret == "another RAY_AUTH_TOKEN_PATH"


def test_services_that_do_not_run_are_skipped(served: Node, tmp_path: Path) -> None:
    for name in ("running-env", "running-nccl"):
        library(ours(tmp_path))
        found = looked(served, tmp_path, name)
        assert (found.verdict, found.found) == ("skip", "vllm.service: not running")


def test_only_a_node_with_services_is_asked(tmp_path: Path) -> None:
    def names(node: Node) -> list[str]:
        return [probe.name for probe in services.probes(node)]

    whole = ["nccl-preload", "running-env", "running-nccl"]
    alone = replace(node_of(tmp_path), rehearsal=False)
    assert names(alone) == ["nccl-preload"]
    assert names(node_of(tmp_path, serving__model="/srv/model")) == ["nccl-preload"], "a rehearsal starts none"
    assert names(serving_node(tmp_path)) == whole
    assert names(replace(node_of(tmp_path, "worker"), rehearsal=False)) == whole
    assert env_units(serving_node(tmp_path, "head")) == ("ray-head.service", "vllm.service")
    assert env_units(serving_node(tmp_path, "worker")) == ("ray-worker.service",)
    assert env_units(serving_node(tmp_path, "worker", cluster__executor="mp")) == ("vllm.service",)


def test_a_process_that_may_not_be_looked_into_is_skipped(served: Node, tmp_path: Path) -> None:
    class Guarded(LocalReader):
        def read(self, path: str) -> bytes | None:
            if path.endswith(("/environ", "/maps")):
                raise PermissionError(13, "Permission denied", path)
            return super().read(path)

    library(ours(tmp_path))
    with service(tmp_path, {}) as pid:
        found = {probe.name: probe.look(Guarded(str(tmp_path))) for probe in services.probes(served)}
    assert found["running-env"].verdict == found["running-nccl"].verdict == "skip"
    assert found["running-env"].found == f"/proc/{pid}/environ cannot be read: run it outside of a container"


@pytest.mark.parametrize("value", ['a "b" $HOME', "back\\slash", "`x`", "plain", "it's", ""])
def test_the_env_file_is_read_as_it_was_written(value: str) -> None:
    text = f"# A=1\nset -a\nNAME={quoted(value)}\nset +a\n. /x/activate\n[ -r x ] || echo B=1\n"
    assert assignments(text.encode()) == {"NAME": value}


def test_a_service_with_our_nccl_is_let_alone(served: Node, tmp_path: Path) -> None:
    with service(tmp_path, {}, library(ours(tmp_path))), service(tmp_path, {}):
        found = looked(served, tmp_path, "running-nccl")
    assert (found.verdict, found.found) == ("pass", "1 process of vllm.service")


def test_a_copy_of_a_wheel_besides_a_preloaded_one_is_let_alone(served: Node, tmp_path: Path) -> None:
    wheels = library(tmp_path / "site-packages/nvidia/nccl/lib/libnccl.so.2", 22907)
    own = library(ours(tmp_path))
    with service(tmp_path, {"LD_PRELOAD": f"/nowhere.so:{own}"}, own, wheels):
        assert looked(served, tmp_path, "running-nccl").verdict == "pass"


@pytest.mark.parametrize("preloaded", [{}, {"LD_PRELOAD": "/nowhere.so"}])
def test_ours_by_path_beside_the_one_that_torch_takes_is_told(
    served: Node, tmp_path: Path, preloaded: dict[str, str]
) -> None:
    """What VLLM_NCCL_SO_PATH alone makes: two NCCLs in one process."""
    wheels = library(tmp_path / "site-packages/nvidia/nccl/lib/libnccl.so.2", 22907)
    with service(tmp_path, {"HOME": "/home/spark", **preloaded}, wheels, library(ours(tmp_path))) as pid:
        found = looked(served, tmp_path, "running-nccl")
    assert found.verdict == "fail"
    assert f"(pid {pid}) has {wheels}" in found.found


def test_another_nccl_in_a_service_is_told(served: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    wheels = library(tmp_path / "site-packages/nvidia/nccl/lib/libnccl.so.2", 22907)
    with service(tmp_path, {}, wheels) as pid:
        found = looked(served, tmp_path, "running-nccl")
    assert found.verdict == "fail"
    assert f"(pid {pid}) has {wheels}" in found.found
    assert found.expected.startswith(str(ours(tmp_path)))


def test_a_library_that_was_replaced_since_the_start_is_told(served: Node, tmp_path: Path) -> None:
    with service(tmp_path, {}, library(ours(tmp_path))) as pid:
        library(ours(tmp_path), 22809, arch=120)
        record(tmp_path, pid, "vllm.service")
        found = looked(served, tmp_path, "running-nccl")
    assert found.verdict == "warn"
    assert "replaced since the start" in found.found
    assert found.hint == "`sudo systemctl restart vllm.service`"


def test_a_library_without_a_build_id_is_not_taken_for_ours(served: Node, tmp_path: Path) -> None:
    for path in (ours(tmp_path), tmp_path / "second/libnccl.so.2"):
        library(path)
        subprocess.run(["strip", "--remove-section=.note.gnu.build-id", path], check=True)
    with service(tmp_path, {}, tmp_path / "second/libnccl.so.2"):
        assert looked(served, tmp_path, "running-nccl").verdict == "fail"


def test_a_service_that_has_loaded_none_is_let_alone(served: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    with service(tmp_path, {}):
        found = looked(served, tmp_path, "running-nccl")
    assert (found.verdict, found.found) == ("pass", "1 process of vllm.service, none of which has loaded one yet")
