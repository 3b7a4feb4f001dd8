"""tools/lock.py and tools/upstream.py on a stack whose one wheel lies in a folder: no index of the day has a say."""

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


def test_a_lock_that_is_right_is_left_alone(stack: Path) -> None:
    assert lock.main(["--check", str(stack)]) == 0
    assert lock.main([str(stack)]) == 0
    assert lock.remake(load(str(stack)), check=True) == []


def test_a_lock_that_differs_is_told_and_only_without_check_written(stack: Path) -> None:
    file = stack.with_name("tiny.lock")
    right = file.read_text()
    file.write_text(OTHER)
    assert lock.main(["--check", str(stack)]) == 1
    assert file.read_text() == OTHER
    assert lock.main([str(stack)]) == 0
    assert file.read_text() == right


def test_a_stack_without_a_solution_is_one_error(stack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(stack.parent.glob("*.whl")).unlink()
    assert lock.main(["--check", str(stack)]) == 1
    assert "uv finds no solution for tiny on aarch64" in capsys.readouterr().err


def test_upstream_names_the_lock_that_the_resolver_makes_differently(stack: Path) -> None:
    assert list(upstream.stale_locks([str(stack)])) == []
    stack.with_name("tiny.lock").write_text(OTHER)
    (line,) = upstream.stale_locks([str(stack)])
    assert line.startswith("tiny.lock: ")


@pytest.mark.parametrize(
    ("newest", "content", "news"),
    [("1.0.0", b"as shipped", None), ("1.1.0", b"as shipped", "is that of 1.0.0"), ("1.1.0", b"new", "has changed")],
)
def test_upstream_tells_what_a_new_vllm_asks_of_the_patch(newest: str, content: bytes, news: str | None) -> None:
    shipped = Variant("vllm/file.py", "it.patch", digest(b"as shipped"), digest(b"patched"), ("1.0.0",), ())
    patch = PatchSet("it", 9, "vllm/file.py", (shipped,), ())
    lines = list(upstream.unlisted_release(patch, newest, content))
    assert len(lines) == bool(news)
    assert all(line.startswith(f"vLLM {newest}: ") and news and news in line for line in lines)
