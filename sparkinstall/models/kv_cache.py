"""What vLLM takes for the KV cache of a layout, by formulas that were held against its own allocator.

A block has the keys and values of `BLOCK` tokens of one layer. Layers of two kinds share one pool: vLLM puts them into
groups of equal size, each with blocks of its own, and pads the last group of a kind.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

from msgspec import Struct

BLOCK = 16
"""Tokens of a block on a GB10."""


class Layers(Struct, frozen=True):
    """Equal layers: `count` of them with `heads` KV heads (1 for MLA).

    Attributes:
        width: elements of one token and head, those of K and V together.
        window: tokens that a sliding layer attends to.
    """

    kind: Literal["full", "sliding", "mla"]
    count: int
    heads: int
    width: int
    window: int = 0


class Load(Struct, frozen=True):
    """What is asked of the cache.

    Attributes:
        context: tokens of each sequence.
        batched_tokens: `--max-num-batched-tokens`.
        element: bytes of an element.
        tensor_parallel: nodes over which the heads are spread.
        batches: batches in flight, whose tokens a sliding layer keeps too; vLLM schedules one ahead from 0.29 on.
        kv_dtype: `--kv-cache-dtype`; `element` follows from it.
    """

    context: int
    sequences: int
    batched_tokens: int
    element: int
    tensor_parallel: int = 1
    batches: int = 1
    kv_dtype: str = "auto"


class CacheSize(Protocol):
    """Tells the size of a model's KV cache: by formulas, or as the installed vLLM plans it."""

    def bytes_of(self, load: Load) -> int | None:
        """Return the bytes that each node takes, None if they are not known for these options."""

    def read_by_token(self, load: Load) -> int | None:
        """Return the bytes that each node reads to decode one token at the end of the context."""


class Formulas(Struct, frozen=True):
    """The size of the cache by formulas: estimates. Its layers are of one kind, or their pages are of one size."""

    layers: Sequence[Layers]

    def bytes_of(self, load: Load) -> int:
        """Return the bytes that each node takes. One block more than the sequences need is vLLM's own."""
        blocks, size = self._blocks(load)
        return (blocks * load.sequences + 1) * size

    def of_sequence(self, load: Load) -> int:
        """Return the bytes of one sequence."""
        blocks, size = self._blocks(load)
        return blocks * size

    def _blocks(self, load: Load) -> tuple[int, int]:
        """Return the blocks of a sequence in all groups, and the bytes of one block in all layers of a group."""
        if len({(each.kind == "sliding", each.window) for each in self.layers}) == 1:
            return _tokens_in_blocks(self.layers[0], load), sum(each.count * _page(each, load) for each in self.layers)
        size = _group_size([each.count for each in self.layers])
        blocks = sum(-(-each.count // size) * _tokens_in_blocks(each, load) for each in self.layers)
        return blocks, size * _page(self.layers[0], load)

    def read_by_token(self, load: Load) -> int:
        """Return the bytes that each node reads to decode one token: a sliding layer reads its window only."""
        return sum(
            each.count * _page(each, load) * min(load.context, each.window or load.context) // BLOCK
            for each in self.layers
        )


def _tokens_in_blocks(layers: Layers, load: Load) -> int:
    """Return the blocks that one sequence takes in one layer.

    A sliding layer keeps its window and what is being computed. Its window may begin within a block.
    """
    if layers.kind != "sliding":
        return -(-load.context // BLOCK)
    tokens = min(load.context, layers.window - 1 + load.batched_tokens * load.batches)
    return -(-tokens // BLOCK) + 1


def _page(layers: Layers, load: Load) -> int:
    """Return the bytes of a block in one layer of one node. MLA's is the same on every node."""
    heads = layers.heads if layers.kind == "mla" else max(1, layers.heads // load.tensor_parallel)
    return BLOCK * heads * layers.width * load.element


def _group_size(counts: Sequence[int]) -> int:
    """Return the layers of a group: as many as the rarest kind has, unless the others have few more."""
    least, most = min(counts), max(counts)
    return most if most < 1.5 * least else least
