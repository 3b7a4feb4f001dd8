"""Recipes: how a model is served on Sparks, as data, with who reported it.

The shipped ones are `knowledge/recipes/*.yaml` (`catalogue`); `readers` turns files of other projects into the same
type. A recipe is data: nothing in it is run here, and its options are checked against an installed vLLM elsewhere.

A leaf: PyYAML is imported only when a file is read.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta, Struct

from sparkinstall.errors import BadConfig
from sparkinstall.schema import like

_Line = Annotated[str, like(r"[^\x00-\x1f\x7f]+", "one line of text")]
_Id = Annotated[str, like(r"[a-z0-9]+(?:[._-][a-z0-9]+)*", "lower-case letters and digits, joined by `-`, `.` or `_`")]
_Model = Annotated[
    str, like(r"/[^\x00-\x1f\x7f]*|[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?(?::[\w.-]+)?", "a model such as openai/gpt-oss-20b")
]
_Release = Annotated[str, like(r"\d+(?:\.\d+)+(?:[a-z.+-][\w.+-]*)?", 'a release such as "0.29.0"')]
_Day = Annotated[str, like(r"\d{4}-\d\d(?:-\d\d)?", "a day or a month such as 2026-09-25 or 2026-09")]
_Count = Annotated[int, Meta(ge=1, title="a number from 1")]
_Share = Annotated[float, Meta(gt=0, le=1, title="a number above 0, at most 1")]
_Word = Annotated[str, like(r"[^\x00]*", "text")]
_Name = Annotated[str, like(r"[A-Za-z_][A-Za-z0-9_]*", "the name of a variable")]
_Image = Annotated[str, like(r"[^\s@-][^\s@]*@sha256:[0-9a-f]{64}", "an image pinned by its digest: NAME@sha256:...")]

Option = Annotated[tuple[_Word, ...], Meta(min_length=1, title="an option and its values, such as [--block-size, 256]")]
"""An option of `vllm serve`: its name and its values, one word each."""


class RecipeError(BadConfig):
    """A recipe cannot be used as it is written, or there is none of that name."""


class Speed(Struct, frozen=True, forbid_unknown_fields=True):
    """A reported speed: `value` is that of all `streams` together.

    `content` is what was generated, `date` when it was measured or published.
    """

    value: Annotated[float, Meta(gt=0, title="a number above 0")]
    source: _Line
    streams: _Count = 1
    unit: Literal["tokens/s", "texts/s"] = "tokens/s"
    content: _Line | None = None
    date: _Day | None = None
    conditions: _Line | None = None

    @property
    def words(self) -> str:
        """The number with its unit and streams."""
        return f"{self.value:g} {self.unit}" + (f" in {self.streams} streams" if self.streams > 1 else "")


class Source(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a recipe's settings or figures come from; `licence` is that of the source, if it was read (SPDX)."""

    repository: _Line
    path: _Line | None = None
    commit: _Line | None = None
    licence: _Line | None = None


class Recipe(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to serve one model. What is not known is absent.

    Attributes:
        bytes: size of the weights' files.
        nodes: Sparks that it takes, one GPU each.
        executor: what distributes it over several nodes, if it works with nothing else.
        memory: the most that it asks for, as vLLM's `--gpu-memory-utilization`: a ceiling, not a recommendation.
        context: tokens of one sequence; "auto": as many as fit.
        sequences, batched_tokens: `--max-num-seqs` and `--max-num-batched-tokens`.
        args: further options of `vllm serve`, in their order.
        loads_from: the oldest shipped stack whose vLLM has the architecture, the parsers and the options.
        good_on_gb10_from: the oldest release of vLLM that was reported to serve it on a GB10.
        needs_vllm: the oldest release that another project's recipe asks for.
        needs_build: the patched build without which these settings do not work.
        expects: files that the recipe takes from its image.
        image: the image that its source runs it in, if pinned.
    """

    id: _Id
    model: _Model
    revision: _Line | None = None
    bytes: _Count | None = None
    nodes: _Count = 1
    tensor_parallel: _Count = 1
    pipeline_parallel: _Count = 1
    executor: Literal["ray", "mp"] | None = None
    memory: _Share | None = None
    context: _Count | Literal["auto"] | None = None
    sequences: _Count | None = None
    batched_tokens: _Count | None = None
    tool_parser: _Line | None = None
    reasoning_parser: _Line | None = None
    args: tuple[Option, ...] = ()
    env: Annotated[
        Mapping[_Name, _Word], Meta(title="a mapping, each key the name of a variable, each value text")
    ] = {}
    loads_from: _Release | None = None
    good_on_gb10_from: _Release | None = None
    needs_vllm: _Release | None = None
    needs_build: _Line | None = None
    expects: tuple[_Line, ...] = ()
    image: _Image | None = None
    speed: tuple[Speed, ...] = ()
    notes: tuple[_Line, ...] = ()
    sources: tuple[Source, ...] = ()


class Change(Struct, frozen=True):
    """What a reader or `render` did with one part of a recipe, and why."""

    what: str
    done: Literal["dropped", "overridden", "ignored", "added"]
    why: str


class ReadRecipe(Struct, frozen=True):
    """A recipe from a file, and what of the file is not in it. `format`: whose format the file has."""

    recipe: Recipe
    format: str = "sparkinstall"
    changes: tuple[Change, ...] = ()
