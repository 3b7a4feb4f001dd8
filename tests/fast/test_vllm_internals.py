"""What sparkinstall uses of vLLM's internals, checked with the wheel of every shipped stack."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
from msgspec.structs import replace

from sparkinstall import payloads, stacks
from sparkinstall.assets import asset
from sparkinstall.config import ClusterConfig, Config
from sparkinstall.diagnose import signatures
from sparkinstall.facts import vllm
from sparkinstall.patches import digest, load
from sparkinstall.steps.serving import arguments
from tests.support.nodes import NODE, node_of
from tests.support.wheel_member import needed_member, source_reader

pytestmark = pytest.mark.network

LINEAR = "vllm.model_executor.kernels.linear"
# The payload uses whichever of them the release has.
EITHER = (
    {("vllm.utils.network_utils", "get_ip"), ("vllm.utils", "get_ip")},
    {
        (LINEAR, "_POSSIBLE_FP8_BLOCK_KERNELS"),
        ("vllm.model_executor.layers.quantization.utils.fp8_utils", "W8A8BlockFp8LinearOp"),
    },
)
# The modules that declare the options of `vllm serve`; the last three are one file in different releases.
SERVE = (
    *("engine.arg_utils", "entrypoints.cli.serve"),
    *("entrypoints.openai.cli_args", "entrypoints.launchers.cli_args", "entrypoints.common.cli_args"),
)
PAYLOADS = ("vllm_internals", "cutlass_fp8", "vllm_kv_cache", "vllm_bench")


@pytest.fixture(params=stacks.names())
def release(request: pytest.FixtureRequest) -> str:
    return stacks.load(str(request.param)).vllm


# Most modules that are looked for are names, and no modules: the list of the wheel's members says so.
reader = cache(source_reader)


@cache
def source(release: str, module: str) -> bytes | None:
    """The source of a module of the wheel; None where it has no such module."""
    path = module.replace(".", "/")
    found = (reader(release)(member) for member in (f"{path}.py", f"{path}/__init__.py"))
    return next((text for text in found if text is not None), None)


def defined(body: list[ast.stmt]) -> Iterator[str]:
    """The names that a module's statements define."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (each.asname or each.name.partition(".")[0] for each in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (each.id for each in targets if isinstance(each, ast.Name))
        elif isinstance(node, ast.If | ast.Try):
            yield from defined([*node.body, *node.orelse])


@cache
def names_in(release: str, module: str) -> frozenset[str]:
    """The names that a module of the wheel defines."""
    return frozenset(defined(ast.parse(source(release, module) or b"").body))


def has(release: str, module: str, name: str) -> bool:
    """Whether `name` can be imported from `module`."""
    if source(release, module) is None:
        return False
    return name in names_in(release, module) or source(release, f"{module}.{name}") is not None


def used(release: str, name: str) -> Iterator[tuple[str, str]]:
    """Module and name of all that a payload imports from vLLM, and of the attributes of modules that it uses."""
    tree, modules = ast.parse(payloads.source(name)), dict[str, str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "vllm":
            for each in node.names:
                yield node.module, each.name
                modules[each.asname or each.name] = f"{node.module}.{each.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            # `module.name`, or `self.module.name` of a class that keeps the module.
            module = modules.get(getattr(node.value, "id", getattr(node.value, "attr", "")))
            if module and source(release, module) is not None:
                yield module, node.attr


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payload_uses_only_what_the_wheel_has(release: str, payload: str) -> None:
    wanted = set(used(release, payload))
    missing = {each for each in wanted if not has(release, *each)}
    assert wanted and missing <= set().union(*EITHER)
    for names in EITHER:
        assert not names <= missing


def function(release: str, name: str) -> ast.FunctionDef:
    body = ast.parse(source(release, LINEAR) or b"").body
    return next(each for each in body if isinstance(each, ast.FunctionDef) and each.name == name)


def required(of: ast.FunctionDef) -> tuple[list[str], list[str]]:
    """The parameters without a default: positional and keyword-only."""
    positional = of.args.args[: len(of.args.args) - len(of.args.defaults)]
    named = [each for each, default in zip(of.args.kwonlyargs, of.args.kw_defaults, strict=True) if default is None]
    return [each.arg for each in positional], [each.arg for each in named]


def test_kernel_selection_accepts_the_arguments_of_the_payload(release: str) -> None:
    first, named = required(function(release, "choose_scaled_mm_linear_kernel"))
    assert len(first) == 2 and set(named) <= {"quantization"}
    scheme = next(
        each
        for each in ast.walk(ast.parse(payloads.source("vllm_internals")))
        if isinstance(each, ast.FunctionDef) and each.name == "_scheme"
    )
    given = {
        key.value
        for each in ast.walk(scheme)
        if isinstance(each, ast.Dict)
        for key in each.keys
        if isinstance(key, ast.Constant)
    }
    first, named = required(function(release, "init_fp8_linear_kernel"))
    assert {*first, *named} <= given


def methods(text: bytes | None, name: str) -> dict[str, ast.FunctionDef]:
    """The methods of a class."""
    body = ast.parse(text or b"").body
    (found,) = (each for each in body if isinstance(each, ast.ClassDef) and each.name == name)
    return {each.name: each for each in found.body if isinstance(each, ast.FunctionDef)}


def test_start_of_the_engine_asks_its_executor_for_what_the_payload_answers(release: str) -> None:
    start = methods(source(release, "vllm.v1.engine.core"), "EngineCore")["_initialize_kv_caches"]
    assert [each.arg for each in start.args.args] == ["self", "vllm_config"]
    asked = {
        each.attr
        for each in ast.walk(start)
        if isinstance(each, ast.Attribute) and ast.unparse(each.value) == "self.model_executor"
    }
    stand_in = methods(payloads.source("vllm_kv_cache").encode(), "Worker")
    # Only for a connector of which nothing is said to it.
    assert asked - set(stand_in) <= {"get_simple_cpu_offload_num_blocks"}
    assert {"get_kv_cache_specs", "determine_available_memory", "initialize_from_config"} <= asked
    worker = methods(source(release, "vllm.v1.worker.worker_base"), "WorkerBase")
    assert asked & {"get_supported_kv_cache_layouts", "set_kv_cache_layout"} <= set(worker)


def test_methods_that_the_payload_calls_are_in_the_wheel(release: str) -> None:
    runner = methods(source(release, "vllm.v1.worker.gpu_model_runner"), "GPUModelRunner")["get_kv_cache_spec"]
    # The payload has no more of a runner.
    used = {ast.unparse(each) for each in ast.walk(runner) if isinstance(each, ast.Attribute)}
    assert {each for each in used if each.startswith("self.")} == {"self.vllm_config", "self.shared_kv_cache_layers"}
    assert "update_block_size_for_backend" in methods(source(release, "vllm.platforms.interface"), "Platform")
    assert has(release, "vllm.model_executor.models.registry", "_run_in_subprocess")


def test_delta_message_has_a_reasoning_field(release: str) -> None:
    texts = [source(release, path.removesuffix(".py").replace("/", ".")) for path in vllm.DELTA_MESSAGE_FILES]
    fields = [field for text in texts for field in vllm.delta_fields(text or b"")]
    assert "content" in fields
    assert "reasoning" in fields or "reasoning_content" in fields


def test_reasoning_parsers_of_the_wheel_are_found(release: str) -> None:
    parsers = vllm.parsers_in(needed_member(release, vllm.REASONING_PARSERS_FILE))
    assert {"deepseek_r1", "qwen3"} <= set(parsers)


def test_metrics_of_the_wheel_have_the_names_of_the_probe(release: str) -> None:
    text = needed_member(release, vllm.METRICS_FILE).decode()
    # Prometheus' client appends the suffix to a counter's name.
    assert f'"{vllm.GENERATED_TOKENS.removesuffix("_total")}"' in text
    assert any(f'"{name}"' in text for name in vllm.KV_CACHE_USAGE)


def test_metrics_of_the_wheel_have_the_names_of_the_proof_of_life(release: str) -> None:
    text = needed_member(release, vllm.METRICS_FILE).decode()
    moving = [name for name in vllm.MOVES_WITH_THE_ENGINE if name not in vllm.KV_CACHE_USAGE]
    for name in (*vllm.RUNNING_REQUESTS, *vllm.WAITING_REQUESTS, *moving, vllm.SLEEP_STATE):
        # Prometheus' client appends the suffix to the name of a counter or a histogram.
        assert any(f'"{name.removesuffix(suffix)}"' in text for suffix in ("_total", "_count") if suffix in name) or (
            f'"{name}"' in text
        ), name
    assert '"awake"' in text


def test_metrics_of_the_wheel_have_the_names_of_the_benchmark(release: str) -> None:
    text = needed_member(release, vllm.METRICS_FILE).decode()
    drafts = needed_member(release, vllm.SPECULATION_FILE).decode()
    for name in vllm.BENCH_METRICS:
        assert f'"{name.removesuffix("_total")}"' in (drafts if name in vllm.SPECULATION else text), name
    assert f'"{vllm.CACHE_CONFIG}"' in text or f'"{vllm.CACHE_CONFIG.removesuffix("_info")}"' in text
    assert re.search(rf"^ +{vllm.PREFIX_CACHING}: bool", (source(release, "vllm.config.cache") or b"").decode(), re.M)


def test_benchmark_of_the_wheel_has_what_the_payload_gives_and_takes(release: str) -> None:
    text = needed_member(release, vllm.BENCH_FILE)
    payload = strings(payloads.source("vllm_bench").encode())
    flags = {each for each in payload if re.fullmatch(r"--[a-z][a-z-]+", each)}
    datasets = source(release, "vllm.benchmarks.datasets.datasets") or source(release, "vllm.benchmarks.datasets")
    known = strings(text) | strings(datasets or b"")
    assert {"--max-concurrency", "--ignore-eos", "--skip-tokenizer-init"} <= flags <= known
    taken = {"input_lens", "output_lens", "ttfts", "itls", "start_times", "errors", "duration", "completed", "failed"}
    assert taken <= payload and taken <= known
    assert "custom" in known and "openai" in strings(
        source(release, "vllm.benchmarks.lib.endpoint_request_func") or b""
    )
    functions = {each.name: each for each in ast.parse(text).body if isinstance(each, ast.AsyncFunctionDef)}
    # The module's own name, which the payload replaces.
    assert "get_samples(args, tokenizer)" in ast.unparse(functions["main_async"])


def test_benchmark_of_the_wheel_sends_the_prompt_as_it_is(release: str) -> None:
    """A list of tokens, so that each prompt has exactly as many as it shall."""
    text = source(release, "vllm.benchmarks.lib.endpoint_request_func") or b""
    (sending,) = (
        each
        for each in ast.parse(text).body
        if isinstance(each, ast.AsyncFunctionDef) and each.name == "async_request_openai_completions"
    )
    body = ast.unparse(sending)
    assert "'prompt': request_func_input.prompt" in body
    assert "usage.get('completion_tokens')" in body
    assert "os.environ.get('OPENAI_API_KEY')" in text.decode().replace('"', "'")


def test_variables_of_the_env_files_are_known_to_the_wheel(release: str) -> None:
    """Another name would only be a warning in vLLM's log."""
    names = {name for path in asset("templates").glob("*.j2") for name in re.findall(r"\bVLLM_\w+", path.read_text())}
    known = set(re.findall(r'"(VLLM_\w+)"', needed_member(release, "vllm/envs.py").decode()))
    assert {"VLLM_NCCL_SO_PATH", "VLLM_DISABLED_KERNELS"} <= names <= known


@pytest.mark.parametrize("executor", ["ray", "mp"])
@pytest.mark.parametrize("role", ["single", "head", "worker"])
def test_arguments_of_the_units_are_known_to_the_wheel(
    release: str, role: Literal["single", "head", "worker"], executor: Literal["ray", "mp"]
) -> None:
    cluster = ClusterConfig(role=role, executor=executor)
    flags = {word for word in arguments(replace(NODE, config=Config(cluster=cluster))) if word.startswith("--")}
    assert flags and flags <= flags_of(release)


def flags_of(release: str) -> set[str]:
    """The options of `vllm serve`: those named in its sources, and the fields that are made into options."""
    texts = [(source(release, f"vllm.{name}") or b"").decode() for name in SERVE]
    fields = [name for text in texts for name in re.findall(r"^ +(\w+): ", text, re.MULTILINE)]
    named = {flag for text in texts for flag in re.findall(r'"(--[\w-]+)"', text)}
    return named | {f"--{no}{field.replace('_', '-')}" for field in fields for no in ("", "no-")}


def test_ray_executor_of_the_wheel_runs_workers_at_their_ray_address(release: str) -> None:
    """Since 0.21 at the latest; 0.18.1 compares VLLM_HOST_IP of the nodes instead (fix 3)."""
    newer = source(release, "vllm.v1.executor.ray_executor_v2")
    older = source(release, "vllm.v1.executor.ray_executor") or b""
    assert b"unique IP address" in older if newer is None else b"connect_ip=ray.util.get_node_ip_address()" in newer


def test_ray_env_of_the_wheel_reads_the_file_of_the_step(release: str, tmp_path: Path) -> None:
    name = Path(node_of(tmp_path).vllm_kept_back).name
    assert name in (source(release, "vllm.ray.ray_env") or b"").decode()


def strings(text: bytes) -> set[str]:
    """The literal texts of a module."""
    tree = ast.parse(text)
    return {each.value for each in ast.walk(tree) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def test_wheel_has_the_option_and_the_variable_of_several_nodes(release: str, tmp_path: Path) -> None:
    (option,) = set(arguments(node_of(tmp_path, "head", serving__model="m"))) & {"--no-enable-flashinfer-autotune"}
    text = source(release, "vllm.engine.arg_utils") or b""
    assert option.replace("--no-", "--") in strings(text)
    # Of a field that is a bool vLLM makes an option with and without `--no-`.
    assert "argparse.BooleanOptionalAction" in text.decode()
    (config,) = (each for each in ast.parse(source(release, "vllm.config.kernel") or b"").body
                 if isinstance(each, ast.ClassDef) and each.name == "KernelConfig")  # fmt: skip
    kinds = {ast.unparse(each.target): ast.unparse(each.annotation) for each in config.body
             if isinstance(each, ast.AnnAssign)}  # fmt: skip
    assert kinds["enable_flashinfer_autotune"] == "bool"
    variables = re.findall(r"^(VLLM_\w+_S)=", (asset("templates") / "multi-node.env.j2").read_text(), re.MULTILINE)
    assert variables and set(variables) <= strings(source(release, "vllm.envs") or b"")


def test_patches_have_a_variant_for_the_wheel(release: str) -> None:
    for patch in load(asset("patches")):
        original = needed_member(release, patch.target)
        variant = patch.known(original)
        assert release in variant.releases
        assert digest(original) == variant.original
        assert patch.kernels_for(release) is not None


def test_flags_and_variables_of_hints_exist_in_the_release(release: str) -> None:
    options = b"".join(source(release, f"vllm.{module}") or b"" for module in SERVE)
    # That one names options which a release does not have.
    known = [each for each in signatures.load(release=release) if each.name != "setting-refused"]
    hints = " ".join(each.hint for each in known if "-backend" in each.hint)
    flags, variables = re.findall(r"`(--[a-z][a-z0-9-]+)", hints), re.findall(r"`(VLLM_\w+)", hints)
    assert {"--moe-backend", "--attention-backend"} <= set(flags) and "VLLM_USE_DEEP_GEMM" in variables
    # Of a field that is a bool vLLM makes an option with and without `--no-`.
    plain = {flag.replace("--no-", "--", 1) for flag in flags}
    assert {flag for flag in plain if f'"{flag}"'.encode() not in options} == set()
    assert {name for name in variables if f'"{name}"'.encode() not in (source(release, "vllm.envs") or b"")} == set()


def test_metrics_of_the_wheel_have_the_names_of_watch(release: str) -> None:
    text = needed_member(release, vllm.METRICS_FILE).decode()
    drafts = needed_member(release, vllm.SPECULATION_FILE).decode()
    for metrics, source in (
        (vllm.GAUGES, text), (vllm.COUNTERS, text), (vllm.HISTOGRAMS, text), (vllm.OF_SPECULATION, drafts),
    ):  # fmt: skip
        for key, metric in metrics.items():
            # The newest name: no shipped release lacks one. Prometheus' client appends the suffix to a counter's name.
            assert f'"{metric.names[0].removesuffix("_total")}"' in source, key
