"""`sparkinstall stacks`: the shipped stacks and their evidence."""

from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.cli.text_output import console, show_line
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.core.stack_list import ListedStack, StackList, stack_list


@verb("stacks", "root", "config", "platform", reads_only=True)
def stacks(target: Target, output: Output) -> CommandResult:
    """List the shipped stacks: versions, for whom each is, and who has run it on a Spark."""
    del output
    session = open_session(target)
    found = stack_list(session)
    return CommandResult(data=found, show=lambda: _show(session, found))


def _show(session: Session, found: StackList) -> None:
    out = console()
    for each in found.stacks:
        versions = f"vLLM {each.vllm}, torch {each.torch}, NCCL {each.nccl}, CUDA {each.cuda}"
        out.print(f"[bold]{each.name}[/]{_marks(each)}  [dim]{versions}[/]")
        show_line(f"    {each.summary}", out)
        show_line(f"    evidence: {each.evidence}", out)
    if found.installed and not any(each.installed for each in found.stacks):
        out.print(f"Installed: {found.installed}, a stack of your own.", markup=False)
    out.print(f"\n`sparkinstall plan --stack NAME{session.root_option}` shows what would change.", markup=False)


def _marks(stack: ListedStack) -> str:
    marks = [name for name in ("default", "installed") if getattr(stack, name)]
    return f" ({', '.join(marks)})" if marks else ""
