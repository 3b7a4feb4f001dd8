"""The tool's own wheels for other nodes and for bundles: downloaded once for all runs, again if they are damaged."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.bundles import OTHER
from tests.support.rehearsals import environment

ASK = f"""\
from sparkinstall.cluster import bootstrap
print(bootstrap.own_packages(bootstrap.Place("{OTHER}", "3.12", "2.39")))
"""
# In place of pip: it records each call, and is slow enough for another run to come.
PIP = """\
import os, sys, time
from pathlib import Path
with open(os.environ["CALLS"], "a") as calls:
    calls.write("download\\n")
time.sleep(1)
Path(sys.argv[sys.argv.index("--dest") + 1], "tool-1.0-py3-none-any.whl").touch()
"""

Started = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def ask(tmp_path: Path) -> Started:
    """Start a process that asks for the wheels; nothing is downloaded."""
    (tmp_path / "fake/pip").mkdir(parents=True)
    (tmp_path / "fake/pip/__init__.py").touch()
    (tmp_path / "fake/pip/__main__.py").write_text(PIP)
    variables = environment(XDG_CACHE_HOME=str(tmp_path / "cache"), CALLS=str(tmp_path / "calls"))
    variables["PYTHONPATH"] = f"{tmp_path}/fake:{variables['PYTHONPATH']}"
    return lambda: subprocess.Popen([sys.executable, "-c", ASK], env=variables, stdout=subprocess.PIPE, text=True)


def _answers(*asking: "subprocess.Popen[str]") -> set[Path]:
    return {Path(each.communicate(timeout=300)[0].strip()) for each in asking}


def test_two_processes_download_the_tools_packages_once(ask: Started, tmp_path: Path) -> None:
    (folder,) = _answers(ask(), ask())
    assert folder.is_dir() and [each.name for each in folder.parent.iterdir()] == [folder.name]
    assert (tmp_path / "calls").read_text().split() == ["download"]


def test_package_of_the_tool_that_is_damaged_is_downloaded_again(ask: Started, tmp_path: Path) -> None:
    (folder,) = _answers(ask())
    (folder / "rich-15.0.0-py3-none-any.whl").write_bytes(b"damaged")
    assert _answers(ask()) == {folder}
    assert (tmp_path / "calls").read_text().split() == ["download"] * 2
    assert [each.name for each in folder.iterdir()] == ["tool-1.0-py3-none-any.whl"]
