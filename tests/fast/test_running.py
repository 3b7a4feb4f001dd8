"""The probes of the env file and of running services, on real processes and libraries, some of them wrong."""

import shutil
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
from tests.support.nccl_library import library
from tests.support.nodes import node_of


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node with an empty environment and the env file of the step."""
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


def finding_of(node: Node, root: Path, name: str) -> Finding:
    probe = next(probe for probe in services.probes(node) if probe.name == name)
    return probe.look(LocalReader(str(root)))


# --- nccl-preload


def test_nccl_preload_with_our_library_passes(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    found = finding_of(node, tmp_path, "nccl-preload")
    assert found.verdict == "pass", found
    build = str(elf.build_id(ours(tmp_path)))
    assert found.found == f"2.29.7, {ours(tmp_path).resolve()}, build-id {build[:12]}, code for sm_121"
    assert found.expected == f"{ours(tmp_path)}, build-id {build}"


def test_nccl_preload_with_another_nccl_in_the_library_path_passes(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    library(tmp_path / "second/libnccl.so.2", 22809)
    env = tmp_path / node.env_file.lstrip("/")
    env.write_text(env.read_text().replace("set -a\n", f'set -a\nLD_LIBRARY_PATH="{tmp_path}/second"\n', 1))
    assert finding_of(node, tmp_path, "nccl-preload").verdict == "pass"


def test_nccl_preload_with_another_nccl_first_fails(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    second = library(tmp_path / "second/libnccl.so.2", 22809)
    write_env(node, tmp_path, f"{second}:{ours(tmp_path)}")
    found = finding_of(node, tmp_path, "nccl-preload")
    assert found.verdict == "fail"
    assert found.found == f"{second}, build-id {elf.build_id(second)}"


def test_nccl_preload_of_a_missing_file_fails(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    write_env(node, tmp_path, tmp_path / "gone/libnccl.so.2")
    found = finding_of(node, tmp_path, "nccl-preload")
    assert found.verdict == "fail"
    assert "cannot be preloaded" in found.found and "gone/libnccl.so.2" in found.found
    assert "sparkinstall all" in found.hint


def test_nccl_preload_without_a_library_in_the_env_file_fails(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    write_env(node, tmp_path, "")
    found = finding_of(node, tmp_path, "nccl-preload")
    assert (found.verdict, found.found) == ("fail", "a process started with the env file did not load NCCL")


def test_nccl_preload_with_another_version_fails(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path), 22809)
    found = finding_of(node, tmp_path, "nccl-preload")
    assert (found.verdict, found.found, found.expected) == ("fail", "it reports version 2.28.9", "2.29.7")


def test_nccl_preload_with_code_for_another_gpu_warns(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path), arch=120)
    found = finding_of(node, tmp_path, "nccl-preload")
    assert found.verdict == "warn"
    assert "code for sm_120" in found.found and found.expected == "code for sm_121"


def test_nccl_preload_without_an_environment_fails(node: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    (tmp_path / node.venv.lstrip("/") / "bin/activate").unlink()
    found = finding_of(node, tmp_path, "nccl-preload")
    assert found.verdict == "fail"
    assert "python: not found" in found.found


def test_nccl_preload_without_a_library_is_skipped_in_a_rehearsal_or_fails(node: Node, tmp_path: Path) -> None:
    assert finding_of(node, tmp_path, "nccl-preload").verdict == "skip"
    foreign = replace(node, platform="aarch64", machine="x86_64")
    assert "aarch64" in finding_of(foreign, tmp_path, "nccl-preload").found
    (tmp_path / node.env_file.lstrip("/")).unlink()
    assert finding_of(node, tmp_path, "nccl-preload").verdict == "fail"


# --- running services


def serving_node(root: Path, role: str = "single", **settings: Any) -> Node:
    return replace(node_of(root, role, serving__model="/srv/model", **settings), rehearsal=False)


@contextmanager
def service(root: Path, env: Mapping[str, str], *libraries: Path, unit: str = "vllm.service") -> Iterator[int]:
    """A real process with these variables and libraries; below `root` it is a process of the unit."""
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
    """Copy the process's files in /proc, but with a control group that only systemd could set."""
    folder = root / f"proc/{pid}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("environ", "maps", "stat"):
        (folder / name).write_bytes(Path(f"/proc/{pid}/{name}").read_bytes())
    (folder / "cgroup").write_text(f"0::/system.slice/{unit}\n")


def variables(node: Node, root: Path) -> dict[str, str]:
    """The variables that systemd sets for the service."""
    of_file = assignments((root / node.env_file.lstrip("/")).read_bytes())
    return {**of_file, "LD_PRELOAD": "", "HOME": "/home/spark", "INVOCATION_ID": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def served(node: Node, tmp_path: Path) -> Node:
    """A node that serves a model, whose env file preloads nothing."""
    write_env(node, tmp_path, "")
    return serving_node(tmp_path)


def test_running_env_as_in_the_file_passes(served: Node, tmp_path: Path) -> None:
    env = {name: value for name, value in variables(served, tmp_path).items() if name != "LD_PRELOAD"}
    with service(tmp_path, env):
        found = finding_of(served, tmp_path, "running-env")
    assert (found.verdict, found.found) == ("pass", "vllm.service: as in the env file")


def test_running_env_with_differences_warns_with_the_restart(served: Node, tmp_path: Path) -> None:
    env = {name: value for name, value in variables(served, tmp_path).items() if name != "LD_PRELOAD"}
    old = {**env, "CUDA_HOME": "/usr/local/cuda-12.8", "VLLM_DISABLED_KERNELS": "CutlassFP8ScaledMMLinearKernel"}
    del old["RAY_memory_usage_threshold"]
    with service(tmp_path, old):
        found = finding_of(served, tmp_path, "running-env")
    assert found.verdict == "warn"
    assert found.found == (
        "vllm.service was started with CUDA_HOME=/usr/local/cuda-12.8 (the file says /usr/local/cuda), "
        "no RAY_memory_usage_threshold, VLLM_DISABLED_KERNELS=CutlassFP8ScaledMMLinearKernel (the file has none)"
    )
    assert found.hint.startswith("`sudo systemctl restart vllm.service`")


def test_running_env_of_a_child_process_is_ignored(served: Node, tmp_path: Path) -> None:
    env = {name: value for name, value in variables(served, tmp_path).items() if name != "LD_PRELOAD"}
    with service(tmp_path, env):
        # The start times in /proc have a resolution of 10 ms.
        time.sleep(0.05)
        with service(tmp_path, {**env, "CUDA_HOME": "/elsewhere"}):
            assert finding_of(served, tmp_path, "running-env").verdict == "pass"


def test_difference_of_a_secret_hides_the_value() -> None:
    secret = services.difference("RAY_AUTH_TOKEN_PATH", "/opt/old-token", "/opt/token")
    assert secret == "another RAY_AUTH_TOKEN_PATH"


def test_running_probes_without_a_service_are_skipped(served: Node, tmp_path: Path) -> None:
    for name in ("running-env", "running-nccl"):
        library(ours(tmp_path))
        found = finding_of(served, tmp_path, name)
        assert (found.verdict, found.found) == ("skip", "vllm.service: not running")


def test_running_probes_belong_to_nodes_with_services(tmp_path: Path) -> None:
    def names(node: Node) -> list[str]:
        return [probe.name for probe in services.probes(node)]

    whole = ["nccl-preload", "running-env", "running-nccl"]
    alone = replace(node_of(tmp_path), rehearsal=False)
    assert names(alone) == ["nccl-preload"]
    assert names(node_of(tmp_path, serving__model="/srv/model")) == ["nccl-preload"], "a rehearsal starts no service"
    assert names(serving_node(tmp_path)) == whole
    assert names(replace(node_of(tmp_path, "worker"), rehearsal=False)) == whole
    assert env_units(serving_node(tmp_path, "head")) == ("ray-head.service", "vllm.service")
    assert env_units(serving_node(tmp_path, "worker")) == ("ray-worker.service",)
    assert env_units(serving_node(tmp_path, "worker", cluster__executor="mp")) == ("vllm.service",)


def test_running_probes_without_permission_are_skipped(served: Node, tmp_path: Path) -> None:
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
def test_assignments_of_a_quoted_value_give_the_value(value: str) -> None:
    text = f"# A=1\nset -a\nNAME={quoted(value)}\nset +a\n. /x/activate\n[ -r x ] || echo B=1\n"
    assert assignments(text.encode()) == {"NAME": value}


def test_running_nccl_with_our_library_passes(served: Node, tmp_path: Path) -> None:
    with service(tmp_path, {}, library(ours(tmp_path))), service(tmp_path, {}):
        found = finding_of(served, tmp_path, "running-nccl")
    assert (found.verdict, found.found) == ("pass", "1 process of vllm.service")


def test_running_nccl_preloaded_beside_that_of_a_wheel_passes(served: Node, tmp_path: Path) -> None:
    wheels = library(tmp_path / "site-packages/nvidia/nccl/lib/libnccl.so.2", 22809)
    own = library(ours(tmp_path))
    with service(tmp_path, {"LD_PRELOAD": f"/nowhere.so:{own}"}, own, wheels):
        assert finding_of(served, tmp_path, "running-nccl").verdict == "pass"


@pytest.mark.parametrize("preloaded", [{}, {"LD_PRELOAD": "/nowhere.so"}])
def test_running_nccl_by_path_beside_that_of_a_wheel_fails(
    served: Node, tmp_path: Path, preloaded: dict[str, str]
) -> None:
    """As with VLLM_NCCL_SO_PATH alone: two NCCLs in one process."""
    wheels = library(tmp_path / "site-packages/nvidia/nccl/lib/libnccl.so.2", 22809)
    with service(tmp_path, {"HOME": "/home/spark", **preloaded}, wheels, library(ours(tmp_path))) as pid:
        found = finding_of(served, tmp_path, "running-nccl")
    assert found.verdict == "fail"
    assert f"(pid {pid}) has {wheels}" in found.found


def test_running_nccl_of_a_wheel_fails(served: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    wheels = library(tmp_path / "site-packages/nvidia/nccl/lib/libnccl.so.2", 22809)
    with service(tmp_path, {}, wheels) as pid:
        found = finding_of(served, tmp_path, "running-nccl")
    assert found.verdict == "fail"
    assert f"(pid {pid}) has {wheels}" in found.found
    assert found.expected.startswith(str(ours(tmp_path)))


def test_running_nccl_replaced_since_the_start_warns(served: Node, tmp_path: Path) -> None:
    with service(tmp_path, {}, library(ours(tmp_path))) as pid:
        library(ours(tmp_path), 22809, arch=120)
        record(tmp_path, pid, "vllm.service")
        found = finding_of(served, tmp_path, "running-nccl")
    assert found.verdict == "warn"
    assert "replaced since the start" in found.found
    assert found.hint == "`sudo systemctl restart vllm.service`"


def test_running_nccl_without_a_build_id_fails(served: Node, tmp_path: Path) -> None:
    for path in (ours(tmp_path), tmp_path / "second/libnccl.so.2"):
        library(path)
        subprocess.run(["strip", "--remove-section=.note.gnu.build-id", path], check=True)
    with service(tmp_path, {}, tmp_path / "second/libnccl.so.2"):
        assert finding_of(served, tmp_path, "running-nccl").verdict == "fail"


def test_running_nccl_not_yet_loaded_passes(served: Node, tmp_path: Path) -> None:
    library(ours(tmp_path))
    with service(tmp_path, {}):
        found = finding_of(served, tmp_path, "running-nccl")
    assert (found.verdict, found.found) == ("pass", "1 process of vllm.service, none of which has loaded one yet")
