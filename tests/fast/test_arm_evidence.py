"""The cheap parts of tests/arm/run: what it changes of the tool, and how it compares two locks."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from sparkinstall import payloads, stacks
from sparkinstall.stacks import Platform
from tests.arm import patient, stack


def test_patient_payload_has_a_longer_limit_and_nothing_else() -> None:
    shipped = payloads.source("inspect_env")
    assert shipped.count(patient.LIMIT) == 1
    assert len(patient.source("inspect_env").splitlines()) == len(shipped.splitlines())
    assert f"_LIMIT = 120.0 * {patient.FACTOR}" in patient.source("inspect_env")


def test_patient_program_gets_the_processor_of_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMU_CPU", "cortex-a76")
    process = patient.start(("sh", "-c", 'test "$QEMU_CPU" = cortex-a76'), {"PATH": "/usr/bin:/bin"})
    assert process.wait() == 0


def test_stack_with_wheels_by_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(stacks.StackError, match="by address"):
        stack.write("0.18.1", tmp_path)


def test_differences_count_the_same_files_and_name_the_others(tmp_path: Path) -> None:
    same, other, third = (f"--hash=sha256:{digit * 64}" for digit in "123")
    spark = f"a==1 {same}\nb==1 {same}\nc==1 {same}\nd==1 {same}\n"
    here = f"a==1 {same}\nb==1 {other}\nc==2 {third}\ne==1 {same}\n"
    lines = stack.differences(_with_lock(tmp_path, "spark", spark), _with_lock(tmp_path, "here", here))
    assert lines[1].startswith("1 of them are the same file")
    assert lines[2:] == [
        "1 have the same version, built for Python 3.12: b",
        "another version: c 1 becomes c 2",
        "only for Python 3.12: e 1",
        "only on a Spark: d 1",
    ]


def _with_lock(folder: Path, name: str, text: str) -> stacks.Stack:
    lock = folder / f"{name}.lock"
    lock.write_text(text)
    shipped = stacks.load("0.29.0")
    return replace(shipped, platforms={"aarch64": Platform("aarch64", (), lock=lock)})
