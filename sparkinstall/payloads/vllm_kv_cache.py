"""Ask the installed vLLM what it allocates for the KV cache of a model, from the model's JSON files alone.

The environment's Python runs this text in a process of its own; sparkinstall cannot be imported there. The model is
built on torch's meta device: it has shapes and no numbers. vLLM's own code of a start then plans the cache, with a
worker in place of its own that answers for that model and allocates nothing: the order of the calls is each release's.

tests/fast/test_vllm_internals.py compares every name used here with the wheels of the shipped stacks.
"""

# These imports exist in the node's environment only.
# mypy: disable-error-code="import-not-found, misc"

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    ensure_model_parallel_initialized,
    get_tp_group,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerBase

Facts = dict[str, Any]

# Bytes to plan with: so many that the quotient by the blocks is exact, whatever the size of a block.
_PLENTY = 1 << 60
_LONGEST_REASON = 300


def main() -> None:
    """Answer the questions in argv[1] (JSON) with one line of JSON."""
    questions, out, began = json.loads(sys.argv[1]), os.dup(1), time.monotonic()
    # Output of libraries must not mix with the answer.
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        oracle = Oracle(folder)
        answers = [oracle.answer(each) for each in questions]
    told = {"vllm": str(vllm.__version__), "device": str(current_platform.device_type), "answers": answers}
    os.write(out, json.dumps({**told, "seconds": round(time.monotonic() - began, 1)}).encode() + b"\n")
    # Without the ends of libraries, which may wait for threads or for a GPU.
    os._exit(0)


def in_words(error: BaseException) -> str:
    """Return an error as one line: the last of a chain says more than a validator's frame around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # pydantic names the class first, then the reason.
    why = next((line for line in lines if line.startswith("Value error, ")), lines[0] if lines else "")
    why = why.removeprefix("Value error, ").partition(" [type=")[0]
    return ": ".join(part for part in (type(error).__name__, why) if part)[:_LONGEST_REASON]


class Oracle:
    """vLLM, for one question after the other."""

    def __init__(self, folder: str) -> None:
        self._parser = EngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
        self._rendezvous = f"file://{folder}/rendezvous"
        # vLLM looks at a model's class in another process, which imports all once more.
        registry._run_in_subprocess = lambda look: look()

    def answer(self, question: Facts) -> Facts:
        """Return the plan, or the error.

        Args:
            question: `folder` has the model's JSON files; `words` are options of `vllm serve`; `nodes` share the
                tensors.
        """
        try:
            return {"plan": self._plan(question)}
        except (Exception, SystemExit) as error:
            return {"error": in_words(error)}

    def _plan(self, question: Facts) -> Facts:
        nodes, config = question["nodes"], self._config(question)
        self._join()
        with set_current_vllm_config(config), _as_one_of(nodes):
            model = self._built(config)
            # As an executor does once its worker has the model.
            current_platform.update_block_size_for_backend(config)
            worker = Worker(config)
            worker.plan()
            return {
                "weights": _bytes_of(model),
                "layers": worker.layers(),
                "block_size": config.cache_config.block_size,
                "kv_dtype": str(config.cache_config.cache_dtype),
                "prefix_caching": bool(config.cache_config.enable_prefix_caching),
                "batched_tokens": config.scheduler_config.max_num_batched_tokens,
                **worker.figures(),
            }

    def _config(self, question: Facts) -> Any:
        words = ["--model", question["folder"], "--load-format", "dummy", "--skip-tokenizer-init", *question["words"]]
        if question["nodes"] > 1:
            nodes = str(question["nodes"])
            words += ["--tensor-parallel-size", nodes, "--nnodes", nodes, "--distributed-executor-backend", "mp"]
        args = EngineArgs.from_cli_args(self._parser.parse_args(words))
        return args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)

    def _join(self) -> None:
        """Make this process the only one of its groups, which layers ask for their rank."""
        if torch.distributed.is_initialized():
            return
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(1, 0, self._rendezvous, 0, "gloo")
            ensure_model_parallel_initialized(1, 1)

    def _built(self, config: Any) -> Any:
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            return initialize_model(vllm_config=config)


@contextlib.contextmanager
def _as_one_of(nodes: int) -> Iterator[None]:
    """Make layers take this process for one of so many that share the tensors; nothing is computed."""
    group = get_tp_group()
    group.world_size = nodes
    try:
        yield
    finally:
        group.world_size = 1


def _bytes_of(model: Any) -> int:
    """Return the bytes of a node's weights, as they are before a backend repacks them."""
    seen = {id(each): each.numel() * each.element_size() for each in model.parameters()}
    return int(sum(seen.values()))


class Worker:
    """Stands in for vLLM's executor and its workers while it plans the cache.

    vLLM calls its public methods up to `plan`. What they ask of the model is left to vLLM's own code.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self._configs: list[Any] = []
        self._own = SimpleNamespace(vllm_config=config, shared_kv_cache_layers={})
        self._specs: dict[str, Any] = {}

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        self._specs = GPUModelRunner.get_kv_cache_spec(self._own)
        return [dict(self._specs)]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [WorkerBase.get_supported_kv_cache_layouts(self._own)]

    def set_kv_cache_layout(self, *layout: Any) -> None:
        WorkerBase.set_kv_cache_layout(self._own, *layout)

    def determine_available_memory(self) -> list[int]:
        return [_PLENTY]

    def initialize_from_config(self, configs: Any) -> None:
        self._configs = list(configs)

    def compile_or_warm_up_model(self) -> None:
        """Nothing is computed."""

    def plan(self) -> None:
        """Let vLLM plan as when it starts."""
        engine = EngineCore.__new__(EngineCore)
        engine.vllm_config, engine.model_executor = self.config, self
        engine._initialize_kv_caches(self.config)
        if not self._configs or not self._configs[0].kv_cache_groups:
            raise ValueError("the model keeps no KV cache")

    def figures(self) -> Facts:
        """Return the blocks of one sequence by its length, and the bytes of a block."""
        planned, context = self._configs[0], self.config.model_config.max_model_len
        step = min(group.kv_cache_spec.block_size for group in planned.kv_cache_groups)
        return {
            "context": context,
            "concurrency": self._concurrency(context),
            "blocks": planned.num_blocks,
            "block_bytes": _PLENTY // planned.num_blocks,
            "groups": len(planned.kv_cache_groups),
            "step": step,
            "steps": _runs([self._blocks(at * step) for at in range(1, -(-context // step) + 1)]),
        }

    def _blocks(self, context: int) -> int:
        """Return the blocks of one sequence."""
        blocks: int = self._configs[0].num_blocks
        return round(blocks / self._concurrency(context))

    def _concurrency(self, context: int) -> float:
        asked = self.config.model_config.max_model_len
        # As vLLM itself does to find the longest sequence that fits.
        self.config.model_config.max_model_len = context
        try:
            return float(get_max_concurrency_for_kv_cache_config(self.config, self._configs[0]))
        finally:
            self.config.model_config.max_model_len = asked

    def layers(self) -> list[Facts]:
        """Return the layers by kind: `page` bytes for `block` tokens, 0 tokens for a state; `window`: 0 for none."""
        found: dict[tuple[str, int, int, int], int] = {}
        for spec in self._specs.values():
            page = getattr(spec, "real_page_size_bytes", None) or spec.page_size_bytes
            block = 0 if hasattr(spec, "mamba_type") else spec.block_size
            key = (type(spec).__name__, int(page), block, getattr(spec, "sliding_window", None) or 0)
            found[key] = found.get(key, 0) + 1
        return [
            {"kind": kind, "page": page, "block": block, "window": window, "count": count}
            for (kind, page, block, window), count in found.items()
        ]


def _runs(values: list[int]) -> list[list[int]]:
    """Return how often each difference follows in a list, from 0 on: [[times, difference], ...]."""
    runs: list[list[int]] = []
    before = 0
    for value in values:
        difference, before = value - before, value
        if runs and runs[-1][1] == difference:
            runs[-1][0] += 1
        else:
            runs.append([1, difference])
    return runs


if __name__ == "__main__":
    main()
