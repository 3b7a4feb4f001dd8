"""Whether a model fits into the memory of a Spark, and what would make it fit; nothing is downloaded or run."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.core.memory import OVERHEAD, RESERVE, Memory
from sparkinstall.core.planned import NotPlanned, Oracle, Questions
from sparkinstall.core.recipe_list import release
from sparkinstall.downloads import NotDownloaded
from sparkinstall.errors import BadUsage
from sparkinstall.models import Basis, Figure, ModelError, hub, unknown
from sparkinstall.models.files import CONFIG, Files, LocalFiles, read_object
from sparkinstall.models.kv_cache import CacheSize, Formulas, Load
from sparkinstall.models.layout import Layout, layout_of
from sparkinstall.models.planned import Asked, Plan, Planned
from sparkinstall.models.weights import Weights, loaded_size, read_by_token, read_weights
from sparkinstall.recipes import Recipe
from sparkinstall.recipes.serve_options import draft_of, key

Verdict = Literal["fits", "does_not_fit", "unknown"]

BANDWIDTH = 273_000_000_000
"""Bytes a second that the memory of a GB10 delivers at best."""

BATCHED_TOKENS = 8192
"""vLLM's own `--max-num-batched-tokens` for a server with as much memory as a Spark."""
FEWER_BATCHED_TOKENS = 2048

# vLLM schedules a batch ahead by default, and counts its tokens for sliding layers, from some release after 0.22.1 on.
_ONE_BATCH_UNTIL = "0.22.1"
_PADDED = {"mxfp4": (1.1, "vLLM pads MXFP4: gpt-oss-120b took 8.4 % more than its files; counted with 10 % more")}
_HF_QUANT = "hf_quant_config.json"
_UNCOUNTED = {
    "--speculative-config": "the draft of speculative decoding, with its own weights and cache",
    "--cpu-offload-gb": "what is offloaded: on a Spark it is the same memory",
    "--kv-offloading-size": "the cache that is offloaded: on a Spark it is the same memory",
    "--enable-lora": "LoRA adapters",
}
_DRAFT_CACHE = "the cache of the model that drafts"
_FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
# Of 16 bits a weight; embeddings and scales stay wider.
_VERSIONS = {"8 bits a weight": 0.55, "4 bits a weight": 0.32}
_MOST_NODES = 64
# Options that change the cache in ways for which there is no formula.
_NO_FORMULA = ("--block-size", "--decode-context-parallel-size", "--disable-hybrid-kv-cache-manager", "--hf-overrides")
# Options that vLLM is asked with: they may change its plan.
_TO_VLLM = (
    *("--attention-backend", "--block-size", "--disable-hybrid-kv-cache-manager", "--dtype", "--hf-overrides"),
    *("--enable-prefix-caching", "--no-enable-prefix-caching", "--mamba-block-size", "--mamba-cache-dtype"),
    *("--mamba-cache-mode", "--mamba-ssm-cache-dtype", "--quantization"),
)


class FitOptions(Struct, frozen=True):
    """How a model is to be served. `context` "auto": as long as fits; None: as long as the model allows.

    `draft`, `draft_bytes`: the model that drafts, and what each node needs for its weights, if that is known.
    `to_vllm`: further options of `vllm serve` that change its plan. `no_formula`, `no_plan`: why there is no formula
    for them, or why vLLM is not asked. `remote_code`: vLLM may run the code of the model to plan.
    """

    context: int | Literal["auto"] | None = None
    sequences: int = 1
    batched_tokens: int = BATCHED_TOKENS
    kv_dtype: str = "auto"
    tensor_parallel: int = 1
    uncounted: tuple[str, ...] = ()
    draft: str = ""
    draft_bytes: int = 0
    no_formula: str = ""
    no_plan: str = ""
    quantized_at_load: bool = False
    to_vllm: tuple[str, ...] = ()
    remote_code: bool = False

    @property
    def asked(self) -> Asked:
        """What of them changes vLLM's plan."""
        return Asked(self.batched_tokens, self.kv_dtype, self.tensor_parallel)


class Way(Struct, frozen=True):
    """A change of the options, or another version of the model: what each node then needs (an estimate), and whether
    that fits."""

    options: Sequence[str]
    need: int
    fits: bool
    version: str = ""


class Outgrown(Struct, frozen=True):
    """A model that no change makes fit: the nodes over which it would, None if those are more than 64, and the bytes
    that a single machine would need. Both are estimates."""

    nodes: int | None
    bytes: int


class Decode(Struct, frozen=True):
    """The ceiling of decoding for one sequence, without speculative decoding.

    `read`: bytes of weights that each node reads for a token; the ceilings are tokens a second, of an empty context and
    at the end of the asked one. None: unknown.
    """

    read: Figure
    ceiling: float | None
    ceiling_at_context: float | None


class WeightFiles(Struct, frozen=True):
    """The files of the weights: exact. `loaded`: their bytes in memory, `counted` what the verdict takes for them."""

    bytes: int
    files: int
    left_out: Sequence[str]
    by_dtype: dict[str, int]
    loaded: Figure
    counted: Figure


class Budget(Struct, frozen=True):
    """What each node needs. `need` is the sum of the others, `short`: bytes that are missing, negative if none are."""

    weights: Figure
    kv_cache: Figure
    overhead: Figure
    reserve: Figure
    need: Figure
    available: Figure
    total: Figure
    short: int | None


class FitReport(Struct, frozen=True):
    """Result of `fit`. Bytes are those of each node, but for the files.

    `vllm`: whose way of counting is taken; `asked`: it was asked itself, else `not_asked` says why not.
    `largest_context`: with the asked sequences, `most_sequences`: with the asked context. `serve` and `serve_largest`:
    options of `vllm serve` for what was asked, and for the largest context.
    """

    model: str
    place: str
    revision: str
    recipe: str
    vllm: str
    asked: bool
    not_asked: str
    model_type: str
    quantization: str
    remote_code: Sequence[str]
    context: int | None
    sequences: int
    batched_tokens: int
    kv_dtype: str
    tensor_parallel: int
    files: WeightFiles
    memory: Budget
    verdict: Verdict
    why: str
    largest_context: int | None
    most_sequences: int | None
    serve: Sequence[str]
    serve_largest: Sequence[str]
    decode: Decode
    ways: Sequence[Way]
    outgrown: Outgrown | None
    notes: Sequence[str]


def options_of_recipe(recipe: Recipe) -> FitOptions:
    """Return how a recipe serves its model."""
    values = {key(each): " ".join(each[1:]) for each in recipe.args}
    kv_dtype = values.get("--kv-cache-dtype", "auto")
    other = next((f"the recipe has {name}" for name in _NO_FORMULA if name in values), "")
    no_plan = "the recipe has --decode-context-parallel-size" if "--decode-context-parallel-size" in values else ""
    if recipe.pipeline_parallel > 1:
        other = no_plan = "the recipe spreads the layers over nodes (pipeline parallel)"
    return FitOptions(
        context=recipe.context,
        sequences=recipe.sequences or 1,
        batched_tokens=recipe.batched_tokens or BATCHED_TOKENS,
        kv_dtype="fp8" if kv_dtype in _FP8 else kv_dtype,
        tensor_parallel=recipe.tensor_parallel,
        uncounted=tuple(what for name, what in _UNCOUNTED.items() if any(each.startswith(name) for each in values)),
        no_formula=other and f"{other}, for which fit has no formula",
        no_plan=no_plan,
        to_vllm=tuple(word for each in recipe.args if key(each) in _TO_VLLM for word in each),
        quantized_at_load="--quantization" in values,
    )


def with_draft(options: FitOptions, recipe: Recipe) -> FitOptions:
    """Count the weights of the model that drafts in a recipe, if their files can be read here or on the hub."""
    draft = draft_of(recipe.args)
    if draft is None:
        return options
    try:
        if draft.model.startswith("/"):
            files: Files = LocalFiles(Path(draft.model))
        else:
            revision = draft.revision or ""
            files = hub.cached(draft.model, revision) or hub.HubFiles(draft.model, revision)
        size = read_weights(files).size
    except (ModelError, NotDownloaded, BadUsage):
        return options
    left = tuple(_DRAFT_CACHE if each == _UNCOUNTED["--speculative-config"] else each for each in options.uncounted)
    return replace(options, draft=draft.model, draft_bytes=size, uncounted=left)


def with_cache_options(options: FitOptions, prefix_caching: bool | None, block_size: int | None) -> FitOptions:
    """Add what only vLLM itself can count: whether prefixes are cached, and the tokens of a block."""
    words = list(options.to_vllm)
    if prefix_caching is not None:
        words.append("--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching")
    if block_size is None:
        return replace(options, to_vllm=tuple(words))
    why = "--block-size, for which fit has no formula"
    return replace(options, to_vllm=(*words, "--block-size", str(block_size)), no_formula=options.no_formula or why)


class _Model(Struct, frozen=True):
    """What the files of a model say, and how its cache is counted: None if that is unknown.

    `planned`: vLLM's own plans, if it was asked and has answered; else `not_asked` says why.
    """

    layout: Layout
    weights: Weights
    cache: CacheSize | None
    why: str
    planned: Planned | None = None
    not_asked: str = ""

    @property
    def longest(self) -> int | None:
        """The longest sequence, None if that is unknown."""
        plans = self.planned.plans.values() if self.planned else ()
        return min((each.context for each in plans), default=self.layout.context)


def fit(
    name: str,
    files: Files,
    options: FitOptions,
    memory: Memory,
    vllm: str,
    recipe: str = "",
    oracle: Oracle | None = None,
) -> FitReport:
    """Judge whether a model fits.

    Args:
        name: how the user calls the model.
        vllm: the release whose way of counting is taken, unless `oracle` answers.
        oracle: asks the installed vLLM for its plan; None: formulas only.

    Raises:
        ModelError: a file of the model is missing, damaged, or absurd.
        BadUsage: the options do not suit the model.
        NotDownloaded: the hub does not give a file.
    """
    model = _read(files, options, oracle)
    judge = _Judge(model, options, memory, 1 if release(vllm) <= release(_ONE_BATCH_UNTIL) else 2)
    context = judge.context
    verdict, why = judge.verdict(options, context)
    largest = judge.largest_context(options)
    fits = verdict == "fits"
    ways = tuple(judge.ways(context)) if verdict == "does_not_fit" else ()
    return FitReport(
        model=name,
        place=files.place,
        revision=files.revision,
        recipe=recipe,
        vllm=model.planned.vllm if model.planned else vllm,
        asked=model.planned is not None,
        not_asked=model.not_asked,
        model_type=model.layout.type,
        quantization=model.layout.quantization,
        remote_code=model.layout.remote_code,
        context=context,
        sequences=options.sequences,
        batched_tokens=options.batched_tokens,
        kv_dtype=judge.kv_dtype(options),
        tensor_parallel=options.tensor_parallel,
        files=judge.files,
        memory=judge.budget(options, context),
        verdict=verdict,
        why=why,
        largest_context=largest,
        most_sequences=judge.most_sequences(options, context),
        serve=judge.serve(options, context) if fits and context else (),
        serve_largest=judge.serve(options, largest) if largest and largest != context else (),
        decode=judge.decode(options, context),
        ways=ways,
        outgrown=judge.outgrown(context) if ways and not any(each.fits for each in ways) else None,
        notes=tuple(judge.notes()),
    )


def _read(files: Files, options: FitOptions, oracle: Oracle | None) -> _Model:
    names = files.names()
    if CONFIG not in names:
        has = " (it has params.json, which is Mistral's own format)" if "params.json" in names else ""
        raise ModelError(f"{files.place} has no {CONFIG}{has}", hint="name the folder or the hub's name of a model")
    config = read_object(files, CONFIG)
    in_config = bool(config.get("quantization_config"))
    layout = layout_of(config, read_object(files, _HF_QUANT) if _HF_QUANT in names and not in_config else None)
    why = layout.why or options.no_formula or _why_no_dtype(layout, options)
    weights = read_weights(files)
    _require_divisible(layout, options.tensor_parallel)
    try:
        if planned := _plans(files, layout, options, oracle):
            return _Model(layout, weights, planned, "", planned)
        not_asked = options.no_plan
    except NotPlanned as error:
        not_asked = str(error)
    return _Model(layout, weights, None if why else Formulas(layout.layers), why, not_asked=not_asked)


def _plans(files: Files, layout: Layout, options: FitOptions, oracle: Oracle | None) -> Planned | None:
    """Ask vLLM for the options, and for every change of them that may be shown."""
    if oracle is None or options.no_plan:
        return None
    changed = [_changed(options, steps) for steps in ([], *_combined(_changes(options, layout.kv_dtype)))]
    nodes = options.tensor_parallel * 2
    if not _indivisible(layout, nodes):
        changed += [replace(each, tensor_parallel=nodes) for each in (changed[0], changed[-1])]
    sets = list(dict.fromkeys(each.asked for each in changed))
    return oracle(files, Questions(sets, options.to_vllm, options.remote_code))


def _changes(options: FitOptions, kv_dtype: str) -> dict[str, dict[str, object]]:
    """Return the changes of options that may shrink a cache, by their words."""
    found: dict[str, dict[str, object]] = {}
    if options.kv_dtype == "auto" and kv_dtype == "auto":
        found["--kv-dtype fp8"] = {"kv_dtype": "fp8"}
    if options.batched_tokens > FEWER_BATCHED_TOKENS:
        found[f"--batched-tokens {FEWER_BATCHED_TOKENS}"] = {"batched_tokens": FEWER_BATCHED_TOKENS}
    return found


def _combined(changes: Mapping[str, dict[str, object]]) -> list[list[dict[str, object]]]:
    """Return each change alone, then all together."""
    alone = [[each] for each in changes.values()]
    return alone + ([list(changes.values())] if len(changes) > 1 else [])


def _why_no_dtype(layout: Layout, options: FitOptions) -> str:
    wanted = layout.kv_dtype if options.kv_dtype == "auto" else options.kv_dtype
    return "" if wanted in ("auto", "fp8") else f"fit has no formula for a KV cache of the type {wanted}"


def _require_divisible(layout: Layout, nodes: int) -> None:
    complaint = _indivisible(layout, nodes)
    if complaint:
        raise BadUsage(f"--tensor-parallel {nodes}: {complaint}", hint="name another number of nodes")


def _indivisible(layout: Layout, nodes: int) -> str:
    """Return why vLLM cannot spread the heads over so many nodes, "" if it can."""
    if layout.heads % nodes:
        return f"the model's {layout.heads} attention heads cannot be divided by {nodes}"
    for each in layout.layers:
        if each.kind != "mla" and max(each.heads, nodes) % min(each.heads, nodes):
            return f"the model's {each.heads} KV heads cannot be spread over {nodes} nodes"
    return ""


class _Judge:
    """Counts one model's bytes in one kind of node, for different options."""

    def __init__(self, model: _Model, options: FitOptions, memory: Memory, batches: int) -> None:
        self._model, self._options, self._memory, self._batches = model, options, memory, batches
        self.files = _weight_files(model, options)
        self.context = self._context()

    def _context(self) -> int | None:
        asked = self._options.context
        if asked == "auto":
            return self.largest_context(self._options) or self._model.longest
        return asked if asked is not None else self._model.longest

    def kv_dtype(self, options: FitOptions) -> str:
        """Return the dtype that vLLM then takes for the cache: a checkpoint may ask for fp8."""
        plan = self._plan(options)
        own = plan.kv_dtype if plan else self._model.layout.kv_dtype
        return own if options.kv_dtype == "auto" else options.kv_dtype

    def _plan(self, options: FitOptions) -> Plan | None:
        """Return vLLM's plan, None if it was not asked, or has none for these options."""
        planned = self._model.planned
        return planned.plans.get(options.asked) if planned else None

    def _load(self, options: FitOptions, context: int) -> Load:
        element = 1 if self.kv_dtype(options) == "fp8" else 2
        parallel = options.tensor_parallel
        return Load(
            context, options.sequences, options.batched_tokens, element, parallel, self._batches, options.kv_dtype
        )

    def _cache(self, options: FitOptions, context: int | None) -> int | None:
        if self._model.cache is None or context is None:
            return None
        return self._model.cache.bytes_of(self._load(options, context))

    def _weights(self, options: FitOptions) -> int:
        plan = self._plan(options)
        if plan and self.files.counted.basis == "planned":
            return plan.weights + options.draft_bytes
        return -(-(self.files.counted.value or 0) // options.tensor_parallel) + options.draft_bytes

    def _fixed(self, options: FitOptions) -> int:
        """Return what a node needs beside the cache."""
        return self._weights(options) + (OVERHEAD.value or 0) + (RESERVE.value or 0)

    def budget(self, options: FitOptions, context: int | None) -> Budget:
        cache = self._cache(options, context)
        why = self._why_no_cache(context)
        need = Figure(self._fixed(options) + cache, "estimate") if cache is not None else unknown(why)
        available = self._memory.available
        known = need.value is not None and available.value is not None
        return Budget(
            weights=Figure(self._weights(options), self._basis_of_weights, self.files.counted.why),
            kv_cache=self._cache_figure(cache) if cache is not None else unknown(why),
            overhead=OVERHEAD,
            reserve=RESERVE,
            need=need,
            available=available,
            total=self._memory.total,
            short=(need.value or 0) - (available.value or 0) if known else None,
        )

    @property
    def _basis_of_weights(self) -> Basis:
        return "planned" if self.files.counted.basis == "planned" else "estimate"

    def _cache_figure(self, cache: int) -> Figure:
        planned = self._model.planned
        return Figure(cache, "planned", f"asked vLLM {planned.vllm}") if planned else Figure(cache, "estimate")

    def _why_no_cache(self, context: int | None) -> str:
        if self._model.why:
            return self._model.why
        longest = self._model.longest
        if self._model.planned and context and longest and context > longest:
            return f"vLLM allows sequences of {longest:,} tokens, not of {context:,}"
        return "" if context else "config.json does not say how long a sequence may be"

    def verdict(self, options: FitOptions, context: int | None) -> tuple[Verdict, str]:
        """Return the verdict with its reason; without the cache only that it does not fit can be known."""
        budget = self.budget(options, context)
        available = budget.available.value
        if available is None:
            return "unknown", budget.available.why
        if budget.short is not None and budget.short <= 0:
            return "fits", ""
        if budget.short is not None and budget.short <= (OVERHEAD.value or 0):
            return "does_not_fit", "it would fit only if the engine took less than was reported, which is unverified"
        if self._fixed(options) > available:
            return "does_not_fit", "even without a KV cache it needs more than is available"
        if budget.short is None:
            return "unknown", budget.need.why
        return "does_not_fit", "it needs more than is available"

    def _fits(self, options: FitOptions, context: int) -> bool:
        return self.verdict(options, context)[0] == "fits"

    def largest_context(self, options: FitOptions) -> int | None:
        """Return the longest context that fits, 0 if none does, None if that is unknown."""
        longest = self._model.longest
        if self._model.cache is None or self._memory.available.value is None or longest is None:
            return None
        low, high = 0, longest
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._fits(options, middle) else (low, middle - 1)
        return low

    def most_sequences(self, options: FitOptions, context: int | None) -> int | None:
        """Return how many sequences of the context fit."""
        one, two = (self._cache(replace(options, sequences=count), context) for count in (1, 2))
        available = self._memory.available.value
        if one is None or two is None or available is None:
            return None
        left = available - self._fixed(options)
        return 0 if left < one else 1 + (left - one) // (two - one)

    def serve(self, options: FitOptions, context: int) -> tuple[str, ...]:
        """Return options of `vllm serve` that take no more than that."""
        cache = self._cache(options, context) or 0
        used = self._fixed(options) - (RESERVE.value or 0) + cache
        # vLLM asks for that share to be free at its start, also where the bytes of the cache are given.
        share = math.ceil(1000 * used / (self._memory.total.value or used)) / 1000
        words = ["--kv-cache-memory-bytes", str(cache), "--gpu-memory-utilization", f"{min(share, 1):g}"]
        words += ["--max-model-len", str(context), "--max-num-seqs", str(options.sequences)]
        words += ["--max-num-batched-tokens", str(options.batched_tokens)]
        words += ["--kv-cache-dtype", "fp8"] if options.kv_dtype == "fp8" else []
        words += options.to_vllm
        parallel = options.tensor_parallel
        return (*words, *(("--tensor-parallel-size", str(parallel)) if parallel > 1 else ()))

    def decode(self, options: FitOptions, context: int | None) -> Decode:
        read = self._read(options)
        if not read.value:
            return Decode(read, None, None)
        at_end = None
        if self._model.cache is not None and context is not None:
            load = self._load(options, context)
            cache = self._model.cache.read_by_token(load)
            at_end = BANDWIDTH / (read.value + cache) if cache is not None else None
        return Decode(read, BANDWIDTH / read.value, at_end)

    def _read(self, options: FitOptions) -> Figure:
        layout = self._model.layout
        read = read_by_token(self._model.weights.tensors, layout.depth, narrow=not layout.quantization)
        if options.quantized_at_load:
            return unknown("the weights are quantized when they are loaded")
        if not read.experts and not layout.experts:
            return Figure(-(-read.always // options.tensor_parallel), "estimate", "all weights")
        if not (read.experts and layout.experts and layout.experts_by_token):
            return unknown("config.json and the names of the tensors do not tell which experts a token uses")
        used = read.always + read.experts * layout.experts_by_token // layout.experts
        why = f"{layout.experts_by_token} of {layout.experts} experts"
        return Figure(-(-used // options.tensor_parallel), "estimate", why)

    def ways(self, context: int | None) -> Iterator[Way]:
        """Yield changes that need less: each alone, then together, on one node and on two."""
        options, steps = self._options, dict(self._steps())
        tried = [[step] for step in steps] + ([list(steps)] if len(steps) > 1 else [])
        nodes = options.tensor_parallel * 2
        variants: list[tuple[list[str], FitOptions]] = [
            (names, _changed(options, [steps[name] for name in names])) for names in tried
        ]
        if not _indivisible(self._model.layout, nodes):
            two = [(list(steps), _changed(options, list(steps.values())))] if steps else []
            variants += [
                ([*names, f"--tensor-parallel {nodes}"], replace(changed, tensor_parallel=nodes))
                for names, changed in ([([], options), *two])
            ]
        for names, changed in variants:
            cache = self._cache(changed, context)
            if cache is None and self._model.planned:
                continue  # vLLM does not take that change.
            need = self._fixed(changed) + (cache or 0)
            yield Way(names, need, cache is not None and need <= (self._memory.available.value or 0))

        yield from self._versions(context)

    def _versions(self, context: int | None) -> Iterator[Way]:
        """Yield versions of the model with fewer bits a weight, if this one has 16."""
        cache, weights = self._cache(self._options, context), self._weights(self._options)
        if self._model.layout.quantization or self._options.quantized_at_load or cache is None:
            return
        for version, share in _VERSIONS.items():
            need = self._fixed(self._options) - weights + int(weights * share) + cache
            yield Way((), need, need <= (self._memory.available.value or 0), version)

    def outgrown(self, context: int | None) -> Outgrown:
        """Return what would be needed, with the changes that need less."""
        options = _changed(self._options, list(dict(self._steps()).values()))
        # More nodes take no more of the cache each than two.
        two = self._cache(replace(options, tensor_parallel=2 * options.tensor_parallel), context)
        one = self._cache(options, context) or 0
        room = (self._memory.available.value or 0) - (OVERHEAD.value or 0) - (RESERVE.value or 0)
        whole = self._weights(options) * options.tensor_parallel
        counts = [options.tensor_parallel << power for power in range(1, _MOST_NODES.bit_length())]
        counts = [each for each in counts if each <= _MOST_NODES and not _indivisible(self._model.layout, each)]
        nodes = next((each for each in counts if -(-whole // each) + (two or one) <= room), None)
        return Outgrown(nodes, whole + one + (OVERHEAD.value or 0) + (RESERVE.value or 0))

    def _steps(self) -> Iterator[tuple[str, dict[str, object]]]:
        """Yield the changes that shrink this cache."""
        layers, plan = self._model.layout.layers, self._plan(self._options)
        windows = [each.window for each in plan.layers] if plan else [each.window for each in layers]
        for words, change in _changes(self._options, self.kv_dtype(self._options)).items():
            if ("batched_tokens" in change and any(windows)) or ("kv_dtype" in change and windows):
                yield words, change

    def notes(self) -> Iterator[str]:
        """Yield what the numbers do not have, and what the user should know."""
        layout, options = self._model.layout, self._options
        if layout.remote_code:
            named = ", ".join(layout.remote_code)
            does = "as it did to plan" if options.remote_code and self._model.planned else "fit never does"
            yield f"the model has code of its own ({named}): vLLM runs it only with --trust-remote-code, {does}"
        if layout.kv_dtype == "fp8" and options.kv_dtype == "auto":
            yield "the checkpoint asks for an fp8 KV cache, and vLLM follows it"
        longest = self._model.longest
        if longest and isinstance(options.context, int) and options.context > longest:
            by = "vLLM" if self._model.planned else "config.json"
            yield f"{by} allows {longest:,} tokens: vLLM refuses a longer context"
        if options.draft_bytes:
            yield f"counted with {options.draft_bytes / 1e6:,.0f} MB of the model that drafts, {options.draft}"
        for what in options.uncounted:
            yield f"not counted: {what}"
        yield from self._notes_on_nodes()
        if left_out := self._model.weights.left_out:
            yield f"not counted: safetensors files that vLLM does not need ({len(left_out)})"
        available, total = self._memory.available, self._memory.total.value or 0
        if available.basis == "measured" and (available.value or 0) < total // 2:
            yield "more than half of this node's memory is in use: what runs now counts against the model"

    def _notes_on_nodes(self) -> Iterator[str]:
        others, nodes = self._memory.others, self._options.tensor_parallel
        yield from (each.why for each in others if each.value is None)
        if nodes > 1 + sum(each.value is not None for each in others):
            yield f"each of the {nodes} nodes is taken to have as much available as this one"
        if self._model.not_asked:
            yield f"counted by formulas: {self._model.not_asked}"


def _changed(options: FitOptions, steps: Sequence[dict[str, object]]) -> FitOptions:
    for step in steps:
        options = replace(options, **step)
    return options


def _weight_files(model: _Model, options: FitOptions) -> WeightFiles:
    weights, layout = model.weights, model.layout
    loaded = _loaded(model, options)
    factor, why = _PADDED.get(layout.quantization.lower(), (1.0, "taken as the bytes of the files"))
    counted = loaded if loaded.value is not None else Figure(int(weights.size * factor), "estimate", why)
    return WeightFiles(
        bytes=weights.size,
        files=len(weights.files),
        left_out=weights.left_out,
        by_dtype=weights.by_dtype(),
        loaded=loaded,
        counted=counted,
    )


def _loaded(model: _Model, options: FitOptions) -> Figure:
    layout = model.layout
    if options.quantized_at_load:
        return unknown("the recipe quantizes the weights when they are loaded")
    if model.planned:
        plan, parallel = model.planned.plans[options.asked], options.tensor_parallel
        why = f"asked vLLM {model.planned.vllm}: its tensors" + (f" of {parallel} nodes" if parallel > 1 else "")
        return Figure(plan.weights * parallel, "planned", why)
    if layout.quantization:
        return unknown(f"the weights are quantized ({layout.quantization}), and vLLM may pad or repack them")
    return Figure(loaded_size(model.weights.tensors, layout.depth, layout.tied), "estimate", "16 bits a weight")
