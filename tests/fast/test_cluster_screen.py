"""What `cluster` shows on a pseudo-terminal; the nodes are folders."""

import re
from pathlib import Path

import pytest

from tests.support.far_nodes import FarNodes, look
from tests.support.terminal import on_a_terminal

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
DRIVER = {"name": "driver", "verdict": "fail", "found": "no driver", "hint": "install it", "title": "", "seconds": 0.0}


@pytest.fixture
def far(tmp_path: Path, checkout: tuple[Path, str]) -> FarNodes:
    nodes = FarNodes(tmp_path, *checkout)
    nodes.add("127.0.0.1", slow=0.2)
    nodes.add("spark-2")
    nodes.add("gone")
    (tmp_path / "gone/ssh-says").write_text("ssh: connect to host gone port 22: Connection timed out\n")
    return nodes


@pytest.mark.parametrize("width", [80, 120])
def test_screen_shows_nodes_in_the_order_of_the_command_line(far: FarNodes, width: int) -> None:
    code, lines = on_a_terminal(far, ["127.0.0.1", "spark-2", "--yes"], width)
    shown = "\n".join(lines)
    assert code == 0, shown
    assert "internal error" not in shown
    for phase in ("look", "packages", "verify"):
        assert re.search(rf"✓ +{phase} +127\.0\.0\.1 ", shown), shown
        assert not re.search(rf"✓ +{phase} +spark-2 ", shown), shown
    assert lines[-2] == "✓ The cluster of 2 nodes is set up and verified."
    assert max(map(len, lines)) <= width


def test_screen_ignored_check_is_a_warning(far: FarNodes) -> None:
    far.answer("127.0.0.1", look=look(preflight=[DRIVER]))
    shown = "\n".join(on_a_terminal(far, ["plan", "127.0.0.1", "spark-2", "--ignore", "driver"])[1])
    assert re.search(r"! +driver +127\.0\.0\.1 +no driver\n +→ ignored: --ignore driver", shown), shown
    assert "✗" not in shown
    assert re.search(r"✗ +driver +127\.0\.0\.1 +no driver", "\n".join(on_a_terminal(far, ["plan", "127.0.0.1"])[1]))


@pytest.mark.parametrize("verb", ["verify", "status"])
def test_screen_unreachable_node_has_only_its_error(far: FarNodes, verb: str) -> None:
    far.answer("127.0.0.1", status=[0, {"installed": False}, []])
    code, lines = on_a_terminal(far, [verb, "127.0.0.1", "gone"])
    assert code == 5
    assert "  ✗  gone       gone does not answer" in lines
    assert any(line.startswith("  ✓  127.0.0.1") for line in lines), lines
    assert "Nothing failed on 127.0.0.1." in lines


def test_screen_counts_checks_on_the_nodes_that_replied(far: FarNodes) -> None:
    shown = "\n".join(on_a_terminal(far, ["plan", "127.0.0.1", "gone"])[1])
    assert "1 of 1 checks passed on 1 of 2 nodes; the others gave no reply" in shown
    shown = "\n".join(on_a_terminal(far, ["plan", "gone"])[1])
    assert "no node gave a reply" in shown
    assert "single" in shown
    assert "…" not in shown
