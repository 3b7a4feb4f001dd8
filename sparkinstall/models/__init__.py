"""Models: what their own files say, before anything of them is downloaded or loaded.

`files` and `hub` read parts of files, `weights` the headers of safetensors files, `layout` config.json; `kv_cache`
computes what vLLM takes for a layout, `planned` has what vLLM itself says. Nothing of a model is run. A leaf: requests
is imported only to ask a hub.
"""

from typing import Literal

from msgspec import Struct

from sparkinstall.errors import BadConfig

Basis = Literal["exact", "estimate", "reported", "chosen", "given", "measured", "planned", "unknown"]


class ModelError(BadConfig):
    """The files of a model cannot be used, or there are none."""


class Figure(Struct, frozen=True):
    """A number with where it is from. `value` is None if it is unknown; `why`: the reason, or the evidence.

    `exact` is counted in files, `estimate` is by a formula, `reported` by others, `chosen` by sparkinstall, `given` by
    the user, `measured` on this node, `planned` by the installed vLLM.
    """

    value: int | None
    basis: Basis
    why: str = ""


def unknown(why: str) -> Figure:
    """Return a number that is not known, with the reason."""
    return Figure(None, "unknown", why)
