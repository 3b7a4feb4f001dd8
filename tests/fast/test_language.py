"""One word per concept: no page, help text, message, docstring or comment uses a retired word (CONTRIBUTING)."""

import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
# Old releases are described in their own words; logs and evidence are quoted as programs wrote them.
QUOTED = (
    *("CHANGELOG.md", "LICENSE", "docs/evidence/", "tests/logs/", "tests/fast/test_language.py"),
    *("patches/cutlass", "knowledge/records/"),
)
SHOWN = (".py", ".md", ".j2", ".yaml", ".sh", ".toml")
RETIRED = {
    r"\bmend(s|ed|ing)?\b": "hint; fix",
    r"\bas (it|they) should be\b": "ok, up to date",
    r"\bleft to the node\b": "node only",
    r"\banew\b": "again; reinstall, rebuild (--force)",
    r"\b(take|takes|taken|taking|took)( \w+)? back\b": "undo, restore",
    r"\bputs?( \w+)? back\b": "restore, roll back",
    r"\bdead[ -]man\b": "rollback timer",
    r"\bnot looked at\b": "skipped (reason)",
    r"\bthe thinking\b": "reasoning field, reasoning",
    r"\b(is|are|all) well\b": "ok",
    r"\bthe eight\b|\beight fixes\b": "the fixes",
    r"\b(make|makes|made) so\b": "apply",
    r"\bbeneath\b": "below",
    r"\bsomebody\b": "another user, another program",
    r"\bside by side\b": "in parallel",
    r"\b(gives|gave) no answer\b": "does not answer",
    r"\b(broke|break|breaks) off\b": "was interrupted",
    r"\bcan(not)? be told\b": "is unknown",
    r"\bto be had\b": "available",
    r"\bis there already\b": "already exists",
}


def pages() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    names = listed.stdout.splitlines()
    return [name for name in names if name.endswith(SHOWN) and not name.startswith(QUOTED)]


def test_pages_use_no_retired_word() -> None:
    found = [
        f"{name}:{number}: {match[0]!r} -> {better}"
        for name in pages()
        for number, line in enumerate((REPOSITORY / name).read_text(encoding="utf-8").splitlines(), 1)
        for word, better in RETIRED.items()
        for match in re.finditer(word, line, re.IGNORECASE)
    ]
    assert found == [], "\n".join(found)


def test_pages_include_documents_code_and_scripts() -> None:
    names = pages()
    assert {"README.md", "docs/json.md", "install.sh", "sparkinstall/errors.py"} <= set(names)
