"""The edge of the process: its streams, its signals, the width of its terminal, and the last word on any error.

It is imported before anything else, so it imports nothing else of sparkinstall until an error is to be explained.
"""

import atexit
import errno
import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn, cast

_INTERRUPTED = 130
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SIZES = {"COLUMNS": (40, 1000), "LINES": (10, 1000)}
"""Variables with the size of the terminal: rich prints nothing on a width of 0, and fills any width with blanks."""


_COMPLETE = "_SPARKINSTALL_COMPLETE"


class Unwritten(OSError):
    """stdout takes no more output, so the error cannot be printed there."""


class _Stdout(io.TextIOWrapper):
    """stdout; a failure to write to it is recognised as such, wherever the text came from."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise Unwritten(*error.args) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise Unwritten(*error.args) from error


class _Stderr(io.TextIOWrapper):
    """stderr; what cannot be written there is lost, because it must not end a run in the middle of a change."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            pass


def run(program: Callable[[], None], problem_of: Callable[[BaseException], Any]) -> int:
    """Run the program; return its exit code, whatever happens in it.

    Args:
        problem_of: the `Problem` that an unexpected error is.
    """
    # At its end Python searches modules and classes for garbage: a quarter of the CPU time if there is nothing to do.
    atexit.register(gc.freeze)
    if sys.flags.isolated:
        # Python itself was told to ignore them. The Pythons that it starts must ignore them too.
        for name in [name for name in os.environ if name.startswith("PYTHON")]:
            del os.environ[name]
    if os.environ.get(_COMPLETE, "").partition("_")[0] not in ("complete", "source"):
        # A shell sets it to complete a command line; click refuses any other value.
        os.environ.pop(_COMPLETE, None)
    on_interrupt(_leave)
    sys.unraisablehook = _interrupt_later
    _open_streams()
    _limit_size()
    code = _code_of(program, problem_of)
    # The program can have ended before the text has left the buffer.
    code = _code_of(lambda: sys.stdout.flush(), problem_of) or code
    # The answer is given, so nothing is left to interrupt.
    on_interrupt(signal.SIG_IGN)
    return code


def on_interrupt(handler: Any) -> None:
    """Set the handler of Ctrl-C, TERM and HUP, except where the caller has us ignore it (`nohup`, a job with `&`)."""
    for number in _INTERRUPTS:
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let what is within come to its end: who presses Ctrl-C twice wants to leave, but not half of something."""
    on_interrupt(lambda *_: None)
    try:
        yield
    finally:
        on_interrupt(raise_interrupt)


def raise_interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """As a handler: end the verb, which cleans up after itself."""
    raise KeyboardInterrupt


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    """As a handler: end the process at once; no verb has begun."""
    on_interrupt(signal.SIG_IGN)
    try:
        _tell(_INTERRUPTED, "interrupted", "interrupted; nothing was changed")
        sys.stdout.flush()
    finally:
        os._exit(_INTERRUPTED)


def _interrupt_later(lost: Any) -> None:
    """As `sys.unraisablehook`: an interrupt within a callback of Python's own does not end the run, so repeat it."""
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)
        return
    signal.signal(signal.SIGALRM, raise_interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _open_streams() -> None:
    """Let the three streams be there, and be able to take or give any character."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # Takes the lowest free number, this one. A closed stdin is not an empty one: reading it still fails.
            os.set_inheritable(os.open(os.devnull, os.O_WRONLY), True)
        if getattr(sys, name) is None:
            stream = open(number, "r" if number == 0 else "w", closefd=False)  # noqa: SIM115
            # The second name keeps it open after the first has got another stream.
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for name, kind in (("stdout", _Stdout), ("stderr", _Stderr)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character gets a question mark, not a crash.
            how = (stream.encoding, "replace", None, stream.line_buffering, stream.write_through)
            setattr(sys, name, kind(cast(Any, stream.buffer), *how))


def _limit_size() -> None:
    """Limit what the environment and the terminal say of its size."""
    for number, (name, (least, most)) in enumerate(_SIZES.items()):
        given = os.environ.get(name, "")
        try:
            size = int(given) if given else _terminal()[number]
        except (ValueError, OSError):
            os.environ.pop(name, None)
            continue
        if not least <= size <= most:
            os.environ[name] = str(80 if not size else min(max(size, least), most))


def _terminal() -> os.terminal_size:
    try:
        return os.get_terminal_size(1)
    except OSError:
        return os.get_terminal_size(2)


def _code_of(program: Callable[[], None], problem_of: Callable[[BaseException], Any]) -> int:
    """Run a part of the program; return its exit code, and explain any error that nothing else has explained."""
    try:
        program()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Unwritten as error:
        return unwritten(error, problem_of)
    except KeyboardInterrupt:
        return _tell(_INTERRUPTED, "interrupted", "interrupted")
    except BaseException as error:
        return _explained(error, problem_of)
    return 0


def _explained(error: BaseException, problem_of: Callable[[BaseException], Any]) -> int:
    try:
        problem = problem_of(error)
    except Exception:
        # What explains errors cannot be imported either.
        return _tell(1, "failed", *cannot_start(error))
    return _tell(int(problem.exit_code), problem.code, problem.message, problem.hint)


def cannot_start(error: BaseException) -> tuple[str, str]:
    """Return why the program cannot even be imported, and what to do."""
    is_limit = isinstance(error, MemoryError | OSError)
    hint = "`ulimit -a` shows the limits; raise them" if is_limit else "install it again: `./install.sh`"
    return f"sparkinstall cannot start: {str(error) or 'not enough memory'}", hint


def unwritten(error: Unwritten, problem_of: Callable[[BaseException], Any]) -> int:
    """Say on stderr that stdout takes no more output, and let nothing fail again when Python exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    # The reader of a closed pipe wants no more, and no sentence about that either.
    if error.errno != errno.EPIPE:
        say(problem_of(error).message)
    return 1


def say(message: str, hint: str = "") -> None:
    """Print an error on stderr."""
    print(f"✗ {message}", *([f"  do    {hint}"] if hint else []), sep="\n", file=sys.stderr)


def _tell(code: int, kind: str, message: str, hint: str = "") -> int:
    """Print an error that ends the process outside of any verb, as JSON too if that was asked for; return `code`."""
    say(message, hint)
    if "--json" in sys.argv:
        # Slow to import, and needed only here.
        json = import_module("json")
        status = {1: "failed", 2: "usage", _INTERRUPTED: "interrupted"}[code]
        verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        error = {"code": kind, "message": message, "cause": "", "hint": hint, "log": "", "output": []}
        whole = {"version": 1, "command": verb, "status": status, "exit_code": code, "data": {}, "errors": [error]}
        print(json.dumps(whole), flush=True)
    return code
