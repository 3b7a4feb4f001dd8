"""`sparkinstall ask`: a question to the served model; its answer appears while it is made."""

import re
import sys
from pathlib import Path
from typing import Annotated, Protocol, TextIO

import typer

from sparkinstall import given
from sparkinstall.cli.run_command import CommandResult, Output, problem_of, verb
from sparkinstall.cli.text_output import console
from sparkinstall.core.ask import Answer, Conversation, Question, server_of
from sparkinstall.core.reasoning import Kind, Piece
from sparkinstall.core.session import Target, open_session
from sparkinstall.errors import BadUsage, Exit

_LONGEST_PROMPT = 16 << 20
_MOST_TOKENS = 1 << 24
# Seconds; what writes into our stdin may take its time, and a person types.
_STDIN_PATIENCE = 600.0
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Prompt = Annotated[
    str, typer.Argument(metavar="PROMPT", help="The question; - reads it from stdin.", show_default=False)
]
Url = Annotated[str | None, typer.Option("--url", metavar="URL", help="Ask another server, such as http://HOST:8000.")]
Model = Annotated[str | None, typer.Option("--model", metavar="NAME", help="One of several served models.")]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="Instructions before the question.")]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", metavar="N", help="End the answer after N tokens.", min=1, max=_MOST_TOKENS),
]
Reasoning = Annotated[bool, typer.Option("--reasoning", help="Without a terminal, print the reasoning too, on stderr.")]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", metavar="FILE", help="The file with the API's key.", readable=False)
]


@verb("ask", "root", "config", reads_only=True)
def ask(
    target: Target,
    output: Output,
    prompt: Prompt,
    url: Url = None,
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    reasoning: Reasoning = False,
    key_file: KeyFile = None,
) -> CommandResult:
    """Ask the served model one question; its answer appears while it is made."""
    session = open_session(target)
    server = server_of(session, url, key_file)
    question = Question(_prompt(prompt), system or "", model or "", max_tokens)
    conversation, screen = Conversation(session, server, question), _screen(output, reasoning)
    try:
        for piece in conversation.pieces():
            screen.show(piece)
    except (Exception, KeyboardInterrupt) as error:
        # What has arrived is shown, so it remains a part of the result.
        screen.end(conversation.answer)
        problem = problem_of(error)
        return CommandResult(problem.exit_code, conversation.answer, problems=(problem,))
    screen.end(conversation.answer)
    return CommandResult(Exit.GOOD, conversation.answer, lambda: _explain(conversation.answer))


def _prompt(word: str) -> str:
    if word != "-":
        return word
    try:
        content = given.read_stdin(_LONGEST_PROMPT, _STDIN_PATIENCE)
    except OSError as error:
        raise BadUsage(f"stdin cannot be read: {error.strerror or error}", hint="pipe the question in") from error
    if len(content) > _LONGEST_PROMPT:
        raise BadUsage("stdin has more than 16 MiB, which no model reads", hint="ask about a part of it")
    if not content.strip():
        raise BadUsage("stdin has no question", hint="pipe it in: `git diff | sparkinstall ask -`")
    return content.decode(errors="replace")


def _explain(answer: Answer) -> None:
    """Say why there is no answer, or why it ends early, if so."""
    said = []
    if not answer.content:
        said.append("the model has only reasoned, and not answered" if answer.reasoning else "the answer is empty")
    if answer.finish_reason == "length":
        said.append("it ends at the limit of tokens: --max-tokens, or the model's context")
    if said:
        console(stderr=True).print(f"[yellow]![/] {'; '.join(said)}")


class _Screen(Protocol):
    def show(self, piece: Piece) -> None:
        """Show a piece at once."""

    def end(self, answer: Answer) -> None:
        """Show what could not be shown at once, and end the line."""


def _screen(output: Output, reasoning: bool) -> _Screen:
    if output.json:
        return _Nothing()
    return _Terminal() if sys.stdout.isatty() else _Pipe(reasoning)


class _Nothing:
    """JSON has all at the end."""

    def show(self, piece: Piece) -> None:
        del piece

    def end(self, answer: Answer) -> None:
        del answer


def _visible(text: str) -> str:
    return _CONTROL.sub(lambda found: "" if found[0] == "\r" else ascii(found[0])[1:-1], text)


class _Terminal:
    """Both, the reasoning dim. Control characters, which a terminal would obey, become visible."""

    def __init__(self) -> None:
        self._out, self._before, self._ends_line = console(), "", True

    def show(self, piece: Piece) -> None:
        text = _visible(piece.text)
        if piece.kind != self._before:
            text = text.lstrip("\n")
            self._separate(piece)
        self._before = piece.kind
        self._write(text, dim=piece.kind == "reasoning")

    def _separate(self, piece: Piece) -> None:
        if self._before:
            self._write("\n" if self._ends_line else "\n\n")
        if (self._before, piece.kind) == ("unsure", "content"):
            self._write("(above: its reasoning)\n\n", dim=True)

    def end(self, answer: Answer) -> None:
        del answer
        if not self._ends_line:
            self._write("\n")

    def _write(self, text: str, dim: bool = False) -> None:
        if text:
            self._ends_line = text.endswith("\n")
            self._out.out(text, end="", style="dim" if dim else None, highlight=False)


class _Pipe:
    """The content on stdout, as it is, and nothing else there; the reasoning on stderr if it is wanted."""

    def __init__(self, reasoning: bool) -> None:
        self._streams: dict[Kind, TextIO | None] = {
            "content": sys.stdout,
            "reasoning": sys.stderr if reasoning else None,
        }
        self._shown: dict[Kind, str] = dict.fromkeys(self._streams, "")

    def show(self, piece: Piece) -> None:
        # What is unsure waits: only content may be on stdout.
        if stream := self._streams.get(piece.kind):
            text = piece.text if self._shown[piece.kind] else piece.text.lstrip("\n")
            # First: after an interrupt here it must not be shown again.
            self._shown[piece.kind] += text
            # stderr is often the terminal that stdout is not.
            stream.write(_visible(text) if stream.isatty() else text)
            stream.flush()

    def end(self, answer: Answer) -> None:
        for whole in (Piece("reasoning", answer.reasoning), Piece("content", answer.content)):
            kind = whole.kind
            if not self._shown[kind]:
                self.show(whole)
            if (stream := self._streams[kind]) and self._shown[kind] and not self._shown[kind].endswith("\n"):
                stream.write("\n")
                stream.flush()
