"""The documents agree with the code: names, codes, options, links and settings."""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from msgspec.structs import replace

from sparkinstall import __version__, errors, ray_ports, stacks
from sparkinstall.cli import cluster_text, json_output
from sparkinstall.cli.multi_node import Role
from sparkinstall.cluster import orchestrate, remote
from sparkinstall.cluster.ssh import Ssh
from sparkinstall.config import Config, build, read_layer, settings
from sparkinstall.core import catalogue
from sparkinstall.envelope import VERSION
from sparkinstall.errors import Exit
from sparkinstall.journal import undo
from sparkinstall.probes.preflight import preflight
from sparkinstall.resources import firewall
from sparkinstall.system import UNDO_FUNCTIONS, Undone
from tests.support.documents import PAGES, REPOSITORY, commands_of, page, rows, section, workflows
from tests.support.nodes import FIXES_OF_SPARKS, HEAD, NODE
from tools import docs

# --- settings


def test_pages_are_as_generated() -> None:
    assert [path.name for path in docs.stale()] == [], "run tools/docs.py (PYTHONPATH=. python tools/docs.py)"


def test_markers_use_every_generator_and_have_an_end() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES if path.name != "CONTRIBUTING.md")
    markers = re.findall(r"<!-- (?:generated: ([a-z -]+)|end) -->", text)
    assert set(markers[::2]) == set(docs.GENERATORS)
    assert set(markers[1::2]) == {""}


def test_table_keeps_written_words_by_row_and_column() -> None:
    old = "| name | level | how |\n|---|---|---|\n| `a` | gone | by `x` |\n| `b` | gone | by `y` |\n"
    rows = [["`b`", "node", docs.Words()], ["`new`", "gpu", docs.Words("as the code says")]]
    new = docs.table(old, ["name", "level", "how"], rows)
    assert new.splitlines()[2:] == ["| `b` | node | by `y` |", "| `new` | gpu | as the code says |"]
    assert docs.table(new, ["name", "level", "how"], rows) == new


def test_generated_changes_only_the_text_between_markers() -> None:
    number, codes = "<!-- generated: number of checks -->0<!-- end -->", "<!-- generated: exit codes -->\n<!-- end -->"
    count, _, rest = docs.generated(f"Knows {number} checks.\n{codes}\n").partition("\n")
    assert re.fullmatch(r"Knows <!-- generated: number of checks -->\d\d<!-- end --> checks\.", count)
    assert "\n| 3 | `drift` |" in rest
    assert rest.endswith("|\n<!-- end -->\n")


def test_check_names_the_stale_pages_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs, "REPOSITORY", tmp_path)
    (tmp_path / "README.md").write_text("<!-- generated: number of checks -->0<!-- end -->")
    assert docs.main(["--check"]) == 1
    assert "README.md is stale" in capsys.readouterr().err
    assert ">0<" in (tmp_path / "README.md").read_text()
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0


def test_example_config_has_every_default(tmp_path: Path) -> None:
    path = tmp_path / "sparkinstall.yaml"
    path.write_text(docs.example())
    layer = read_layer(path)
    assert list(layer.values) == [setting.name for setting in settings()]
    assert build([layer])[0] == Config()


def test_takes_describes_the_values_of_a_setting() -> None:
    takes = {setting.name: docs.takes(setting) for setting in settings()}
    assert takes["fp8.fallback"] == "one of auto, on, off"
    assert takes["cluster.ray_port"] == "a port from 1 to 65535"
    assert takes["nccl.sha256"] == "64 hexadecimal digits, or null"
    assert takes["packages.extra"] == "a list; each a Debian package name"


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", "".join(map(page, ["docs/usage.md"])), re.DOTALL))
def test_usage_page_settings_are_valid(text: str, tmp_path: Path) -> None:
    path = tmp_path / "sparkinstall.yaml"
    path.write_text(text)
    build([read_layer(path)])


# --- words and codes


def test_json_page_lists_the_fields_of_uninstall() -> None:
    (text,) = [row[1] for row in rows(section("docs/json.md", "## `data` of each verb")) if row[0] == "uninstall"]
    outcomes = get_args(Undone.__annotations__["outcome"])
    assert {"changes", "subject", "outcome", "note", *outcomes} == set(re.findall(r"`(\w+)`", text))


def test_json_page_lists_the_fields_of_cluster() -> None:
    (text,) = [row[1] for row in rows(section("docs/json.md", "## `data` of each verb")) if row[0] == "cluster"]
    one = remote.RemoteNode(remote.Member("spark-1", "head", 0, "192.168.100.10"), Ssh("spark-1", None))
    whole = orchestrate.Cluster(
        [one],
        orchestrate.ClusterOptions(Config(), {}),
        lambda _: None,
        done=[orchestrate.Done("spark-1", "look", "changed")],
    )
    data = cluster_text.node_data(whole, one)
    outcomes = get_args(orchestrate.Outcome)
    assert {"nodes", "serving", *data, *data["phases"][0], *outcomes} == set(re.findall(r"`(\w+)`", text))


def test_how_it_works_names_existing_files() -> None:
    named = re.findall(r"`((?:\w+/)*[\w*]+\.py)`", page("docs/how-it-works.md"))
    assert len(named) > 20
    assert [name for name in named if not list((REPOSITORY / "sparkinstall").glob(name))] == []


def test_how_it_works_lists_every_kind_of_change() -> None:
    text = section("docs/how-it-works.md", "## The journal").split("kinds of change:")[1].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", text)) == {*undo.OWN_KINDS, *UNDO_FUNCTIONS}


def test_json_page_envelope_has_the_fields_of_a_real_one() -> None:
    shown = json.loads(re.findall(r"```json\n(.*?)```", page("docs/json.md"), re.DOTALL)[0])
    real = json.loads(json_output.envelope("plan", Exit.USAGE, {}, [errors.BadConfig("x")]))
    assert shown.keys() == real.keys()
    assert shown["errors"][0].keys() == real["errors"][0].keys()
    assert shown["version"] == VERSION


@pytest.mark.parametrize("text", re.findall(r"```json\n(.*?)```", page("docs/json.md"), re.DOTALL))
def test_json_page_examples_are_json(text: str) -> None:
    json.loads(text)


# --- checks, probes, steps, fixes, stacks


def test_checks_page_marks_the_checks_of_several_nodes() -> None:
    table = rows(section("docs/checks.md", "## Preflight checks"))
    serving = replace(NODE, config=Config(serving=HEAD.config.serving))
    alone, served, several = ({probe.name for probe in preflight(node)} for node in (NODE, serving, HEAD))
    assert several - served == {row[0] for row in table if "of several nodes" in row[3]}
    assert served - alone == {row[0] for row in table if "with `serving.model`" in row[3]}


def test_multi_node_page_lists_every_port() -> None:
    closed = firewall.merged([(HEAD.config.serving.port,) * 2, *firewall.ports_between_nodes(HEAD)])
    assert f"TCP {', '.join(closed)}" in section("docs/multi-node.md", "## The firewall")
    for name, port in vars(ray_ports).items():
        if name.isupper() and isinstance(port, int):
            assert str(port) in section("docs/multi-node.md", "## Ray"), name


def test_troubleshooting_has_the_symptom_of_every_fix() -> None:
    numbers = re.findall(r"^### (\d+)\. ", section("docs/troubleshooting.md", "## Symptoms by fix"), re.MULTILINE)
    assert numbers == [str(fix.number) for fix in FIXES_OF_SPARKS]


def test_tables_have_no_empty_cell() -> None:
    for name in ("docs/exit-codes.md", "docs/json.md"):
        assert not re.findall(r"^\|.*\| \|.*$", page(name), re.MULTILINE), name


def test_readme_names_every_package_without_a_hash() -> None:
    open_ones = {
        (stack.name, platform.arch): platform.unhashed
        for stack in map(stacks.load, stacks.names())
        for platform in stack.platforms.values()
        if platform.unhashed
    }
    assert open_ones == {("0.18.1", "aarch64"): ("vllm", "torchaudio")}
    assert "**The hashes of two of them, vllm and torchaudio, were not known in advance" in page("README.md")


def test_changelog_has_the_current_version() -> None:
    assert tomllib.loads(page("pyproject.toml"))["project"]["version"] == __version__
    assert f"## [{__version__}]" in page("CHANGELOG.md")


# --- commands


@cache
def options_of() -> dict[str, set[str]]:
    """Verb -> its options; "" -> those of the program itself."""
    return dict(_options("", docs.whole_program()))


def _options(name: str, command: Any) -> Iterator[tuple[str, set[str]]]:
    shown = [each for each in command.params if not getattr(each, "hidden", False)]
    names = {option for each in shown for option in (*each.opts, *each.secondary_opts)}
    yield name, names | {"-h", "--help"}
    for sub, inner in getattr(command, "commands", {}).items():
        # The verbs that `cluster` runs on the nodes are internal.
        if not inner.hidden:
            yield from _options(f"{name} {sub}".strip(), inner)


GROUPS = {name.rpartition(" ")[0] for name in options_of()}
VERBS = tuple(name for name in options_of() if name not in GROUPS)


@dataclass(frozen=True)
class Command:
    """A command line in a document."""

    page: str
    line: str

    @property
    def tokens(self) -> list[str]:
        return shlex.split(self.line.replace("...", ""), comments=True)


_PIPED = r"(?:ssh [^|`]+ \| )?"


def commands() -> Iterator[Command]:
    """Every command line of ours: in code blocks, with or without a prompt, and between backticks."""
    for path in PAGES:
        name = str(path.relative_to(REPOSITORY))
        blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for line in "".join(blocks).splitlines():
            if match := re.match(rf"\s*(?:\$ )?{_PIPED}((?:\w+=\S+ )*(?:sparkinstall|\./install\.sh) .*)", line):
                yield Command(name, match[1])
        prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for span in re.findall(r"`([^`\n]+)`", prose + "\n" + "\n".join(blocks)):
            if match := re.match(rf"{_PIPED}((?:\w+=\S+ )*(?:sparkinstall|\./install\.sh) .*)", span):
                yield Command(name, match[1])


IN_WORKFLOWS = [Command("docs/ci.md", line) for line in commands_of(workflows())]
# The verb that CONTRIBUTING adds as an example.
EXAMPLE = Command("CONTRIBUTING.md", "sparkinstall patches")
COMMANDS = sorted({*commands(), *IN_WORKFLOWS} - {EXAMPLE}, key=lambda command: (command.page, command.line))


def test_commands_of_several_pages_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/troubleshooting.md"} <= {command.page for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.line}")
def test_command_in_a_document_exists(command: Command) -> None:
    tokens = [token for token in command.tokens if not re.match(r"\w+=", token)]
    program, *rest = tokens
    verb = _verb(program, rest)
    known = set(options_of()[verb])
    if program == "./install.sh":
        known |= set(re.findall(r"--[a-z-]+(?= *(?:\||\)|\]))", page("install.sh")))
    for token in rest:
        if token.startswith("-") and token != "-":
            assert token.split("=")[0] in known, f"{program} {verb} has no {token}"
    _names_are_known(verb, rest)


def _verb(program: str, rest: list[str]) -> str:
    if program == "./install.sh":
        return "all"
    if rest[0].startswith("-"):
        return ""
    verb = " ".join(rest[:2]) if rest[0] in GROUPS else rest[0]
    if rest[0] == "serve" and verb not in options_of():
        # What is no verb of it is a recipe or a model.
        return "serve start"
    if rest[0] == "bench" and verb not in options_of():
        # What is no verb of it is a scenario.
        return "bench run"
    assert verb in options_of(), f"there is no verb {verb}"
    return verb


def _names_are_known(verb: str, rest: list[str]) -> None:
    steps = {step.name for step in catalogue.STEPS} | {"STEP", "watchdog"}
    checks = {probe.name for probe in preflight(HEAD)} | {"CHECK", "NAME"}
    shipped = {*stacks.names(), "NAME", "0.99"}
    for option, value in pairwise(rest):
        if option in ("--only", "--skip"):
            assert value in steps
        if option == "--role":
            assert value in {role.value for role in Role}
        if option == "--ignore":
            assert value in checks
        if option == "--stack":
            assert value in shipped or value.endswith(".yaml")
        if option == "--set" and value != "KEY=VALUE":
            assert value.split("=")[0] in {setting.name for setting in settings()}
    if verb == "run":
        assert rest[1:2] == [] or rest[1] in steps


# --- links, and what no page may contain


def links() -> Iterator[tuple[Path, str]]:
    for path in PAGES:
        prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if not target.startswith(("http://", "https://", "mailto:")):
                yield path, target


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("path", "target"), [pytest.param(p, t, id=f"{p.name} -> {t}") for p, t in sorted(set(links()))]
)
def test_link_has_a_target(path: Path, target: str) -> None:
    file, _, anchor = target.partition("#")
    linked = (path.parent / file).resolve() if file else path
    assert linked.is_relative_to(REPOSITORY)
    assert linked.exists()
    assert not anchor or anchor in anchors(linked)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.name))
def test_page_has_no_private_path_or_secret(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"/home/\w+|/root\b|/Users/\w+|/work/|/tmp/\w+|/\.pyenv|[A-Za-z]:\\", text)
    assert not re.findall(r"\bSERIAL_NUMBER=\S+|\bhf_[A-Za-z0-9]{20,}", text)
    assert "\t" not in text
    assert not re.findall(r" +$", text, re.MULTILINE)
    assert not [line for line in text.splitlines() if len(line) > 160 and not line.startswith(("|", "{"))]


def test_readme_speed_is_as_measured() -> None:
    shown = section("README.md", "## Speed")
    measured = "".join((REPOSITORY / f"benchmarks/{name}.md").read_text() for name in ("results", "cluster"))
    figures = re.findall(r"\b\d+\.\d+ (?:s|x|%)", shown)
    assert len(figures) > 8
    assert [figure for figure in figures if f" {figure} " not in measured] == []
