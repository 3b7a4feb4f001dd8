"""tools/lock.py and tools/upstream.py on a stack whose only wheel is in a folder: no index is asked."""

from pathlib import Path

import pytest

from sparkinstall.patches import PatchSet, Variant, digest
from sparkinstall.stacks import load
from tests.support.tiny_stack import no_index, tiny_stack
from tools import lock, upstream

OTHER = "vllm==0.18.1 \\\n    --hash=sha256:" + "0" * 64 + "\n"


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tiny_stack(tmp_path / "stack")
    for name, value in no_index(path).items():
        monkeypatch.setenv(name, value)
    return path


def test_lock_up_to_date_is_kept(stack: Path) -> None:
    assert lock.main(["--check", str(stack)]) == 0
    assert lock.main([str(stack)]) == 0
    assert lock.regenerate(load(str(stack)), check=True) == []


def test_lock_with_a_difference_is_written_only_without_check(stack: Path) -> None:
    file = stack.with_name("tiny.lock")
    right = file.read_text()
    file.write_text(OTHER)
    assert lock.main(["--check", str(stack)]) == 1
    assert file.read_text() == OTHER
    assert lock.main([str(stack)]) == 0
    assert file.read_text() == right


def test_lock_without_a_solution_fails(stack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(stack.parent.glob("*.whl")).unlink()
    assert lock.main(["--check", str(stack)]) == 1
    assert "uv finds no solution for tiny on aarch64" in capsys.readouterr().err


PROJECT = """
[build-system]
requires = []
[project]
name = "mine"
version = "1"
requires-python = ">=3.11"
dependencies = ["vllm"]
[dependency-groups]
dev = ["torch"]
"""


def test_own_locks_are_made_of_pyproject_and_keep_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = tiny_stack(tmp_path / "stack", more_packages=("editables", "torch"))
    for name, value in no_index(stack).items():
        monkeypatch.setenv(name, value)
    (root := tmp_path / "mine").mkdir()
    (root / "pyproject.toml").write_text(PROJECT)
    made = lock.stale_own(root)
    pins = {file.name: [line.split()[0] for line in text.splitlines() if "==" in line] for file, text in made.items()}
    assert pins == {
        "requirements.lock": ["editables==1", "vllm==0.18.1"],
        "requirements-dev.lock": ["torch==1", "vllm==0.18.1"],
    }
    assert lock.written(made, check=True) == list(made) and not (root / "requirements.lock").exists()
    lock.written(made, check=False)
    assert lock.stale_own(root) == {}
    (root / "requirements.lock").write_text(OTHER)
    assert list(lock.stale_own(root)) == [root / "requirements.lock"]


def test_upstream_with_another_resolution_names_the_lock(stack: Path) -> None:
    assert list(upstream.stale_locks([str(stack)])) == []
    stack.with_name("tiny.lock").write_text(OTHER)
    (line,) = upstream.stale_locks([str(stack)])
    assert line.startswith("tiny.lock: ")


@pytest.mark.parametrize(
    ("newest", "content", "expected"),
    [("1.0.0", b"as shipped", None), ("1.1.0", b"as shipped", "is that of 1.0.0"), ("1.1.0", b"new", "has changed")],
)
def test_upstream_with_a_newer_vllm_says_whether_the_patched_file_changed(
    newest: str, content: bytes, expected: str | None
) -> None:
    shipped = Variant(("1.0.0",), "it.patch", digest(b"as shipped"), digest(b"patched"), "vllm/file.py", ())
    patch = PatchSet("it", 9, "vllm/file.py", (shipped,), ())
    lines = list(upstream.unlisted_release(patch, newest, content))
    assert len(lines) == bool(expected)
    assert all(line.startswith(f"vLLM {newest}: ") and expected and expected in line for line in lines)
