"""All benchmarks: `python -m benchmarks.run [--quick] [--full]`, from the top folder of the checkout."""

import argparse
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import converged, diagnose, environments, fresh, models, report, startup

RESULTS = Path(__file__).with_name("results.md")


def main() -> None:
    """Measure, and write results.md; a quick run only prints its tables."""
    parser = argparse.ArgumentParser(description="Measure sparkinstall, other tools, and the same work by hand.")
    parser.add_argument("--quick", action="store_true", help="without the builds; print, and write nothing")
    parser.add_argument("--full", action="store_true", help="fresh: the whole environment (30 GB of disk)")
    parser.add_argument("--rounds", type=int, default=11, help="number of runs of each short command")
    options = parser.parse_args()
    if sys.version_info < (3, 12):
        sys.exit(f"Ansible needs Python 3.12 or newer, and this is {sys.version.split()[0]}: run it with another one")
    done: list[str] = []
    with _alone():
        for section in _sections(options.quick, options.full, options.rounds):
            print(section, flush=True)
            done.append(section)
    if not options.quick:
        RESULTS.write_text("\n".join(done))


@contextmanager
def _alone() -> Iterator[None]:
    """Allow only one run at a time: two would use the same folders and disturb each other."""
    environments.cache().mkdir(parents=True, exist_ok=True)
    with open(environments.cache() / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("another run of the benchmarks is in progress")
        yield


def _sections(quick: bool, full: bool, rounds: int) -> Iterator[str]:
    work = environments.cache() / "work"
    _say("installing the environments")
    tool, pyinfra, ansible = environments.sparkinstall(), environments.peer("pyinfra"), environments.peer("ansible")
    versions = {each: tool.version_of(each) for each in ("sparkinstall", "typer")}
    yield report.heading(versions | {"pyinfra": environments.PYINFRA, "ansible-core": environments.ANSIBLE})
    _say("a converged node")
    yield report.converged_table(*converged.measure(tool, pyinfra, ansible, work / "converged", rounds))
    _say("starting")
    yield report.startup_table(startup.measure(tool, rounds))
    _say("models")
    yield report.models_table(*models.measure(tool, work / "models", rounds))
    _say("reading a log")
    yield report.diagnose_table(diagnose.measure(tool, work / "diagnose"))
    if not quick:
        _say("a fresh install, and the same by hand: three builds, 15 minutes on two cores")
        found = fresh.measure(tool, work / "fresh", full)
        yield report.fresh_table(found)
        yield report.engine_table(found)
        yield report.verify_table(found)


def _say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
