"""What vLLM's engine did when an exception was raised, as its traceback tells, and what to do about it."""

import re
from functools import lru_cache
from typing import Annotated

from msgspec import Struct

from sparkinstall import schema
from sparkinstall.assets import asset

FILE = "knowledge/stages.yaml"


class Stage(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the engine's work: found in the frames of a traceback. `hint`: what to do about it.

    `is_place`: it is told beside the stage that the traceback passes last, of which there is one.
    """

    frames: re.Pattern[str]
    hint: Annotated[str, schema.like(r"[^\n]+", "one line of text")]
    is_place: bool = False


@lru_cache(maxsize=1)
def stages() -> tuple[Stage, ...]:
    """Return the known stages.

    Raises:
        Malformed: an entry is invalid.
    """
    return schema.read_file(tuple[Stage, ...], asset(FILE))


def stage_of(frames: str) -> str:
    """Return what to do about what the engine did when an exception was raised; "" if its traceback does not tell.

    Graphs are captured with a run that measures memory too: the last stage is the one that failed.
    """
    passed = {
        max(found.end() for found in those): each.hint
        for each in stages()
        if not each.is_place and (those := list(each.frames.finditer(frames)))
    }
    last = [passed[max(passed)]] if passed else []
    return "; ".join([*last, *(each.hint for each in stages() if each.is_place and each.frames.search(frames))])
