"""Parsers of external input, on the data of hypothesis: they return a value or raise an error in plain words."""

import json
import shlex
import shutil
import string
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from sparkinstall import config, redaction
from sparkinstall.config import Config, Layer
from sparkinstall.errors import BadConfig, JournalDamaged
from sparkinstall.facts.machine import parse_meminfo, parse_release
from sparkinstall.journal.journal import Journal
from sparkinstall.resources.template import quoted
from sparkinstall.system import Undo

settings.register_profile("fast", max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("fast")

NAMES = [setting.name for setting in config.settings()]
printable = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=60).filter(str.isprintable)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


# --- release files and meminfo


@given(st.binary(max_size=2000))
@example(b"DGX_SERIAL_NUMBER=123456789\nDGX_PRETTY_NAME=\x1b]0;owned\x07\x9b31m\n")
@example(b"\x85DGX_SERIAL_NUMBER='1'\x0bNAME=x\x0cSERIAL=2\x1eUUID=3")
def test_parse_release_any_bytes_give_printable_values_and_no_serial_number(content: bytes) -> None:
    for name, value in parse_release(content).items():
        assert value.isprintable() and len(value) <= 200
        assert "SERIAL" not in name.upper() and "UUID" not in name.upper()


@given(st.text(string.ascii_letters + string.digits, min_size=8), st.sampled_from(["", "export ", "  "]))
def test_parse_release_drops_the_serial_number_in_every_notation(serial: str, before: str) -> None:
    for key in ("DGX_SERIAL_NUMBER", "SERIAL_NUMBER", "dgx_serial", "PRODUCT_UUID", "ASSET_TAG"):
        for written in (serial, f'"{serial}"', f"'{serial}'", f" {serial} "):
            found = parse_release(f"NAME=x\n{before}{key}={written}\r\nA=b".encode())
            assert serial not in found.values() and found.get("NAME") == "x"


@given(st.dictionaries(st.from_regex(r"\A[A-Z]{1,8}\Z"), printable.filter(lambda v: v == v.strip(" \"'"))))
def test_parse_release_returns_ordinary_values_unchanged(expected: dict[str, str]) -> None:
    assume(not any(word in name for name in expected for word in ("SERIAL", "UUID", "ASSET")))
    text = "".join(f'{name}="{value}"\n' for name, value in expected.items())
    assert parse_release(text.encode()) == expected


@given(st.binary(max_size=2000))
@example(b"MemTotal:       131072000 kB\nHugePages_Total:       0\n")
def test_parse_meminfo_any_bytes_give_numbers(content: bytes) -> None:
    assert all(value >= 0 for value in parse_meminfo(content).values())


# --- settings

# Fifteen lines that expand to 9 ** 15 letters.
LAUGHS = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (char, char, b",".join([b"*%c" % (char - 1)] * 9)) for char in b"bcdefghijklmno"
)


def build_or_refuse(tmp_path: Path, content: bytes) -> Config | None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    try:
        built, sources = config.build([config.read_layer(path)])
    except BadConfig as problem:
        assert problem.message.isprintable() and len(problem.message) < 400, problem.message
        return None
    assert set(sources) == set(NAMES)
    return built


@given(content=st.binary(max_size=500))
@example(content=b"\xff\xfe")
@example(content=b"prefix: !!python/object/apply:os.system [id]")
@example(content=b"nccl: {jobs: 0x" + b"f" * 5000 + b"}")
@example(content=b"nccl: {jobs: " + b"9" * 5000 + b"}")
@example(content=b"prefix: 2020-13-45")
@example(content=b"[" * 100_000)
@example(content=b"{a: " * 100_000)
@example(content=b"- " * 100_000)
@example(content=b"? " * 100_000)
@example(content=b"#" * (1 << 20) + b"\nprefix: /x")
@example(content=LAUGHS + b"prefix: *o\n")
@example(content=LAUGHS.replace(b"a: &a", b"prefix: &a", 1))
@example(content=b'stack: "~no-such-user/x.yaml"')
@example(content=b'stack: "/\\0/x.yaml"')
@example(content=b"nccl: &n\n  jobs: *n\n")
@example(content=b"k" * 100_000 + b": 1")
@example(content=b'"\\e[31m": 1')
def test_config_of_any_bytes_is_built_or_refused(tmp_path: Path, content: bytes) -> None:
    build_or_refuse(tmp_path, content)


@given(chosen=st.dictionaries(st.sampled_from(NAMES), values, max_size=4))
def test_config_of_any_values_is_built_or_refused(tmp_path: Path, chosen: dict[str, object]) -> None:
    nested: dict[str, object] = {}
    for name, value in chosen.items():
        section, _, leaf = name.rpartition(".")
        inside = nested.setdefault(section, {}) if section else nested
        assert isinstance(inside, dict)
        inside[leaf] = value
    build_or_refuse(tmp_path, yaml.safe_dump(nested).encode())


@given(st.text(max_size=200))
@example("prefix=2020-13-45")
@example("nccl.jobs=" + "9" * 5000)
@example("nccl.jobs=0x" + "f" * 5000)
@example("prefix=" + "[" * 100_000)
@example("nccl.arch=[1")
@example("=")
@example("k" * 100_000 + "=1")
@example("\x1b[31m=1")
def test_assignment_of_any_text_is_parsed_or_refused(text: str) -> None:
    for assignment in (text, f"prefix={text}", f"nccl.jobs={text}", f"packages.extra={text}"):
        try:
            name, value = config.parse_assignment(assignment)
            config.build([Layer("--set", {name: value})])
        except BadConfig as problem:
            assert problem.message.isprintable(), problem.message


@given(st.text(max_size=60) | st.text("/.a", max_size=12))
@example("/.")
@example("/./")
@example("/a/../..")
@example("//")
@example("/a\n")
@example("/" + "a" * 5000)
def test_safe_path_is_one_word_below_the_root(path: str) -> None:
    if config.safe_path(path) is None:
        normal = Path(path)
        assert str(normal) == path and normal.is_absolute() and len(normal.parts) > 1
        assert shlex.quote(path) == path and ".." not in normal.parts


@given(st.text(max_size=40) | st.text("~/.a", max_size=12))
def test_environment_link_accepted_stays_below_the_root(link: str) -> None:
    try:
        config.build([Layer("test", {"environment.link": link})])
    except BadConfig:
        return
    place = "/root-folder" + link.replace("~/", "/home/user/", 1) if link.startswith("~/") else "/root-folder" + link
    assert place.startswith("/root-folder/") and ".." not in place.split("/")


# --- the journal


@given(st.binary(max_size=300), st.booleans())
def test_journal_of_any_bytes_is_read_or_damaged(tmp_path: Path, content: bytes, ended: bool) -> None:
    (tmp_path / "journal.jsonl").write_bytes(content + b"\n" * ended)
    try:
        records = Journal(tmp_path).records()
    except JournalDamaged as problem:
        assert "line" in problem.message and problem.hint
    else:
        assert len(records) == 0 or ended or b"\n" in content


@given(st.dictionaries(st.sampled_from(["v", "n", "at", "run", "step", "undo", "more"]), values))
def test_journal_of_any_json_is_damaged(tmp_path: Path, raw: dict[str, object]) -> None:
    (tmp_path / "journal.jsonl").write_text(json.dumps({"v": 1, **raw}) + "\n")
    with pytest.raises(JournalDamaged):
        Journal(tmp_path).records()


@given(st.text(), st.text(), st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text())))
def test_journal_record_is_read_as_written(tmp_path: Path, step: str, subject: str, after: dict[str, object]) -> None:
    assume(_is_text(step + subject + repr(after)))
    for name in ("journal.jsonl", "journal.last"):
        (tmp_path / name).unlink(missing_ok=True)
    Journal(tmp_path, "run").add(step, Undo("path", subject, {"kind": "absent"}, after))
    record = Journal(tmp_path).records()[0]
    assert (record.step, record.undo) == (step, Undo("path", subject, {"kind": "absent"}, after))


def _is_text(text: str) -> bool:
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


# --- env files

SHELLS = [found for found in map(shutil.which, ("sh", "dash", "bash")) if found]


@given(st.lists(printable, min_size=1, max_size=40))
@example(
    ["$(id)", "`id`", "${HOME}", "\\", '"', "'", "\\\\$x", "!!", "a#b", " ", "", "%h", "*", "~", "\\n", "$$", "x\\"]
)
def test_quoted_value_is_the_same_in_every_shell_and_systemd(words: list[str]) -> None:
    script = "".join(f"V{number}={quoted(word)}\n" for number, word in enumerate(words))
    script += "".join(f'printf "%s\\n" "$V{number}"\n' for number in range(len(words)))
    for shell in SHELLS:
        run = subprocess.run([shell, "-eu"], input=script.encode(), capture_output=True, env={"PATH": "/nowhere"})
        assert run.stdout.decode().split("\n")[:-1] == words, (shell, run.stderr)
    assert [as_systemd_reads(quoted(word)) for word in words] == words


def as_systemd_reads(text: str) -> str:
    """systemd's parse_env_file_internal(), state DOUBLE_QUOTE_VALUE: a backslash is removed before
    SHELL_NEED_ESCAPE (one of "\\`$), and kept before anything else (src/basic/env-file.c)."""
    assert text[0] == text[-1] == '"'
    found, escaped = "", False
    for char in text[1:-1]:
        if escaped:
            found, escaped = found + (char if char in '"\\`$' else "\\" + char), False
        elif char == "\\":
            escaped = True
        else:
            assert char != '"', "the value would end here"
            found += char
    assert not escaped
    return found


@given(st.text(st.characters(categories=("Cc", "Zl", "Zp", "Cf", "Cs")), min_size=1))
def test_quoted_value_with_control_characters_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cannot stand in an environment file"):
        quoted(f"a{text}b")


# --- secrets

secrets = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=6, max_size=40)


@given(secrets, st.text(max_size=30), st.text(max_size=30))
def test_redact_hides_a_secret_of_the_environment(secret: str, before: str, after: str) -> None:
    assume(secret not in redaction.HIDDEN and secret not in before + redaction.HIDDEN + after)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(redaction, "_own_secrets", lambda: redaction.secrets_of({"MY_API_KEY": secret}))
        assert secret not in redaction.redact(before + secret + after)


@given(secrets, secrets)
def test_secrets_of_a_value_with_several_lines_are_its_lines(one: str, other: str) -> None:
    found = redaction.secrets_of({"KEY_PASSWORD": f"{one}\n{other}\n", "HOME": "/home/user"})
    assert {one, other} <= set(found) and "/home/user" not in found


@given(st.text(string.ascii_letters + string.digits + "-_.~!*:@%", min_size=1))
def test_redact_hides_credentials_in_an_address(credentials: str) -> None:
    shown = redaction.redact(f"fetching https://{credentials}@index.example.org/simple/ failed")
    assert shown == f"fetching https://{redaction.HIDDEN}@index.example.org/simple/ failed"


@given(st.text(string.ascii_letters + string.digits, min_size=20))
def test_redact_hides_known_forms_of_secrets_and_keeps_json(secret: str) -> None:
    lines = [
        f"token hf_{secret}",
        f"DGX_SERIAL_NUMBER={secret}",
        f'DGX_SERIAL_NUMBER="{secret}"',
        f"Authorization: Bearer {secret}",
        f"https://user:{secret}@example.org/",
    ]
    shown = json.loads(redaction.redact(json.dumps({"lines": lines, "last": 1})))
    assert len(shown["lines"]) == 5 and shown["last"] == 1
    assert secret not in repr(shown)
    for line in lines:
        assert secret not in redaction.redact(line)
