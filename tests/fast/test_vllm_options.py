"""Arguments and variables of vLLM, checked with what its source declares: the shipped stacks, and small sources."""

import argparse
import json
import re
import time
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from msgspec.structs import replace

from sparkinstall import stacks
from sparkinstall.facts import units, vllm, vllm_releases
from sparkinstall.facts.vllm_options import Declared, Option, options_of, refusals
from sparkinstall.node import Node
from sparkinstall.probes import vllm_arguments
from sparkinstall.probes.preflight import preflight
from sparkinstall.stacks import Pin
from sparkinstall.steps.serving import arguments
from sparkinstall.wheelhouse import Wheelhouse
from tests.support.machine import Machine
from tests.support.nodes import NODE, node_of
from tests.support.rehearsals import envelope, sparkinstall
from tests.support.vllm_parser import BOOLEAN, empty_parser
from tests.support.wheel_member import source_reader

RELEASES = [stacks.load(name).vllm for name in stacks.names()]
SHIPPED = {each.release: each for each in vllm_releases.shipped()}


def messages(argv: Sequence[str], of: Declared, *variables: str) -> list[str]:
    found = refusals(argv, variables, of, vllm_releases.shipped())
    return [f"{each.message} ({each.hint})" for each in found]


# --- the shipped stacks


@cache
def declared_by_wheel(release: str) -> Declared:
    found = vllm.declared(source_reader(release))
    assert found
    return found


def test_table_has_every_shipped_stack() -> None:
    assert list(SHIPPED) == RELEASES == list(stacks.names())


@pytest.mark.network
@pytest.mark.parametrize("release", RELEASES)
def test_table_is_what_the_wheel_declares(release: str) -> None:
    wheel, table = declared_by_wheel(release), SHIPPED[release]
    assert (wheel.release, wheel.variables) == (release, table.variables)
    assert wheel.options.keys() == table.options.keys()
    for name, option in wheel.options.items():
        other = table.options[name]
        assert (option.kind, option.fold) == (other.kind, other.fold), name
        assert sorted(option.choices) == sorted(other.choices), name
        assert sorted(option.keys) == sorted(other.keys), name


@pytest.mark.network
@pytest.mark.parametrize("release", RELEASES)
def test_source_is_read_in_seconds_of_the_processor(release: str) -> None:
    read = source_reader(release)
    declared_by_wheel(release)
    began = time.process_time()
    assert vllm.declared(read)
    assert time.process_time() - began < 20


# What vLLM's `make_arg_parser` answered in an environment with torch (tests/support/vllm-on-cpu.txt has the former).
# Its choices are more here, or left open, where statements change them after they were made of a type.
REAL = json.loads((Path(__file__).parents[1] / "cases/vllm-parsers.json").read_text())
CHANGED = {"--all2all-backend", "--collect-detailed-traces", "--mm-processor-device"}
COUNTS = {"value": "one", "optional": "optional", "several": "several"}


@pytest.mark.network
@pytest.mark.parametrize("release", REAL)
def test_options_are_those_of_the_real_parser(release: str) -> None:
    real, spelled = dict(REAL[release]), declared_by_wheel(release).spelled
    choices = {name: words.split() for name, words in real.pop("choices").items()}
    counts = {name: count for count, words in real.items() for name in words.split()}
    # `vllm serve` 0.18.1 adds it to that parser.
    assert counts.keys() == spelled.keys() - ({"--grpc"} if release == "0.18.1" else set())
    assert len(counts) == {"0.18.1": 310, "0.32.0": 430}[release]
    for name, count in counts.items():
        assert count == COUNTS.get(spelled[name].kind, "none"), name
    for name in choices.keys() - CHANGED:
        assert sorted(spelled[name].choices) == choices[name], name


# Without those that the parser makes of a switch: 245 and 340 of the two above.
@pytest.mark.parametrize(("release", "count"), [("0.18.1", 246), ("0.22.1", 283), ("0.29.0", 315), ("0.33.0", 344)])
def test_count_of_options_of_each_release(release: str, count: int) -> None:
    assert len([each for each in SHIPPED[release].options.values() if each.kind != "inverse"]) == count


@pytest.mark.network
@pytest.mark.parametrize("release", RELEASES)
def test_options_named_in_the_source_are_all_declared(release: str) -> None:
    """By another way than the tree: every literal text that is an option in these modules."""
    read = source_reader(release)
    paths = ["engine/arg_utils", *(f"entrypoints/{each}/cli_args" for each in ("openai", "launchers", "common"))]
    text = b"".join(read(f"vllm/{path}.py") or b"" for path in paths).decode()
    named = set(re.findall(r"add_argument\(\s*\"(--?[a-z][\w-]*)\"", text))
    assert len(named) > 150 and named <= SHIPPED[release].options.keys()


@pytest.mark.parametrize("release", RELEASES)
def test_choices_that_a_user_sets_are_known(release: str) -> None:
    options = SHIPPED[release].options
    for name in ("--tool-call-parser", "--reasoning-parser", "--load-format", "--kv-cache-dtype", "--attention-backend",
                 "--moe-backend", "--quantization", "--dtype", "--runner", "--scheduling-policy"):  # fmt: skip
        assert len(options[name].choices) > 1, name
    assert ("--linear-backend" in options) == (release != "0.18.1")
    assert options["--tool-call-parser"].takes("hermes") and not options["--tool-call-parser"].takes("nemotron_v3")
    assert options["--reasoning-parser"].takes("qwen3") and not options["--reasoning-parser"].takes("qwen3_coder")
    assert options["--attention-backend"].takes("flash_attn") and not options["--attention-backend"].takes("flash")


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("role", ["single", "head", "worker"])
@pytest.mark.parametrize("executor", ["ray", "mp"])
def test_arguments_of_our_own_are_taken(release: str, role: str, executor: str, tmp_path: Path) -> None:
    node = node_of(tmp_path, role, serving__model="m", cluster__executor=executor)
    assert messages(arguments(node), SHIPPED[release]) == []


TAKEN = (
    ("-tp", "2"), ("-tp=2",), ("--tensor_parallel_size", "2"), ("--tensor_parallel_size=2",), ("--tensor-par=2",),
    ("-O3",), ("-O=2",), ("-O", "3"), ("-O0",), ("--compilation-config.mode", "3"), ("-cc.mode=3",),
    ("--compilation_config.pass_config.fuse_norm_quant=true",), ("-cc", '{"mode": 3}'), ("--no-enable-prefix-caching",),
    ("--enforce-eager",), ("--no_enforce_eager",), ("--max-model-len", "-1"), ("--max-model-len=auto",),
    ("--tool-call-parser=hermes", "--enable-auto-tool-choice"), ("--attention_backend", "Flash_Attn"),
    ("--served-model-name", "a", "b", "--port", "8001"), ("--hf-token",), ("--kv-cache-dtype", "fp8"),
    ("--moe-backend", "flashinfer-cutlass"), ("--hf-overrides", '{"rope": "-x y"}'), ("--chat-template", "{{ a }}"),
    ("--max-lora-rank", "016"), ("-q", "fp8"), ("--tool-call-parser", "mine", "--tool-parser-plugin", "/x.py"),
    ("--tool-call-parser", "mine", "--config", "/x.yaml"),
    ("-cc.custom_ops+=a,b",), ("-cc", '{"inductor_compile_config": {"any": 1}}'), ("--kv-transfer-config", "{}"),
    ("--speculative-config", '{"method": "eagle3", "model": "a/b", "num_speculative_tokens": 3}'),
    # With which `serve` pins the model that drafts.
    ("--speculative-config", '{"model": "a/b", "revision": "main"}'), ("--speculative-config.revision", "main"),
    ("--compilation-config.backend=a b", "--compilation-config.mode", "3"), ("--hf-overrides.any", "1"),
    ("--tokenizer", "-"), ("--served-model-name", "-a b"), ("--gpu-memory-util", "0.8"), ("--dtype=half",),
)  # fmt: skip


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("argv", TAKEN, ids=" ".join)
def test_spelling_that_vllm_takes_is_taken(argv: tuple[str, ...], release: str) -> None:
    assert messages(argv, SHIPPED[release]) == []


OLD, NEW, DEFAULT = "0.18.1", "0.33.0", stacks.DEFAULT
REFUSED = (
    (OLD, ("--linear-backend", "triton"), "vLLM 0.18.1 has no option `--linear-backend` (the first stack that has it"
     " is 0.22.1; did you mean `--moe-backend`?)"),
    (DEFAULT, ("--swap-space", "4"), "vLLM 0.29.0 has no option `--swap-space` (remove it: no stack of sparkinstall"
     " has it)"),
    (DEFAULT, ("--tool-cal-parser", "hermes"), "vLLM 0.29.0 has no option `--tool-cal-parser` (did you mean"
     " `--tool-call-parser`?)"),
    (NEW, ("--calculate-kv-scales",), "vLLM 0.33.0 has no option `--calculate-kv-scales` (the last stack that has it is"
     " 0.22.1)"),
    (OLD, ("--tool-call-parser", "gemma4"), "`--tool-call-parser` of vLLM 0.18.1 does not take `gemma4` (the first"
     " stack that has it is 0.22.1)"),
    (DEFAULT, ("--tool_call_parser=qwen3-coder",), "`--tool-call-parser` of vLLM 0.29.0 does not take `qwen3-coder` "
     "(did you mean `qwen3_coder`?)"),
    (DEFAULT, ("--attention-backend", "flashatn"), "`--attention-backend` of vLLM 0.29.0 does not take `flashatn` (did"
     " you mean `FLASH_ATTN`?)"),
    (DEFAULT, ("--scheduling-policy", "x"), "`--scheduling-policy` of vLLM 0.29.0 does not take `x` (it takes fcfs or"
     " priority)"),
    (DEFAULT, ("--max-model-len 4096",), "`--max-model-len 4096` belongs to no option (write `--max-model-len` and its"
     " value as two words of the list)"),
    (DEFAULT, ("--enforce-eager", "true"), "`true` belongs to no option (each option takes the words that follow it:"
     " remove this one, or name its option)"),
    (DEFAULT, ("--enforce-eager=true",), "`--enforce-eager` takes no value, and has `true` (write `--enforce-eager`"
     " alone)"),
    (DEFAULT, ("--max-model-len", "--port", "80"), "`--max-model-len` has no value (add the value as a word of its"
     " own)"),
    (DEFAULT, ("--max-num-b", "4", "--max-num", "1"), "`--max-num` is the beginning of `--max-num-"),
    (DEFAULT, ("-O.mode=3",), "`--optimization-level` of vLLM 0.29.0 does not take `.mode=3`"),
    (DEFAULT, ("--compilation-confg.mode", "3"), "vLLM 0.29.0 has no option `--compilation-confg` (did you mean"
     " `--compilation-config`?)"),
    (DEFAULT, ("--no-headless",), "vLLM 0.29.0 has no option `--no-headless`"),
    (DEFAULT, ("--speculative-config", '{"method": "mtp", "num_speculative_token": 3}'), "`--speculative-config` of"
     " vLLM 0.29.0 has no key `num_speculative_token` (did you mean `num_speculative_tokens`?)"),
    (OLD, ("--speculative_config={\"kv_cache_dtype\": \"fp8\"}",), "`--speculative-config` of vLLM 0.18.1 has no key"
     " `kv_cache_dtype` (the first stack that has it is 0.29.0)"),
    (OLD, ("--speculative-config.method", "dspark"), "`method` in `--speculative-config` of vLLM 0.18.1 does not take"
     " `dspark` (the first stack that has it is 0.29.0"),
    (DEFAULT, ("--compilation-config.mod", "3"), "`--compilation-config` of vLLM 0.29.0 has no key `mod` (did you mean"
     " `mode`?)"),
    (DEFAULT, ("-cc.pass_config.fuse_norm=true",), "`-cc` of vLLM 0.29.0 has no key `pass_config.fuse_norm`"),
    (NEW, ("-cc", '{"splitting_op": [], "mode": 3}'), "`-cc` of vLLM 0.33.0 has no key `splitting_op` (did you mean"
     " `splitting_ops`?)"),
    (DEFAULT, ("--kernel-config", "{'moe_backend': 'triton'}"), "the value of `--kernel-config` is no JSON:"),
    (DEFAULT, ("--reasoning-parser", "qwen3", "--reasoning-parser", "super_v3"), "`--reasoning-parser` of vLLM 0.29.0"
     " does not take `super_v3`"),
    (DEFAULT, ("--tool-call-parser=mine", "--reasoning-parser-plugin=/x.py"), "`--tool-call-parser` of vLLM 0.29.0 does"
     " not take `mine`"),
)  # fmt: skip


@pytest.mark.parametrize(("release", "argv", "message"), REFUSED, ids=lambda each: " ".join(each))
def test_argument_that_vllm_does_not_take_is_refused(release: str, argv: tuple[str, ...], message: str) -> None:
    (found,) = messages(argv, SHIPPED[release])
    assert found.startswith(message)


def test_variables_are_compared_with_those_of_the_release() -> None:
    of, known = SHIPPED[DEFAULT], ("VLLM_API_KEY", "HF_HOME", "PATH", "NCCL_DEBUG", "VLLM_ENGINE_READY_TIMEOUT_S")
    assert messages((), of, *known) == []
    (typo,) = messages((), of, "VLLM_LOGING_LEVEL")
    assert typo == "vLLM 0.29.0 does not read the variable `VLLM_LOGING_LEVEL` (did you mean `VLLM_LOGGING_LEVEL`?)"
    (newer,) = messages((), SHIPPED[OLD], "VLLM_CHAT_TEMPLATE_FUEL")
    assert "(the first stack that has it is 0.33.0" in newer
    (gone,) = messages((), SHIPPED[NEW], "VLLM_ENGINE_ITERATION_TIMEOUT_S")
    assert "(the last stack that has it is 0.29.0" in gone


@pytest.mark.network
def test_variables_that_the_list_lacks_are_read_by_a_module() -> None:
    for name, path in vllm.READ_ELSEWHERE.items():
        texts = [source_reader(release)(path) or b"" for release in RELEASES]
        assert any(f'"{name}"'.encode() in text for text in texts), name


# --- with vLLM's own parser


@cache
def parser_of(release: str) -> Any:
    """vLLM's parser with every option that we read from the source, whatever its values are converted to."""
    parser = empty_parser(release)
    parser.add_argument("model_tag", nargs="?")
    for name, option in SHIPPED[release].options.items():
        if option.kind in ("switch", "flag"):
            parser.add_argument(name, action=BOOLEAN if option.kind == "switch" else "store_true")
        elif option.kind != "inverse":
            counts = {"optional": "?", "several": "+"}
            choices = None if option.fold or not option.choices else list(option.choices)
            number = bool(choices) and all(map(str.isdigit, choices or ()))
            parser.add_argument(
                name,
                nargs=counts.get(option.kind),
                type=int if number else str,
                choices=list(map(int, choices or ())) if number else choices,
            )
    return parser


def is_taken(release: str, argv: Sequence[str]) -> bool:
    try:
        parser_of(release).parse_args(["m", *argv])
    except (argparse.ArgumentError, ValueError, IndexError):
        return False
    return True


@pytest.mark.network
@pytest.mark.parametrize("release", RELEASES)
def test_names_are_those_of_vllms_parser(release: str) -> None:
    """Including `--no-x`, and `--disable-x` for `--enable-x` of newer releases, which the parser adds by itself."""
    assert SHIPPED[release].spelled.keys() == parser_of(release)._option_string_actions.keys()


@st.composite
def command_line(draw: st.DrawFn, release: str) -> list[str]:
    """Words for vLLM: known, cut, misspelled or in another spelling, with and without a value.

    `--config` is left out: the parser reads its file.
    """
    spelled = SHIPPED[release].spelled
    words: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(spelled.keys() - {"-h", "--help", "--config"})))
        known = spelled[name]
        name = name[: draw(st.integers(max(3, len(name) - 6), len(name) + 3))] if draw(st.booleans()) else name
        name = name[:2] + name[2:].replace("-", draw(st.sampled_from("-_")))
        name += draw(st.sampled_from(["", "", "x"]))
        value = draw(st.sampled_from([*known.choices[:3], "1", "-1", "x", "a b", "-a b", "-", "x=y", ""]))
        # A key without a value ends vLLM with an IndexError, unless another option follows and becomes its value.
        key = name + draw(st.sampled_from([".a", ".a_b.c-d"]))
        form = draw(st.sampled_from([[name], [name, value], [f"{name}={value}"], [name, value, "z"],
                                     [key, "1"], [f"{key}={value}"], [f"{key}+=1,2"]]))  # fmt: skip
        words += form
    return words


@pytest.mark.network
@pytest.mark.parametrize("release", RELEASES)
@limits(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_what_vllms_parser_takes_is_taken_and_nothing_else(release: str, data: st.DataObject) -> None:
    argv = data.draw(command_line(release))
    # Values that are compared after the start are not the parser's: its choices alone count here.
    of = SHIPPED[release]
    plain = {
        name: replace(each, choices=() if each.fold else each.choices, keys=()) for name, each in of.options.items()
    }
    refused = refusals(argv, (), replace(of, options=plain, opened_by={}))
    assert is_taken(release, argv) == (refused == []), (argv, refused)


# --- small sources

ENGINE = """
import argparse
from typing import get_args
from vllm.config import ModelConfig
if platform:
    from vllm.elsewhere import Where
class EngineArgs:
    def add_cli_args(parser):
        model_kwargs = get_kwargs(ModelConfig)
        group = parser.add_argument_group()
        if wanted:
            group.add_argument("--model", **model_kwargs["model"])
        group.add_argument("--kind", "-k", **model_kwargs["kind"])
        group.add_argument("--level", **{**model_kwargs["level"], "default": None})
        group.add_argument("--fast", "-f", **model_kwargs["fast"])
        group.add_argument("--backend", **model_kwargs["backend"])
        group.add_argument("--traces", **model_kwargs["traces"])
        group.add_argument("--names", **model_kwargs["names"])
        group.add_argument("--free", **model_kwargs["free"])
        group.add_argument("--where", **model_kwargs["where"])
        group.add_argument("--deep", **model_kwargs["deep"])
        folded_kwargs = model_kwargs["kind"]
        folded_kwargs["type"] = lambda s: s.lower().replace("-", "_")
        group.add_argument("--folded", **folded_kwargs)
        group.add_argument("--device", choices=["auto"] + ([platform] if platform else []))
        group.add_argument("--listed", choices=["a", "b"])
        group.add_argument("--quiet", action="store_true")
        group.add_argument("--pairs", nargs="*")
        model_kwargs["traces"]["choices"] += ["all"]
        group.add_argument("--load-format", type=str)
"""
CONFIG = """
from typing import Annotated, Literal, Optional
from enum import Enum
from vllm.kinds import Kind
Levels = Literal[1, 8]
class Backend(Enum):
    ONE = "path.of.one"
    TWO = "path.of.two"
@config
class Inner:
    a: int = 1
@config
class ModelConfig:
    model: str = ""
    kind: Kind | None = None
    level: Annotated[Levels, 5] = 1
    fast: bool | None = False
    backend: Optional[Backend] = None
    traces: list[Literal["x", "y"]] | None = None
    names: "list[str]" = None
    free: Kind | str = ""
    where: Where = None
    deep: Inner = None
"""
FILES = {
    "vllm/_version.py": "__version__ = version = '0.31.0'\n",
    "vllm/engine/arg_utils.py": ENGINE,
    "vllm/config/__init__.py": "from vllm.config.model import ModelConfig\n",
    "vllm/config/model.py": CONFIG,
    "vllm/kinds.py": 'from typing import Literal\nMore = Literal["c_d"]\nKind = Literal["a", "b", More]\n',
    "vllm/entrypoints/openai/cli_args.py": "class FrontendArgs:\n    chat_template: str = ''\n"
    "    tool_call_parser: str\n"
    "    tool_parser_plugin: str = ''\n    _own: int = 1\n    log_level: Literal['info'] = 'info'\n"
    "    origins: list[str]\n    methods: list[str]\ndef change(kwargs):\n    del kwargs['origins']['nargs']\n",
    "vllm/tool_parsers/__init__.py": '_TOOL_PARSERS_TO_REGISTER = {"hermes": ("a", "B"), "qwen3_coder": ()}\n',
    "vllm/model_executor/model_loader/__init__.py": 'LoadFormats = Literal["auto", "dummy"]\n',
    "vllm/envs.py": 'environment_variables: dict = {"VLLM_ONE": lambda: 1, "HOME": lambda: 2}\n',
}


def reader_of(files: dict[str, str]) -> Callable[[str], bytes | None]:
    return lambda path: files[path].encode() if path in files else None


def small(**changed: str) -> Declared:
    found = vllm.declared(reader_of(FILES | changed))
    assert found
    return found


def test_small_source_is_read() -> None:
    of = small()
    assert (of.release, of.variables) == ("0.31.0", frozenset({"VLLM_ONE", *vllm.READ_ELSEWHERE}))
    assert dict(of.options) == {
        "--model": Option(),
        **dict.fromkeys(("--kind", "-k"), Option(choices=("a", "b", "c_d", "None"))),
        "--level": Option(choices=("1", "8")),
        **dict.fromkeys(("--fast", "-f"), Option("switch")),
        "--backend": Option(choices=("ONE", "TWO", "auto"), fold="case"),
        "--traces": Option("several"),
        "--names": Option(),
        **dict.fromkeys(("--free", "--where", "--device"), Option()),
            "--deep": Option(keys=("a",)),
        **dict.fromkeys(("--chat-template", "--tool-parser-plugin"), Option()),
        "--folded": Option(choices=("a", "b", "c_d", "None"), fold="dash"),
        "--listed": Option(choices=("a", "b")),
        "--quiet": Option("flag"),
        "--pairs": Option("several"),
        "--load-format": Option(choices=("auto", "dummy"), fold="case"),
        "--tool-call-parser": Option(choices=("hermes", "qwen3_coder")),
        "--log-level": Option(choices=("info",)),
        "--origins": Option(),
        "--methods": Option("several"),
    }  # fmt: skip
    assert messages(("--folded", "C-D", "--backend=two", "--level", "08", "--no-fast", "-f", "--pairs"), of) != []
    assert messages(("--folded", "C-D", "--backend=two", "--level", "08", "--no-fast", "-f", "--pairs", "1"), of) == []


def test_source_with_plugins_leaves_their_options_open() -> None:
    of = vllm.declared(reader_of(FILES), plugins=True)
    assert of and of.options["--load-format"] == Option() == of.options["--tool-call-parser"]
    assert of.options["--listed"].choices == ("a", "b")


@pytest.mark.parametrize("path", ["vllm/engine/arg_utils.py", "vllm/envs.py", "vllm/entrypoints/openai/cli_args.py"])
def test_source_that_is_not_understood_says_so(path: str) -> None:
    assert vllm.declared(reader_of(FILES | {path: "def broken(:\n"})) is None
    assert vllm.declared(reader_of({name: text for name, text in FILES.items() if name != path})) is None


def test_source_alone_answers_for_any_command_line() -> None:
    read = reader_of(FILES)
    argv = ("--listed", "a", "--chat-template", "/none.jinja")
    assert vllm_releases.refused_by(read, argv, ("VLLM_ONE", "HF_HOME")) == []
    found = vllm_releases.refused_by(read, (*argv, "--lissed", "b"), ("VLLM_TWO",), lambda _: False)
    assert found and [each.message for each in found] == [
        "vLLM 0.31.0 has no option `--lissed`",
        "vLLM 0.31.0 does not read the variable `VLLM_TWO`",
        "`--chat-template` names /none.jinja, which is not on this node",
    ]
    assert found[0].hint == "did you mean `--listed`?"
    assert vllm_releases.refused_by(lambda _: None, argv, ()) is None


def test_source_may_import_in_a_circle() -> None:
    assert small(**{"vllm/kinds.py": "from vllm.kinds import Kind\n"}).options["--kind"] == Option()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--chat-template", "/srv/there.jinja"), ""),
        (("--chat-template", "/srv/x.jinja"), "`--chat-template` names /srv/x.jinja, which is not on this node"),
        (("--chat_template=x.jinja",), "`--chat-template` names `x.jinja` without its folder"),
        (("--chat-template", "{% for a in b %}"), ""),
        (("--tool-parser-plugin", "/a.py", "--tool-call-parser", "mine"), "`--tool-parser-plugin` names /a.py, which"),
        (("--tokenizer", "some/name", "--generation-config", "vllm"), ""),
        (("--tokenizer", "/srv/none"), "`--tokenizer` names /srv/none, which is not on this node"),
        (("--lora-modules", "a=/srv/there.jinja", "b=/srv/b"), "`--lora-modules` names /srv/b, which is not"),
        (("--hf-config-path", "/srv"), ""),
    ],
    ids=lambda each: " ".join(each),
)
def test_file_that_an_argument_names_must_exist(argv: tuple[str, ...], message: str) -> None:
    exists = {"/srv", "/srv/there.jinja"}.__contains__
    found = [each.message for each in refusals(argv, (), SHIPPED[DEFAULT], exists=exists)]
    assert len(found) == bool(message) and "".join(found).startswith(message)
    assert refusals(argv, (), SHIPPED[DEFAULT]) == []


def test_secret_in_an_argument_is_not_repeated() -> None:
    (found,) = messages(("--api-kee=https://me:sesame@host/",), SHIPPED[DEFAULT])
    assert "sesame" not in found


def test_options_of_a_command_line_have_their_whole_name_and_values() -> None:
    found = options_of(("--tensor_par", "2", "--served-model-name", "a", "b", "-O3"), SHIPPED[DEFAULT])
    assert [(each.name, each.values) for each in found] == [
        ("--tensor-parallel-size", ("2",)), ("--served-model-name", ("a", "b")), ("--optimization-level", ("3",)),
    ]  # fmt: skip


# --- a node


SITE = "opt/sparkinstall/venv/lib/python3.12/site-packages"


def with_vllm(root: Path, stack: str = DEFAULT, files: dict[str, str] = FILES) -> Path:
    """An installed vLLM of small sources below `root`."""
    for path, text in files.items():
        (root / SITE / path).parent.mkdir(parents=True, exist_ok=True)
        (root / SITE / path).write_text(text)
    stamp = root / node_of(root).venv_stamp[1:]
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps({"lock": "0" * 64, "stack": stack}))
    return root


def spark(root: Path, *words: str, **settings: Any) -> Node:
    return replace(node_of(root, serving__model="m", serving__arguments=list(words), **settings), rehearsal=False)


def look(root: Path, *words: str, **settings: Any) -> tuple[str, str]:
    node = spark(root, *words, **settings)
    finding = vllm_arguments.probe(node, words).look(Machine(str(root)))
    return finding.verdict, finding.found


def test_installed_vllm_is_asked_before_the_table(tmp_path: Path) -> None:
    with_vllm(tmp_path)
    assert look(tmp_path, "--listed", "a") == ("pass", "the installed vLLM takes the 1 that are set")
    verdict, found = look(tmp_path, "--listed", "c", "--enforce-eager")
    assert verdict == "fail" and "vLLM 0.31.0 has no option `--enforce-eager`" in found and "`c` (it takes a" in found


def test_installed_vllm_of_another_stack_is_not_asked(tmp_path: Path) -> None:
    with_vllm(tmp_path, stack=NEW)
    assert look(tmp_path, "--enforce-eager") == ("pass", "vLLM 0.29.0 takes the 1 that are set")


def test_plugin_in_the_environment_opens_choices(tmp_path: Path) -> None:
    with_vllm(tmp_path)
    assert look(tmp_path, "--load-format", "mine")[0] == "fail"
    (tmp_path / SITE / "loader-1.0.dist-info").mkdir()
    (tmp_path / SITE / "loader-1.0.dist-info/entry_points.txt").write_text("[vllm.general_plugins]\na = b:c\n")
    assert look(tmp_path, "--load-format", "mine")[0] == "pass"


def test_downloaded_wheel_is_asked_before_the_table(tmp_path: Path) -> None:
    node = spark(tmp_path, "--listed", "c")
    pin = next(pin for pin in node.wheels.locked() if pin.name == "vllm")
    folder = node.cache / "wheels"
    folder.mkdir(parents=True)
    name = f"vllm-{pin.version}-cp38-abi3-manylinux_2_31_x86_64.whl"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        for path, text in FILES.items():
            wheel.writestr(path, text)
    assert look(tmp_path, "--listed", "c")[1].startswith("vLLM 0.29.0 has no option"), "its hash is not the lock's"
    digest = pin.hashes[0].removeprefix("sha256:")
    stat = (folder / name).stat()
    kept = {"sha256": digest, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    (folder / "index.json").write_text(json.dumps({name: kept}))
    assert Wheelhouse(folder).found([pin])
    assert look(tmp_path, "--listed", "c")[1].startswith("`--listed` of vLLM 0.31.0 does not take `c`")


def test_unknown_vllm_is_skipped_with_a_reason(tmp_path: Path) -> None:
    node = spark(tmp_path, "--nonsense")
    node = replace(node, stack=replace(node.stack, name="mine", vllm="0.99.0", platforms={}))
    finding = vllm_arguments.probe(replace(node, platform="none"), ("--nonsense",)).look(Machine(str(tmp_path)))
    assert (finding.verdict, finding.found) == ("skip", "stack mine has a vLLM of its own, which is not here yet")


def test_own_build_is_not_judged_by_the_release_of_its_name(tmp_path: Path) -> None:
    node = spark(tmp_path, "--nonsense")
    own = replace(node.wheels, wheels=(Pin("vllm", node.stack.vllm, "https://example.org/vllm-0.29.0.whl"),))
    node = replace(node, stack=replace(node.stack, name="mine", platforms={node.platform: own}))
    assert vllm_arguments.probe(node, ("--nonsense",)).look(Machine(str(tmp_path))).verdict == "skip"
    with_vllm(tmp_path, stack="mine")
    assert vllm_arguments.probe(node, ("--nonsense",)).look(Machine(str(tmp_path))).verdict == "fail"


def test_variables_of_the_units_drop_in_are_checked(tmp_path: Path) -> None:
    folder = tmp_path / "etc/systemd/system/vllm.service.d"
    folder.mkdir(parents=True)
    (tmp_path / "etc/open.env").write_text("VLLM_C=1\n# VLLM_D=2\n")
    (tmp_path / "etc/open.env").chmod(0o644)
    (tmp_path / "etc/shut.env").write_text("VLLM_API_KEI=sesame\n")
    (tmp_path / "etc/shut.env").chmod(0o640)
    (folder / "key.conf").write_text(
        '[Service]\nEnvironment=VLLM_API_KEY=a "VLLM_B=x y" \\\n  HF_HOME=/x\nEnvironmentFile=/etc/open.env\n'
        "EnvironmentFile=-/etc/shut.env\n#Environment=VLLM_E=1\n"
    )
    (folder / "key.txt").write_text("[Service]\nEnvironment=VLLM_F=1\n")
    names = units.own_variables(Machine(str(tmp_path)), "/etc/systemd/system/vllm.service.d")
    assert names == ["HF_HOME", "VLLM_API_KEY", "VLLM_B", "VLLM_C"]
    verdict, found = look(tmp_path)
    assert verdict == "fail" and "VLLM_API_KEY" not in found
    assert "does not read the variable `VLLM_B`" in found and "`VLLM_C`" in found


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.yaml", "max-model-len: 4096\nserved_model_name: [a, b]\nenforce-eager: true\nno-such: false\n", ""),
        ("x.yaml", "compilation-config: {mode: 3, pass_config: {fuse_norm_quant: true}}\nport: -1\n", ""),
        ("x.yaml", "max-model-length: 4096\n", "/srv/x.yaml: vLLM 0.29.0 has no option `--max-model-length`"),
        ("x.yaml", "tool-call-parser: mine\n", "/srv/x.yaml: `--tool-call-parser` of vLLM 0.29.0 does not take `mine`"),
        ("x.yaml", "tool-call-parser: mine\ntool-parser-plugin: /srv/x.yaml\n", ""),
        ("x.yaml", "speculative-config: {methd: mtp}\n", "has no key `methd` (did you mean `method`?)"),
        ("x.yaml", "chat-template: /srv/none.jinja\n", "/srv/x.yaml: `--chat-template` names /srv/none.jinja, which"),
        ("x.yaml", "a: [\n", "x.yaml: not YAML"),
        ("x.yaml", "- a\n", "/srv/x.yaml"),
        ("x.json", "{}", "/srv/x.json is no YAML file by its name"),
    ],
)
def test_file_of_options_is_checked_like_the_arguments(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "srv").mkdir()
    (tmp_path / "srv" / name).write_text(text)
    node = replace(node_of(tmp_path, serving__model="m", serving__life__enabled=False), rehearsal=False)
    finding = vllm_arguments.probe(node, ("--port", "8000", "--config", f"/srv/{name}")).look(Machine(str(tmp_path)))
    assert (finding.verdict, says in finding.found) == ("fail" if says else "pass", True), finding


def test_files_are_looked_for_on_the_node_and_not_in_a_rehearsal(tmp_path: Path) -> None:
    words = ("--chat-template", "/srv/x.jinja")
    assert look(tmp_path, *words)[1].startswith("`--chat-template` names /srv/x.jinja, which is not on this node")
    (tmp_path / "srv").mkdir()
    (tmp_path / "srv/x.jinja").write_text("{{ a }}")
    assert look(tmp_path, *words)[0] == "pass"


def test_wrong_argument_stops_a_rehearsal_before_anything_is_changed(tmp_path: Path) -> None:
    root, sentence = tmp_path / "node", "`--tool-call-parser` of vLLM 0.29.0 does not take `qwen3-coder`"
    words = "--set=serving.arguments=[--tool-call-parser, qwen3-coder, --chat-template, /none.jinja]"
    given = ("--root", root, "--json", "--set=serving.model=m", "--set=nccl.mode=wheel", words)
    plan = envelope(sparkinstall("plan", *given))["data"]
    (found,) = (each for each in plan["preflight"] if each["name"] == vllm_arguments.NAME)
    assert found["verdict"] == "fail" and found["found"] == f"{sentence} (did you mean `qwen3_coder`?)"
    run = sparkinstall("all", *given)
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (4, "preflight") and sentence in error["cause"]
    assert not root.exists()


def test_node_without_a_model_has_no_such_check() -> None:
    assert vllm_arguments.NAME not in [each.name for each in preflight(NODE)]
