"""The time of `sparkinstall --version` and `--help`, compared with Python alone and with typer."""

from benchmarks.environments import Environment
from benchmarks.timing import Command, Spread, in_turns

PYTHON, TYPER = "python -c pass", "python -c 'import typer'"


def measure(tool: Environment, rounds: int) -> dict[str, Spread]:
    """Seconds by command; all of them with the same interpreter and packages."""
    ours = tool.program("sparkinstall")
    return in_turns(
        {
            PYTHON: Command((tool.python, "-c", "pass")),
            TYPER: Command((tool.python, "-c", "import typer")),
            "sparkinstall --version": Command((ours, "--version")),
            "sparkinstall --help": Command((ours, "--help")),
        },
        rounds,
    )
