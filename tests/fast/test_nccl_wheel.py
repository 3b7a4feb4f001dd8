"""`nccl.mode: wheel` on several nodes: refused where the NCCL of the aarch64 wheel hangs."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from sparkinstall import stacks
from sparkinstall.node import Node
from sparkinstall.resources import Conflict, Ok, Unknown
from sparkinstall.resources.nccl_wheel import NcclOfWheel
from sparkinstall.steps.env_files import EnvFiles
from sparkinstall.system.local import LocalReader
from tests.support.nodes import node_of
from tests.support.rehearsals import envelope, in_this_process

WHEEL = {"nccl__mode": "wheel"}


def node_with_lock(root: Path, arch: str, lock: str | None) -> Node:
    """A head whose stack has this lock, or none."""
    node = node_of(root, "head", **WHEEL)
    path = root / "stack.lock"
    path.write_text(lock or "")
    platform = replace(node.stack.platforms[arch], lock=path if lock is not None else None, wheels=())
    platform = replace(platform, requirements=())
    return replace(node, stack=replace(node.stack, platforms={arch: platform}), platform=arch)


def pinned(*pins: str) -> str:
    return "".join(f"{pin} --hash=sha256:{'0' * 64}\n" for pin in pins)


@pytest.mark.parametrize(
    ("arch", "pins", "refused"),
    [
        ("aarch64", ("nvidia-nccl-cu12==2.27.5",), True),
        ("aarch64", ("nvidia-nccl-cu13==2.28.9",), True),
        ("aarch64", ("torch==2.12.0", "nvidia-nccl-cu13==2.29.2"), True),
        ("aarch64", ("nvidia-nccl-cu13==2.29.3",), False),
        ("aarch64", ("nvidia-nccl-cu13==2.29.7",), False),
        ("aarch64", ("nvidia-nccl-cu14==2.30.7",), False),
        ("aarch64", ("nvidia-nccl-cu13==3.0",), False),
        ("aarch64", ("nccl4py==0.6.0", "nccl-extensions==0.1.0"), False),
        ("x86_64", ("nvidia-nccl-cu12==2.27.5",), False),
        ("x86_64", ("nvidia-nccl-cu13==2.28.9",), False),
    ],
)
def test_nccl_of_a_wheel_is_refused_by_its_version_on_arm(
    arch: str, pins: tuple[str, ...], refused: bool, tmp_path: Path
) -> None:
    state = NcclOfWheel(node_with_lock(tmp_path, arch, pinned(*pins))).check(LocalReader(str(tmp_path)))
    assert isinstance(state, Conflict if refused else Ok)
    if isinstance(state, Conflict):
        assert pins[-1].rpartition("==")[2] in state.message and "NVIDIA/nccl #2353" in state.message
        assert "nccl.mode=source" in state.hint and "2.29.3" in state.hint


def test_nccl_of_a_wheel_without_a_lock_is_judged_after_the_environment(tmp_path: Path) -> None:
    node, on = node_with_lock(tmp_path, "aarch64", None), LocalReader(str(tmp_path))
    assert NcclOfWheel(node).check(on) == Unknown("environment")
    record = tmp_path / node.lock_record[1:]
    record.parent.mkdir(parents=True)
    record.write_text(pinned("nvidia-nccl-cu13==2.28.9"))
    assert isinstance(NcclOfWheel(node).check(on), Conflict)


@pytest.mark.parametrize("name", stacks.names())
def test_nccl_of_each_shipped_stack_is_judged_before_anything_is_installed(name: str, tmp_path: Path) -> None:
    node = replace(node_of(tmp_path, "head", stack=name, **WHEEL), platform="aarch64")
    pins = {pin.name: pin.version for pin in stacks.parse_lock(node.wheels.lock_text())}
    old = tuple(map(int, pins["nvidia-nccl-cu13"].split("."))) < (2, 29, 3)
    assert isinstance(NcclOfWheel(node).check(LocalReader(str(tmp_path))), Conflict if old else Ok)


@pytest.mark.parametrize(
    ("role", "mode", "there"), [("head", "wheel", True), ("worker", "wheel", True), ("single", "wheel", False),
                                ("head", "source", False), ("single", "source", False)],
)  # fmt: skip
def test_nccl_of_a_wheel_is_judged_on_several_nodes_only(role: str, mode: str, there: bool, tmp_path: Path) -> None:
    found = EnvFiles().resources(node_of(tmp_path, role, nccl__mode=mode))
    assert any(isinstance(each, NcclOfWheel) for each in found) is there


# Under a fixed stack: a default may change.
OLD = ("--stack", "0.22.1", "--platform", "aarch64", "--set", "nccl.mode=wheel")


@pytest.mark.parametrize(
    "words", [("all", "--set", "cluster.role=head", "--yes"), ("multi-node", "--role", "worker", "--yes")]
)
def test_all_with_an_nccl_that_hangs_is_refused_before_anything_is_changed(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    run = in_this_process(*words, "--root", tmp_path / "node", *OLD, "--json")
    (error,) = envelope(run)["errors"]
    assert run.returncode == 1 and error["code"] == "blocked"
    assert "NCCL 2.28.9" in error["message"] and "nccl.mode=source" in error["hint"]
    assert not (tmp_path / "node").exists()


def test_plan_with_an_nccl_that_hangs_names_the_step_and_the_reason(tmp_path: Path) -> None:
    run = in_this_process("plan", "--root", tmp_path / "node", *OLD, "--set", "cluster.role=head")
    assert "NVIDIA/nccl #2353" in " ".join(run.stdout.split()) and "would stop at env-files" in run.stdout
