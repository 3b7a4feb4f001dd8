"""All steps, in one place. A new fix is one line here, one file in steps/, one test."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from sparkinstall.errors import BadUsage
from sparkinstall.steps import Step
from sparkinstall.steps.env_files import EnvFiles
from sparkinstall.steps.environment import Environment
from sparkinstall.steps.fp8 import Fp8
from sparkinstall.steps.nccl import Nccl
from sparkinstall.steps.nccl_fit import NcclFit
from sparkinstall.steps.packages import SystemPackages

STEPS: tuple[Step, ...] = (SystemPackages(), Environment(), Nccl(), NcclFit(), Fp8(), EnvFiles())


def chosen(only: Iterable[str], skip: Iterable[str]) -> Sequence[Step]:
    """The steps that `--only` and `--skip` leave.

    Raises:
        BadUsage: there is no step of that name.
    """
    only, skip = tuple(only), tuple(skip)
    require_known(only + skip, [step.name for step in STEPS], "step")
    return [step for step in STEPS if (not only or step.name in only) and step.name not in skip]


def require_known(asked: Iterable[str], known: Sequence[str], what: str) -> None:
    """Refuse a name that is not known, with the nearest one that is."""
    for name in asked:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
            raise BadUsage(f"there is no {what} {name!r}", mend=hint)
