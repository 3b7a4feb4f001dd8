"""Installed files and their wheels: changed, cut, missing, reinstalled, and wheels with a wrong RECORD."""

import csv
import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from sparkinstall.assets import asset
from sparkinstall.facts import wheel_files
from sparkinstall.node import Node
from sparkinstall.probes import wheels
from sparkinstall.system.local import LocalReader
from tests.support.nodes import node_of
from tests.support.rehearsals import SETTINGS, Rehearsal, output_of
from tests.support.tiny_stack import no_index, tiny_stack
from tests.support.wheel_member import opened_wheel
from tests.support.wheel_record import recorded_hash, recorded_sizes


@pytest.fixture
def packages(tmp_path: Path) -> Node:
    """An environment of two packages, one of them not in the lock; all are older than the stamp, as in the step."""
    node = node_of(tmp_path)
    for name in ("vllm", "added"):
        install(tmp_path, node, name, {f"{name}/__init__.py": b"one = 1\n", f"{name}/_C.abi3.so": b"\x7fELF" * 50})
    venv = tmp_path / node.venv.lstrip("/")
    (venv / "installed.lock").write_text("vllm==0.18.1 \\\n    --hash=sha256:00\n")
    time.sleep(0.02)
    (venv / "sparkinstall.json").write_text("{}")
    time.sleep(0.02)
    return node


def site_of(root: Path, node: Node) -> Path:
    return root / node.venv.lstrip("/") / "lib/python3.12/site-packages"


def install(root: Path, node: Node, name: str, files: Mapping[str, bytes], version: str = "0.18.1") -> None:
    site, rows = site_of(root, node), ""
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content)
        rows += f"{path},{recorded_hash(content)},{len(content)}\n"
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "RECORD").write_text(f"{rows}{folder.name}/RECORD,,\n")


def test_wheel_files_unchanged_pass(packages: Node, tmp_path: Path) -> None:
    found = wheels.files(packages, LocalReader(str(tmp_path)))
    assert (found.verdict, found.found) == ("pass", "1 package, as in its wheel")


def test_wheel_files_with_a_newer_date_pass(packages: Node, tmp_path: Path) -> None:
    (site_of(tmp_path, packages) / "vllm/__init__.py").write_bytes(b"one = 1\n")
    assert wheels.files(packages, LocalReader(str(tmp_path))).verdict == "pass"


def test_wheel_files_with_a_changed_file_of_the_same_size_and_date_fail(packages: Node, tmp_path: Path) -> None:
    path = site_of(tmp_path, packages) / "vllm/__init__.py"
    times = path.stat()
    path.write_bytes(b"one = 2\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = wheels.files(packages, LocalReader(str(tmp_path)))
    assert (found.verdict, found.found) == ("fail", "vllm/__init__.py was changed")
    assert "sparkinstall run environment fp8 --force" in found.hint


def test_wheel_files_cut_or_missing_fail(packages: Node, tmp_path: Path) -> None:
    (site_of(tmp_path, packages) / "vllm/_C.abi3.so").write_bytes(b"\x7fELF")
    (site_of(tmp_path, packages) / "vllm/__init__.py").unlink()
    found = wheels.files(packages, LocalReader(str(tmp_path)))
    assert found.found == "vllm/__init__.py is missing; vllm/_C.abi3.so has 4 bytes instead of 200"


def test_wheel_files_of_a_reinstalled_wheel_fail(packages: Node, tmp_path: Path) -> None:
    install(tmp_path, packages, "vllm", {"vllm/__init__.py": b"another = 1\n"})
    found = wheels.files(packages, LocalReader(str(tmp_path)))
    assert (found.verdict, found.found) == ("fail", "vllm was reinstalled since")


def test_wheel_files_of_packages_outside_the_lock_are_ignored(packages: Node, tmp_path: Path) -> None:
    (site_of(tmp_path, packages) / "added/__init__.py").unlink()
    install(tmp_path, packages, "more", {"more/__init__.py": b""})
    assert wheels.files(packages, LocalReader(str(tmp_path))).verdict == "pass"


def test_wheel_files_of_two_wheels_pass_with_the_content_of_either(packages: Node, tmp_path: Path) -> None:
    """As with nvidia-cutlass-dsl-libs-base and -libs-cu13: the one that was unpacked last wins."""
    install(tmp_path, packages, "other", {"shared.py": b"of the other\n"})
    install(tmp_path, packages, "vllm", {"shared.py": b"of vllm\n"})
    venv = tmp_path / packages.venv.lstrip("/")
    (venv / "installed.lock").write_text("vllm==0.18.1 \\\n    --hash=sha256:00\nother==0.18.1\n")
    time.sleep(0.02)
    (venv / "sparkinstall.json").write_text("{ }")
    time.sleep(0.02)
    shared = site_of(tmp_path, packages) / "shared.py"
    for content, verdict in ((b"of vllm\n", "pass"), (b"of the other\n", "pass"), (b"of nobody\n", "fail")):
        shared.write_bytes(content)
        assert wheels.files(packages, LocalReader(str(tmp_path))).verdict == verdict


def install_with_a_wrong_record(root: Path, node: Node, name: str, version: str) -> Path:
    """Install a wheel with a file that is longer than its RECORD says, before the stamp."""
    path = f"{name}/lib.so"
    install(root, node, name, {path: b"short"}, version)
    (site_of(root, node) / path).write_bytes(b"longer")
    lock = root / node.venv.lstrip("/") / "installed.lock"
    lock.write_text(f"{lock.read_text()}{name}=={version}\n")
    time.sleep(0.02)
    lock.with_name("sparkinstall.json").write_text("{ }")
    time.sleep(0.02)
    return site_of(root, node) / path


def test_wheel_files_with_a_wrong_record_warn(packages: Node, tmp_path: Path) -> None:
    on = LocalReader(str(tmp_path))
    file = install_with_a_wrong_record(tmp_path, packages, "odd", "1.0")
    Path(on.real(packages.wheel_exceptions)).write_text(wheel_files.unlike_their_records(packages, on))
    found = wheels.files(packages, on)
    assert (found.verdict, found.found) == ("warn", "odd/lib.so has 6 bytes instead of 5, since it was installed")
    assert "the wheel's RECORD is wrong" in found.hint
    for content in (b"", b"longed"):
        file.write_bytes(content)
        found = wheels.files(packages, on)
        assert (found.verdict, found.found) == ("fail", f"odd/lib.so has {len(content)} bytes instead of 5")


def test_wheel_files_with_a_known_wrong_record_pass(
    packages: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, on = tmp_path / "knowledge/records", LocalReader(str(tmp_path))
    known.mkdir(parents=True)
    monkeypatch.setattr(wheel_files, "asset", lambda name: tmp_path / name)
    file = install_with_a_wrong_record(tmp_path, packages, "Odd_Name", "1.0")
    assert wheels.files(packages, on).verdict == "fail"
    digest = recorded_hash(b"longer")
    (known / "odd-name-1.0.csv").write_text(f"Odd_Name/for_another_arch.so,{digest},1\nOdd_Name/lib.so,{digest},6\n")
    assert (wheels.files(packages, on).verdict, wheel_files.unlike_their_records(packages, on)) == ("pass", "")
    file.write_bytes(b"longed")
    assert wheels.files(packages, on).found == "Odd_Name/lib.so was changed"


@pytest.mark.network
@pytest.mark.parametrize("path", sorted(asset("knowledge").glob("records/*.csv")), ids=lambda path: path.stem)
@pytest.mark.parametrize("platform", ["aarch64-manylinux_2_39", "x86_64-manylinux_2_39"])
def test_known_wrong_records_match_the_wheels(path: Path, platform: str) -> None:
    package, _, version = path.stem.rpartition("-")
    known = {(name, digest, int(size)) for name, digest, size in csv.reader(path.read_text().splitlines())}
    with opened_wheel(package, version, platform) as wheel:
        names = {name for name, _, _ in known} & set(wheel.namelist())
        sizes = recorded_sizes(wheel)
        assert names
        for name in names:
            content = wheel.read(name)
            assert (name, recorded_hash(content), len(content)) in known
            assert int(sizes[name]) != len(content)


def test_environment_with_a_wrong_record_stores_the_real_hash(tmp_path: Path) -> None:
    stack = tiny_stack(tmp_path / "stack", more=b"one = 1\n")
    node = Rehearsal(tmp_path / "node", (*SETTINGS, "--stack", str(stack)))
    run = node.all("--json", **no_index(stack))
    (noted,) = node.root.rglob("not-as-recorded.csv")
    assert "Traceback" not in output_of(run)
    assert noted.read_text().startswith("vllm/__init__.py,sha256=") and noted.read_text().endswith(",8\n")


def test_wheel_files_ignore_the_patched_file(packages: Node, tmp_path: Path) -> None:
    (target,) = wheel_files.patched_files()
    install(tmp_path, packages, "vllm", {target: b"as vLLM has it\n"})
    (tmp_path / packages.venv.lstrip("/") / "sparkinstall.json").write_text("{ }")
    (site_of(tmp_path, packages) / target).write_bytes(b"as we have it, patched\n")
    assert wheels.files(packages, LocalReader(str(tmp_path))).verdict == "pass"


def test_wheel_files_of_a_missing_package_fail(packages: Node, tmp_path: Path) -> None:
    (site_of(tmp_path, packages) / "vllm-0.18.1.dist-info").rename(tmp_path / "elsewhere")
    found = wheels.files(packages, LocalReader(str(tmp_path)))
    assert (found.verdict, found.found) == ("fail", "vllm is not installed")


def test_wheel_files_without_the_lock_fail(packages: Node, tmp_path: Path) -> None:
    (tmp_path / packages.venv.lstrip("/") / "installed.lock").unlink()
    found = wheels.files(packages, LocalReader(str(tmp_path)))
    assert (found.verdict, "installed.lock is missing" in found.found) == ("fail", True)


def test_wheel_files_without_an_environment_fail(tmp_path: Path) -> None:
    assert wheels.files(node_of(tmp_path), LocalReader(str(tmp_path))).verdict == "fail"
