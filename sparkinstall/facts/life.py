"""What the proof of life has noted of vLLM on this node: payloads/vllm_life.py writes it."""

from collections.abc import Sequence
from datetime import datetime

import msgspec
from msgspec import Struct

from sparkinstall.layout import LIFE_FOLDER, LIFE_LIVE
from sparkinstall.system import Reader


class Wedge(Struct, frozen=True):
    """A time when vLLM generated nothing. `at` is UTC. `evidence`: a folder; "": `trouble` says why there is none.

    `action`: `restarted`, `none` (the budget was used up), or why the restart failed; "" while it is decided.
    """

    at: str
    why: str
    action: str = ""
    evidence: str = ""
    trouble: str = ""


class LifeState(Struct, frozen=True):
    """The last look, and what happened within 24 hours. Times are UTC.

    `state`: stopped, starting, alive, idle, asleep, quiet, probe (it asks for a token) or wedged. `budget`: restarts
    allowed in an hour; `left`: of these.
    """

    checked: str
    state: str
    why: str
    budget: int
    left: int
    wedges: Sequence[Wedge] = ()
    restarts: Sequence[str] = ()

    def age(self, now: float) -> float:
        """Seconds from the last look to `now`, in seconds of the epoch."""
        return now - datetime.fromisoformat(self.checked.replace("Z", "+00:00")).timestamp()


def life_state(on: Reader) -> LifeState | None:
    """Return what was noted last; None if nothing can be read."""
    for folder in (LIFE_LIVE, LIFE_FOLDER):
        try:
            return msgspec.json.decode(on.read(f"{folder}/state.json") or b"", type=LifeState)
        except msgspec.DecodeError:
            continue
    return None


def summary(state: LifeState) -> str:
    """Return one line: what was seen last, and what happened within 24 hours."""
    count = len(state.wedges)
    wedges = f"{count or 'no'} wedge{'s' if count != 1 else ''} and {len(state.restarts) or 'no'} restarts in 24 h"
    return f"{state.state}; {wedges}, {state.left} of {state.budget} restarts left this hour"
