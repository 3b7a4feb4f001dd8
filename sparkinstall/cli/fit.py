"""`sparkinstall fit`: whether a model fits into a Spark, before it is downloaded."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from msgspec.structs import replace
from rich.text import Text

from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.cli.text_output import columns, console, show_line
from sparkinstall.cli.text_output import shown as redacted
from sparkinstall.core import fit as use
from sparkinstall.core.memory import memory_of
from sparkinstall.core.model_source import Source, source_of
from sparkinstall.core.planned import InstalledVllm
from sparkinstall.core.session import Target, open_session
from sparkinstall.errors import BadUsage, Exit
from sparkinstall.models import Figure
from sparkinstall.schema import show

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_LONGEST, _MOST, _NODES = 1 << 32, 1 << 20, 64

model_option = partial(typer.Option, rich_help_panel="Which model")
served_option = partial(typer.Option, rich_help_panel="How it is served")
count_option = partial(typer.Option, rich_help_panel="How it is counted")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RECIPE", help="A folder, ORG/NAME of the hub, a shipped recipe, or its file.", show_default=False
    ),
]
Context = Annotated[
    str | None,
    served_option("--context", metavar="TOKENS", help="Tokens of a sequence; auto: as many as fit."),
]
Sequences = Annotated[
    int | None, served_option("--sequences", metavar="N", help="Sequences at once.", min=1, max=_MOST)
]
Batched = Annotated[
    int | None,
    served_option("--batched-tokens", metavar="N", help="vLLM's --max-num-batched-tokens.", min=1, max=_MOST),
]
KvDtype = Annotated[str | None, served_option("--kv-dtype", metavar="auto|fp8", help="The type of the KV cache.")]
Parallel = Annotated[
    int | None,
    served_option("--tensor-parallel", metavar="NODES", help="Spread it over nodes.", min=1, max=_NODES),
]
Memory = Annotated[
    str | None, count_option("--memory", metavar="SIZE", help="What a node has available, such as 101GiB.")
]
Prefix = Annotated[
    bool | None,
    served_option("--prefix-caching/--no-prefix-caching", help="Of vLLM; default: what vLLM does with the model."),
]
BlockSize = Annotated[
    int | None, served_option("--block-size", metavar="N", help="vLLM's --block-size.", min=1, max=_MOST)
]
ByFormula = Annotated[
    bool, count_option("--by-formula", help="Do not ask the installed vLLM, which takes 10 to 20 seconds.")
]
RemoteCode = Annotated[
    bool, count_option("--trust-remote-code", help="Let vLLM run the model's own code when it is asked.")
]
Folder = Annotated[Path | None, model_option("--folder", metavar="FOLDER", help="Where a recipe's model is.")]
Id = Annotated[str | None, model_option("--id", metavar="ID", help="Which recipe of a file with several.")]


@verb("fit", "root", "config", "stack", reads_only=True)
def fit(
    target: Target,
    output: Output,
    model: Model,
    context: Context = None,
    sequences: Sequences = None,
    batched_tokens: Batched = None,
    kv_dtype: KvDtype = None,
    tensor_parallel: Parallel = None,
    prefix_caching: Prefix = None,
    block_size: BlockSize = None,
    memory: Memory = None,
    folder: Folder = None,
    id_: Id = None,
    by_formula: ByFormula = False,
    trust_remote_code: RemoteCode = False,
) -> CommandResult:
    """Tell whether a model fits into a Spark, before it is downloaded; exit 3 if it does not, or that is unknown."""
    given = {
        "context": _context(context),
        "sequences": sequences,
        "batched_tokens": batched_tokens,
        "kv_dtype": _kv_dtype(kv_dtype),
        "tensor_parallel": tensor_parallel,
    }
    size = _size(memory)
    session = open_session(target)
    source = source_of(model, folder, id_)
    asked = replace(_options(source), **{name: value for name, value in given.items() if value is not None})
    asked = use.with_cache_options(asked, prefix_caching, block_size)
    asked = replace(asked, remote_code=trust_remote_code)
    recipe = source.recipe.id if source.recipe else ""
    peers = session.node.peers if asked.tensor_parallel > 1 and session.node.several else ()
    node_memory = memory_of(session.system, size, peers)
    with _waiting(output) as say:
        oracle = None if by_formula else InstalledVllm(session.node, session.system, say).plan
        found = use.fit(source.name, source.files, asked, node_memory, session.node.stack.vllm, recipe, oracle)
    code = Exit.GOOD if found.verdict == "fits" else Exit.DRIFT
    return CommandResult(code, found, lambda: _show(found))


@contextmanager
def _waiting(output: Output) -> Iterator[Callable[[str], None]]:
    """Yield a function that says on stderr what is waited for: on a terminal until it is over."""
    if output.json or not sys.stderr.isatty():
        yield lambda text: None if output.json else print(text, file=sys.stderr, flush=True)
        return
    status = console(stderr=True).status("", spinner="dots")

    def say(text: str) -> None:
        status.update(Text(text))
        status.start()

    try:
        yield say
    finally:
        status.stop()


def _options(source: Source) -> use.FitOptions:
    recipe = source.recipe
    return use.with_draft(use.options_of_recipe(recipe), recipe) if recipe else use.FitOptions()


def _context(text: str | None) -> int | Literal["auto"] | None:
    if text is None or text == "auto":
        return "auto" if text else None
    if not re.fullmatch(r"[0-9]{1,10}", text) or not 0 < int(text) <= _LONGEST:
        raise BadUsage(f"--context {show(text)} is no number of tokens", hint="use a number such as 32768, or auto")
    return int(text)


def _kv_dtype(text: str | None) -> str | None:
    if text not in (None, "auto", "fp8"):
        raise BadUsage(f"--kv-dtype {show(text)} is not known", hint="use auto or fp8")
    return text


def _size(text: str | None) -> int | None:
    """Return the bytes of a size such as 101GiB."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([A-Za-z]+)", text)
    unit = {name.lower(): value for name, value in _UNITS.items()}.get(match[2].lower()) if match else None
    if not match or not unit or not float(match[1]):
        raise BadUsage(f"--memory {show(text)} is no size", hint="use a number and a unit, such as 101GiB or 108GB")
    return int(float(match[1]) * unit)


# --- text


def _show(found: use.FitReport) -> None:
    out = console()
    out.print(Text(redacted(found.model), style="bold"), Text(_described(found), style="dim"), soft_wrap=True)
    table = columns(16, 10, None)
    for name, value, why in _rows(found):
        table.add_row(Text(name, style="dim"), Text(value, justify="right"), Text(redacted(why)))
    out.print(table)
    out.print()
    colour = {"fits": "green", "does_not_fit": "red", "unknown": "yellow"}[found.verdict]
    show_line(_verdict(found), out, f"bold {colour}")
    for line in (*_limits(found), *_ways(found), *(f"note: {each}" for each in found.notes)):
        # What is copied must not be wrapped by us.
        copied = "options of vLLM:" in line
        out.print(Text(redacted(line)), soft_wrap=True) if copied else show_line(redacted(line), out)


def _described(found: use.FitReport) -> str:
    recipe = f"recipe {found.recipe}, " if found.recipe else ""
    place = "" if found.place == found.model else f", {found.place}"
    commit = f" at {found.revision[:12]}" if found.revision else ""
    kind = f"{found.model_type or 'unknown type'}, {found.quantization or 'not quantized'}"
    return redacted(f"{recipe}{kind}{place}{commit}")


def _rows(found: use.FitReport) -> Iterator[tuple[str, str, str]]:
    memory, files = found.memory, found.files
    types = ", ".join(f"{name} {_gb(size)}" for name, size in files.by_dtype.items())
    yield "weights' files", _gb(files.bytes), f"exact: {files.files} file{'s' if files.files != 1 else ''} ({types})"
    # On one node both are the same, unless the verdict counts with another number than the files tell.
    if found.tensor_parallel > 1 or files.loaded.value != memory.weights.value:
        yield "loaded", *_cells(files.loaded)
    if found.tensor_parallel > 1:
        yield "", "", f"each of {found.tensor_parallel} nodes:"
    yield "weights", *_cells(memory.weights)
    amount, why = _cells(memory.kv_cache)
    yield "KV cache", amount, why if memory.kv_cache.value is None else f"{memory.kv_cache.basis}: {_asked(found)}"
    yield "engine", *_cells(memory.overhead)
    yield "system", *_cells(memory.reserve)
    yield "needs", *_cells(memory.need)
    yield "available", *_cells(memory.available)
    yield "decode ceiling", *_ceiling(found)


def _asked(found: use.FitReport) -> str:
    sequences = f"{found.sequences:,} sequence{'s' if found.sequences > 1 else ''} of {found.context or 0:,} tokens"
    by = f"asked vLLM {found.vllm}" if found.asked else f"as vLLM {found.vllm} counts"
    return f"{sequences}, type {found.kv_dtype}, {found.batched_tokens:,} batched tokens, {by}"


def _cells(figure: Figure) -> tuple[str, str]:
    why = f": {figure.why}" if figure.why else ""
    return ("unknown", figure.why) if figure.value is None else (_gb(figure.value), figure.basis + why)


def _ceiling(found: use.FitReport) -> tuple[str, str]:
    decode = found.decode
    if decode.ceiling is None:
        return "unknown", decode.read.why
    later = f", {decode.ceiling_at_context:.1f} at the end of the context" if decode.ceiling_at_context else ""
    per_token = f"{_gb(decode.read.value or 0)} a token ({decode.read.why})"
    return f"{decode.ceiling:.1f}/s", f"estimate: 273 GB/s over {per_token}; one sequence, no drafts{later}"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def _verdict(found: use.FitReport) -> str:
    short = found.memory.short
    words = {
        "fits": f"It fits, with {_gb(-(short or 0))} left",
        "does_not_fit": "It does not fit" + (f" by {_gb(short)}" if short is not None else ""),
        "unknown": "Whether it fits is unknown",
    }[found.verdict]
    mark = "" if found.verdict == "unknown" else " (estimate)"
    return words + mark + (f": {redacted(found.why)}" if found.why else "")


def _limits(found: use.FitReport) -> Iterator[str]:
    if found.largest_context:
        sequences = f"{found.sequences:,} sequence{'s' if found.sequences > 1 else ''}"
        yield f"largest context with {sequences}: {found.largest_context:,} tokens (estimate)"
    if found.most_sequences:
        yield f"sequences of {found.context or 0:,} tokens that fit: {found.most_sequences:,} (estimate)"
    if found.serve:
        yield f"as options of vLLM: {' '.join(found.serve)}"
    if found.serve_largest:
        yield f"the largest context as options of vLLM: {' '.join(found.serve_largest)}"


def _ways(found: use.FitReport) -> Iterator[str]:
    """Yield the changes that make it fit; of the others only the one that needs least."""
    for each in found.ways:
        if each.fits:
            yield f"{_changed(each)}: {_gb(each.need)}{_on_each(each)}, fits (estimate)"
    if found.ways and not any(each.fits for each in found.ways):
        least = min(found.ways, key=lambda each: each.need)
        yield f"no change is enough; least {_changed(least)}: {_gb(least.need)}{_on_each(least)} (estimate)"
    if outgrown := found.outgrown:
        over = f"over {outgrown.nodes} nodes, or " if outgrown.nodes else ""
        yield "the model has outgrown the machine"
        yield f"use it {over}on a machine with {_gb(outgrown.bytes)} for it (estimate); else take a smaller model"


def _changed(each: use.Way) -> str:
    return f"in a version with {each.version}" if each.version else f"with {' '.join(each.options)}"


def _on_each(each: use.Way) -> str:
    return " on each node" if any(word.startswith("--tensor") for word in each.options) else ""
