"""Progress of a run: a live screen on a terminal, plain lines in a log."""

import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from msgspec import Struct, field
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from sparkinstall.cli.text_output import console, sign
from sparkinstall.events import (  # fmt: skip
    Emit,
    Event,
    LineRead,
    ProbeStarted,
    Progressed,
    ResourceApplied,
    StepEnded,
    StepStarted,
    WaitedFor,
    Warned,
    silent,
)
from sparkinstall.redaction import redact

OUTCOMES = {
    "unchanged": "up to date", "changed": "done", "node_only": "node only", "failed": "failed",
    "blocked": "not started", "drift": "drift",
}  # fmt: skip
_BAR = 18


class _Running(Struct):
    since: float = field(default_factory=time.monotonic)
    line: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    ended: StepEnded | None = None


@contextmanager
def watching(verbose: bool) -> Iterator[Emit]:
    """Yield an `Emit` that shows the run on stderr."""
    with shown(_Screen(), _Lines(verbose), verbose) as emit:
        yield emit


@contextmanager
def shown(screen: "LiveTable", lines: Any, verbose: bool) -> Iterator[Callable[[Any], None]]:
    """Yield the `take` of the right view: `screen` on a terminal, `lines` in a log or with `verbose`."""
    if verbose or not sys.stderr.isatty():
        yield lines.take
        return
    with Live(screen, console=console(stderr=True), refresh_per_second=8, transient=True):
        yield screen.take
    screen.leave(console(stderr=True))


@contextmanager
def asking(quiet: bool) -> Iterator[Emit]:
    """Yield an `Emit` that shows the current probe on a terminal; nothing elsewhere, or if `quiet`."""
    if quiet or not sys.stderr.isatty():
        yield silent
        return
    with console(stderr=True).status("[dim]looking[/]", spinner="dots") as status:
        yield lambda event: status.update(f"[dim]{event.name}[/]") if isinstance(event, ProbeStarted) else None


Row = tuple[RenderableType, ...]


class LiveTable(ABC):
    """One line per task, redrawn. Only the last column shrinks when a line is long; the others have `widths`."""

    def __init__(self, *widths: int) -> None:
        self.guard = threading.Lock()
        self._widths = widths
        self._spinner = Spinner("dots")

    @abstractmethod
    def take(self, event: Any) -> None:
        """Record an event."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """The current rows, made by `ended` and `running`."""

    def ended(self, outcome: str, names: Sequence[str], seconds: float | None, text: str) -> Row:
        return Text("  ") + sign(outcome), *names, _took(seconds), Text(text)

    def running(self, names: Sequence[str], since: float, text: str) -> Row:
        now = time.monotonic()
        frame = self._spinner.render(now)
        mark = Text("  ") + (frame if isinstance(frame, Text) else Text("*"))
        return mark, *names, _took(now - since), Text(text, style="dim")

    def __rich__(self) -> RenderableType:
        with self.guard:
            return self.table()

    def table(self) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for width in self._widths:
            table.add_column(min_width=width, no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for row in self.rows():
            table.add_row(*row)
        return table

    def leave(self, out: Console) -> None:
        """Print the final state."""
        out.print(self.table())
        out.print()


def _took(seconds: float | None) -> Text:
    return Text("" if seconds is None else duration(seconds), style="dim", justify="right")


class _Screen(LiveTable):
    """The steps, one line each."""

    def __init__(self) -> None:
        super().__init__(3, 12, 8)
        self._steps: dict[str, _Running] = {}
        self._said = ""
        self._warned: list[Warned] = []

    def take(self, event: Event) -> None:
        with self.guard:
            if isinstance(event, StepStarted):
                self._steps[event.step] = _Running()
            elif isinstance(event, StepEnded):
                self._steps.setdefault(event.step, _Running()).ended = event
            elif isinstance(event, LineRead | Progressed) and event.step in self._steps:
                self._advance(self._steps[event.step], event)
            elif isinstance(event, ProbeStarted):
                self._said = f"proving: {event.name}"
            elif isinstance(event, WaitedFor):
                self._said = event.what
            elif isinstance(event, Warned):
                self._warned.append(event)

    def _advance(self, running: _Running, event: LineRead | Progressed) -> None:
        if isinstance(event, LineRead):
            running.line = event.line.strip() or running.line
        else:
            running.done, running.total, running.unit = event.done, event.total, event.unit

    def __rich__(self) -> RenderableType:
        with self.guard:
            rows: list[RenderableType] = [self.table()]
            if self._said:
                rows.append(Text(f"    {self._said}", style="dim"))
            return Group(*rows)

    def leave(self, out: Console) -> None:
        out.print(self.table())
        for each in self._warned:
            out.print(Text("  ") + sign("warn"), f"{each.step}: {each.text}", markup=False)
        out.print()

    def rows(self) -> Iterator[Row]:
        for name, running in self._steps.items():
            if ended := running.ended:
                outcome = OUTCOMES.get(ended.outcome, ended.outcome)
                text = f"{outcome}: {redact(ended.note)}" if ended.note else outcome
                yield self.ended(ended.outcome, (name,), ended.seconds, text)
            else:
                yield self.running((name,), running.since, _doing(running))


def _doing(running: _Running) -> str:
    if not running.unit:
        return running.line
    amount = _amount(running.done, running.total, running.unit)
    if running.total:
        filled = _BAR * min(running.done, running.total) // running.total
        amount = f"{'━' * filled}{'─' * (_BAR - filled)} {amount}"
    return f"{amount}  {running.line}"


def _amount(done: int, total: int, unit: str) -> str:
    if unit == "bytes":
        return f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB" if total else f"{done / 2**20:.0f} MiB"
    return f"{done} of {total} {unit}" if total else f"{done} {unit}"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 m 05 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 60 else f"{int(seconds) // 60} m {int(seconds) % 60:02d} s"


class Pace:
    """The words for bytes that come: how many of how many, how fast, and the time left. It begins with the first."""

    def __init__(self) -> None:
        self._begun: tuple[float, int] | None = None

    def words(self, done: int, total: int) -> str:
        """Return them for `done` bytes of `total`."""
        began, first = self._begun = self._begun or (time.monotonic(), done)
        return amount(done, total, time.monotonic() - began, done - first)


def amount(done: int, total: int, seconds: float, came: int) -> str:
    """Return the progress in words.

    Args:
        seconds, came: how long this run has taken until now, and the bytes that came in it.
    """
    text = f"{decimal(done)} of {decimal(total)}"
    if seconds < 1 or came <= 0:
        return text
    speed = came / seconds
    return f"{text}, {decimal(int(speed))}/s, {duration((total - done) / speed)} left"


class _Lines:
    """Plain lines with a time, for logs; progress at each tenth."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._tenth: dict[str, int] = {}
        self._guard = threading.Lock()

    def take(self, event: Event) -> None:
        text = redact(self._text(event))
        if text:
            with self._guard:
                print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)

    def _text(self, event: Event) -> str:
        match event:
            case StepStarted(step):
                return f"{step}: begins"
            case ResourceApplied(step, _, summary):
                return f"{step}: {summary}"
            case StepEnded(step, outcome, seconds, note):
                return f"{step}: {OUTCOMES.get(outcome, outcome)} ({duration(seconds)}){' - ' + note if note else ''}"
            case LineRead(step, line):
                return f"{step} | {line}" if self._verbose and line.strip() else ""
            case Progressed():
                return self._progress(event)
            case Warned(step, text):
                return f"{step}: warning: {text}"
            case WaitedFor(what):
                return what
            case _:
                return ""

    def _progress(self, event: Progressed) -> str:
        if not event.total:
            return ""
        tenth = 10 * event.done // event.total
        if self._tenth.get(event.step) == tenth:
            return ""
        self._tenth[event.step] = tenth
        return f"{event.step}: {_amount(event.done, event.total, event.unit)}"
