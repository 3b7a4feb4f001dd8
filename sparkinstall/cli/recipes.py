"""`sparkinstall recipes`: how models are served on Sparks, who reported it, and as which command."""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import click
import typer
from msgspec import Struct
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from sparkinstall import given
from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.cli.text_output import console, headed, show_line, show_rows
from sparkinstall.cli.text_output import shown as redacted
from sparkinstall.core import recipe_list as use
from sparkinstall.core.recipe_settings import RankUnit, members_of, units_of
from sparkinstall.core.session import Target, open_session
from sparkinstall.facts.vllm_options import Refusal
from sparkinstall.recipes import Change, Recipe, Source, Speed
from sparkinstall.recipes.catalogue import shipped
from sparkinstall.recipes.readers import recipes_of
from sparkinstall.recipes.render import Command, command, shell
from sparkinstall.redaction import redact


class _Group(TyperGroup):
    """Without a verb, `list` is meant."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        help_options = ("-h", "--help")
        alone = not args or (args[0].startswith("-") and args[0] not in help_options)
        return super().parse_args(ctx, ["list", *args] if alone else args)


app = typer.Typer(
    add_completion=False, cls=_Group, help="List recipes for models on Sparks, or show one and its command."
)

Name = Annotated[
    str,
    typer.Argument(metavar="ID|FILE", help="A shipped recipe, or a file or folder with recipes.", show_default=False),
]
Id = Annotated[str | None, typer.Option("--id", metavar="ID", help="Which recipe of a file with several.")]


@app.command("list")
@verb("recipes list", "root", "config", "stack", reads_only=True)
def list_(target: Target, output: Output) -> CommandResult:
    """List the shipped recipes: whether a Spark can run them, with which stack, and the speed that was reported."""
    session = open_session(target)
    found = use.recipe_list(shipped(), session.node.stack, use.memory_for_models(session.system))
    return CommandResult(data=found, show=lambda: _show_list(found, output.verbose))


def _show_list(found: use.RecipeList, verbose: bool) -> None:
    out = console()
    out.print(f"Recipes for the stack {found.stack} (vLLM {found.vllm}) and {_memory(found)}:\n", markup=False)
    shown_columns = [each for each in _COLUMNS if verbose or out.width >= each.from_width]
    table = headed(*(each.heading for each in shown_columns))
    for column, each in zip(table.columns, shown_columns, strict=True):
        column.justify = "right" if each.number else "left"
        # Who wants to serve it copies it.
        column.no_wrap = each is shown_columns[0]
    section = ""
    for recipe in found.recipes:
        if (title := _section(recipe)) != section:
            table.add_row(Text(f"\n{title}" if section else title, style="bold"))
            section = title
        table.add_row(*(each.cell(recipe) for each in shown_columns))
    out.print(table)
    out.print()
    for line in _LEGEND:
        show_line(line, out, "dim")


def _memory(found: use.RecipeList) -> str:
    amount = f"{(found.memory.value or 0) / 1e9:.1f} GB"
    return f"the {amount} available now" if found.memory.basis == "measured" else f"a Spark's {amount}"


def _section(each: use.ListedRecipe) -> str:
    words = {"other_stack": "With another stack", "patched_build": "With a patched build", "unknown": "Stack not known"}
    return words.get(each.loads) or ("On one Spark" if each.nodes == 1 else "On several Sparks")


def _fits(each: use.ListedRecipe) -> Text:
    words = {
        "fits": ("yes", "green"),
        "does_not_fit": ("no", "red"),
        "reported": ("reported", ""),
        "unknown": ("unknown", "dim"),
    }
    word, style = words[each.fits]
    return Text(word, style=style)


def _stack(each: use.ListedRecipe) -> Text:
    if each.loads == "loads":
        return Text(each.stack + ("" if each.good_on_gb10 else "*"))
    words = {"patched_build": "patched", "unknown": "unknown"}
    return Text(words.get(each.loads) or each.stack or "newer", style="yellow")


def _listed_speed(each: use.ListedRecipe) -> Text:
    if each.speed is None:
        return Text("")
    # Of embeddings: not of one stream, and not tokens.
    return Text(f"{each.speed.value:g}" if each.speed.unit == "tokens/s" else f"{each.speed.value:g} {each.speed.unit}")


class _Column(Struct, frozen=True):
    """A column of the list, and the width of the terminal from which there is room for it."""

    heading: str
    cell: Callable[[use.ListedRecipe], Text]
    from_width: int = 0
    number: bool = False


_COLUMNS = (
    _Column("recipe", lambda each: Text(each.id)),
    _Column("fits", _fits),
    _Column("stack", _stack),
    _Column("nodes", lambda each: Text(str(each.nodes)), number=True),
    _Column("context", lambda each: Text(_short(each.context)), 95, number=True),
    _Column("GB", lambda each: Text(f"{each.bytes / 1e9:.0f}" if each.bytes else "?"), 95, number=True),
    _Column("tokens/s", _listed_speed, number=True),
    _Column("source", lambda each: Text(each.speed.source if each.speed else ""), 135),
    _Column("model", lambda each: Text(each.model), 175),
)
_LEGEND = (
    "fits: weights, engine and system; `sparkinstall fit ID` adds the KV cache",
    "reported: others have run it so; size unknown (GB ?), or a part is on the disk",
    "* not reported to work on a GB10 with this vLLM or an older one",
    "tokens/s: what others report; `sparkinstall recipes show ID` has the settings",
    "To serve one: `sparkinstall serve ID`",
)


def _short(tokens: int | str | None) -> str:
    """Return a context as people name it, such as 256K; in full if it is no multiple of 1024."""
    if not isinstance(tokens, int) or tokens % 1024:
        return _number(tokens)
    return f"{tokens >> 10}K" if tokens % (1 << 20) else f"{tokens >> 20}M"


def _loads(loads: use.Loads, stack: str) -> str:
    """Say whether a stack can load a recipe."""
    words = {"loads": "loads", "patched_build": "needs a patched build", "unknown": "not known"}
    return words.get(loads) or (f"loads with stack {stack}" if stack else "needs a newer vLLM")


def _number(value: int | str | None) -> str:
    return f"{value:,}" if isinstance(value, int) else value or ""


@app.command()
@verb("recipes show", "root", "config", "stack", reads_only=True)
def show(target: Target, output: Output, name: Name, id_: Id = None) -> CommandResult:
    """Show all of a recipe, with its sources; of a file also what was dropped or overridden."""
    del output
    session = open_session(target)
    read = recipes_of(name, id_)
    found = use.ShownRecipes(
        tuple(use.shown(each, session.node, session.system) for each in read.recipes), read.skipped
    )
    return CommandResult(data=found, show=lambda: _show_all(found))


def _show_all(found: use.ShownRecipes) -> None:
    out = console()
    for at, each in enumerate(found.recipes):
        if at:
            out.print()
        _show(each, out)
    for skipped in found.skipped:
        show_line(redacted(f"skipped {skipped.what}: {skipped.why}"), out)


def _show(each: use.ShownRecipe, out: Console) -> None:
    recipe = each.recipe
    out.print(Text(recipe.id, style="bold"), Text(redacted(recipe.model)))
    rows = [*_facts(each), *(("note", note) for note in recipe.notes), *(_change(change) for change in each.changes)]
    show_rows(((name, redacted(text)) for name, text in rows if text), out, 16)


def _facts(each: use.ShownRecipe) -> Iterator[tuple[str, str]]:
    recipe = each.recipe
    parallel = f"tensor parallel {recipe.tensor_parallel}, pipeline parallel {recipe.pipeline_parallel}"
    yield f"stack {each.stack}", _loads(each.fit.loads, each.fit.stack) + (f": {each.fit.why}" if each.fit.why else "")
    yield "loads from", f"stack {recipe.loads_from}" if recipe.loads_from else ""
    yield "good on a GB10", f"from vLLM {recipe.good_on_gb10_from}" if recipe.good_on_gb10_from else ""
    yield "revision", recipe.revision or ""
    unknown = "unknown: no source names it; `sparkinstall fit` reads it from the hub or a folder"
    yield "size", f"{recipe.bytes / 1e9:.1f} GB" if recipe.bytes else unknown
    yield "nodes", f"{recipe.nodes} ({parallel})" if recipe.nodes > 1 else "1"
    yield "memory", f"at most {recipe.memory:g} (--gpu-memory-utilization)" if recipe.memory else ""
    yield "context", _number(recipe.context)
    yield "sequences", _number(recipe.sequences)
    yield "batched tokens", _number(recipe.batched_tokens)
    yield "parsers", _parsers(recipe)
    for option in recipe.args:
        yield "option", shell(option).replace(" \\\n    ", " ")
    for variable, value in recipe.env.items():
        yield "variable", f"{variable}={value}"
    for refused in each.refused:
        yield "not taken", f"{refused.message} ({refused.hint})"
    for file in recipe.expects:
        yield "missing file", f"{file}: the recipe takes it from its image"
    yield "image", recipe.image or ""
    for speed in recipe.speed:
        yield "reported", _speed(speed)
    for source in recipe.sources:
        yield "source", _source(source)


def _parsers(recipe: Recipe) -> str:
    both = (("tools", recipe.tool_parser), ("reasoning", recipe.reasoning_parser))
    return ", ".join(f"{name} {parser}" for name, parser in both if parser)


def _speed(speed: Speed) -> str:
    more = (speed.content, speed.conditions, speed.date)
    return ", ".join((f"{speed.words} by {speed.source}", *filter(None, more)))


def _source(source: Source) -> str:
    place = " ".join(filter(None, (source.repository, source.path)))
    commit = f" at {source.commit[:12]}" if source.commit else ""
    return place + commit + (f" ({source.licence})" if source.licence else "")


def _change(change: Change) -> tuple[str, str]:
    return change.done, f"{change.what}: {change.why}"


class Rendered(Struct, frozen=True):
    """What `render` prints: commands and units of each node, and what is not as the recipe's file has it."""

    id: str
    command: Command
    units: Sequence[RankUnit]
    changes: Sequence[Change]
    fit: use.Fit
    refused: Sequence[Refusal]


@app.command()
@verb("recipes render", "root", "config", "stack", reads_only=True)
def render(target: Target, output: Output, name: Name, id_: Id = None) -> CommandResult:
    """Print a recipe as a command for `vllm serve`, its variables, the unit of systemd, and the same with docker."""
    del output
    session = open_session(target)
    node = session.node
    read = recipes_of(name, id_, only_one=True).recipes[0]
    recipe, config = read.recipe, node.config
    members = members_of(recipe, node)
    made = command(recipe, config.serving.port, given.home(), members, config.cluster.master_port)
    refused = use.refused_of(recipe, node, session.system)
    units = units_of(recipe, target, session)
    found = Rendered(recipe.id, made, units, (*read.changes, *made.added), use.fit(recipe, node.stack), refused)
    return CommandResult(data=found, show=lambda: _show_rendered(found, session.system.real(node.env_folder)))


def _show_rendered(found: Rendered, env_folder: str) -> None:
    print("# --- by hand")
    for rank in found.command.ranks:
        _show_place(rank.address, env_folder, first=rank is found.command.head)
        for name, value in found.command.env.items():
            print(shell(("export", f"{name}={value}")))
        print(shell(rank.argv))
    _show_units(found.units)
    print("\n# --- with docker")
    for rank in found.command.ranks if not found.command.no_docker else ():
        if rank.address:
            _show_place(rank.address, env_folder, first=rank is found.command.head)
        print(shell(rank.docker))
    print(f"# {found.command.no_docker}\n" if found.command.no_docker else "")
    if found.fit.loads != "loads":
        print(f"# {_loads(found.fit.loads, found.fit.stack)}{f': {found.fit.why}' if found.fit.why else ''}")
    for refused in found.refused:
        print(redacted(f"# not taken: {refused.message} ({refused.hint})"))
    for each in found.changes:
        print(redacted(f"# {each.done}: {each.what} ({each.why})"))


def _show_place(address: str, env_folder: str, first: bool) -> None:
    name = ("multi-node-head" if first else "multi-node-worker") if address else "single-node"
    print(f"#{_on(address)} after `source {env_folder}/{name}.env`:")


def _show_units(units: Sequence[RankUnit]) -> None:
    """Print the first unit, and of the others what they do not share with it."""
    for at, unit in enumerate(units):
        print(f"\n# --- {'the unit ' + unit.path if not at else 'the same unit'}{_on(unit.address)}", end="")
        if not at:
            print(f"\n{redact(unit.text)}")
            continue
        first = units[0].text.splitlines()
        print(", but with")
        for line in unit.text.splitlines():
            if line not in first:
                print(redact(line))


def _on(address: str) -> str:
    return f" on {address}" if address else ""
