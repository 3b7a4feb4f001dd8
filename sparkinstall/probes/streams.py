"""Fix 8: judge from a stream's deltas which field carries reasoning."""

import re
from collections.abc import Collection, Mapping, Sequence

from msgspec import Struct

from sparkinstall.facts.vllm import reasoning_parsers
from sparkinstall.node import Node
from sparkinstall.probes import Finding, failed, passed, warned
from sparkinstall.system import Reader

_RAW = ("<think>", "</think>", "<seed:think>", "</seed:think>")
# Parsers that keep the markers in the answer, for clients that parse them.
_KEEPS_RAW = "append_think"
# Model families whose names differ from their parser's.
_ALSO_NAMED = {"nemotron_v3": "nemotron3", "openai_gptoss": "gptoss"}


class Transcript(Struct, frozen=True):
    """A complete stream. `said`: text by delta field; `prompt`: the end of the model's prompt."""

    said: Mapping[str, str]
    prompt: str
    finish: str | None

    @property
    def content(self) -> str:
        return self.said.get("content", "")

    @property
    def reasoning(self) -> list[str]:
        """The fields that carried reasoning."""
        return [field for field in self.said if field.startswith("reasoning")]

    @property
    def raw(self) -> str | None:
        """A reasoning marker in the answer's text."""
        return next((mark for mark in _RAW if mark in self.content), None)

    @property
    def opened(self) -> bool:
        """Whether the chat template itself opens the reasoning, as Qwen3.5's does: the stream has no opening marker."""
        return self.prompt.rfind("<think>") > self.prompt.rfind("</think>")

    @property
    def closed(self) -> bool:
        """Whether the chat template disables reasoning."""
        return "</think>" in self.prompt and not self.opened


def judged(transcript: Transcript, parser: str | None, fields: Collection[str], add: str) -> Finding:
    """Judge a stream.

    Args:
        parser: the parser that vLLM was started with.
        fields: the reasoning fields of the installed vLLM; empty if unknown.
        add: how to set the parser of the model.
    """
    finding = _unparsed(transcript, add) if parser is None else _misparsed(transcript, parser)
    if finding:
        return finding
    if strange := [field for field in transcript.reasoning if fields and field not in fields]:
        return failed(
            f"reasoning is in delta.{strange[0]}, which the installed vLLM does not send",
            "it was started before vLLM was updated: `sudo systemctl restart vllm.service`",
            _expected(fields),
        )
    return passed(_where(transcript, parser), _expected(fields))


def _expected(fields: Collection[str]) -> str:
    return "reasoning, if any, in " + " and ".join(f"delta.{field}" for field in fields or ("reasoning",))


def _unparsed(transcript: Transcript, add: str) -> Finding | None:
    """Return what is wrong without a configured parser; vLLM has a built-in one for gpt-oss."""
    if transcript.raw:
        return warned(f"raw {transcript.raw} in delta.content: clients show reasoning as the answer", add)
    if transcript.opened and not transcript.reasoning:
        return warned("reasoning is in delta.content, unmarked: the chat template opens it", add)
    return None


def _misparsed(transcript: Transcript, parser: str) -> Finding | None:
    """Return what is wrong with the configured parser."""
    change = "it does not match this model: the model card names its `--reasoning-parser`, for `serving.arguments`"
    if transcript.raw and not parser.endswith(_KEEPS_RAW):
        return failed(f"raw {transcript.raw} in delta.content despite --reasoning-parser {parser}", change)
    if transcript.opened and not transcript.reasoning and not transcript.raw:
        return failed(f"reasoning is in delta.content despite --reasoning-parser {parser}", change)
    if transcript.reasoning and not transcript.content and (transcript.finish == "stop" or transcript.closed):
        return warned(
            f"the whole answer is in delta.{transcript.reasoning[0]}, and nothing in delta.content",
            f"--reasoning-parser {parser} is for models with reasoning: remove it from `serving.arguments`",
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
    """Return the `--reasoning-parser` among vLLM's arguments; the last wins."""
    parser = None
    for place, word in enumerate(arguments):
        name, given, value = word.partition("=")
        if name.replace("_", "-") == "--reasoning-parser":
            parser = value if given else "".join(arguments[place + 1 : place + 2])
    return parser or None


def adding(node: Node, on: Reader, model: str) -> str:
    """Return how to set the parser of `model`, from the names that this vLLM knows."""
    names = f"{model} {node.config.serving.model}"
    parser = fitting(names, reasoning_parsers(node, on))
    which = parser or "NAME"
    said = f"add `--reasoning-parser`, `{which}` to `serving.arguments`, then `sparkinstall run serving`"
    return said if parser else f"{said}; the model card names it"


def fitting(names: str, parsers: Collection[str]) -> str | None:
    """Return the parser whose family is in `names`: qwen3 for Qwen3.5-35B-A3B; the longest match wins."""
    plain = _plain(names)
    fit = [parser for parser in parsers if _plain(_ALSO_NAMED.get(parser, parser)) in plain]
    return max(fit, key=len, default=None)


def _plain(text: str) -> str:
    return re.sub("[^a-z0-9]", "", text.lower())
