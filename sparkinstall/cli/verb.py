"""The frame around every verb: errors in words, JSON, exit codes, Ctrl-C."""

import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, NoReturn

import typer

from sparkinstall.errors import BadUsage, Exit, Interrupted, Problem
from sparkinstall.records import dataclass


@dataclass(frozen=True)
class Answer:
    """What a verb has to say: an exit code, data for JSON, and how a person is shown it."""

    code: Exit = Exit.GOOD
    data: Mapping[str, Any] = field(default_factory=dict)
    show: Callable[[], None] = lambda: None
    problems: tuple[Problem, ...] = ()


def answer(verb: str, body: Callable[[], Answer], *, root: Path | None, json: bool, verbose: bool = False) -> NoReturn:
    """Run a verb and end the process with its exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _as_interrupt)
    try:
        given = body()
    except Problem as problem:
        given = Answer(problem.exit_code, problems=(problem,))
    except KeyboardInterrupt:
        given = Answer(Exit.INTERRUPTED, problems=(_interrupted(),))
    except typer.Abort:
        given = Answer(Exit.INTERRUPTED, problems=(Interrupted("not begun; nothing was changed"),))
    except Exception as error:
        if verbose:
            traceback.print_exc()
        given = Answer(Exit.FAILED, problems=(_bug(error),))
    _tell(verb, given, json, f" --root {root}" if root else "")
    sys.stdout.flush()
    raise typer.Exit(int(given.code))


def confirm(question: str, *, agreed: bool, default: bool) -> None:
    """Ask at the terminal, unless it was agreed to beforehand.

    Raises:
        BadUsage: there is no terminal to ask on.
        Interrupted: the answer is no.
    """
    if agreed:
        return
    if not sys.stdin.isatty():
        raise BadUsage("there is no terminal to ask on", mend="add `--yes` if that is what you want")
    if not typer.confirm(question, default=default):
        raise Interrupted("not begun; nothing was changed")


def _tell(verb: str, given: Answer, json: bool, root: str) -> None:
    if json:
        from sparkinstall.cli.envelope import envelope

        print(envelope(verb, given.code, given.data, given.problems))
        return
    given.show()
    if given.problems:
        from sparkinstall.cli.render import show_problems

        show_problems(given.problems, root)


def _as_interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _interrupted() -> Interrupted:
    return Interrupted("interrupted", mend="run the same command again: it goes on where this one stopped")


def _bug(error: Exception) -> Problem:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return Problem(
        f"sparkinstall itself failed: {type(error).__name__}: {error}{place}",
        mend="this is a bug of ours; `-v` shows where. What was done is in the journal, and running again goes on",
    )
