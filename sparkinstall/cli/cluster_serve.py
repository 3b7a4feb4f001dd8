"""`cluster --serve`: the nodes are set up, and serve one model until it answers; a failure is explained and undone."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sparkinstall.cli import edge
from sparkinstall.cli.serve import show_answering, told
from sparkinstall.cli.text_output import console, show_line, shown
from sparkinstall.cluster.orchestrate import Barrier, Cluster
from sparkinstall.cluster.serving import Together
from sparkinstall.core.readiness import LIMIT, LIMIT_OF_SEVERAL
from sparkinstall.core.serve import Explained
from sparkinstall.core.serve_settings import named
from sparkinstall.diagnose import judge
from sparkinstall.diagnose.index import index_of
from sparkinstall.diagnose.signatures import load
from sparkinstall.diagnose.sources import Log
from sparkinstall.errors import Interrupted
from sparkinstall.system import processes


def together(cluster: Cluster, name: str) -> Together:
    """Return the serving of what is named, of which all nodes have been asked.

    Raises:
        Barrier: one does not answer, or there is no such model.
        RecipeError, BadUsage: a recipe cannot be read, or needs the user's consent.
    """
    found = Together(cluster, named(name), LIMIT_OF_SEVERAL if len(cluster.nodes) > 1 else LIMIT)
    found.prepare()
    return found


def show_changes(serving: Together) -> None:
    """Show what will not be as the recipe has it, before the user is asked."""
    for each in serving.changes:
        show_line(shown(f"{each.done}: {each.what} ({each.why})"), console(), "dim")


@contextmanager
def restoring(cluster: Cluster, serving: Together) -> Iterator[None]:
    """If the work within fails once services are started, explain it from all logs, and restore what was before."""
    try:
        yield
    except (Barrier, Interrupted, KeyboardInterrupt) as error:
        if serving.started:
            with edge.uninterrupted():
                processes.start_again()
                _undo(cluster, serving, explains=isinstance(error, Barrier))
        raise


def _undo(cluster: Cluster, serving: Together, *, explains: bool) -> None:
    problem = serving.first_failure()
    found = _explained(cluster, serving.logs()) if explains else Explained()
    words = serving.restore()
    if problem is None:
        print(words, file=sys.stderr)
        return
    if found.cause:
        problem.cause, problem.hint = found.cause, found.hint or problem.hint
    problem.output = tuple(found.lines) or problem.output
    problem.message = f"{problem.message}; {words}"


def _explained(cluster: Cluster, logs: Mapping[str, str]) -> Explained:
    """Say what the logs of all nodes show together."""
    index = index_of(load(release=cluster.nodes[0].look.versions.get("vllm", "")))
    searches = (judge.read(_log(host, text), index) for host, text in logs.items())
    return told(judge.judge(searches), lambda place: f"{place.log}: {place.text}")


def _log(host: str, text: str) -> Log:
    return Log(host, lambda: iter([text.encode()]))


def show_served(cluster: Cluster, serving: Together) -> None:
    """Show how to use what is served."""
    if serving.answering is None:
        return
    if len(cluster.nodes) > 1:
        print(shown(f"The API is on the head, {cluster.nodes[0].host}:"))
    show_answering(serving.answering)
