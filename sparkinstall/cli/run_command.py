"""The frame around every verb: errors in words, JSON, exit codes, Ctrl-C."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import typer
from msgspec import Struct, field

from sparkinstall.cli.options import root_option
from sparkinstall.errors import BadUsage, Exit, Interrupted, Problem, storage_problem

_LOOKING = ("plan", "verify", "doctor", "diagnose", "support-bundle", "status", "settings show")
"""The verbs that change nothing, so that there is nothing to go on with."""


class Answer(Struct, frozen=True):
    """What a verb has to say: an exit code, data for JSON, and how a person is shown it."""

    code: Exit = Exit.GOOD
    data: Struct | Mapping[str, Any] = field(default_factory=dict)
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
        given = Answer(Exit.INTERRUPTED, problems=(Interrupted("interrupted"),))
    except typer.Abort:
        given = Answer(Exit.INTERRUPTED, problems=(Interrupted("cancelled; nothing was changed"),))
    except Exception as error:
        if verbose:
            traceback.print_exc()
        given = Answer(Exit.FAILED, problems=(_bug(error),))
    for each in given.problems:
        _complete(each, verb)
    code = given.code
    try:
        _tell(verb, given, json, root_option(root))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has seen enough; click ends such a run in silence.
        raise
    except OSError as error:
        code = _untold(error)
    raise typer.Exit(int(code))


def confirm(question: str, *, agreed: bool, default: bool) -> None:
    """Ask at the terminal, unless it was agreed to beforehand.

    Raises:
        BadUsage: there is no terminal to ask on.
        Interrupted: the answer is no.
    """
    if agreed:
        return
    if not sys.stdin.isatty():
        raise BadUsage("there is no terminal to ask on", hint="add `--yes` if that is what you want")
    if not typer.confirm(question, default=default):
        raise Interrupted("cancelled; nothing was changed")


def _tell(verb: str, given: Answer, json: bool, root: str) -> None:
    if json:
        from sparkinstall.cli.json_output import envelope

        print(envelope(verb, given.code, given.data, given.problems))
        return
    given.show()
    if given.problems:
        from sparkinstall.cli.text_output import show_problems

        show_problems(given.problems, root)


def _as_interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _complete(problem: Problem, verb: str) -> None:
    """What an interrupt means depends on the verb, which those who raise it do not know."""
    if not isinstance(problem, Interrupted) or problem.message != "interrupted":
        return
    if verb in _LOOKING:
        problem.message = "interrupted; nothing was changed"
    else:
        problem.hint = "run the same command again: it goes on where this one stopped"


def _untold(error: OSError) -> Exit:
    """Where the answer cannot be written (a full disk), one line says so."""
    print(f"✗ {storage_problem(error, 'writing the output').message}", file=sys.stderr)
    # What is still buffered would fail once more when Python ends.
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return Exit.FAILED


def _bug(error: Exception) -> Problem:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return Problem(
        f"sparkinstall itself failed: {type(error).__name__}: {error}{place}",
        hint="this is a bug of ours; `-v` shows where. What was done is in the journal, and running again goes on",
    )
