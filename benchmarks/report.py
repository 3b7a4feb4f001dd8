"""The tables of results.md, which the README shows."""

import datetime
import os
import platform
from collections.abc import Iterable, Mapping

from benchmarks import converged, diagnose, models, startup
from benchmarks.fresh import Fresh, Installed
from benchmarks.timing import Long, Spread

# Two long runs are comparable if the cores that other programs used meanwhile differ by less than this.
_ALIKE = 0.25


def heading(versions: Mapping[str, str]) -> str:
    """Date, kind of machine, and versions."""
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    machine = (
        f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Linux {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}"
    )
    return (
        f"# How fast it is\n\nMade by `python -m benchmarks.run` on {datetime.date.today()}, {machine}; {named}.\n"
        "Only the ratios mean something: the machine was shared. README.md in this folder says what is measured.\n"
    )


def converged_table(found: Mapping[str, Spread], resources: int) -> str:
    """The second run, on a converged node."""
    ours = found[converged.OURS]
    rows = (
        (f"`{name}`" if "`" not in name else name, each, f"{each.times(ours):.1f} x") for name, each in found.items()
    )
    return table(
        f"A converged node, {resources} resources",
        ("", "median", "lowest - highest", "beside sparkinstall"),
        ((name, _seconds(each.median), _range(each), ratio) for name, each, ratio in rows),
    )


def startup_table(found: Mapping[str, Spread]) -> str:
    """The time to start."""
    python, typer = found[startup.PYTHON], found[startup.TYPER]
    return table(
        "Starting",
        ("", "median", "lowest - highest", "beside Python", "beside Python and typer"),
        (
            (
                f"`{name}`",
                _ms(each.median),
                _ms_range(each),
                f"{each.times(python):.1f} x",
                f"{each.times(typer):.1f} x",
            )
            for name, each in found.items()
        ),
    )


def models_table(found: Mapping[str, Spread], size: int, tensors: int) -> str:
    """`sparkinstall fit` and `recipes`."""
    typer, by_hand = found[models.TYPER], found[models.BY_HAND]
    return table(
        f"Whether a model of {size / 1e9:.0f} GB with {tensors:,} tensors fits, and what there is to serve",
        ("", "median", "lowest - highest", "beside Python and typer", "beside reading by hand"),
        (
            (
                f"`{name}`" if "`" not in name else name,
                _ms(each.median),
                _ms_range(each),
                f"{each.times(typer):.1f} x",
                f"{each.times(by_hand):.1f} x",
            )
            for name, each in found.items()
        ),
    )


def diagnose_table(found: Mapping[str, diagnose.Read]) -> str:
    """`sparkinstall diagnose` on large logs."""
    heads = ("", "size", "seconds", "speed", "most memory")
    rows = (
        (
            kind,
            f"{read.size / 1e9:.1f} GB",
            f"{read.seconds:.1f}",
            f"{read.rate:.0f} MB/s",
            f"{read.memory:.0f} MiB",
        )
        for kind, read in found.items()
    )
    return table("Reading a log with `sparkinstall diagnose`", heads, rows)


def fresh_table(found: Fresh) -> str:
    """The first run, compared with the same by hand."""
    part = "the whole environment" if found.full else "vLLM's own wheel"
    rows: list[tuple[str, ...]] = [
        ("`sparkinstall all`", *_long(found.first.whole), "", ""),
        ("the same without its proofs", f"{found.first.installing:.1f}", "", "1.0 x", ""),
        ("`sparkinstall all`, with the NCCL that was kept", *_long(found.again.whole), "", ""),
        ("the same without its proofs", f"{found.again.installing:.1f}", "", "", "1.0 x"),
    ]
    rows += [(f"by hand: `{name}`", *_long(each), "", "") for name, each in found.by_hand.items()]
    for make in ("make -j", "make"):
        others = [each.seconds for name, each in found.by_hand.items() if not name.startswith("make")]
        whole = sum(others) + found.by_hand[make].seconds
        beside = (_fair_ratio(whole, found.by_hand[make], ours) for ours in (found.first, found.again))
        rows.append((f"all by hand, with `{make}`", f"{whole:.1f}", "", *beside))
    return table(
        f"A fresh install: {part} and a small NCCL, warm caches",
        ("", "seconds", "cores that others took", "beside the first", "beside that with the NCCL that was kept"),
        rows,
    )


def _fair_ratio(seconds: float, make: Long, ours: Installed) -> str:
    fair = abs(make.others - ours.whole.others) < _ALIKE
    return f"{seconds / ours.installing:.1f} x" if fair else "void: unequally disturbed"


def verify_table(found: Fresh) -> str:
    """The time of `verify`."""
    part = "the whole environment" if found.full else "vLLM's own wheel"
    rows = [("`sparkinstall verify --level node`", _seconds(found.verify.median), _range(found.verify))]
    return table(f"Looking at it again: {part} and NCCL", ("", "median", "lowest - highest"), rows)


def _long(each: Long) -> tuple[str, str]:
    return f"{each.seconds:.1f}", f"{each.others:.1f}"


def engine_table(found: Fresh) -> str:
    """The time of the engine itself in that install."""
    wall, tools = found.engine["seconds"], found.engine["tools"]
    own, theirs = found.engine["own_cpu"], found.engine["tools_cpu"]
    return table(
        "The engine's own time on that install",
        ("", "engine", "tools", "share"),
        (
            (
                "wall time, none of its tools running",
                _seconds(wall - tools),
                _seconds(tools),
                _share(wall - tools, tools),
            ),
            ("CPU time", _seconds(own), _seconds(theirs), _share(own, theirs)),
        ),
    )


def table(title: str, heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"## {title}\n", f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _share(part: float, other: float) -> str:
    return f"{100 * part / other:.2f} %"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _range(each: Spread) -> str:
    return f"{each.lowest:.2f} - {each.highest:.2f}"


def _ms(value: float) -> str:
    return f"{1000 * value:.0f} ms"


def _ms_range(each: Spread) -> str:
    return f"{1000 * each.lowest:.0f} - {1000 * each.highest:.0f}"
