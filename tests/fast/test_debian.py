"""Debian packages for a bundle, which the real apt brings from a repository in a folder."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from sparkinstall.bundle import debian
from sparkinstall.system.local import LocalSystem

_CONTROL = """\
Package: {name}
Version: 1:2.0-1
Architecture: all
Maintainer: n <n@example.org>
Description: for a test
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the package `tiny-for-a-test`, the only one that apt knows."""
    folder, tree = tmp_path / "repository", tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    folder.mkdir()
    control = _CONTROL.format(name="tiny-for-a-test")
    (tree / "DEBIAN/control").write_text(control)
    deb = folder / "tiny.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, deb], check=True, capture_output=True)
    content = deb.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    (folder / "Packages").write_text(f"{control}Filename: ./tiny.deb\nSize: {len(content)}\nSHA256: {digest}\n")
    # With file: apt would leave the package where it is.
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] copy:{folder} ./\n")
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{tmp_path}/sources.list";\nDir::Etc::sourceparts "{os.devnull}";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    return folder


def test_package_damaged_in_the_cache_is_downloaded_again(repository: Path, tmp_path: Path) -> None:
    content = (repository / "tiny.deb").read_bytes()
    for _ in range(3):
        found = debian.download(LocalSystem(), ("tiny-for-a-test",), tmp_path / "cache")
        assert found is not None and found.versions == {"tiny-for-a-test": "1:2.0-1"}
        assert [*found.files] == ["tiny-for-a-test_2.0-1_all.deb"]
        (path,) = found.files.values()
        assert path.read_bytes() == content
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.usefixtures("repository")
def test_package_that_apt_does_not_know_is_not_in_the_bundle(tmp_path: Path) -> None:
    assert debian.download(LocalSystem(), ("another-for-a-test",), tmp_path / "cache") is None
