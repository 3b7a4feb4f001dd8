"""Generate what the documents derive from the code: a maintainer's tool, run from the repository's root.

    PYTHONPATH=. python tools/docs.py            # write the pages
    PYTHONPATH=. python tools/docs.py --check    # write nothing; exit 1 and name the pages that are stale

A page has it between `<!-- generated: NAME -->` and `<!-- end -->`. Some columns of a table hold words of people, who
explain more than the code declares: the tool keeps these, row by row, and gives a new row what the code says of it.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any, Union, get_args, get_origin
from unittest.mock import patch

import click
import typer
from msgspec.structs import replace

import sparkinstall
from sparkinstall import stacks
from sparkinstall.assets import asset
from sparkinstall.cli import app
from sparkinstall.cluster import orchestrate
from sparkinstall.config import ClusterConfig, Config, ServingConfig, Setting, settings
from sparkinstall.core import catalogue, engine, fixes
from sparkinstall.diagnose import signatures
from sparkinstall.errors import Exit, Problem
from sparkinstall.fixes import Fix
from sparkinstall.measure.advice import rules
from sparkinstall.measure.vllm_dashboards import VLLM_DASHBOARDS
from sparkinstall.node import Node
from sparkinstall.patches import load
from sparkinstall.probes import LEVELS, Probe, Verdict, known_hosts, nccl_tests
from sparkinstall.probes.preflight import preflight
from sparkinstall.recipes.catalogue import shipped
from sparkinstall.resources import State
from sparkinstall.schema import words
from sparkinstall.steps import Step
from tools import score

REPOSITORY = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(<!-- generated: ([a-z -]+) -->)(.*?)(<!-- end -->)", re.DOTALL)

ALONE = Node(Config(), stacks.load(stacks.DEFAULT), "aarch64", "aarch64", False, False, "/nowhere", Path("/nowhere"))
SEVERAL = replace(ALONE, config=Config(cluster=ClusterConfig(role="head")))
# This node has every step that is not off by default, and every check.
SERVING = replace(ALONE, config=Config(cluster=ClusterConfig(role="head"), serving=ServingConfig(model="m")))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Generate what the documents derive from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    check = parser.parse_args(argv).check
    pages = stale()
    for path, text in pages.items():
        if not check:
            path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(REPOSITORY)}{' is stale: run tools/docs.py' if check else ''}", file=sys.stderr)
    return int(check and bool(pages))


def stale() -> dict[Path, str]:
    """Return the stale pages with their new text."""
    paths = sorted(path for folder in (".", "docs", "patches") for path in REPOSITORY.glob(f"{folder}/*.md"))
    pages = {path: path.read_text(encoding="utf-8") for path in paths}
    new = {path: generated(text) for path, text in pages.items() if "<!-- generated" in text}
    return {path: text for path, text in new.items() if text != pages[path]}


def generated(page: str) -> str:
    """Return a page with its generated parts renewed."""

    def block(match: re.Match[str]) -> str:
        begin, name, old, end = match.groups()
        # A table begins on its own line; a number or a list is within a sentence.
        new = "\n" + GENERATORS[name](old) if old.startswith("\n") else GENERATORS[name](old)
        return begin + new + end

    return _BLOCK.sub(block, page)


Generator = Callable[[str], str]
GENERATORS: dict[str, Generator] = {}
"""Generate the text between two markers, by its name, from the current one."""


def generates(name: str) -> Callable[[Generator], Generator]:
    def register(generator: Generator) -> Generator:
        GENERATORS[name] = generator
        return generator

    return register


# --- tables


class Words(str):
    """A cell written by hand: the one in the table, or this default."""


def table(old: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. Hand-written cells are kept from the old one, by first cell and column name."""
    kept = _rows(old)
    lines = [_line(columns), "|" + "---|" * len(columns)]
    for row in rows:
        mine = kept.get(row[0].replace("|", r"\|"), {})
        cells = zip(columns, row, strict=True)
        lines.append(_line([mine.get(at, cell) if isinstance(cell, Words) else _escaped(cell) for at, cell in cells]))
    return "\n".join(lines) + "\n"


def _rows(text: str) -> dict[str, dict[str, str]]:
    """Map the first cell of each row to its cells by column name."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def _line(cells: Sequence[str]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|")


def code(name: object) -> str:
    return f"`{name}`"


def listed(names: Iterable[object]) -> str:
    """`a`, `b` and `c`."""
    *first, last = map(code, names)
    return f"{', '.join(first)} and {last}" if first else last


# --- settings


@generates("settings")
def _settings(_: str) -> str:
    return "\n".join(_settings_of(section, list(of)) for section, of in _sections())


def _sections() -> Iterator[tuple[str, Iterator[Setting]]]:
    return groupby(settings(), key=lambda setting: setting.name.rpartition(".")[0])


def _settings_of(section: str, of: list[Setting]) -> str:
    rows = ([code(each.name), code(yaml_value(each.default)), takes(each), each.doc] for each in of)
    return (f"### `{section}`\n\n" if section else "") + table("", ["setting", "default", "takes", "what"], rows)


def takes(setting: Setting) -> str:
    """Describe the valid values of a setting, in the words of its type or its check."""
    kind = get_args(setting.type)[0]
    if get_origin(kind) is tuple:
        return f"a list; each {_rule(setting, get_args(kind)[0])}"
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (setting.type,)
    return ", or ".join(_rule(setting, each) for each in members)


def _rule(setting: Setting, kind: Any) -> str:
    # An invalid value makes a check describe the valid ones.
    refusal = setting.check("\0") if setting.check and words(kind) == "text" else None
    return (refusal or words(kind)).removeprefix("must be ")


def yaml_value(value: Any) -> str:
    """Return a default as in a YAML file. JSON is YAML, and quotes text that YAML would read as a number."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


@generates("all defaults")
def _all_defaults(_: str) -> str:
    return f"```yaml\n{example()}```\n"


def example() -> str:
    """A config file with every default."""
    return "\n".join(_example_section(section, list(of)) for section, of in _sections())


def _example_section(section: str, of: list[Setting]) -> str:
    outer, _, name = section.rpartition(".")
    above = "  " if outer else ""
    indent = f"{above}  " if section else ""
    lines = [f"{above}{name}:"] if section else []
    for each in of:
        lines += [f"{indent}# {each.doc}", f"{indent}{each.name.rpartition('.')[2]}: {yaml_value(each.default)}"]
    return "\n".join(lines) + "\n"


@generates("settings that matter")
def _settings_that_matter(old: str) -> str:
    """Settings are chosen by hand; defaults come from the code."""
    defaults = {code(each.name): code(yaml_value(each.default)) for each in settings()}
    return table(old, ["setting", "default", "what"], ([name, defaults[name], Words()] for name in _rows(old)))


# --- words and codes


@generates("exit codes")
def _exit_codes(old: str) -> str:
    rows = ([str(int(each)), code(each.word), Words()] for each in Exit)
    return table(old, ["code", "status", "when"], rows)


@generates("error codes")
def _error_codes(old: str) -> str:
    kinds = {each.code: each for each in reversed(problems())}
    order = sorted(kinds, key=lambda name: (kinds[name].exit_code, name))
    rows = ([code(name), str(int(kinds[name].exit_code)), Words(_first_line(kinds[name]))] for name in order)
    return table(old, ["code", "exit", "meaning"], rows)


def problems() -> list[type[Problem]]:
    """Return every kind of error in the code, the general one first."""
    for module in pkgutil.walk_packages(sparkinstall.__path__, "sparkinstall."):
        if not module.name.startswith(("sparkinstall.payloads.", "sparkinstall.__main__")):
            import_module(module.name)
    return [kind for kind in _with_subclasses(Problem) if kind.__module__.startswith("sparkinstall.")]


def _with_subclasses(kind: type[Problem]) -> Iterator[type[Problem]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _with_subclasses(each)


def _first_line(of: Any) -> str:
    return str(of.__doc__ or "").split("\n")[0]


@generates("outcomes")
def _outcomes(old: str) -> str:
    return table(old, ["`outcome`", "meaning"], ([code(each), Words()] for each in get_args(engine.Outcome)))


@generates("states")
def _states(old: str) -> str:
    columns = ["`state`", "fields beside `key` and `changed`", "what"]
    rows = (
        [code(each.__struct_config__.tag), ", ".join(map(code, each.__match_args__)), Words(_first_line(each))]
        for each in get_args(State)
    )
    return table(old, columns, rows)


@generates("standings")
def _standings(old: str) -> str:
    """Return the table if there is one, else a list."""
    names = get_args(fixes.Standing)
    return table(old, ["word", "meaning"], ([code(each), Words()] for each in names)) if "|" in old else listed(names)


@generates("verdicts")
def _verdicts(_: str) -> str:
    return listed(get_args(Verdict))


@generates("levels")
def _levels(old: str) -> str:
    rows = ([code(each), Words()] for each in LEVELS)
    return table(old, ["level", "what its probes do"], rows) if "|" in old else listed(LEVELS)


# --- steps, phases, fixes


@generates("steps")
def _steps(old: str) -> str:
    rows = ([code(step.name), _where(step), Words(step.why)] for step in catalogue.STEPS)
    return table(old, ["step", "on", "what"], rows)


def _where(step: Step) -> str:
    if step.wanted(ALONE):
        return "every node"
    if step.wanted(SEVERAL):
        return "several nodes"
    return "a model is named" if step.wanted(SERVING) else "off by default"


@generates("steps of every node")
def _steps_of_every_node(_: str) -> str:
    return listed(step.name for step in catalogue.of(ALONE))


@generates("steps of several nodes")
def _steps_of_several_nodes(_: str) -> str:
    return listed(step.name for step in catalogue.STEPS if _where(step) == "several nodes")


_WHOM = {"all": "all nodes", "head": "the head", "workers": "the workers"}


@generates("phases")
def _phases(old: str) -> str:
    return table(old, ["phase", "where", "steps", "what"], _phase_rows())


def _phase_rows() -> Iterator[Sequence[str]]:
    yield "look", "all nodes", "", Words()
    for phase in orchestrate.PHASES:
        if phase.copied:
            yield "copy", "head to workers", "", Words()
        yield code(phase.name), _WHOM[phase.whom], ", ".join(map(code, phase.steps)), Words()
    yield "verify", "all nodes", "", Words()


@generates("fixes")
def _fixes(old: str) -> str:
    columns = ["#", "without it", "fix", "what sparkinstall does", "on"]
    rows = ([str(fix.number), Words(), fix.title, Words(_why(fix)), _on(fix)] for fix in fixes.FIXES)
    return table(old, columns, rows)


def _on(fix: Fix) -> str:
    return "several nodes" if fix.between else "every node"


def _why(fix: Fix) -> str:
    return next(step.why for step in catalogue.STEPS if fix in step.fixes)


@generates("fixes by step and probe")
def _fixes_by_step_and_probe(_: str) -> str:
    rows = [
        [
            str(fix.number),
            fix.title,
            ", ".join(code(step.name) for step in catalogue.STEPS if fix in step.fixes),
            ", ".join(code(probe.name) for _, probe in probes() if probe.fix == fix),
        ]
        for fix in fixes.FIXES
    ]
    return table("", ["#", "fix", "steps that apply it", "probes that prove it"], rows)


# --- checks and probes


@cache
def probes() -> tuple[tuple[Step, Probe], ...]:
    """Return every probe of a step, with the step."""
    # A machine with two GPUs has one more.
    with patch.object(nccl_tests, "gpus", lambda: 2):
        return tuple((step, probe) for step in catalogue.STEPS for probe in step.probes(SERVING))


@generates("preflight checks")
def _preflight_checks(old: str) -> str:
    columns = ["name", "title", "in a rehearsal", "passes if", "if it fails"]
    rows = (
        [code(each.name), each.title, "node only" if each.needs_node else "checked", Words(), Words(each.impact)]
        for each in preflight(SERVING)
    )
    return table(old, columns, rows)


@generates("hints of preflight checks")
def _hints_of_preflight_checks(old: str) -> str:
    rows = ([code(each.name), Words(each.impact)] for each in preflight(SERVING))
    return table(old, ["check", "what to do"], rows)


@generates("number of checks")
def _number_of_checks(_: str) -> str:
    return str(len(list(preflight(SERVING))))


@generates("probes")
def _probes(old: str) -> str:
    columns = ["name", "step", "level", "fix", "title", "how it looks", "if it fails"]
    rows = (
        [
            *(code(probe.name), code(step.name), probe.level, str(probe.fix.number) if probe.fix else ""),
            *(probe.title, Words(), probe.impact),
        ]
        for step, probe in probes()
    )
    return table(old, columns, rows)


@generates("known bad hosts")
def _known_bad_hosts(_: str) -> str:
    columns = ["name", "what it looks at", "verdict", "what it concerns", "last checked", "evidence"]
    rows = (
        [code(rule.name), rule.title, rule.verdict, rule.concerns, str(rule.checked), _seen(rule.evidence)]
        for rule in known_hosts.rules()
    )
    return table("", columns, rows)


def _seen(evidence: Sequence[known_hosts.Evidence]) -> str:
    return "; ".join(f"[{each.seen}]({each.link})" for each in evidence)


def _links(addresses: Sequence[str]) -> str:
    return ", ".join(f"[{number}]({address})" for number, address in enumerate(addresses, 1))


@generates("readings")
def _readings(_: str) -> str:
    columns = ["name", "colour", "when", "what it means", "what to do"]
    return table("", columns, ([code(each.name), each.level, each.condition, each.means, each.do] for each in rules()))


# --- failures, stacks


@generates("failures")
def _failures(_: str) -> str:
    rows = (
        [
            code(each.name),
            each.title + each.note,
            code(each.family) if each.family else "",
            str(each.fix or ""),
        ]
        for each in signatures.load()
    )
    return table("", ["failure", "what it is", "a kind of", "fix"], rows)


@generates("number of failures")
def _number_of_failures(_: str) -> str:
    return str(len(signatures.load()))


@generates("score of the corpus")
def _score(_: str) -> str:
    return "{} of {}".format(*score.counted())


@generates("size of the corpus")
def _size_of_corpus(_: str) -> str:
    return str(sum(map(len, score.cases().values())))


@generates("stacks")
def _stacks(_: str) -> str:
    columns = ["`--stack`", "torch", "triton", "transformers", "CUDA", "NCCL", "for whom", "evidence"]
    return table("", columns, (_stack_row(stacks.load(name)) for name in stacks.names()))


def _stack_row(stack: stacks.Stack) -> Sequence[str]:
    name = code(stack.name) + (" (default)" if stack.name == stacks.DEFAULT else "")
    pins = {pin.name: pin.version for pin in stack.requirements}
    versions = (pins.get(each, "") for each in ("torch", "triton", "transformers"))
    return name, *versions, stack.platforms["aarch64"].cuda, stack.nccl.version, stack.summary, stack.evidence


@generates("number of recipes")
def _number_of_recipes(_: str) -> str:
    return str(len(shipped()))


@generates("variants")
def _variants(_: str) -> str:
    rows = ([code(each.patch), _span(each.releases)] for patches in load(asset("patches")) for each in patches.variants)
    return table("", ["patch", "releases"], rows)


def _span(releases: Sequence[str]) -> str:
    return releases[0] if len(releases) == 1 else f"{releases[0]} - {releases[-1]}"


# --- verbs and options


def whole_program() -> click.Group:
    """Return the whole command line with every verb imported."""
    group = typer.main.get_command(app.program())
    assert isinstance(group, click.Group)
    for verb in app.VERBS:
        group.add_command(app.command(verb), verb)
    return group


@cache
def commands() -> dict[str, Any]:
    """Verb -> its command, in the order of the help, without what `cluster` runs on the nodes."""
    return dict(_commands("", whole_program()))


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    subs = getattr(command, "commands", {})
    if name and not subs:
        yield name, command
    for sub, inner in subs.items():
        if not inner.hidden:
            yield from _commands(f"{name} {sub}".strip(), inner)


@generates("verbs")
def _verbs(_: str) -> str:
    rows = ([code(f"{name} {_arguments(each)}".strip()), _help(each)] for name, each in commands().items())
    return table("", ["verb", "what"], rows)


@generates("groups of verbs")
def _groups_of_verbs(_: str) -> str:
    group = whole_program()
    shown = [(name, each) for name, each in group.commands.items() if not each.hidden and app.VERBS[name][1]]
    rows = ([code(f"{name}{_its_verbs(each)}"), app.VERBS[name][1]] for name, each in shown)
    return table("", ["verb", "what"], rows)


def _its_verbs(command: Any) -> str:
    """Return the verbs of a group, but for those that may be left out."""
    names = [name for name in getattr(command, "commands", {}) if name not in ("run", "start")]
    return f" {'|'.join(names)}" if names else ""


@generates("vllm dashboards")
def _vllm_dashboards(old: str) -> str:
    rows = ([code(name), each.has, code(each.path), code(each.sha256)] for name, each in VLLM_DASHBOARDS.items())
    return table(old, ["name", "what it shows", "file", "sha256"], rows)


@generates("alerts")
def _alerts(old: str) -> str:
    rows = ([code(rule.name), rule.level, rule.condition] for rule in rules() if rule.alert)
    return table(old, ["alert", "level in `watch`", "when"], rows)


@generates("rules of health")
def _rules_of_health(old: str) -> str:
    rows = ([code(rule.name), rule.title, rule.verdict, rule.impact] for rule in known_hosts.rules() if rule.health)
    return table(old, ["name", "what", "verdict", "effect"], rows)


@generates("exit codes of verbs")
def _exit_codes_of_verbs(old: str) -> str:
    columns = ["verb", *(str(int(each)) for each in Exit)]
    return table(old, columns, ([code(name), *(Words() for _ in Exit)] for name in commands()))


@generates("data of verbs")
def _data_of_verbs(old: str) -> str:
    names = [name for verb in commands() for name in ((verb, "cluster verify") if verb == "cluster" else (verb,))]
    return table(old, ["verb", "fields"], ([code(name), Words()] for name in names))


@generates("names of verbs")
def _names_of_verbs(_: str) -> str:
    return listed(commands())


def _arguments(command: Any) -> str:
    return " ".join(each.metavar for each in command.params if each.param_type_name == "argument")


def _help(command: Any) -> str:
    return " ".join(str(command.help).split())


@generates("options")
def _options(_: str) -> str:
    found: dict[tuple[str, str], list[str]] = {}
    for name, command in commands().items():
        for each in command.params:
            if each.param_type_name == "option" and not each.hidden:
                found.setdefault((_spelled(each), str(each.help)), []).append(name)
    rows = ([option, what, _among(verbs)] for (option, what), verbs in found.items())
    return table("", ["option", "what", "of"], rows)


@generates("options of verify")
def _options_of_verify(old: str) -> str:
    """Return the options that select what is verified; `plan` lists the others too."""
    others = {(tuple(each.opts), each.help) for each in commands()["plan"].params if each.param_type_name == "option"}
    own = [each for each in commands()["verify"].params if (tuple(each.opts), each.help) not in others]
    return table(old, ["option", "what"], ([_spelled(each), Words(each.help)] for each in own))


def _spelled(option: Any) -> str:
    names = [*sorted(option.opts, key=len), *option.secondary_opts]
    kinds = getattr(option.type, "choices", ())
    default = "" if option.is_flag else "PATH" if hasattr(option.type, "path_type") else "NAME"
    value = option.metavar or "|".join(kinds) or default
    return ", ".join(code(f"{name} {value}".strip()) for name in names)


def _among(verbs: Sequence[str]) -> str:
    others = [verb for verb in commands() if verb not in verbs]
    if not others:
        return "all verbs"
    return f"all but {listed(others)}" if len(others) < 4 else ", ".join(map(code, verbs))


if __name__ == "__main__":
    raise SystemExit(main())
