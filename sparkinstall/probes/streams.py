"""The field in which a stream carries reasoning: fix 8, from the deltas themselves."""

import re
from collections.abc import Collection, Mapping, Sequence

from msgspec import Struct

from sparkinstall.facts.vllm import reasoning_parsers
from sparkinstall.node import Node
from sparkinstall.probes import Finding, failed, passed, warned
from sparkinstall.system import Reader

_RAW = ("<think>", "</think>", "<seed:think>", "</seed:think>")
# Parsers that keep the marks in the answer, for clients that look for them there.
_KEEPS_RAW = "append_think"
# Families whose models are not named as their parser is.
_ALSO_NAMED = {"nemotron_v3": "nemotron3", "openai_gptoss": "gptoss"}


class Transcript(Struct, frozen=True):
    """A stream to its end. `said`: text by field of the deltas; `prompt`: the end of what the model was given."""

    said: Mapping[str, str]
    prompt: str
    finish: str | None

    @property
    def content(self) -> str:
        return self.said.get("content", "")

    @property
    def reasoning(self) -> list[str]:
        """The fields that carried thinking."""
        return [field for field in self.said if field.startswith("reasoning")]

    @property
    def raw(self) -> str | None:
        """A mark of thinking that stands in the answer's text."""
        return next((mark for mark in _RAW if mark in self.content), None)

    @property
    def opened(self) -> bool:
        """Whether the chat template itself opens the reasoning, as Qwen3.5's does: no mark will come."""
        return self.prompt.rfind("<think>") > self.prompt.rfind("</think>")

    @property
    def closed(self) -> bool:
        """Whether the chat template says that there is nothing to think."""
        return "</think>" in self.prompt and not self.opened


def judged(transcript: Transcript, parser: str | None, fields: Collection[str], add: str) -> Finding:
    """What a stream shows.

    Args:
        parser: the one that vLLM was started with.
        fields: what the installed vLLM calls its field for thinking; empty: not known.
        add: how to set the parser that fits the model.
    """
    finding = _unparsed(transcript, add) if parser is None else _misparsed(transcript, parser)
    if finding:
        return finding
    if strange := [field for field in transcript.reasoning if fields and field not in fields]:
        return failed(
            f"reasoning is in delta.{strange[0]}, which the installed vLLM does not send",
            "it was started before vLLM was changed: `sudo systemctl restart vllm.service`",
            _expected(fields),
        )
    return passed(_where(transcript, parser), _expected(fields))


def _expected(fields: Collection[str]) -> str:
    return "thinking, if any, in " + " and ".join(f"delta.{field}" for field in fields or ("reasoning",))


def _unparsed(transcript: Transcript, add: str) -> Finding | None:
    """What is wrong where no parser was asked for; vLLM has one of its own for gpt-oss."""
    if transcript.raw:
        return warned(f"raw {transcript.raw} in delta.content: clients show reasoning as the answer", add)
    if transcript.opened and not transcript.reasoning:
        return warned("reasoning is in delta.content, unmarked: the chat template opens it", add)
    return None


def _misparsed(transcript: Transcript, parser: str) -> Finding | None:
    """What is wrong with a parser that was asked for."""
    change = "it does not fit this model: the model's card names its `--reasoning-parser`, for `serving.arguments`"
    if transcript.raw and not parser.endswith(_KEEPS_RAW):
        return failed(f"raw {transcript.raw} in delta.content in spite of --reasoning-parser {parser}", change)
    if transcript.opened and not transcript.reasoning and not transcript.raw:
        return failed(f"reasoning is in delta.content in spite of --reasoning-parser {parser}", change)
    if transcript.reasoning and not transcript.content and (transcript.finish == "stop" or transcript.closed):
        return warned(
            f"all of the answer came in delta.{transcript.reasoning[0]}, and none in delta.content",
            f"--reasoning-parser {parser} takes this model for one that thinks: leave it out of `serving.arguments`",
        )
    return None


def _where(transcript: Transcript, parser: str | None) -> str:
    if transcript.reasoning:
        fields = " and ".join(f"delta.{field}" for field in transcript.reasoning)
        return f"reasoning in {fields}" + (", the answer in delta.content" if transcript.content else "")
    if transcript.raw:
        return f"reasoning in delta.content, marked, as --reasoning-parser {parser} has it"
    return "no reasoning in this model's stream"


def parser_of(arguments: Sequence[str]) -> str | None:
    """The `--reasoning-parser` among vLLM's arguments; the last wins."""
    parser = None
    for place, word in enumerate(arguments):
        name, given, value = word.partition("=")
        if name.replace("_", "-") == "--reasoning-parser":
            parser = value if given else "".join(arguments[place + 1 : place + 2])
    return parser or None


def adding(node: Node, on: Reader, model: str) -> str:
    """How to set the parser that fits `model`, by the names that this vLLM knows."""
    names = f"{model} {node.config.serving.model}"
    parser = fitting(names, reasoning_parsers(node, on))
    which = parser or "NAME"
    said = f"add `--reasoning-parser`, `{which}` to `serving.arguments`, then `sparkinstall run serving`"
    return said if parser else f"{said}; the model's card says which"


def fitting(names: str, parsers: Collection[str]) -> str | None:
    """The parser whose family `names` has in it: qwen3 for Qwen3.5-35B-A3B; the longest that fits."""
    plain = _plain(names)
    fit = [parser for parser in parsers if _plain(_ALSO_NAMED.get(parser, parser)) in plain]
    return max(fit, key=len, default=None)


def _plain(text: str) -> str:
    return re.sub("[^a-z0-9]", "", text.lower())
