"""A secret in the settings is recognised by the rules of vLLM's parser, since everyone can read the unit."""

import argparse
import io
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, reject
from hypothesis import settings as limits
from hypothesis import strategies as st
from rich.console import Console

from sparkinstall import stacks
from sparkinstall.cli.text_output import show_diff
from sparkinstall.config import Layer, build, parse_assignment, read_layer
from sparkinstall.errors import BadConfig
from sparkinstall.redaction import redact
from sparkinstall.resources import Drift
from tests.support.vllm_parser import empty_parser

VALUE = "s3same-open"
REFUSED = "must not contain a secret"

# As vLLM's help has them: what abbreviations must not be mistaken for.
OPTIONS = (
    "--api-key", "--hf-token", "--api-server-count", "--allow-credentials", "--allowed-origins", "--hf-overrides",
    "--hf-config-path", "--host", "--headless", "--port", "--max-num-batched-tokens", "--tokenizer", "--tokenizer-mode",
    "--speculative-config", "--kv-transfer-config", "--model-loader-extra-config", "--enable-prompt-tokens-details",
    "--return-tokens-as-token-ids", "--ssl-keyfile", "--otlp-traces-endpoint", "--served-model-name", "--config",
)  # fmt: skip
NO_VALUE = ("--allow-credentials", "--enable-prompt-tokens-details", "--return-tokens-as-token-ids", "--headless")


def refusal(*words: str) -> str:
    """The error about these words in `serving.arguments`; "" if they are taken."""
    try:
        build([Layer("a test", {"serving.arguments": list(words)})])
    except BadConfig as problem:
        return problem.message
    return ""


@pytest.mark.parametrize(
    "words",
    [
        ("--api-key", VALUE), (f"--api-key={VALUE}",), ("--api_key", VALUE), (f"--api_key={VALUE}",),
        (f"--api-k={VALUE}",), ("--api_k", VALUE), (f"--api-ke={VALUE}",), (f"--api={VALUE}",), ("--api", VALUE),
        ("--hf-token", VALUE), (f"--hf_token={VALUE}",), (f"--hf-t={VALUE}",), ("--hf_tok", VALUE),
        (f"--API-KEY={VALUE}",), (f"--api-key {VALUE}",), (f"--port 8000 --api_key {VALUE}",),
        (f"--api-key.x={VALUE}",),
        ("--hf_token.x", VALUE), ("--port", "8000", f"--api_key={VALUE}"), (f"--ssl-keyfile-password={VALUE}",),
        (f"--hf-overrides.api_key={VALUE}",), ("--model-loader-extra-config.aws_secret_access_key", VALUE),
        (f"--kv_transfer_config.kv_connector_extra_config.password={VALUE}",),
        (f"--additional-config.a.token+={VALUE}",),
        (f"-O.api_key={VALUE}",), ("-O.a.hf_token", VALUE), (f"-cc.inductor.apiKey+={VALUE}",), (f"-ac.token={VALUE}",),
        (f'-O{{"api_key": "{VALUE}"}}',), (f'-O={{"a": {{"password": "{VALUE}"}}}}',),
        ("-O", f'{{"token": "{VALUE}"}}'), (f'-O.a={{"api_key": "{VALUE}"}}',),
        ("--hf-overrides", json.dumps({"api_key": VALUE})), (f'--hf-overrides={{"a": {{"hfToken": "{VALUE}"}}}}',),
        ("--kv-transfer-config", json.dumps({"a": [{"access-key": VALUE}]})),
        ("--additional-config", f'{{"api\\u005fkey": "{VALUE}"}}'),
        ("--additional-config", f'{{"auth_token": ["{VALUE}"]}}'),
        ("--otlp-traces-endpoint", f"https://me:{VALUE}@collector:4317"), (f"--middleware=https://x/?token={VALUE}",),
        ("--chat-template", "hf_" + VALUE.replace("-", "") * 3), ("--x", f"Authorization: Bearer {VALUE}"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_secret_in_any_spelling_is_refused_and_not_repeated(words: tuple[str, ...], tmp_path: Path) -> None:
    message = refusal(*words)
    assert REFUSED in message and VALUE not in message
    (tmp_path / "config.yaml").write_text(json.dumps({"serving": {"arguments": words}}))
    assignment = f"serving.arguments={json.dumps(words)}"
    ways: tuple[Callable[[], object], ...] = (
        lambda: build([read_layer(tmp_path / "config.yaml")]),
        lambda: parse_assignment(assignment),
    )
    for way in ways:
        with pytest.raises(BadConfig, match=REFUSED) as refused:
            way()
        assert VALUE not in refused.value.message and "serving.key_file" in refused.value.hint


@pytest.mark.parametrize(
    "words",
    [
        ("--api-server-count", "2"), ("--api_server_count=2",), ("--allow-credentials",), ("--hf-overrides", "{}"),
        ("--hf_config_path", "/models/x"), ("--host", "0.0.0.0"), ("--max-num-batched-tokens", "8192"), ("--headless",),
        ("--tokenizer=Qwen/Qwen3",), ("--tokenizer-mode", "mistral"), ("--enable-prompt-tokens-details",),
        ("--speculative-config", '{"model": "x", "num_speculative_tokens": 3}'), ("--return-tokens-as-token-ids",),
        ("--hf-overrides.bos_token", "<s>"), ("--hf-overrides", '{"pad_token_id": 0, "eos_token": "</s>"}'),
        ("--hf-overrides", '{"api_key": null, "token": true, "password": ""}'), ("--ssl-keyfile", "/etc/ssl/key.pem"),
        ("--config", "/etc/vllm.yaml"), ("--override-generation-config", '{"stop_token_ids": [1, 2]}'),
        ("--otlp-traces-endpoint", "https://collector:4317"), ("--served-model-name", "hf_model"), ("-tp", "2"),
        ("-O3",), ("-O.level=3",), ("-O.pass_config.fuse_norm_quant", "true"), ('-O{"level": 3}',), ("-dp=2",),
        ("-tp", "-1"),
        ("--long-prefill-token-threshold=4", "--compilation-config", "{" * 4000), ("--x", "[" * 4000),
    ],
    ids=lambda words: " ".join(words)[:60],
)  # fmt: skip
def test_argument_without_a_secret_is_taken(words: tuple[str, ...]) -> None:
    assert refusal(*words) == ""


@pytest.mark.parametrize("name", ["serving.model", "stack", "environment.python", "nccl.source"])
@pytest.mark.parametrize("value", [f"https://me:{VALUE}@host/x.tar.gz", f"https://host/x?a=1&access_token={VALUE}"])
def test_credential_in_another_setting_is_refused_and_not_repeated(name: str, value: str) -> None:
    with pytest.raises(BadConfig, match="must not contain a") as refused:
        build([Layer("a test", {name: value})])
    assert VALUE not in refused.value.message


@pytest.mark.parametrize("value", [f"--api_k={VALUE}", f"--hf_token={VALUE}", f"--hf-overrides.password={VALUE}"])
def test_option_in_place_of_a_model_is_refused(value: str) -> None:
    with pytest.raises(BadConfig, match=REFUSED) as refused:
        parse_assignment(f"serving.model={value}")
    assert VALUE not in refused.value.message


@pytest.mark.parametrize("option", ["--api_key", "--api", "--api-k", "--hf_t", "--hf-overrides.api_key"])
@pytest.mark.parametrize("form", ["{}={}", "- {} {}", "{{{}: {}}}", "[[{}, {}]]", "[[{}={}]]", '["{}={}"'])
@pytest.mark.parametrize("name", ["serving.arguments", "serving.port", "nccl.arch", "packages.extra"])
def test_secret_in_a_value_of_the_wrong_type_is_not_repeated(name: str, form: str, option: str) -> None:
    text = form.format(option, VALUE)
    with pytest.raises(BadConfig) as refused:
        parse_assignment(f"{name}={text}")
    assert VALUE not in refused.value.message


@pytest.mark.parametrize("option", ["--api-key", "--api_k", "--api-ke", "--hf-token", "--hf_t", "--hf_toke"])
@pytest.mark.parametrize("form", ["{} {}", "{}={}", "'{}', '{}'", '["{}", "{}"]'])
def test_output_hides_the_secret_of_every_spelling(option: str, form: str) -> None:
    assert VALUE not in redact("vllm serve Qwen/Q " + form.format(option, VALUE) + " --port 8000")


@pytest.mark.parametrize(
    "option", ["-O.api_key", "--hf-overrides.a.hf_token", "-cc.x.token", "--x.aws_secret_access_key"]
)
@pytest.mark.parametrize("form", ["{}={}", "{} {}", "'{}', '{}'", '["{}", "{}"]', "{}+={}"])
def test_output_hides_the_secret_below_a_key(option: str, form: str) -> None:
    shown = redact("vllm serve Qwen/Q " + form.format(option, VALUE) + " --port 8000")
    assert VALUE not in shown and "--port 8000" in shown


def test_output_keeps_what_is_below_another_key() -> None:
    text = "vllm serve x -O.level=3 --hf-overrides.bos_token <s> --a.b-c=d see docs.api_key and -v"
    assert redact(text) == text


def test_text_of_a_plan_hides_what_its_json_hides() -> None:
    after = f'api_keys: [\n  "{VALUE}",\n]\nport: 1\n'
    drift = Drift("change it", before="port: 2\n", after=after, key=f"file:https://me:{VALUE}@host/x")
    out = Console(file=io.StringIO(), width=200)
    show_diff(drift, out, verbose=True)
    shown = cast(io.StringIO, out.file).getvalue()
    assert "port: 1" in shown and VALUE not in shown and VALUE not in redact(after)


# --- with vLLM's own parser


@cache
def parser_of(release: str) -> Any:
    """The parser of this vLLM, with the options above."""
    parser = empty_parser(release)
    for option in OPTIONS:
        how = {"action": "store_true"} if option in NO_VALUE else {"nargs": "*"} if option == "--api-key" else {}
        parser.add_argument(option, **how)
    return parser


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


@st.composite
def spelled(draw: st.DrawFn) -> list[str]:
    """A secret, or something like it, in one of the spellings that the parser knows."""
    option = draw(st.sampled_from(OPTIONS))
    option = option[: draw(st.integers(3, len(option)))]
    option = "--" + "".join(draw(st.sampled_from("-_")) if each == "-" else each for each in option[2:])
    option += draw(st.sampled_from(["", "", ".x", ".api_key"]))
    return [f"{option}={VALUE}"] if draw(st.booleans()) else [option, VALUE]


@pytest.mark.network
@pytest.mark.parametrize("stack", stacks.names())
@limits(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(words=spelled())
def test_secret_that_vllms_parser_reads_is_refused(stack: str, words: list[str]) -> None:
    try:
        found = vars(parser_of(stacks.load(stack).vllm).parse_args(words))
    except (argparse.ArgumentError, ValueError):
        reject()
    if any(VALUE in each for each in _strings([found["api_key"], found["hf_token"]])):
        assert REFUSED in refusal(*words)
    elif ".api_key" not in words[0]:
        assert refusal(*words) == ""
