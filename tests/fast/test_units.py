"""Unit files: what is rendered and quoted, and whether systemd accepts them."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sparkinstall import ray_ports
from sparkinstall.errors import Problem
from sparkinstall.journal.system import JournaledSystem
from sparkinstall.layout import FIREWALL_UNIT, UNIT_FOLDER
from sparkinstall.node import Node
from sparkinstall.resources import Drift, NodeOnly, Ok, state_of, systemd
from sparkinstall.resources.stale_services import StaleServices
from sparkinstall.resources.systemd import Cause, Service, UnitFile, complaints_of_systemd
from sparkinstall.resources.template import render
from sparkinstall.services import UNITS
from sparkinstall.steps import ray
from sparkinstall.steps.env_files import EnvFiles
from sparkinstall.steps.firewall import Firewall
from sparkinstall.steps.life import Life
from sparkinstall.steps.ray import Ray
from sparkinstall.steps.serving import Serving, arguments
from sparkinstall.system.local import LocalReader
from tests.support.nodes import node_of, system_of

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")


def unit_of(node: Node, step: Ray | Serving, on: LocalReader) -> tuple[UnitFile, str]:
    """The step's unit file, and its text."""
    (unit,) = [each for each in step.resources(node) if isinstance(each, UnitFile)]
    values = unit.values(on)
    assert isinstance(values, Mapping)
    return unit, render(unit.template, {**values, "path": unit.path}).decode()


CASES: tuple[tuple[str, Ray | Serving, dict[str, Any]], ...] = (
    ("head", Ray(), {}),
    ("worker", Ray(), {}),
    ("single", Serving(), {"serving__model": "/srv/models/tiny"}),
    ("head", Serving(), {"serving__model": "some/name"}),
    ("head", Serving(), {"serving__model": "some/name", "cluster__executor": "mp"}),
    ("worker", Serving(), {"serving__model": "some/name", "cluster__executor": "mp"}),
)


@needs_systemd
@pytest.mark.parametrize(("role", "step", "settings"), CASES)
def test_systemd_accepts_all_units(role: str, step: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    node, on = node_of(tmp_path, role, **settings), LocalReader(str(tmp_path))
    for name in ("ray", "vllm", "python"):
        program = tmp_path / "opt/sparkinstall/venv/bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.symlink_to("/bin/true")
    unit, text = unit_of(node, step, on)
    assert complaints_of_systemd(on, unit.name, text.encode()) == []


@needs_systemd
@pytest.mark.parametrize("line", ["Exekstart=/bin/true", "LimitNOFILE=many", "KillMode=gently"])
def test_unit_with_a_warning_of_systemd_has_complaints(line: str, tmp_path: Path) -> None:
    text = f"[Service]\nExecStart=/bin/true\n{line}\n"
    assert complaints_of_systemd(LocalReader(str(tmp_path)), "some.service", text.encode())


@needs_systemd
def test_unit_with_a_missing_program_has_complaints_on_a_node_only(tmp_path: Path) -> None:
    text = b"[Service]\nExecStart=/no/such/program\n"
    assert complaints_of_systemd(LocalReader(str(tmp_path)), "some.service", text) == []
    assert "not executable" in complaints_of_systemd(LocalReader("/"), "some.service", text)[0]


@needs_systemd
def test_unit_that_systemd_rejects_keeps_the_old_file(tmp_path: Path) -> None:
    template = "ray-non-carry-over.json.j2"
    unit = UnitFile(f"{UNIT_FOLDER}/some.service", template, lambda _: {"names": ["no unit"]}, noted_in="/noted.json")
    old = tmp_path / "etc/systemd/system/some.service"
    old.parent.mkdir(parents=True)
    old.write_text("old\n")
    with pytest.raises(Problem, match="systemd does not accept"):
        unit.apply(system_of(tmp_path))
    assert old.read_text() == "old\n"


def test_ray_step_in_a_rehearsal_writes_the_unit_and_starts_nothing(tmp_path: Path) -> None:
    node, on = node_of(tmp_path, "head"), system_of(tmp_path)
    kinds = []
    for resource in Ray().resources(node):
        if not isinstance(state_of(resource, on), NodeOnly):
            resource.apply(on)
        kinds.append(type(state_of(resource, on)))
    assert kinds == [Ok] * 4 + [NodeOnly]
    text = (tmp_path / "etc/systemd/system/ray-head.service").read_text()
    assert f"{tmp_path}/opt/sparkinstall/venv/bin/ray start --head --block" in text
    assert sorted(path.name for path in (tmp_path / "etc/systemd/system").iterdir()) == ["ray-head.service"]
    journal = (tmp_path / "var/lib/sparkinstall/journal.jsonl").read_text()
    assert '"units"' not in journal and '"service"' not in journal


def test_ray_unit_of_a_worker_waits_for_the_head(tmp_path: Path) -> None:
    node = node_of(tmp_path, "worker", cluster__head="192.168.7.1", cluster__ray_port=6400)
    _, text = unit_of(node, Ray(), LocalReader(str(tmp_path)))
    assert "--address=192.168.7.1:6400" in text
    assert text.index("ray-nodes.py 192.168.7.1:6400 120") < text.index("ExecStart=")


def setting_of(unit: str, name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE)
    return str(value)


@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_unit_without_address_or_head_is_restarted_for_ever(role: str, tmp_path: Path) -> None:
    """systemd gives up if the whole burst of starts fits into the interval."""
    node, on = node_of(tmp_path, role), LocalReader(str(tmp_path))
    _, unit = unit_of(node, Ray(), on)
    waits = {"address": int(before_start_of(node, on)["patience"])}
    if role == "worker":
        waits["head"] = int(re.findall(r"ray-nodes\.py \S+:6379 (\d+)$", unit, re.MULTILINE)[0])
    burst, rest = int(setting_of(unit, "StartLimitBurst")), int(setting_of(unit, "RestartSec"))
    interval = 60 * int(setting_of(unit, "StartLimitIntervalSec").removesuffix("min"))
    for what, seconds in waits.items():
        assert burst * (seconds + rest) > interval, what
    assert int(setting_of(unit, "TimeoutStartSec")) > sum(waits.values())


def before_start_of(node: Node, on: LocalReader) -> Mapping[str, Any]:
    values = ray.before_start(node).values(on)
    assert isinstance(values, Mapping)
    return values


@pytest.mark.parametrize(
    ("role", "executor", "gives_up"),
    [
        ("single", "ray", True),
        ("head", "ray", False),
        ("head", "mp", False),
        ("worker", "mp", False),
    ],
)
def test_vllm_unit_gives_up_only_on_a_single_node(role: str, executor: str, gives_up: bool, tmp_path: Path) -> None:
    node = node_of(tmp_path, role, serving__model="m", cluster__executor=executor)
    _, unit = unit_of(node, Serving(), LocalReader(str(tmp_path)))
    assert ("StartLimitBurst=5" in unit) is gives_up
    assert setting_of(unit, "StartLimitIntervalSec") == ("5h" if gives_up else "0")


def test_ray_ports_are_fixed_and_distinct(tmp_path: Path) -> None:
    _, text = unit_of(node_of(tmp_path, "head"), Ray(), LocalReader(str(tmp_path)))
    named = {name: value for name, value in vars(ray_ports).items() if name.isupper() and isinstance(value, int)}
    ports = [value for name, value in named.items() if not name.endswith("_OF_VLLM")]
    assert len(set(ports)) == len(ports)
    assert all(f"={port}" in text for port in ports if port != ray_ports.CLIENT)
    inside = [port for port in ports if port not in (ray_ports.CLIENT, ray_ports.DASHBOARD)]
    assert (min(inside), max(inside)) == ray_ports.BETWEEN_NODES


ARGUMENTS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("single", {}, "--host 127.0.0.1 --port 8000 --gpu-memory-utilization 0.85 --max-model-len 32768"),
    ("single", {"serving__allow": "192.168.1.0/24"}, "--host 0.0.0.0 --port 8000"),
    ("head", {}, "--tensor-parallel-size 2 --distributed-executor-backend ray --gpu-memory-utilization 0.80"),
    ("head", {"serving__memory": "0.7", "serving__max_model_len": 9}, "--gpu-memory-utilization 0.7 --max-model-len 9"),
    (
        "worker",
        {"cluster__executor": "mp"},
        "--headless --tensor-parallel-size 2 --distributed-executor-backend mp --nnodes 2 --node-rank 1 "
        "--master-addr 192.168.100.10 --master-port 29501",
    ),
)  # fmt: skip


@pytest.mark.parametrize(("role", "settings", "expected"), ARGUMENTS)
def test_vllm_arguments_follow_role_and_settings(
    role: str, settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    words = " ".join(arguments(node_of(tmp_path, role, serving__model="m", **settings)))
    assert expected in words
    assert "--trust-remote-code" not in words


def test_vllm_arguments_of_the_settings_come_last(tmp_path: Path) -> None:
    own = ["--no-enforce-eager", "--trust-remote-code"]
    assert arguments(node_of(tmp_path, serving__model="m", serving__arguments=own))[-2:] == own


@pytest.mark.parametrize("role", ["single", "head", "worker"])
@pytest.mark.parametrize("executor", ["ray", "mp"])
def test_vllm_arguments_keep_flashinfer_from_tuning_on_several_nodes_only(
    role: str, executor: str, tmp_path: Path
) -> None:
    words = arguments(node_of(tmp_path, role, serving__model="m", cluster__executor=executor))
    assert ("--no-enable-flashinfer-autotune" in words) is (role != "single")


@pytest.mark.parametrize(
    "own",
    [
        ["--enable-flashinfer-autotune"],
        ["--enable_flashinfer_autotune"],
        ["--no-enable-flashinfer-autotune"],
        ["--no_enable_flashinfer-autotune"],
        ["--enforce-eager", "--kernel-config.enable_flashinfer_autotune=true"],
        ["--kernel_config.enable_flashinfer_autotune", "true"],
        ["--kernel-config", '{"enable_flashinfer_autotune": true}'],
        ['--kernel-config={"enable_flashinfer_autotune":false}', "--enforce-eager"],
    ],
)
def test_vllm_arguments_leave_the_tuning_to_the_user_who_names_it(own: list[str], tmp_path: Path) -> None:
    words = arguments(node_of(tmp_path, "head", serving__model="m", serving__arguments=own))
    assert words[-len(own) :] == own and sum("autotune" in word for word in words) == 1


@pytest.mark.parametrize("own", [["--kernel-config", '{"moe_backend": "auto"}'], ["--enforce-eager"]])
def test_vllm_arguments_about_something_else_leave_the_tuning_off(own: list[str], tmp_path: Path) -> None:
    words = arguments(node_of(tmp_path, "head", serving__model="m", serving__arguments=own))
    assert words[-len(own) - 1] == "--no-enable-flashinfer-autotune"


def test_serving_step_of_a_worker_with_ray_declares_nothing(tmp_path: Path) -> None:
    assert list(Serving().resources(node_of(tmp_path, "worker", serving__model="m"))) == []
    assert not Serving().wanted(node_of(tmp_path))


def test_env_files_of_a_head_list_the_variables_that_stay_there(tmp_path: Path) -> None:
    node, on = node_of(tmp_path, "head", serving__model="m"), system_of(tmp_path)
    on.write(node.fp8_decision, json.dumps({"fallback": False, "disabled_kernels": [], "why": "so"}).encode())
    for resource in EnvFiles().resources(node):
        if not isinstance(state_of(resource, on), NodeOnly):
            resource.apply(on)
    folder = tmp_path / "opt/sparkinstall/services/vllm"
    names = json.loads((folder / "ray_non_carry_over_env_vars.json").read_text())
    assert {"NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_GID_INDEX"} <= set(names)
    head, worker = (tmp_path / f"opt/sparkinstall/env/multi-node-{role}.env" for role in ("head", "worker"))
    assert f'VLLM_CONFIG_ROOT="{folder}"\n' in head.read_text()
    for file in (tmp_path / "opt/sparkinstall/env").glob("*.env"):
        assert 'MAX_JOBS="4"\n' in file.read_text(), "FlashInfer's compilers would use up the memory"
    for file in (head, worker):
        assert 'VLLM_ENGINE_READY_TIMEOUT_S="3600"\n' in file.read_text()
    assert "VLLM_ENGINE_READY_TIMEOUT_S" not in (head.parent / "single-node.env").read_text()
    # vLLM no longer reads its former configuration folder, which may have turned this off.
    assert 'VLLM_NO_USAGE_STATS="1"\n' in head.read_text()
    assert "VLLM_CONFIG_ROOT" not in worker.read_text()
    assert str(folder / "ray_non_carry_over_env_vars.json") in inputs_of(node, on)
    without = node_of(tmp_path, "head", cluster__executor="mp")
    assert [each for each in EnvFiles().resources(without) if "carry_over" in each.key] == []


def inputs_of(node: Node, on: JournaledSystem) -> list[str]:
    """The files (real paths) whose change restarts vLLM."""
    (service,) = [each for each in Serving().resources(node) if isinstance(each, Service)]
    return [on.real(path) for path in service.inputs(on)]


@pytest.mark.parametrize("role", ["single", "head", "worker"])
@pytest.mark.parametrize("executor", ["ray", "mp"])
@pytest.mark.parametrize("model", [None, "m"])
def test_wanted_units_are_those_of_the_steps(tmp_path: Path, role: str, executor: str, model: str | None) -> None:
    node = node_of(tmp_path, role, cluster__executor=executor, serving__model=model)
    steps = [step for step in (Ray(), Serving(), Life(), Firewall()) if step.wanted(node)]
    found = [each for step in steps for each in step.resources(node)]
    wanted = {unit.name for unit in UNITS if unit.wanted(node)}
    assert wanted == {each.name for each in found if isinstance(each, Service)}


def test_stale_services_of_a_former_role_are_removed(tmp_path: Path) -> None:
    on, folder = system_of(tmp_path), tmp_path / "etc/systemd/system"
    folder.mkdir(parents=True)
    (folder / "vllm.service").write_text("# another user's\n[Service]\nExecStart=/bin/true\n")
    for step in (Ray(), Firewall()):
        for each in step.resources(node_of(tmp_path, "head")):
            if not isinstance(state_of(each, on), NodeOnly):
                each.apply(on)
    assert {each.name for each in folder.iterdir()} == {"ray-head.service", FIREWALL_UNIT, "vllm.service"}
    as_head, as_worker, alone = (StaleServices(node_of(tmp_path, role)) for role in ("head", "worker", "single"))
    assert isinstance(as_head.check(on), Ok)
    state = as_worker.check(on)
    assert isinstance(state, Drift)
    assert state.summary == "stop ray-head.service: no longer required"
    alone.apply(on)
    assert isinstance(alone.check(on), Ok)
    assert {each.name for each in folder.iterdir()} == {"vllm.service"}
    assert not (tmp_path / "opt/sparkinstall/firewall.nft").exists(), (
        "a file left there would stop `auto` from deciding again"
    )


def test_unit_values_with_a_line_break_are_refused() -> None:
    for quote in (systemd.word, systemd.program, systemd.setting):
        with pytest.raises(ValueError, match="cannot stand in a unit"):
            quote("a\nExecStartPre=/bin/false")


def test_cause_of_a_failed_service_follows_its_log() -> None:
    service = Service("some.service", lambda _: (), "/noted", (Cause(r"refuses the token", "why", "hint"),))
    log = ["sparkinstall: the head refuses the token of this node", "some.service: Failed"]
    assert service.cause_in(log) == ("the head refuses the token of this node", "hint")
    assert service.cause_in(["it refuses the token"]) == ("why", "hint")
    assert service.cause_in(["something else"]) == ("", "")


class TestRayNodes:
    """The program that waits for Ray, without Ray."""

    @pytest.fixture
    def program(self, tmp_path: Path) -> str:
        node, on = node_of(tmp_path, "head"), system_of(tmp_path)
        (script,) = [each for each in Ray().resources(node) if each.key.endswith("ray-nodes.py")]
        script.apply(on)
        return on.real(node.ray_nodes)

    def test_ray_nodes_without_a_head_fails_in_time(self, program: str) -> None:
        answer = subprocess.run(
            [sys.executable, "-W", "error", program, "127.0.0.1:9", "0"], capture_output=True, text=True, timeout=60
        )
        assert answer.returncode == 1
        assert answer.stderr.startswith("sparkinstall: the head does not answer at 127.0.0.1:9: Connection refused")
