"""A fresh Debian node with systemd as PID 1: `./install.sh`, a kill, broken parts, a reboot, and the uninstall.

The tests of this file run in order on one node.
"""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparkinstall import elf
from sparkinstall.probes.known_hosts import rules
from tests.lab.node import Bind, FreshNode
from tests.nodes.broken import ENV_FILE, SITE, changed, probe_result, reinstall, serve, stop_serving
from tests.nodes.fresh import (
    CHECKOUT,
    COMMAND,
    CPU_STACK,
    NOT_COMPARED,
    beside_the_wheels,
    file_metadata,
    fresh_node,
    grow_old,
    ignoring,
    let_pytorch_find_cuda,
    objects,
    put_before_the_compiler,
    sparkinstall,
    wait_for_objects,
)
from tests.support import cpu_stack, vllm_on_cpu

pytestmark = [pytest.mark.layer3, pytest.mark.layer4, pytest.mark.network]

LIBRARY = "/opt/sparkinstall/nccl/lib/libnccl.so.2"
REHEARSAL = "/home/spark/rehearsal"
COPY_OF_THE_CACHE = """
mkdir -p "$1"
cp -a ~/.cache/sparkinstall/nccl "$1"
ln -s ~/.cache/sparkinstall/wheels "$1/wheels"
"""
# For another stack, a wheelhouse of its own: both have wheels of the same name.
CPU_CACHE = {"XDG_CACHE_HOME": "/srv/cpu-cache"}
# resources/nccl.py distrusts what was written 30 s before the last file.
UNSURE_SECONDS = 31
W8A8 = "vllm/model_executor/layers/quantization/utils/w8a8_utils.py"


# What apt, dpkg, ldconfig and logging leave by their own nature, and what the tool itself is (it stays).
@pytest.fixture(scope="module")
def node() -> Iterator[FreshNode]:
    other = Bind(cpu_stack.tree() / "wheels", f"{CPU_CACHE['XDG_CACHE_HOME']}/sparkinstall/wheels", read_only=False)
    with fresh_node("fresh-node", *beside_the_wheels(), other) as fresh:
        fresh.run("chown", "spark:spark", CPU_CACHE["XDG_CACHE_HOME"], f"{CPU_CACHE['XDG_CACHE_HOME']}/sparkinstall")
        let_pytorch_find_cuda(fresh)
        yield fresh


@pytest.fixture(scope="module")
def before(node: FreshNode) -> dict[str, str]:
    """The node before anything was done to it, the tool itself apart."""
    node.run("./install.sh", "--tool-only", user="spark", cwd=CHECKOUT, timeout=300)
    return node.tree_digest("/", exclude=NOT_COMPARED)


def test_install_on_another_machine_is_refused_with_the_command_for_a_rehearsal(
    node: FreshNode, before: dict[str, str]
) -> None:
    answer = node.run("./install.sh", "--yes", user="spark", cwd=CHECKOUT, check=False, timeout=300)
    assert answer.returncode == 4
    assert "./install.sh --root ./node" in answer.stderr
    told = sparkinstall(node, "all", "--yes", check=False)
    assert told.returncode == 4
    assert "sparkinstall all --root ./node" in told.stderr
    assert node.tree_digest("/", exclude=NOT_COMPARED) == before


def test_all_without_a_terminal_requires_yes(node: FreshNode, before: dict[str, str]) -> None:
    answer = sparkinstall(node, "all", *ignoring(), check=False)
    assert answer.returncode == 2
    assert "--yes" in answer.stderr
    assert sparkinstall(node, "all", "--json", *ignoring(), check=False).returncode == 2
    assert node.tree_digest("/", exclude=NOT_COMPARED) == before


def test_all_without_sudo_is_refused(node: FreshNode) -> None:
    answer = node.run(COMMAND, "all", "--yes", *ignoring(), user="plain", check=False)
    # Another user's home may not even be looked into; what counts is that nothing was begun.
    assert answer.returncode != 0
    assert "Traceback" not in answer.stderr


@pytest.mark.usefixtures("before")
def test_install_killed_during_the_build_continues_without_compiling_a_file_twice(node: FreshNode) -> None:
    """What was written just before the kill may be unfinished, and is compiled again."""
    install, nccl = ("./install.sh", "--yes", *ignoring()), "/opt/sparkinstall"
    put_before_the_compiler(node, used=False)
    with node.popen(*install, user="spark", cwd=CHECKOUT) as run:
        wait_for_objects(node, nccl)
        # What there is grows old, and meanwhile no other file is compiled.
        node.run("pkill", "--signal", "STOP", "--exact", "make")
        grow_old(node, nccl, UNSURE_SECONDS + 5)
        node.run("pkill", "--signal", "CONT", "--exact", "make")
        wait_for_objects(node, nccl, age=UNSURE_SECONDS + 5)
        node.signal(run, signal.SIGKILL)
    assert not _exists(node, ENV_FILE)
    compiled, killed = objects(node, nccl, age=UNSURE_SECONDS), max(objects(node, nccl).values())
    put_before_the_compiler(node)
    with node.popen(*install, user="spark", cwd=CHECKOUT) as again:
        there = wait_for_objects(node, nccl, after=killed)
        out, err = again.communicate(timeout=2400)
    assert again.returncode == 0, out[-3000:] + err[-3000:]
    assert "is done" in out
    assert "memory-guard" in out, "the preflight of the machine ran too"
    assert _exists(node, LIBRARY)
    assert compiled and compiled.items() <= there.items()


def test_nccl_library_names_sm_121_and_its_recipe(node: FreshNode) -> None:
    library = _on_this_machine(node, LIBRARY)
    assert "sm_121" in {code.arch for code in elf.gpu_code(library)}
    stamp = json.loads(node.read("/opt/sparkinstall/nccl/build.json"))
    assert stamp["build_id"] == elf.build_id(library)
    assert stamp["recipe"]["version"] == "2.29.7"


def test_packages_are_installed_by_apt(node: FreshNode) -> None:
    status = node.run("dpkg-query", "-W", "-f", "${Status} ${Package}\n", "python3.13-dev", "build-essential", "git")
    assert status.stdout.count("install ok installed") == 3


def test_nccl_of_the_same_recipe_is_installed_from_the_cache(node: FreshNode) -> None:
    (step,) = _rehearsed(node, "plan", "--only", "nccl")["data"]["steps"]
    assert "install NCCL 2.29.7 for sm_121 from the cache" in str(step)
    _rehearsed(node, "run", "nccl")
    node.run("cmp", f"{REHEARSAL}{LIBRARY}", LIBRARY)
    assert objects(node, f"{REHEARSAL}/opt/sparkinstall") == {}
    assert _rehearsed(node, "run", "nccl")["data"]["changed"] is False


def test_nccl_of_another_recipe_is_a_change(node: FreshNode) -> None:
    assert _rehearsed(node, "plan", "--only", "nccl", "--set", "nccl.arch=120")["data"]["drift"] is True


@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        ("nccl.arch=999", 4, "nvcc 13.0 does not support compute_999"),
        ("nccl.version=2.28.9", 1, "is the source of NCCL 2.29.7, not of 2.28.9"),
        (f"nccl.sha256={'0' * 64}", 1, "does not have the expected hash"),
    ],
)
def test_nccl_that_cannot_be_built_is_refused_and_the_library_stays(
    node: FreshNode, setting: str, code: int, message: str
) -> None:
    refused = _rehearsed(node, "run", "nccl", "--set", setting, code=code)
    assert message in str(refused["errors"])
    assert _exists(node, f"{REHEARSAL}{LIBRARY}")


@pytest.mark.parametrize("damaged", [True, False], ids=["damaged cache", "--force"])
def test_nccl_is_built_although_the_cache_has_it(node: FreshNode, damaged: bool) -> None:
    """From a copy of the cache; the run is killed as soon as it compiles."""
    place = f"/home/spark/{'damaged' if damaged else 'forced'}"
    node.run("sh", "-euc", COPY_OF_THE_CACHE, "sh", f"{place}/sparkinstall", user="spark")
    if damaged:
        node.run("sh", "-euc", f"truncate -s -1 {place}/sparkinstall/nccl/built/*/libnccl.so", user="spark")
    run_nccl, cache = (COMMAND, "run", "nccl", "--root", f"{place}/node"), {"XDG_CACHE_HOME": place}
    if not damaged:
        node.run(*run_nccl, user="spark", env=cache)
    with node.popen(*run_nccl, *([] if damaged else ["--force"]), user="spark", env=cache) as run:
        wait_for_objects(node, f"{place}/node/opt/sparkinstall")
        node.signal(run, signal.SIGKILL)
    # This ends the compiler too.
    node.run(COMMAND, "uninstall", "--root", f"{place}/node", user="spark", env=cache)
    node.run("rm", "-r", place)


def test_a_rehearsal_on_a_node_is_uninstalled_whole(node: FreshNode) -> None:
    _rehearsed(node, "uninstall")
    assert not _exists(node, REHEARSAL)


def test_all_again_changes_nothing(node: FreshNode) -> None:
    looked_at = ("/opt/sparkinstall", "/var/lib/sparkinstall", "/etc", "/home/spark/vllm-env")
    there = file_metadata(node, *looked_at)
    answer = json.loads(sparkinstall(node, "all", "--yes", "--json").stdout)
    assert answer["data"]["changed"] is False
    assert file_metadata(node, *looked_at) == there


def test_torch_without_the_env_file_loads_the_nccl_of_its_wheel(node: FreshNode) -> None:
    """LD_LIBRARY_PATH does not change that."""
    look = "import torch; print([l for l in open('/proc/self/maps') if 'libnccl' in l][0])"
    plain = node.run("/opt/sparkinstall/venv/bin/python", "-c", look, user="spark", timeout=300)
    assert "site-packages/nvidia/nccl" in plain.stdout
    with_path = node.run(
        "env", "LD_LIBRARY_PATH=/opt/sparkinstall/nccl/lib", "/opt/sparkinstall/venv/bin/python", "-c", look,
        user="spark", timeout=300,
    )  # fmt: skip
    assert "site-packages/nvidia/nccl" in with_path.stdout


def test_env_file_gives_a_shell_and_systemd_the_same_variables(node: FreshNode) -> None:
    node.write(
        "/etc/systemd/system/show-env.service",
        f"[Service]\nType=oneshot\nEnvironmentFile={ENV_FILE}\nExecStart=/bin/sh -c 'env -0 > /run/of-systemd'\n",
    )
    node.run("systemctl", "daemon-reload")
    node.run("systemctl", "start", "show-env.service")
    in_shell = _variables(node.run("bash", "-c", f"source {ENV_FILE} && env -0", user="spark").stdout)
    in_systemd = _variables(node.run("cat", "/run/of-systemd").stdout)
    for name in ("LD_PRELOAD", "VLLM_NCCL_SO_PATH", "VLLM_HOST_IP", "RAY_memory_usage_threshold"):
        assert in_shell[name] == in_systemd[name], name
    assert in_systemd["PATH"].startswith("/opt/sparkinstall/venv/bin:")
    # A shell keeps the environment that it has activated; a service follows the link.
    assert in_shell["PATH"].startswith(f"{in_shell['VIRTUAL_ENV']}/bin:/")
    assert node.run("readlink", "-f", in_systemd["VIRTUAL_ENV"]).stdout.strip() == in_shell["VIRTUAL_ENV"]
    journal = node.run("journalctl", "-u", "show-env.service", "--no-pager").stdout
    assert "Ignoring invalid" not in journal
    node.run("rm", "/etc/systemd/system/show-env.service", "/run/of-systemd")
    node.run("systemctl", "daemon-reload")


def test_verify_at_level_node_skips_only_what_a_spark_has(node: FreshNode) -> None:
    answer = json.loads(sparkinstall(node, "verify", "--level", "node", "--json").stdout)
    assert {probe["level"] for probe in answer["data"]["probes"]} == {"static", "node"}
    verdicts = {probe["name"]: probe["verdict"] for probe in answer["data"]["probes"]}
    # What only a Spark can tell: its GPU and firmware; and its kernel's journal, which no container has.
    journal = {rule.name for rule in rules() if rule.looks == "kernel_log"}
    of_a_spark = {"gpu-driver", "gpu-slowdown", "driver-mismatch", "firmware"}
    assert {name for name, verdict in verdicts.items() if verdict == "skip"} == journal | of_a_spark


def test_nccl_preload_with_another_nccl_in_the_env_file_fails(node: FreshNode) -> None:
    second = f"{SITE}/nvidia/nccl/lib/libnccl.so.2"
    with changed(node, ENV_FILE, f"s|^LD_PRELOAD=.*|LD_PRELOAD={second}|"):
        verdict, found = probe_result(node, "nccl-preload")
    assert verdict == "fail"
    assert "nvidia/nccl/lib/libnccl.so.2, build-id " in found
    # A path alone does not choose: LD_PRELOAD wins.
    with changed(node, ENV_FILE, f"s|^set -a|set -a\\nLD_LIBRARY_PATH={SITE}/nvidia/nccl/lib|"):
        assert probe_result(node, "nccl-preload")[0] == "pass"


def test_nccl_preload_of_a_missing_file_fails(node: FreshNode) -> None:
    with changed(node, ENV_FILE, "s|^LD_PRELOAD=.*|LD_PRELOAD=/opt/nowhere/libnccl.so.2|"):
        verdict, found = probe_result(node, "nccl-preload")
    assert verdict == "fail"
    assert "/opt/nowhere/libnccl.so.2" in found and "cannot be preloaded" in found


def test_wheel_files_with_a_changed_file_fails(node: FreshNode) -> None:
    with changed(node, f"{SITE}/vllm/envs.py", "s/import/import /"):
        verdict, found = probe_result(node, "wheel-files")
    assert verdict == "fail"
    assert found.startswith("vllm/envs.py has ")
    # Of the same length and with the old date.
    with changed(node, f"{SITE}/torch/version.py", "s/0/1/"):
        assert probe_result(node, "wheel-files") == ("fail", "torch/version.py was changed")
    assert probe_result(node, "wheel-files")[0] == "pass"


def test_fp8_path_without_the_patch_fails(node: FreshNode) -> None:
    node.run("cp", "-a", f"{SITE}/{W8A8}", "/run/unpatched")
    # The env files, which name the kernels that are off, are not written meanwhile: their probes import torch and vLLM.
    sparkinstall(node, "run", "fp8", "--set", "fp8.fallback=on", "--yes", *ignoring())
    assert probe_result(node, "fp8-path")[0] == "pass"
    node.run("cp", "-a", "/run/unpatched", f"{SITE}/{W8A8}")
    assert probe_result(node, "fp8-path") == ("fail", "vLLM's file is not as decided")
    sparkinstall(node, "run", "fp8", "--set", "fp8.fallback=auto", "--yes", *ignoring())
    assert probe_result(node, "fp8-path")[0] == "pass"


def test_running_env_that_differs_from_the_env_file_warns(node: FreshNode) -> None:
    serve(node)
    assert probe_result(node, "running-env") == ("pass", "vllm.service: as in the env file")
    assert probe_result(node, "running-nccl") == ("pass", "1 process of vllm.service")
    with changed(node, ENV_FILE, "s/^RAY_memory_usage_threshold=.*/RAY_memory_usage_threshold=0.9/"):
        verdict, found = probe_result(node, "running-env")
    assert verdict == "warn"
    assert found == "vllm.service was started with RAY_memory_usage_threshold=1.0 (the file says 0.9)"


def test_running_nccl_with_a_replaced_library_warns(node: FreshNode) -> None:
    serve(node)
    real = node.run("readlink", "-f", LIBRARY).stdout.strip()
    node.run("sh", "-c", 'cp -a "$1" "$1.new" && mv "$1.new" "$1"', "sh", real)
    verdict, found = probe_result(node, "running-nccl")
    assert verdict == "warn"
    assert found.endswith("replaced since the start")


def test_running_nccl_of_a_wheel_fails(node: FreshNode) -> None:
    wheels = f"{SITE}/nvidia/nccl/lib/libnccl.so.2"
    serve(node, "UnsetEnvironment=LD_PRELOAD", f"import ctypes; ctypes.CDLL('{wheels}')")
    verdict, found = probe_result(node, "running-nccl")
    assert verdict == "fail"
    assert "site-packages/nvidia/nccl/lib/libnccl.so.2" in found
    assert probe_result(node, "running-env") == ("warn", "vllm.service was started with no LD_PRELOAD")
    stop_serving(node)
    assert probe_result(node, "running-nccl") == ("skip", "vllm.service: not running")


def test_verify_after_a_reboot_passes_and_names_the_loaded_nccl(node: FreshNode) -> None:
    node.reboot()
    answer = json.loads(sparkinstall(node, "verify", "--json", check=False).stdout)
    drift = [check["step"] for check in answer["data"]["checks"] if check["outcome"] != "unchanged"]
    failures = {probe["name"]: probe["found"] for probe in answer["data"]["probes"] if probe["verdict"] == "fail"}
    assert (drift, failures, answer["exit_code"]) == ([], {}, 0)
    probes = {probe["name"]: probe for probe in answer["data"]["probes"]}
    wanted = {
        "wheel-gate": "pass", "reasoning-field": "pass", "fp8-path": "pass", "wheel-files": "pass",
        "nccl-preload": "pass", "imports": "pass", "nccl-loaded": "pass", "host-ip": "pass",
    }  # fmt: skip
    assert {name: probes[name]["verdict"] for name in wanted} == wanted
    assert "/opt/sparkinstall/nccl/build-" in probes["nccl-loaded"]["found"]
    assert "2.29.7" in probes["nccl-loaded"]["found"]
    assert "vllm 0.29.0" in probes["imports"]["found"]


def test_verify_with_a_missing_library_fails(node: FreshNode) -> None:
    node.run("mv", LIBRARY, f"{LIBRARY}.away")
    found = json.loads(
        sparkinstall(node, "verify", "--json", "--only", "nccl", "--only", "nccl-loaded", check=False).stdout
    )
    node.run("mv", f"{LIBRARY}.away", LIBRARY)
    assert found["exit_code"] == 3
    assert {p["name"]: p["verdict"] for p in found["data"]["probes"]}["nccl-loaded"] == "fail"


def test_all_restores_a_changed_env_file(node: FreshNode) -> None:
    node.run("sed", "-i", "s/LD_PRELOAD=/LD_PRELOAD_=/", ENV_FILE)
    assert sparkinstall(node, "verify", "--level", "static", check=False).returncode == 3
    repaired = json.loads(sparkinstall(node, "all", "--yes", "--json", *ignoring()).stdout)
    assert repaired["exit_code"] == 0
    assert [s["step"] for s in repaired["data"]["steps"] if s["outcome"] == "changed"] == ["env-files"]


def test_all_with_another_stack_replaces_a_changed_environment_and_keeps_the_former_if_asked(node: FreshNode) -> None:
    """The files of a reinstalled wheel match its own RECORD, but they may not be those of the lock."""
    reinstall(node, "idna")
    assert probe_result(node, "wheel-files") == ("fail", "idna was reinstalled since")
    former = node.run("readlink", "/opt/sparkinstall/venv").stdout.strip()
    other = ("--stack", CPU_STACK)
    assert "beside stack lab-full; once they are proven, switch to them" in sparkinstall(node, "plan", *other).stdout
    node.run(COMMAND, "all", *other, "--keep-old", "--yes", *ignoring(), user="spark", env=CPU_CACHE, timeout=1800)
    used = node.run("readlink", "/opt/sparkinstall/venv").stdout.strip()
    assert used.startswith("venvs/lab-cpu-")
    kept = node.run("ls", "/opt/sparkinstall/venvs").stdout.split()
    assert sorted(f"venvs/{name}" for name in kept) == sorted([former, used])
    assert _exists(node, f"{SITE}/vllm-{vllm_on_cpu.VERSION}+cpu.dist-info")
    assert probe_result(node, "wheel-files")[0] == "pass"


def test_uninstall_restores_every_byte(node: FreshNode, before: dict[str, str]) -> None:
    answer = sparkinstall(node, "uninstall", "--yes", timeout=600)
    assert "kept" not in answer.stdout.replace("Downloads are kept", "")
    after = node.tree_digest("/", exclude=NOT_COMPARED)
    assert {path for path in before | after if before.get(path) != after.get(path)} == set()


def test_install_remove_removes_the_tool(node: FreshNode) -> None:
    node.run("./install.sh", "--remove", user="spark", cwd=CHECKOUT)
    assert not _exists(node, COMMAND)
    assert not _exists(node, "/home/spark/.local/share/sparkinstall")


def _rehearsed(node: FreshNode, *argv: str, code: int = 0) -> dict[str, Any]:
    """What a verb prints in a rehearsal on the node, with the node's own config."""
    run = sparkinstall(node, *argv, "--root", REHEARSAL, "--json", check=False)
    assert run.returncode == code, run.stdout + run.stderr
    return dict(json.loads(run.stdout))


def _on_this_machine(node: FreshNode, path: str) -> Path:
    """The file of the node, its links followed there."""
    return node.root / node.run("readlink", "-f", path).stdout.strip().lstrip("/")


def _exists(node: FreshNode, path: str) -> bool:
    return node.run("test", "-e", path, check=False).returncode == 0


def _variables(output: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in output.split("\0") if "=" in item)
