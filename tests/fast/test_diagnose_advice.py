"""What is drawn from the words of a message: what it says, and what to do that follows from them."""

import re

import pytest

from sparkinstall.diagnose import advice
from sparkinstall.diagnose.signatures import steps
from sparkinstall.facts import vllm_releases
from tests.support.diagnosing import BY_NAME, diagnosed


def test_general_failure_quotes_the_line_and_advises_what_that_names() -> None:
    raised = (
        '  File "/opt/v/lib/python3.12/site-packages/vllm/v1/attention/backends/own.py", line 8, in build',
        "    raise ValueError(",
        "ValueError: own_rows (4) of kv_cache_dtype must be one of ['auto', 'fp8'], see --own-table and VLLM_OWN_ROWS",
    )
    log = "\n".join(f"(EngineCore pid=7) ERROR 10-02 09:00:01 [core.py:9] {each}" for each in raised)
    (cause,) = diagnosed(log.encode()).causes
    assert cause.why.startswith(f'"{raised[2].removeprefix("ValueError: ")}": ')
    for words in ("['auto', 'fp8']", "`--own-table` and `--kv-cache-dtype`", "`VLLM_OWN_ROWS`"):
        assert words in cause.hint
    assert cause.hint.index("TRITON_ATTN") < cause.hint.index(steps(BY_NAME[cause.name].hint)[0])
    assert cause.title == f"{BY_NAME['attention-part-failed'].title}: {BY_NAME[cause.name].title}"


@pytest.mark.parametrize(
    ("message", "advised"),
    [
        ("RuntimeError: the table is not aligned", ""),
        ("ValueError: Unknown kind own. Supported kinds: a, b, c", "a, b, c"),
        ("ValueError: own backend is not supported for models with windows", ""),
        ("RuntimeError: unknown model architecture: 'own7'", ""),
        ("ValueError: unsupported formats: 'own', 'b'", ""),
        ("ValueError: not a valid backend: 'own', 'b'", ""),
        ("ValueError: not supported: 'own'", ""),
        ("ValueError: there are no available blocks: 'own', 'b'", ""),
        ("ValueError: 'own' is not one of ['a', 'b']", "['a', 'b']"),
        ("ValueError: 'own' is not supported. Available: ['a', 'b']", "['a', 'b']"),
        ("ValueError: the name must not be one of ['own', 'b']", ""),
        ("RuntimeError: own GEMM only supports Hopper (SM90) and B200", ""),
        ("ValueError: TRITON_ATTN and FLASHINFER_MLA refuse 7 rows", ""),
        ("RuntimeError: own, logged by /srv/own/process.go", ""),
        ("Error: run `apt install own-dev` first", "`apt install own-dev`"),
        ("OSError: [Errno 22] Invalid argument: '/srv/own/part.bin'", "`/srv/own/part.bin`"),
        ("RuntimeError: raised in /opt/v/lib/python3.12/site-packages/vllm/own.py", ""),
        ("ValueError: total heads 12 is not divisible by tp_size 8", "`--tensor-parallel-size`"),
        ("HTTPError: 404 for url: https://example.com/own/x", "https://example.com/own/x"),
        ("vllm: error: unrecognized arguments: serve own/model", "stands there twice"),
        ("vllm serve: error: unrecognized arguments: own model", "belong to no option"),
        (
            "vllm serve: error: unrecognized arguments: --tensor-paralel-size 2",
            "the nearest is `--tensor-parallel-size`",
        ),
        ("vllm serve: error: unrecognized arguments: --tp-size 2", "it is now `--tensor-parallel-size`"),
        ("request (7 tokens) exceeds the available context size (5 tokens), try increasing it", ""),
        ("Expected a word to be set. Or for one of the `X-Own-Key` or `Own` headers to be omitted", ""),
        (
            "TypeError: EngineArgs.__init__() got an unexpected keyword argument 'task'",
            "`task` is now what the option `--runner or --convert` is",
        ),
        ("vllm: error: unrecognized arguments: --host 127.0.0.1 --port 6379", "came as one word"),
        ("api_server.py: error: unrecognized arguments: serve own/x --dtype auto", "stands there twice"),
        ("vllm serve: error: ambiguous option: --model could match --model-impl", "without `--model`"),
        ("vllm serve: error: argument --max-model-len: expected one argument", "the value of `--max-model-len`"),
        ("vllm serve: error: unrecognized arguments: --swap-space 4", "nothing takes its place"),
        ("vllm serve: error: unrecognized arguments: --max-model-len 9", "this one is older, or another program"),
        ("vllm serve: error: unrecognized arguments: --linear-backend own", "only vLLM "),
        ("vllm serve: error: the following arguments are required: model_tag", "before all options"),
        (
            "vllm serve: error: argument --moe-backend: invalid choice: 'b12x'",
            "`b12x` is a value of `--moe-backend` in vLLM ",
        ),
        ("CalledProcessError: Command '['own', '--max-model-len', '9']' returned non-zero exit status 1.", ""),
        ("vllm serve: error: argument --own/--no-own: ignored explicit argument 'true'", "`--own` takes no value"),
    ],
)
def test_advice_is_drawn_from_the_words_of_a_message(message: str, advised: str) -> None:
    told = advice.advice(message, is_of_vllm=True)
    assert advised in "".join(told) if advised else told == ()


def test_words_of_a_message_lack_the_class_of_its_exception() -> None:
    assert advice.says("own.errors.OwnError:  the rows\n differ.") == "the rows differ"
    assert advice.says("RuntimeError: Worker failed with error 'OwnError: 3 < 4', please check the stack") == "3 < 4"
    assert advice.says("OwnError: ") == "OwnError"


def test_former_options_are_gone_from_a_release_and_name_what_vllm_has() -> None:
    shipped = vllm_releases.shipped()
    for former, now in advice.FORMER.items():
        assert not all(former in each.options for each in shipped), former
        for option in re.findall(r"--[a-z-]+", now):
            assert advice.shipped_with(option), option


def test_advice_names_options_that_vllm_has() -> None:
    known = {option for each in vllm_releases.shipped() for option in each.options}
    assert {option for _, option in advice.OPTIONS} <= known
