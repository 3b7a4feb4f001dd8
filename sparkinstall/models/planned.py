"""The KV cache as the installed vLLM plans it: its own answers, as payloads/vllm_kv_cache.py asks for them."""

from collections.abc import Mapping, Sequence

from msgspec import Struct

from sparkinstall.models.kv_cache import Load


class Asked(Struct, frozen=True):
    """What of the options changes the plan. `kv_dtype` "auto": what the checkpoint asks for."""

    batched_tokens: int
    kv_dtype: str = "auto"
    tensor_parallel: int = 1


class PlannedLayers(Struct, frozen=True):
    """Equal layers: `page` bytes for `block` tokens of each, or one state if that is 0; `window` 0: none."""

    kind: str
    page: int
    block: int
    window: int
    count: int


class Plan(Struct, frozen=True):
    """vLLM's plan for one set of options, of each node.

    Attributes:
        weights: bytes of the weights before a backend repacks them.
        context: the longest sequence.
        concurrency: sequences of that length in `blocks`.
        block_bytes: bytes of a block in all layers of a group; all groups draw from one pool.
        steps: the blocks of one sequence by its length: how often each difference follows, every `step` tokens.
    """

    weights: int
    layers: tuple[PlannedLayers, ...]
    block_size: int
    kv_dtype: str
    prefix_caching: bool
    batched_tokens: int
    context: int
    concurrency: float
    blocks: int
    block_bytes: int
    groups: int
    step: int
    steps: tuple[tuple[int, int], ...]

    def blocks_of(self, context: int) -> int | None:
        """Return the blocks of one sequence, None if vLLM does not allow one of that length."""
        if context > self.context:
            return None
        left, blocks = -(-context // self.step), 0
        for times, difference in self.steps:
            blocks += min(left, times) * difference
            left -= min(left, times)
        return None if left else blocks


class Planned(Struct, frozen=True):
    """vLLM's plans by what was asked. `errors`: why it has none for some options."""

    vllm: str
    plans: Mapping[Asked, Plan]
    errors: Mapping[Asked, str] = {}

    def plan(self, batched_tokens: int, kv_dtype: str, tensor_parallel: int) -> Plan | None:
        """Return the plan for these options, None if there is none."""
        return self.plans.get(Asked(batched_tokens, kv_dtype, tensor_parallel))

    def bytes_of(self, load: Load) -> int | None:
        """Return the bytes that each node takes. One block more than the sequences need is vLLM's own."""
        plan = self.plan(load.batched_tokens, load.kv_dtype, load.tensor_parallel)
        blocks = plan.blocks_of(load.context) if plan else None
        return (blocks * load.sequences + 1) * plan.block_bytes if plan and blocks is not None else None

    def read_by_token(self, load: Load) -> int | None:
        """Return the bytes that each node reads to decode one token: a window, a state, or the whole context."""
        plan = self.plan(load.batched_tokens, load.kv_dtype, load.tensor_parallel)
        return sum(each.count * _read(each, load.context) for each in plan.layers) if plan else None


def _read(layers: PlannedLayers, context: int) -> int:
    if not layers.block:
        return layers.page
    return layers.page * min(context, layers.window or context) // layers.block


class Question(Struct, frozen=True):
    """A question to the payload: the folder of the model's JSON files, options of `vllm serve`, and the nodes that
    share the tensors."""

    folder: str
    words: Sequence[str]
    nodes: int


class Answer(Struct, frozen=True):
    """Its answer: a plan, or why there is none."""

    plan: Plan | None = None
    error: str = ""


class Reply(Struct, frozen=True):
    """The reply of the payload to all questions; `device`: what vLLM would run on."""

    error: str = ""
    vllm: str = ""
    device: str = ""
    seconds: float = 0
    answers: Sequence[Answer] = ()
