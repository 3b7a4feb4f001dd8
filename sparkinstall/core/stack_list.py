"""The shipped stacks, each with the evidence that it runs on a Spark, and which one is installed here."""

from collections.abc import Sequence

from msgspec import Struct

from sparkinstall import stacks
from sparkinstall.core.session import Session
from sparkinstall.facts.decisions import installed_stack


class ListedStack(Struct, frozen=True):
    """A shipped stack; `cuda` is that of its packages for the node's architecture, `summary` says for whom it is."""

    name: str
    default: bool
    installed: bool
    vllm: str
    torch: str
    nccl: str
    cuda: str
    summary: str
    evidence: str


class StackList(Struct, frozen=True):
    """Result of `stacks`. `installed`: the name of this node's stack, shipped or not; None: there is none."""

    platform: str
    installed: str | None
    stacks: Sequence[ListedStack]


def stack_list(session: Session) -> StackList:
    """Return the shipped stacks, oldest vLLM first. Raises StackError if a lock cannot be read."""
    platform, installed = session.node.platform, installed_stack(session.system, session.node.venv_stamp) or None
    shipped = [_listed(stacks.load(name), platform, installed) for name in stacks.names()]
    return StackList(platform, installed, shipped)


def _listed(stack: stacks.Stack, platform: str, installed: str | None) -> ListedStack:
    pins = {pin.name: pin.version for pin in stack.requirements}
    return ListedStack(
        name=stack.name,
        default=stack.name == stacks.DEFAULT,
        installed=stack.name == installed,
        vllm=stack.vllm,
        torch=pins["torch"],
        nccl=stack.nccl.version,
        cuda=stack.platforms[platform].cuda,
        summary=stack.summary,
        evidence=stack.evidence,
    )
