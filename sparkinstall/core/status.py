"""Read what is installed on a node, since when, and how the fixes stand."""

from collections.abc import Sequence

from msgspec import Struct

from sparkinstall.core import catalogue, fixes
from sparkinstall.core.engine import StepReport
from sparkinstall.core.fixes import FixState
from sparkinstall.core.session import Session, looked_at
from sparkinstall.facts.health import HealthRun, last_run
from sparkinstall.facts.life import LifeState, life_state
from sparkinstall.services import LIFE


class NodeStatus(Struct, frozen=True):
    """Result of `status`. `since` and `last_change` are UTC; None: nothing is installed.
    `life`: what the proof of life has seen of vLLM; None: none is set up, or it has noted nothing yet. `health`: the
    last run of the timer of `health`; None: there is no timer, or it has not run.
    """

    installed: bool = False
    stack: str = ""
    platform: str = ""
    prefix: str = ""
    since: str | None = None
    last_change: str | None = None
    journal: str = ""
    steps: Sequence[StepReport] = ()
    fixes: Sequence[FixState] = ()
    life: LifeState | None = None
    health: HealthRun | None = None


def status(session: Session) -> NodeStatus:
    """Read the state of the node from its journal and files.

    Raises:
        JournalDamaged, Blocked: the journal cannot be used.
    """
    if problem := session.state.trouble(session.node):
        raise problem
    node, records = session.node, session.state.journal().records()
    reports = looked_at(session, catalogue.of(node))
    return NodeStatus(
        installed=bool(records),
        stack=node.stack.name,
        platform=node.platform,
        prefix=session.system.real(node.prefix),
        since=records[0].at if records else None,
        last_change=records[-1].at if records else None,
        journal=str(session.state.home / "journal.jsonl"),
        steps=reports,
        fixes=fixes.stand(node, reports, {}),
        life=life_state(session.system) if LIFE.wanted(node) else None,
        health=last_run(session.system, node.health_metrics) if node.config.health.timer else None,
    )
