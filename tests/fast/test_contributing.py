"""The examples of CONTRIBUTING, applied as printed to a copy of the tree, pass its checks and tests."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.documents import REPOSITORY, section


@dataclass(frozen=True)
class Block:
    """A block of code, the file named above it, and its language."""

    file: str
    language: str
    text: str


def blocks(heading: str) -> Iterator[Block]:
    text = section("CONTRIBUTING.md", heading)
    for match in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        named = re.findall(r"\*\*`([\w./-]+)`\*\*", text[: match.start()])
        yield Block(named[-1] if named else "", match[1], match[2])


@dataclass(frozen=True)
class Tree:
    """A copy of the repository."""

    root: Path

    def add(self, block: Block) -> None:
        path = self.root / block.file
        if block.language == "diff":
            path.write_text(patched(path.read_text(), block.text))
        elif block.language == "yaml":
            path.write_text(f"{path.read_text()}\n{block.text}")
        else:
            assert not path.exists(), block.file
            path.write_text(block.text)

    def run(self, *argv: str) -> str:
        """Run a program of this Python's environment, which must succeed, and return its output."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        env = {**kept, "PYTHONPATH": str(self.root), "COLUMNS": "200"}
        done = subprocess.run(argv, cwd=self.root, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    def python(self, *argv: str) -> str:
        return self.run(sys.executable, *argv)

    def typed(self, given: list[Block]) -> None:
        """Check types with mypy, starting from its cache of the unchanged files."""
        if (cache := REPOSITORY / ".mypy_cache").exists():
            shutil.copytree(cache, self.root / ".mypy_cache")
        self.python("-m", "mypy", *(block.file for block in given if block.file.endswith(".py")))

    def tested(self, *argv: str) -> str:
        return self.python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *argv)


def patched(text: str, diff: str) -> str:
    """Apply a diff without line numbers; its old lines must occur exactly once."""
    for place in diff.split("@@\n"):
        lines = place.splitlines(keepends=True)
        old = "".join(line[1:] or line for line in lines if not line.startswith("+"))
        new = "".join(line[1:] or line for line in lines)
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A copy in which every example was followed: the examples are about different things and do not meet."""
    tree = Tree(tmp_path_factory.mktemp("tree"))
    listed = ("git", "ls-files", "-co", "--exclude-standard")
    for name in subprocess.check_output(listed, cwd=REPOSITORY, text=True).splitlines():
        if (REPOSITORY / name).is_file():
            (tree.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, tree.root / name, follow_symlinks=False)
    for block in (*FIX, SIGNATURE, *VERB):
        tree.add(block)
    _add_stack(tree)
    # Some tests ask git for the names of the files.
    tree.run("git", "init", "-q")
    tree.run("git", "add", "-A")
    tree.python("tools/docs.py")
    return tree


def _add_stack(tree: Tree) -> None:
    """Its locks are copied: tools/lock.py needs the index."""
    tree.run("bash", "-ec", STACK.text)
    folder = tree.root / "sparkinstall/stacks"
    old, new = OLD_AND_NEW_STACK
    for arch in ("aarch64", "x86_64"):
        text = (folder / f"{old}.{arch}.lock").read_text()
        (folder / f"{new}.{arch}.lock").write_text(text.replace(f"vllm=={old}", f"vllm=={new}"))


FIX = list(blocks("## Add a fix"))
(SIGNATURE,) = blocks("## Add a signature")
(STACK,) = blocks("## Add a stack")
VERB = list(blocks("## Add a verb"))
NAME_OF_SIGNATURE = str(re.findall(r"- name: (\S+)", SIGNATURE.text)[0])
OLD_AND_NEW_STACK = re.findall(r"stacks/([\d.]+)\.yaml", STACK.text)

# The examples' own tests, and those of the lists that an example extends.
CASES = ("watchdog", "patches_verb", "docs", "engine", "layers", "cli", "stacks", "diagnose")
CHOSEN = (
    f"watchdog or patches_verb or docs or engine or floor or point_down or help or stack or {NAME_OF_SIGNATURE}"
    " or page_lists or log_index or good_log"
)


def test_examples_are_formatted_and_typed(tree: Tree) -> None:
    tree.python("-m", "ruff", "check", ".")
    tree.python("-m", "ruff", "format", "--check", ".")
    tree.typed([*FIX, *VERB])


def test_examples_pass_their_tests(tree: Tree) -> None:
    tree.tested("-m", "not network", *(f"tests/fast/test_{name}.py" for name in CASES), "-k", CHOSEN)


def test_example_fix_is_documented_and_planned(tree: Tree) -> None:
    assert "`watchdog.enabled`" in (tree.root / "docs/config.md").read_text()
    assert "| 9 |" in (tree.root / "README.md").read_text()
    assert "watchdog" in tree.python("-m", "sparkinstall", "plan", "--only", "watchdog", "--root", "./node")


def test_example_fix_edits_two_files() -> None:
    edited = [block.file for block in FIX if block.language == "diff"]
    assert edited == ["sparkinstall/config/schema.py", "sparkinstall/core/catalogue.py"]


def test_example_signature_is_listed_by_diagnose(tree: Tree) -> None:
    assert NAME_OF_SIGNATURE in tree.python("-m", "sparkinstall", "diagnose", "--known")


def test_example_stack_and_verb_are_listed(tree: Tree) -> None:
    readme = (tree.root / "README.md").read_text()
    assert f"| `{OLD_AND_NEW_STACK[1]}` |" in readme and "| `patches` |" in readme
