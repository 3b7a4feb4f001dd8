"""vLLM's internals that are read from files or referred to by name: paths, fields, options, an operator, metrics.

payloads/vllm_internals.py has what needs a running vLLM. tests/fast/test_vllm_internals.py compares both with the
wheels of every shipped stack.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from msgspec import Struct

from sparkinstall import elf
from sparkinstall.facts.python_source import Hint, Module, Read, Sources, fields, last_name, parsed, texts
from sparkinstall.facts.vllm_options import Declared, Fold, Option
from sparkinstall.node import Node, site_packages
from sparkinstall.system import Reader

DELTA_MESSAGE_FILES = (
    "vllm/entrypoints/generate/base/protocol.py",
    "vllm/entrypoints/openai/engine/protocol.py",
    "vllm/entrypoints/openai/protocol.py",
)
"""Files that defined `class DeltaMessage` since vLLM 0.10, newest first."""
REASONING_PARSERS_FILE = "vllm/reasoning/__init__.py"
FP8_OPERATOR = b"cutlass_scaled_mm"
"""The operator of the CUTLASS FP8 kernels; which extension contains it differs between releases."""
METRICS_FILE = "vllm/v1/metrics/loggers.py"
GENERATED_TOKENS = "vllm:generation_tokens_total"
KV_CACHE_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
"""Names of the metric, newest first; the second was used before vLLM 0.10."""
RUNNING_REQUESTS = ("vllm:num_requests_running",)
WAITING_REQUESTS = ("vllm:num_requests_waiting",)
MOVES_WITH_THE_ENGINE = (
    *("vllm:prompt_tokens_total", "vllm:iteration_tokens_total_count", "vllm:num_preemptions_total"),
    *KV_CACHE_USAGE,
)
"""Metrics that only an engine that works changes. While it reads a long prompt in parts, the last one alone moves."""
SLEEP_STATE = "vllm:engine_sleep_state"
"""0 with the label `sleep_state="awake"` while it sleeps."""
PROMPT_TOKENS = "vllm:prompt_tokens_total"
PREFIX_CACHE_QUERIES, PREFIX_CACHE_HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
SPECULATION = (
    *("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_draft_tokens_total"),
    "vllm:spec_decode_num_accepted_tokens_total",
)
"""Only there with speculative decoding."""
BENCH_METRICS = (GENERATED_TOKENS, PROMPT_TOKENS, PREFIX_CACHE_QUERIES, PREFIX_CACHE_HITS, *SPECULATION)
"""What a benchmark reads before and after, which all are counters."""
CACHE_CONFIG, PREFIX_CACHING = "vllm:cache_config_info", "enable_prefix_caching"
"""A metric whose labels are settings, and the label that says whether prefixes are cached."""
SPECULATION_FILE = "vllm/v1/spec_decode/metrics.py"
BENCH_FILE = "vllm/benchmarks/serve.py"
"""`vllm bench serve`."""


class Metric(Struct, frozen=True):
    """A number of /metrics: its names, the newest first, and how those of several engines become one."""

    names: tuple[str, ...]
    together: Literal["sum", "max"] = "sum"


GAUGES = {
    "running": Metric(RUNNING_REQUESTS),
    "waiting": Metric(WAITING_REQUESTS),
    "kv_cache": Metric(KV_CACHE_USAGE, "max"),
}
"""What is so at the moment. `kv_cache`: a share from 0 to 1."""
COUNTERS = {
    "prompt_tokens": Metric((PROMPT_TOKENS,)),
    "cached_tokens": Metric(("vllm:prompt_tokens_cached_total",)),
    "generated_tokens": Metric((GENERATED_TOKENS,)),
    "preemptions": Metric(("vllm:num_preemptions_total",)),
    "prefix_queries": Metric((PREFIX_CACHE_QUERIES, "vllm:gpu_prefix_cache_queries_total")),
    "prefix_hits": Metric((PREFIX_CACHE_HITS, "vllm:gpu_prefix_cache_hits_total")),
}
"""What only grows while a server runs. All count tokens, except preemptions of requests."""
OF_SPECULATION = {
    key: Metric((name,)) for key, name in zip(("drafts", "drafted_tokens", "accepted_tokens"), SPECULATION, strict=True)
}
"""Counters that are there only with speculative decoding."""
HISTOGRAMS = {
    "ttft": Metric(("vllm:time_to_first_token_seconds",)),
    "itl": Metric(("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")),
    "e2e": Metric(("vllm:e2e_request_latency_seconds",)),
}
"""Latencies in seconds: to the first token, between two tokens, of a whole request."""
STARTED = "process_start_time_seconds"
"""When the server was started, in seconds of the epoch; it has no prefix, because Prometheus' client adds it."""
_CUDART = re.compile(r"libcudart\.so\.(\d+)")


def extensions(on: Reader, site: str) -> tuple[Path, ...]:
    """Return the real paths of vLLM's compiled extensions."""
    names = on.names(f"{site}/vllm")
    return tuple(Path(on.real(f"{site}/vllm/{n}")) for n in names if n.startswith("_C") and n.endswith(".so"))


def cuda_majors(on: Reader, site: str) -> set[str]:
    """Return the major versions N of the libcudart.so.N that vLLM's extensions need."""
    needed = {name for path in extensions(on, site) for name in elf.needed(path)}
    return {match[1] for name in needed if (match := _CUDART.match(name))}


def reasoning_fields(node: Node, on: Reader) -> list[str]:
    """Return the fields of a delta that carry reasoning; [] without a vLLM that has them."""
    site = site_packages(node, on)
    for path in DELTA_MESSAGE_FILES:
        names = delta_fields(on.read(f"{site}/{path}") or b"")
        if found := [name for name in names if name.startswith("reasoning")]:
            return found
    return []


def delta_fields(source: bytes) -> list[str]:
    """Return the annotated fields of `class DeltaMessage` in a module's source, or []."""
    classes = [each for each in _body(source) if isinstance(each, ast.ClassDef) and each.name == "DeltaMessage"]
    return [name for each in classes for name in fields(each)]


def reasoning_parsers(node: Node, on: Reader) -> list[str]:
    """Return the values that the installed vLLM accepts for `--reasoning-parser`; [] if unknown."""
    return parsers_in(on.read(f"{site_packages(node, on)}/{REASONING_PARSERS_FILE}") or b"")


def parsers_in(source: bytes) -> list[str]:
    """Return the keys of the parser tables in a module's source."""
    tables = [each.value for each in _body(source) if isinstance(each, ast.Assign) and isinstance(each.value, ast.Dict)]
    keys = [key.value for table in tables for key in table.keys if isinstance(key, ast.Constant)]
    return [key for key in keys if isinstance(key, str)]


def _body(source: bytes) -> list[ast.stmt]:
    return parsed(source).body


# --- the command line of `vllm serve`


_VERSION_FILE = "vllm/_version.py"
_ENGINE = "vllm.engine.arg_utils"
_CONFIG = "vllm.config"
_FRONTENDS = tuple(f"vllm.entrypoints.{each}.cli_args" for each in ("common", "launchers", "openai"))
"""Modules that defined `class FrontendArgs`, newest first."""
_SERVE = "vllm.entrypoints.cli.serve"
_PARSER = "vllm.utils.argparse_utils"
_VARIABLES = ("vllm.envs", "environment_variables")
READ_ELSEWHERE = {
    "VLLM_BATCH_INVARIANT": "vllm/model_executor/layers/batch_invariant.py",
    "VLLM_CPU_CI_ENV": "vllm/platforms/cpu.py",
    "VLLM_CPU_SIM_MULTI_NUMA": "vllm/v1/worker/cpu_worker.py",
    "VLLM_CUSTOM_ALLREDUCE_ALGO": "vllm/model_executor/determinism/batch_invariant.py",
    "VLLM_DIST_IDENT": "vllm/v1/worker/cpu_worker.py",
    "VLLM_MINIMAX_M3_MSA_CUTLASS_MIN_BATCH": "vllm/models/minimax_m3/nvidia/sparse_attention_msa.py",
    "VLLM_MORIIO_TRANSFER_TIMEOUT_S": "vllm/distributed/kv_transfer/kv_connector/v1/moriio/moriio_common.py",
    "VLLM_SNAPSHOT_TIMEOUT_S": "vllm/snapshot/runtime.py",
}
"""Variables that its list does not have in some release, though a module of it reads them."""
_TABLES = {
    "--tool-call-parser": ("vllm.tool_parsers", "_TOOL_PARSERS_TO_REGISTER"),
    "--reasoning-parser": ("vllm.reasoning", "_REASONING_PARSERS_TO_REGISTER"),
}
"""Dictionaries whose keys are the values of an option that is compared with them after the start."""
_NAMED: Mapping[str, tuple[str, str, Fold]] = {
    "--kv-cache-dtype": ("vllm.config.cache", "CacheDType", ""),
    "--load-format": ("vllm.model_executor.model_loader", "LoadFormats", "case"),
    "--quantization": ("vllm.model_executor.layers.quantization", "QuantizationMethods", ""),
}
"""Likewise `Literal`s, of options that argparse itself takes as any text: a plug-in may register more."""
_OPENED_BY = {
    "--tool-call-parser": ("--tool-parser-plugin", "--config"),
    "--reasoning-parser": ("--reasoning-parser-plugin", "--config"),
}
"""Options that add values to another one's; a file of options may name them."""
_FILES = frozenset((
    *("--chat-template", "--config", "--log-config-file", "--tool-parser-plugin", "--reasoning-parser-plugin"),
    *("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--mm-encoder-fp8-scale-path"),
))  # fmt: skip
_PATHS = frozenset(("--tokenizer", "--hf-config-path", "--generation-config", "--lora-modules"))
_CLOSED_KEYS = frozenset(("method",))
"""Keys whose values are compared too: `method` of speculative decoding, which differs between releases."""
_DEEPEST_KEY = 1
_OPEN_TYPES = ("dict", "Mapping", "Any")
_WITHOUT_NARGS = re.compile(r"\['(\w+)'\]\['nargs'\]$")
_PLUGIN = re.compile(rb"^\[vllm\.", re.MULTILINE)
_OPEN = Option()
_KINDS = {"store_true": "flag", "store_false": "flag", "BooleanOptionalAction": "switch"}


def release_of(read: Read) -> str:
    """Return the version of the vLLM whose files `read` finds; "" if there is none."""
    found = re.search(rb"^__version__ = version = ['\"]([^'\"]+)", read(_VERSION_FILE) or b"", re.MULTILINE)
    return found[1].decode() if found else ""


def has_plugins(on: Reader, site: str) -> bool:
    """Whether another package registers itself with vLLM: it may add values to options."""
    folders = (each for each in on.names(site) if each.endswith(".dist-info") and not each.startswith("vllm-"))
    return any(_PLUGIN.search(on.read(f"{site}/{each}/entry_points.txt") or b"") for each in folders)


def declared(read: Read, plugins: bool = False) -> Declared | None:
    """Return what the vLLM whose files `read` finds takes as arguments and variables; None if it is not understood.

    What depends on the run, such as the platform, is left open, and so is what plug-ins extend if there are `plugins`.
    """
    sources = Sources(read)
    engine, variables = sources.module(_ENGINE), sources.module(_VARIABLES[0])
    frontend = next((each for each in map(sources.module, _FRONTENDS) if each and "FrontendArgs" in each.defined), None)
    if not (engine and variables and frontend):
        return None
    named, of_frontend = dict(_Calls(sources, engine).options()), dict(_fields_of_frontend(sources, frontend))
    names = _keys(variables.defined.get(_VARIABLES[1]))
    if not (named and of_frontend and names):
        return None
    others = (module for module in (sources.module(_SERVE), frontend) if module)
    options = {**named, **of_frontend, **{k: v for each in others for k, v in _Calls(sources, each).options()}}
    options.update(_inverses(sources, options))
    tabled = {name: each for name, each in _tabled(sources, options).items() if not plugins}
    return with_files(release_of(read), {**options, **tabled}, frozenset(names))


def with_files(release: str, options: Mapping[str, Option], variables: frozenset[str]) -> Declared:
    """Return the same with what no source tells: which options name a file, and which allow others more values."""
    ours = frozenset(name for name in variables if name.startswith("VLLM_")) | READ_ELSEWHERE.keys()
    return Declared(release, options, ours, _FILES & options.keys(), _PATHS & options.keys(), _OPENED_BY)


def _fields_of_frontend(sources: Sources, module: Module) -> Iterator[tuple[str, Option]]:
    """Yield the options that are made of the fields of the classes `*FrontendArgs`."""
    # `del frontend_kwargs["middleware"]["nargs"]`: each takes one value, in spite of its type.
    deleted = (ast.unparse(to) for each in ast.walk(module.tree) if isinstance(each, ast.Delete) for to in each.targets)
    single = {match[1] for text in deleted if (match := _WITHOUT_NARGS.search(text))}
    for name, found in module.defined.items():
        if isinstance(found, ast.ClassDef) and name.endswith("FrontendArgs"):
            for field, annotation in fields(found).items():
                if not field.startswith("_"):
                    option = option_of(tuple(sources.hints(module, annotation)))
                    yield _flag(field), Option("value", option.choices) if field in single else option


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _inverses(sources: Sources, options: Mapping[str, Option]) -> dict[str, Option]:
    """Return the second names of switches, `--disable-x` of `--enable-x`, if the parser makes them."""
    parser = sources.module(_PARSER)
    found = parser.defined.get("EnableDisableAction") if parser else None
    pairs = {
        str(key.value): str(value.value)
        for each in (found.body if isinstance(found, ast.ClassDef) else ())
        if isinstance(each, ast.Assign) and isinstance(each.value, ast.Dict)
        for key, value in zip(each.value.keys, each.value.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
    }
    switches = [name for name, each in options.items() if each.kind == "switch"]
    made = (to + name.removeprefix(of) for name in switches for of, to in pairs.items() if name.startswith(of))
    return {name: Option("inverse") for name in made if name not in options}


def _tabled(sources: Sources, options: Mapping[str, Option]) -> dict[str, Option]:
    """Return the options whose values are compared with a table after the start, with these."""
    found: dict[str, Option] = {}
    for option, (where, table) in _TABLES.items():
        module = sources.module(where)
        if keys := _keys(module.defined.get(table)) if module else ():
            found[option] = Option("value", keys)
    for option, (where, name, fold) in _NAMED.items():
        module = sources.module(where)
        literal = module.defined.get(name) if module else None
        if module and isinstance(literal, ast.Subscript):
            found[option] = Option("value", tuple(sources.literals(module, literal.slice)), fold)
    engine = sources.module(_ENGINE)
    if "--reasoning-parser" in found and engine and "parse_reasoning_parser" in _functions(engine):
        found["--reasoning-parser"] = Option("value", (*found["--reasoning-parser"].choices, "none"))
    return {name: each for name, each in found.items() if name in options}


def _functions(module: Module) -> set[str]:
    return {each.name for each in module.tree.body if isinstance(each, ast.FunctionDef)}


def _keys(table: ast.expr | ast.ClassDef | None) -> tuple[str, ...]:
    keys = table.keys if isinstance(table, ast.Dict) else ()
    return tuple(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def option_of(hints: tuple[Hint, ...]) -> Option:
    """Return the option that vLLM makes of a field with these alternatives of its type, in its own order."""
    names = {each.name for each in hints}
    literals = tuple(value for each in hints if each.name == "Literal" for value in each.values)
    enums = tuple(value for each in hints if each.name == "Enum" for value in each.values)
    several = next((each for each in hints if each.name in ("tuple", "list", "set")), None)
    if "dataclass" in names:
        return _OPEN
    if names == {"bool", "str", "None"}:
        return Option("optional")
    if "bool" in names:
        return Option("switch")
    if literals:
        none = ("None",) if "None" in names else ()
        return _OPEN if "str" in names else Option("value", literals + none)
    if several:
        inner = [each for each in several.inner if each.name == "Literal"]
        return Option("several", inner[0].values if len(several.inner) == len(inner) == 1 else ())
    # An enumeration is compared after the start, by the names of its members; most take `auto` as well.
    return Option("value", (*enums, "auto"), "case") if enums and "str" not in names else _OPEN


def _keys_of(sources: Sources, module: Module, annotation: ast.expr, within: str = "") -> Iterator[str]:
    """Yield the keys that JSON for this type may have, as in `Option`: pydantic refuses others of a `@config` class."""
    # Modules of that package import each other by relative names, which are not followed.
    package = sources.module(_CONFIG)
    for name in _named_in(annotation):
        found = sources.find(module, name) or (sources.find(package, name) if package else None)
        if found is None or not isinstance(found[1], ast.ClassDef) or not _is_config(found[1]):
            continue
        for field, inner in fields(found[1]).items():
            if field.startswith("_") or _is_made_later(found[1], field):
                continue
            yield within + field
            if within + field in _CLOSED_KEYS:
                yield from (f"{within}{field}={value}" for value in _only_literals(sources, found[0], inner))
            if within.count(".") < _DEEPEST_KEY:
                yield from _keys_of(sources, found[0], inner, f"{within}{field}.")


def _named_in(annotation: ast.expr) -> tuple[str, ...]:
    """Return the names of the alternatives of an annotation; none if one of them allows any key."""
    if isinstance(annotation, ast.BinOp):
        sides = _named_in(annotation.left), _named_in(annotation.right)
        return () if () in sides else (*sides[0], *sides[1])
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return ("None",)
    name = last_name(annotation)
    return (name,) if name and name not in _OPEN_TYPES else ()


def _is_config(of: ast.ClassDef) -> bool:
    """Whether a class refuses unknown keys. One with a base may have more fields than its own."""
    return not of.bases and any(last_name(each) == "config" for each in of.decorator_list)


def _is_made_later(of: ast.ClassDef, field: str) -> bool:
    """Whether a field is no argument of its class: `field(init=False)`."""
    for each in of.body:
        if isinstance(each, ast.AnnAssign) and last_name(each.target) == field and isinstance(each.value, ast.Call):
            return any(
                word.arg == "init" and isinstance(word.value, ast.Constant) and word.value.value is False
                for word in each.value.keywords
            )
    return False


def _only_literals(sources: Sources, module: Module, annotation: ast.expr) -> tuple[str, ...]:
    hints = tuple(sources.hints(module, annotation))
    if not all(each.name in ("Literal", "None") for each in hints):
        return ()
    return tuple(value for each in hints for value in each.values)


class _Calls:
    """The calls of `add_argument` in a module, and what their arguments are made of."""

    def __init__(self, sources: Sources, module: Module) -> None:
        self._sources, self._module = sources, module
        assigned = [each for each in ast.walk(module.tree) if isinstance(each, ast.Assign)]
        self._values = {last_name(each.targets[0]): each.value for each in assigned if last_name(each.targets[0])}
        self._set = {ast.unparse(each.targets[0]): each.value for each in assigned}
        self._added = {ast.unparse(each.target) for each in ast.walk(module.tree) if isinstance(each, ast.AugAssign)}

    def options(self) -> Iterator[tuple[str, Option]]:
        for call in ast.walk(self._module.tree):
            if isinstance(call, ast.Call) and last_name(call.func) == "add_argument":
                names = [each.value for each in call.args if isinstance(each, ast.Constant)]
                option = self._option(call.keywords)
                yield from ((str(name), option) for name in names if str(name).startswith("-"))

    def _option(self, keywords: list[ast.keyword]) -> Option:
        option = next((self._spread(each.value) for each in keywords if each.arg is None), _OPEN)
        for each in keywords:
            if each.arg == "action":
                action = each.value.value if isinstance(each.value, ast.Constant) else last_name(each.value)
                option = Option("switch") if _KINDS.get(str(action)) == "switch" else option
                option = Option("flag") if _KINDS.get(str(action)) == "flag" else option
            elif each.arg == "nargs":
                count = each.value.value if isinstance(each.value, ast.Constant) else "*"
                option = Option("optional" if count == "?" else "several", option.choices)
            elif each.arg == "choices":
                option = Option(option.kind, self._choices(each.value))
        return option

    def _choices(self, value: ast.expr) -> tuple[str, ...]:
        """Return choices that are listed, or the values of a Literal; () for any other expression."""
        if isinstance(value, ast.Call) and last_name(value.func) == "get_args":
            return tuple(text for each in self._sources.hints(self._module, value.args[0]) for text in each.values)
        return texts(value) or ()

    def _spread(self, value: ast.expr) -> Option:
        """Return the option of `**value`: a field of a class, possibly with changes."""
        if isinstance(value, ast.Dict):
            inner = next((v for k, v in zip(value.keys, value.values, strict=True) if k is None), None)
            changed = {key.value for key in value.keys if isinstance(key, ast.Constant)}
            return _OPEN if inner is None or changed & {"choices", "nargs", "action"} else self._spread(inner)
        place = ast.unparse(value)
        if isinstance(value, ast.Name) and isinstance(of := self._values.get(value.id), ast.Subscript):
            value = of
        if not isinstance(value, ast.Subscript) or not isinstance(value.slice, ast.Constant):
            return _OPEN
        option = self._field(value.value, str(value.slice.value))
        if any(f"{each}['choices']" in self._added for each in (place, ast.unparse(value))):
            return Option(option.kind)
        converted = self._set.get(f"{place}['type']")
        folds = isinstance(converted, ast.Lambda) and ".lower()" in ast.unparse(converted)
        return Option(option.kind, option.choices, "dash") if folds else option

    def _field(self, of: ast.expr, field: str) -> Option:
        """Return the option of a field of the class in `get_kwargs(Class)`, or of a name that was assigned that."""
        call = self._values.get(of.id) if isinstance(of, ast.Name) else of
        if not isinstance(call, ast.Call) or last_name(call.func) != "get_kwargs":
            return _OPEN
        found = self._sources.find(self._module, last_name(call.args[0]))
        if found is None or not isinstance(found[1], ast.ClassDef) or field not in fields(found[1]):
            return _OPEN
        annotation = fields(found[1])[field]
        option = option_of(tuple(self._sources.hints(found[0], annotation)))
        keys = tuple(_keys_of(self._sources, found[0], annotation)) if option == _OPEN else ()
        return Option(keys=keys) if keys else option
