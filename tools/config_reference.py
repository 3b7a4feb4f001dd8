"""Make docs/config.md from sparkinstall/config/schema.py: a maintainer's tool, run from the repository's root.

    PYTHONPATH=. python tools/config_reference.py            # write docs/config.md
    PYTHONPATH=. python tools/config_reference.py --check    # write nothing, exit 1 where it is not what it would be

Types, defaults and rules are read from the code.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from sparkinstall.config import DEFAULT_FILES, Setting, settings
from sparkinstall.schema import words

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "config.md"

_HEAD = """\
<!-- Made by tools/config_reference.py from sparkinstall/config/schema.py. Change it there, then run the tool. -->

# Settings

Every setting has a default, so no file is needed. A file is YAML; an unknown key is an error that names the nearest
known one. `sparkinstall settings show` prints each setting with its value and where that came from.

## Where a value comes from

Later ones win:

1. the default
2. {files};
   or, instead of both, the one file that `--config FILE` or the variable `SPARKINSTALL_CONFIG` names
3. the options of the last `sparkinstall all` or `run` that began to change this node or rehearsal
   (`settings show` calls it "the last `all` or `run`")
4. the options of this command line: `--set KEY=VALUE`, `--stack`

So a node that was set up with `--set nccl.arch=90` or with `--config FILE` is verified with it too. A remembered option
wins over the file: to be rid of one, name the value that you want with `--set`.

A value of `--set` is read as YAML: `--set hub.offline=false`, `--set packages.extra=[jq,tmux]`,
`--set environment.link=null`.

## Reference
"""

_EXAMPLE = """
## A complete file

Every setting with its default. Keep the lines that you change, and drop the rest.

```yaml
{yaml}```
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make docs/config.md from sparkinstall/config/schema.py.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file is stale")
    wanted, text = parser.parse_args(argv).check, reference()
    if REFERENCE.exists() and REFERENCE.read_text(encoding="utf-8") == text:
        return 0
    if wanted:
        print("docs/config.md is stale: run `PYTHONPATH=. python tools/config_reference.py`", file=sys.stderr)
        return 1
    REFERENCE.write_text(text, encoding="utf-8")
    return 0


def reference() -> str:
    """The whole of docs/config.md."""
    files = " and ".join(f"`{each}`" for each in DEFAULT_FILES)
    tables = "".join(_table(section, list(of)) for section, of in _sections())
    return _HEAD.format(files=files) + tables + _EXAMPLE.format(yaml=example())


def example() -> str:
    """A config file that says every default aloud."""
    return "\n".join(_example_section(section, list(of)) for section, of in _sections())


def _sections() -> Iterator[tuple[str, Iterator[Setting]]]:
    return groupby(settings(), key=lambda setting: setting.name.rpartition(".")[0])


def _table(section: str, of: list[Setting]) -> str:
    title = f"\n### `{section}`\n" if section else ""
    rows = "".join(
        f"| `{each.name}` | `{yaml_value(each.default)}` | {takes(each)} | {each.doc.replace('|', chr(92) + '|')} |\n"
        for each in of
    )
    return f"{title}\n| setting | default | takes | what it is for |\n|---|---|---|---|\n{rows}"


def takes(setting: Setting) -> str:
    """What a setting takes, in the words of its type, or of its own check where it has one."""
    kind = get_args(setting.type)[0]
    if get_origin(kind) is tuple:
        return f"a list; each {_rule(setting, get_args(kind)[0])}"
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (setting.type,)
    return ", or ".join(_rule(setting, each) for each in members)


def _rule(setting: Setting, kind: Any) -> str:
    # A check is asked what it takes by giving it what none takes.
    refusal = setting.check("\0") if setting.check and words(kind) == "text" else None
    return (refusal or words(kind)).removeprefix("must be ")


def yaml_value(value: Any) -> str:
    """A default as it stands in a YAML file. JSON is YAML, and quotes what YAML would take for a number."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _example_section(section: str, of: list[Setting]) -> str:
    indent = "  " if section else ""
    lines = [f"{section}:"] if section else []
    for each in of:
        lines += [f"{indent}# {each.doc}", f"{indent}{each.name.rpartition('.')[2]}: {yaml_value(each.default)}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
