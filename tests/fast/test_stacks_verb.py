"""`sparkinstall stacks`."""

from pathlib import Path

import pytest

from sparkinstall import stacks
from tests.support.rehearsals import envelope, in_this_process, output_of


def write_stamp(root: Path, text: str) -> None:
    venv = root / "opt/sparkinstall/venv"
    venv.mkdir(parents=True)
    (venv / "sparkinstall.json").write_text(text)


def test_stacks_on_a_machine_without_one_marks_the_default_only(tmp_path: Path) -> None:
    data = envelope(in_this_process("stacks", "--json", "--root", tmp_path / "node", "--platform", "aarch64"))["data"]
    assert (data["platform"], data["installed"]) == ("aarch64", None)
    assert tuple(each["name"] for each in data["stacks"]) == stacks.names()
    assert [each["name"] for each in data["stacks"] if each["default"]] == [stacks.DEFAULT]
    assert not any(each["installed"] for each in data["stacks"])
    assert {each["cuda"] for each in data["stacks"]} == {"13.0"}
    assert all(each["summary"] and each["evidence"] and each["torch"] and each["nccl"] for each in data["stacks"])


def test_stacks_marks_the_installed_one(tmp_path: Path) -> None:
    write_stamp(tmp_path, '{"lock": "0", "stack": "0.22.1"}')
    run = in_this_process("stacks", "--root", tmp_path)
    assert "0.22.1 (installed)  vLLM 0.22.1, torch 2.11.0, NCCL 2.28.9, CUDA 13.0" in run.stdout, output_of(run)
    assert f"{stacks.DEFAULT} (default)  vLLM" in run.stdout
    assert f"sparkinstall plan --stack NAME --root {tmp_path}" in run.stdout


def test_stacks_names_an_installed_stack_of_the_user(tmp_path: Path) -> None:
    write_stamp(tmp_path, '{"lock": "0", "stack": "mine"}')
    assert "Installed: mine, a stack of your own." in in_this_process("stacks", "--root", tmp_path).stdout


@pytest.mark.parametrize("stamp", ["{", "[]"])
def test_stacks_with_a_damaged_stamp_lists_them(stamp: str, tmp_path: Path) -> None:
    write_stamp(tmp_path, stamp)
    run = in_this_process("stacks", "--json", "--root", tmp_path)
    assert (run.returncode, envelope(run)["data"]["installed"]) == (0, None)
