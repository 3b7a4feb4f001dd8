"""The frame around every verb: shared options, error messages, JSON, exit codes, Ctrl-C."""

import inspect
import resource
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from typing import Any, NoReturn

import typer
from msgspec import Struct, field

from sparkinstall.cli import edge, options
from sparkinstall.cli.json_output import envelope
from sparkinstall.core.session import Target
from sparkinstall.errors import BadUsage, Exit, Interrupted, Problem, storage_problem
from sparkinstall.redaction import redact

_TARGET = {
    "root": options.Root, "config": options.ConfigFile, "stack": options.Stack, "set_": options.Set,
    "platform": options.Platform, "full": options.Full,
}  # fmt: skip
NODE = tuple(_TARGET)
"""All options that select the node."""


class CommandResult(Struct, frozen=True):
    """The result of a verb: an exit code, data for JSON, and a function that prints it as text."""

    code: Exit = Exit.GOOD
    data: Struct | Mapping[str, Any] = field(default_factory=dict)
    show: Callable[[], None] = lambda: None
    problems: tuple[Problem, ...] = ()


class Output(Struct, frozen=True):
    """The output options: JSON, and every line of every program."""

    json: bool = False
    verbose: bool = False


def verb(
    name: str, *target: str, reads_only: bool = False
) -> Callable[[Callable[..., CommandResult]], Callable[..., None]]:
    """Turn a function of a `Target`, an `Output` and its own options into a command.

    Args:
        name: name of the verb in JSON.
        target: options of `NODE` that the verb has; every verb has `--json` and `--verbose`.
        reads_only: it changes nothing, so there is nothing to resume after an interruption.
    """

    def decorate(body: Callable[..., CommandResult]) -> Callable[..., None]:
        def command(json: bool, verbose: bool, **given: Any) -> None:
            asked = {each: given.pop(each) for each in target}
            asked["settings"] = tuple(asked.pop("set_", None) or ())
            node, output = Target(**asked), Output(json, verbose)
            _run(name, lambda: body(node, output, **given), node, output, reads_only)

        own = list(inspect.signature(body).parameters.values())[2:]
        required = [each for each in own if each.default is Parameter.empty]
        shared = [_parameter(each, _TARGET[each], None) for each in target]
        ends = [_parameter("json", options.Json, False), _parameter("verbose", options.Verbose, False)]
        parameters = [*required, *shared, *(each for each in own if each not in required), *ends]
        command.__name__, command.__doc__ = body.__name__, body.__doc__
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [each.replace(kind=Parameter.KEYWORD_ONLY) for each in parameters]
        )
        return command

    return decorate


def _parameter(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _run(name: str, body: Callable[[], CommandResult], target: Target, output: Output, reads_only: bool) -> NoReturn:
    """Run a verb and exit with its code."""
    edge.on_interrupt(edge.raise_interrupt)
    result = _result(body, output.verbose)
    for each in result.problems:
        _complete(each, reads_only)
    shown = _result(lambda: _tell(name, result, target, output), output.verbose)
    for each in shown.problems:
        edge.say(each.message, each.hint)
    raise typer.Exit(int(shown.code))


def _tell(name: str, result: CommandResult, target: Target, output: Output) -> CommandResult:
    """Print the result of a verb; return one with only its code."""
    if output.json:
        print(envelope(name, result.code, result.data, result.problems))
    else:
        result.show()
        _show_problems(result.problems, target.root_option)
    sys.stdout.flush()
    return CommandResult(result.code)


def _show_problems(problems: Sequence[Problem], root: str) -> None:
    if problems:
        from sparkinstall.cli.text_output import show_problems

        show_problems(problems, root)


def _result(body: Callable[[], CommandResult], verbose: bool) -> CommandResult:
    try:
        return body()
    except edge.Unwritten as error:
        return CommandResult(Exit(edge.unwritten(error, problem_of)))
    except (Exception, KeyboardInterrupt) as error:
        problem = problem_of(error)
        if verbose and problem is not error and not isinstance(problem, Interrupted):
            traceback.print_exc()
        return CommandResult(problem.exit_code, problems=(problem,))


def problem_of(error: BaseException) -> Problem:
    """Return what an error means to the user: itself, an interrupt, a fault around us, or a bug."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt):
        return Interrupted("interrupted")
    if isinstance(error, typer.Abort):
        return Interrupted("cancelled; nothing was changed")
    if isinstance(error, MemoryError) or _is_lack_of_memory(error):
        return Problem("there is not enough memory", hint="`free -h` and `ulimit -v` show how much there is")
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        return Problem("no thread can be started", hint="`ulimit -u` and `ulimit -v` show the limits; raise them")
    if isinstance(error, ImportError | SyntaxError):
        return Problem(f"sparkinstall is not whole: {error}", hint="install it again: `./install.sh`")
    if isinstance(error, OSError):
        return storage_problem(error, "writing the output" if isinstance(error, edge.Unwritten) else "sparkinstall")
    return _bug(error)


def _is_lack_of_memory(error: BaseException) -> bool:
    """Whether Python fails within itself, or cannot load a library, below `ulimit -v`."""
    is_limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return is_limited and (isinstance(error, SystemError) or "failed to map segment" in str(error))


def report_usage(words: Sequence[str], error: Any) -> int:
    """Print a usage error (an exception of click), as JSON if the command line asks for that; return the exit code."""
    error.message = redact(error.message)
    if "--json" not in words:
        error.show()
        return int(error.exit_code)
    # Of a verb of two words click knows both, once it has come that far.
    called = error.ctx.command_path.split()[1:] if getattr(error, "ctx", None) else []
    name = " ".join(called) or next((word for word in words if not word.startswith("-")), "")
    problem = BadUsage(error.format_message(), hint="`sparkinstall --help` lists verbs and options")
    print(envelope(name, Exit.USAGE, {}, [problem]))
    return int(Exit.USAGE)


def confirm(question: str, *, agreed: bool, default: bool) -> None:
    """Ask for confirmation on the terminal, unless already `agreed`.

    Raises:
        BadUsage: there is no terminal to ask on.
        Interrupted: the answer is no.
    """
    if agreed:
        return
    if not sys.stdin.isatty():
        raise BadUsage("there is no terminal to ask on", hint="add `--yes` to confirm")
    if not typer.confirm(question, default=default):
        raise Interrupted("cancelled; nothing was changed")


def _complete(problem: Problem, reads_only: bool) -> None:
    """Explain the effect of an interrupt, which depends on the verb."""
    if not isinstance(problem, Interrupted) or problem.message != "interrupted":
        return
    if reads_only:
        problem.message = "interrupted; nothing was changed"
    else:
        problem.hint = "run the same command again: it continues where this one stopped"


def _bug(error: BaseException) -> Problem:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return Problem(
        f"sparkinstall failed with an internal error: {type(error).__name__}: {error}{place}",
        hint="this is a bug; `-v` shows the traceback. The journal has all changes, and running again resumes",
    )
