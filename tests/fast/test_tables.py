"""Tables of ours are parsed once: what is kept of them is never believed over the text itself."""

from pathlib import Path

import pytest

from sparkinstall import safe_yaml
from sparkinstall.assets import user_cache

TABLE = b"fix: 5\nbelow: null\nreleases: [0.18.1, '0.20']\n"
AS_WRITTEN = {"fix": "5", "below": "null", "releases": ["0.18.1", "0.20"]}
AS_MEANT = {"fix": 5, "below": None, "releases": ["0.18.1", "0.20"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def kept() -> list[Path]:
    return list((user_cache() / "tables").glob("*"))


def test_the_second_time_no_yaml_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    first = safe_yaml.load_table(TABLE)
    monkeypatch.setattr(safe_yaml, "load", lambda *_, **__: pytest.fail("parsed again"))
    assert first == safe_yaml.load_table(TABLE) == AS_MEANT


def test_the_two_ways_to_read_a_scalar_are_kept_apart() -> None:
    for _ in range(2):
        assert safe_yaml.load_table(TABLE) == AS_MEANT
        assert safe_yaml.load_table(TABLE, only_text=True) == AS_WRITTEN
    assert len(kept()) == 2


def test_a_table_that_was_edited_is_parsed_again() -> None:
    safe_yaml.load_table(TABLE)
    assert safe_yaml.load_table(TABLE.replace(b"5", b"6"))["fix"] == 6


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe"])
def test_what_is_kept_and_damaged_is_made_anew(damage: bytes) -> None:
    safe_yaml.load_table(TABLE)
    (path,) = kept()
    path.write_bytes(damage)
    assert safe_yaml.load_table(TABLE) == AS_MEANT
    assert path.read_bytes() != damage


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert safe_yaml.load_table(TABLE) == AS_MEANT


def test_what_json_has_no_word_for_is_parsed_each_time() -> None:
    for _ in range(2):
        assert str(safe_yaml.load_table(b"at: 2026-11-21")["at"]) == "2026-11-21"
    assert not kept()


@pytest.mark.parametrize("content", [b"{", b"a: 1\na: 2", b"[" * 50])
def test_what_is_no_yaml_is_refused_each_time(content: bytes) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"."):
            safe_yaml.load_table(content)
    assert not kept()


def test_uninstall_forgets_them_and_leaves_downloads() -> None:
    safe_yaml.load_table(TABLE)
    safe_yaml.forget_tables()
    assert not user_cache().exists()
    safe_yaml.load_table(TABLE)
    (user_cache() / "wheels").mkdir()
    safe_yaml.forget_tables()
    assert [path.name for path in user_cache().iterdir()] == ["wheels"]
