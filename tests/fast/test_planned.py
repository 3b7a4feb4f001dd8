"""The installed vLLM as the judge of a KV cache: its plans against its own log, and what `fit` makes of them."""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from sparkinstall.core import fit as use
from sparkinstall.core.memory import GIB, SPARK_TOTAL, Memory
from sparkinstall.core.planned import PLANS, InstalledVllm, NotPlanned, Oracle, Questions
from sparkinstall.models import Figure
from sparkinstall.models.files import Files, LocalFiles
from sparkinstall.models.kv_cache import Load
from sparkinstall.models.planned import Answer, Asked, Plan, Planned, PlannedLayers, Reply
from sparkinstall.node import Node
from sparkinstall.system import Entry, Result, read_only
from sparkinstall.system.local import LocalReader
from tests.support.model_files import LLAMA, TENSORS, write_model
from tests.support.nodes import node_with
from tests.support.rehearsals import envelope, in_this_process

CASES = Path(__file__).parents[1] / "cases/kv-cache"
RECORDS = {path.stem: json.loads(path.read_text()) for path in sorted(CASES.glob("*.json"))}
ENGINES = [
    pytest.param(release, each, id=f"{release} {each['model']} {' '.join(each['words'])} x{each['nodes']}")
    for release, found in RECORDS.items()
    for each in found["records"]
]
KINDS = {
    "qwen3", "llama-mha", "qwen3-moe", "gemma2", "gemma3", "mistral-sliding", "gpt-oss", "deepseek-v2", "qwen3-next",
    "nemotron-h", "granite-hybrid",
}  # fmt: skip
ROOM = Memory(Figure(100 * GIB, "given"), SPARK_TOTAL)
HYBRID = {
    "model_type": "qwen3_next", "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "hidden_size": 512, "max_position_embeddings": 65536, "full_attention_interval": 4,
}  # fmt: skip
# Of a hybrid: six layers with a state, two with a cache, in blocks of 384 tokens.
PLAN = Plan(
    weights=5_000_000_000,
    layers=(PlannedLayers("MambaSpec", 500_000, 0, 0, 6), PlannedLayers("FullAttentionSpec", 786_432, 384, 0, 2)),
    block_size=384, kv_dtype="auto", prefix_caching=True, batched_tokens=8192, context=65536, concurrency=1.0,
    blocks=177, block_bytes=1_572_864, groups=4, step=384, steps=((1, 7), (170, 1)),
)  # fmt: skip


# --- vLLM's plans against the logs of its own engines


@pytest.mark.parametrize(("release", "record"), ENGINES)
def test_plan_equals_the_log_of_a_real_engine(release: str, record: dict[str, Any]) -> None:
    """The plan, as sparkinstall's payload got it, gives the concurrency of the log to its last digit."""
    if not record["log"]:
        assert record["failed"] and record["error"]
        return
    plan = msgspec.convert(record["plan"], Plan)
    log = " ".join(record["log"])
    (length, concurrency), (tokens,) = (
        re.findall(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x", log)[0],
        re.findall(r"KV cache size: ([\d,]+) tokens", log),
    )
    context = int(length.replace(",", ""))
    blocks = plan.blocks_of(context)
    assert blocks and plan.context == context
    sequences = RECORDS[release]["bytes"] // plan.block_bytes / blocks
    assert f"{sequences:.2f}" == concurrency
    # 0.18.1 divides the blocks by the groups instead.
    if "Maximum concurrency for" in record["log"][0]:
        assert f"{int(sequences * context):,}" == tokens


def test_records_have_every_kind_of_layers() -> None:
    assert {each["model"] for each in RECORDS["0.32.0"]["records"] if each["log"]} == KINDS
    assert set(RECORDS) >= {"0.18.1", "0.32.0"}


def test_what_a_release_cannot_run_has_no_plan() -> None:
    """MLA and hybrids do not run in a 0.18.1 that is built for the CPU: its payload says so, and guesses nothing."""
    failed = {each["model"]: each for each in RECORDS["0.18.1"]["records"] if each["failed"]}
    assert {"deepseek-v2", "qwen3-next", "nemotron-h", "granite-hybrid"} <= set(failed)
    assert not any("plan" in each for each in failed.values())


@pytest.mark.parametrize(("model", "batch"), [("gemma3", "8192"), ("qwen3-next", "8192")])
def test_plan_of_a_longer_context_has_the_shorter_one(model: str, batch: str) -> None:
    """So the largest context that fits is found with one plan."""
    same = [
        msgspec.convert(each["plan"], Plan)
        for each in RECORDS["0.32.0"]["records"]
        if each["model"] == model and each["nodes"] == 1 and each["words"][2:] == ["--max-num-batched-tokens", batch]
    ]
    short, long = sorted(same, key=lambda plan: plan.context)
    assert (short.context, long.context) == (8192, 32768)
    assert long.blocks_of(8192) == short.blocks_of(8192)
    assert long.block_bytes == short.block_bytes


# --- a plan


def test_blocks_follow_the_steps() -> None:
    assert [PLAN.blocks_of(context) for context in (1, 384, 385, 768, 65536)] == [7, 7, 8, 8, 177]
    assert PLAN.blocks_of(65537) is None


def test_bytes_are_those_of_the_asked_options_only() -> None:
    planned = Planned("0.33.0", {Asked(8192): PLAN})
    load = Load(context=8192, sequences=3, batched_tokens=8192, element=2)
    assert planned.bytes_of(load) == (3 * 28 + 1) * 1_572_864
    assert planned.bytes_of(replace(load, batched_tokens=2048)) is None
    assert planned.bytes_of(replace(load, kv_dtype="fp8")) is None
    assert planned.bytes_of(replace(load, context=1 << 20)) is None


def test_token_reads_a_state_once_and_a_window_only() -> None:
    layers = (*PLAN.layers, PlannedLayers("SlidingWindowSpec", 1600, 16, 160, 10))
    planned = Planned("0.33.0", {Asked(8192): replace(PLAN, layers=layers)})
    load = Load(context=8192, sequences=1, batched_tokens=8192, element=2)
    assert planned.read_by_token(load) == 6 * 500_000 + 2 * 786_432 * 8192 // 384 + 10 * 1600 * 160 // 16


# --- fit


def planning(plans: Mapping[Asked, Plan], asked: list[Questions] | None = None) -> Oracle:
    """Has these plans, and no other."""

    def oracle(_: Files, questions: Questions) -> Planned:
        if asked is not None:
            asked.append(questions)
        return Planned("0.33.0", {each: plans[each] for each in questions.sets if each in plans})

    return oracle


def silent(why: str) -> Oracle:
    def oracle(*_: object) -> Planned:
        raise NotPlanned(why)

    return oracle


def hybrid(tmp_path: Path) -> LocalFiles:
    return LocalFiles(write_model(tmp_path / "hybrid", HYBRID))


def test_hybrid_is_judged_by_what_vllm_plans(tmp_path: Path) -> None:
    options = use.FitOptions(context=8192, sequences=4)
    found = use.fit("m", hybrid(tmp_path), options, ROOM, "0.29.0", oracle=planning({Asked(8192): PLAN}))
    cache = (4 * 28 + 1) * 1_572_864
    assert (found.verdict, found.asked, found.vllm) == ("fits", True, "0.33.0")
    assert found.memory.kv_cache == Figure(cache, "planned", "asked vLLM 0.33.0")
    assert found.memory.weights.value == found.files.loaded.value == PLAN.weights
    assert found.files.loaded.basis == "planned" and "0.33.0" in found.files.loaded.why
    assert str(cache) in found.serve
    room = 100 * GIB - PLAN.weights - 13 * GIB
    assert found.most_sequences == (room // 1_572_864 - 1) // 28
    assert found.largest_context == 65536


def test_longest_context_is_what_vllm_says(tmp_path: Path) -> None:
    oracle = planning({Asked(8192): replace(PLAN, context=4096)})
    found = use.fit("m", hybrid(tmp_path), use.FitOptions(), ROOM, "0.29.0", oracle=oracle)
    assert (found.context, found.verdict) == (4096, "fits")
    longer = use.fit("m", hybrid(tmp_path), use.FitOptions(context=8192), ROOM, "0.29.0", oracle=oracle)
    assert (longer.verdict, longer.memory.kv_cache.value) == ("unknown", None)
    assert "vLLM allows sequences of 4,096 tokens" in longer.why


def test_vllm_is_asked_for_the_changes_that_may_be_shown_too(tmp_path: Path) -> None:
    asked: list[Questions] = []
    options = use.FitOptions(to_vllm=("--no-enable-prefix-caching",), remote_code=True)
    use.fit("m", hybrid(tmp_path), options, ROOM, "0.29.0", oracle=planning({Asked(8192): PLAN}, asked))
    (questions,) = asked
    assert questions.sets == [
        Asked(8192), Asked(8192, "fp8"), Asked(2048), Asked(2048, "fp8"), Asked(8192, "auto", 2), Asked(2048, "fp8", 2),
    ]  # fmt: skip
    assert (questions.more, questions.remote_code) == (("--no-enable-prefix-caching",), True)


def test_ways_are_those_that_vllm_takes(tmp_path: Path) -> None:
    """It has no plan for an fp8 cache of this model, so that is no way."""
    plans = {Asked(8192): PLAN, Asked(8192, "auto", 2): replace(PLAN, weights=PLAN.weights // 2)}
    options = use.FitOptions(context=65536, sequences=400)
    found = use.fit("m", hybrid(tmp_path), options, ROOM, "0.29.0", oracle=planning(plans))
    assert found.verdict == "does_not_fit"
    assert [(list(each.options), each.version) for each in found.ways] == [
        (["--tensor-parallel 2"], ""), ([], "8 bits a weight"), ([], "4 bits a weight"),
    ]  # fmt: skip


@pytest.mark.parametrize("of", [HYBRID, LLAMA], ids=["hybrid", "dense"])
def test_without_an_answer_the_formulas_count_and_the_reason_is_named(of: dict[str, Any], tmp_path: Path) -> None:
    files = LocalFiles(write_model(tmp_path / "m", of))
    found = use.fit("m", files, use.FitOptions(), ROOM, "0.29.0", oracle=silent("KeyError: 'x'"))
    assert (found.asked, found.not_asked, found.vllm) == (False, "KeyError: 'x'", "0.29.0")
    assert found.memory.kv_cache.basis == ("unknown" if of is HYBRID else "estimate")
    assert "counted by formulas: KeyError: 'x'" in found.notes


def test_options_that_only_vllm_can_count_are_unknown_without_it(tmp_path: Path) -> None:
    options = use.with_cache_options(use.FitOptions(), prefix_caching=False, block_size=32)
    assert options.to_vllm == ("--no-enable-prefix-caching", "--block-size", "32")
    files = LocalFiles(write_model(tmp_path / "m", LLAMA))
    assert "--block-size" in use.fit("m", files, options, ROOM, "0.29.0").why
    plan = replace(PLAN, context=8192)
    found = use.fit("m", files, options, ROOM, "0.29.0", oracle=planning({Asked(8192): plan}))
    assert found.verdict == "fits"
    assert " ".join(options.to_vllm) in " ".join(found.serve)


def test_verb_says_that_no_vllm_is_installed(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", LLAMA)
    asked, by_formula = (
        envelope(in_this_process("fit", folder, "--memory", "100GiB", "--root", tmp_path / "node", "--json", *more))[
            "data"
        ]
        for more in ((), ("--by-formula",))
    )
    assert (asked["asked"], by_formula["asked"]) == (False, False)
    assert asked["not_asked"] and not by_formula["not_asked"]
    assert asked["memory"] == by_formula["memory"]


# --- asking


class Spark(LocalReader):
    """A node with vLLM, whose payload replies with `said`."""

    def __init__(self, said: str, code: int = 0, err: str = "", free: int = 100 << 20) -> None:
        super().__init__("/")
        self.said, self.code, self.err, self.free = said, code, err, free
        self.asked: list[tuple[Sequence[str], Mapping[str, str], set[str]]] = []
        self.installed = True

    def entry(self, path: str) -> Entry | None:
        return Entry("file", 0o755, 1, 0, 0, 0) if self.installed and "/opt/" in path else None

    def read(self, path: str) -> bytes | None:
        return b"MemAvailable: %d kB\n" % self.free if path == "/proc/meminfo" else b"x" if "/opt/" in path else None

    def ask(
        self,
        *argv: str,
        timeout: float = 30,
        env: Mapping[str, str] | None = None,
        root: bool = False,
        stdin: str = "",
    ) -> Result:
        del timeout, root, stdin
        read_only.require(argv)
        questions = json.loads(argv[-1])
        (folder,) = {each["folder"] for each in questions}
        self.asked.append((argv, env or {}, {path.name for path in Path(folder).iterdir()}))
        return Result(argv, self.code, self.said, self.err)


QUESTIONS = Questions([Asked(8192), Asked(2048, "fp8", 2)])
REPLY = msgspec.json.encode(Reply("", "0.33.0", "cuda", 1.5, (Answer(PLAN), Answer(None, "it does not")))).decode()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return replace(node_with(), cache=tmp_path / "cache")


def with_code(tmp_path: Path) -> LocalFiles:
    folder = write_model(tmp_path / "m", LLAMA, TENSORS, {"a": ("BF16", (1,))})
    for name in ("modeling_x.py", "tokenizer.json", "hf_quant_config.json"):
        (folder / name).write_text("{}")
    return LocalFiles(folder)


def test_installed_vllm_gets_json_files_only_and_no_network(node: Node, tmp_path: Path) -> None:
    spark, said = Spark(f"a library's line\n{REPLY}\n"), list[str]()
    planned = InstalledVllm(node, spark, said.append).plan(with_code(tmp_path), QUESTIONS)
    assert planned == Planned("0.33.0", {Asked(8192): PLAN}, {Asked(2048, "fp8", 2): "it does not"})
    ((argv, env, names),) = spark.asked
    assert names == {"config.json", "hf_quant_config.json"}
    assert env["HF_HUB_OFFLINE"] == "1" and env["VLLM_CACHE_ROOT"].startswith(env["TMPDIR"])
    words = [each["words"] for each in json.loads(argv[-1])]
    assert words[1] == ["--max-num-batched-tokens", "2048", "--kv-cache-dtype", "fp8"]
    assert [each["nodes"] for each in json.loads(argv[-1])] == [1, 2]
    assert said == [f"asking vLLM {node.stack.vllm} how it would plan the KV cache: 10 to 20 seconds"]
    assert not Path(env["TMPDIR"]).exists()


def test_code_of_the_model_is_there_only_if_it_may_run(node: Node, tmp_path: Path) -> None:
    spark = Spark(REPLY)
    InstalledVllm(node, spark).plan(with_code(tmp_path), replace(QUESTIONS, remote_code=True))
    ((argv, _, names),) = spark.asked
    assert "modeling_x.py" in names
    assert all("--trust-remote-code" in each["words"] for each in json.loads(argv[-1]))


def test_answer_is_kept_until_something_changes(node: Node, tmp_path: Path) -> None:
    spark, files = Spark(REPLY), with_code(tmp_path)
    oracle = InstalledVllm(node, spark)
    first = oracle.plan(files, QUESTIONS)
    assert oracle.plan(files, QUESTIONS) == first
    assert len(spark.asked) == 1
    oracle.plan(files, replace(QUESTIONS, more=("--dtype", "float16")))
    assert len(spark.asked) == 2
    (tmp_path / "m/config.json").write_text(json.dumps({**LLAMA, "hidden_size": 1024}))
    oracle.plan(files, QUESTIONS)
    assert len(spark.asked) == 3
    for path in (node.cache / PLANS).iterdir():
        path.write_bytes(b"{")
    assert oracle.plan(files, QUESTIONS) == first
    assert len(spark.asked) == 4


@pytest.mark.parametrize(
    ("spark", "why"),
    [
        (Spark("", 1, "Traceback ...\nModuleNotFoundError: No module named 'torch'\n"), "No module named 'torch'"),
        (Spark("", 124), "within 240 s"),
        (Spark("", -9), "code -9"),
        (Spark("[]"), "code 0"),
        (Spark('{"vllm": "0.33.0", "answers": []}'), "not whole"),
        (Spark('{"vllm": "0.33.0", "answers": [{"error": "ValueError: no"}, {}]}'), "no plan for it: ValueError: no"),
        (Spark('{"vllm": "0.33.0", "answers": [{"error": "X: it has custom code"}, {}]}'), "--trust-remote-code lets"),
        (Spark(REPLY, free=2 << 20), "only 2048 MiB of memory"),
    ],
)  # fmt: skip
def test_vllm_that_does_not_answer_is_one_line(spark: Spark, why: str, node: Node, tmp_path: Path) -> None:
    with pytest.raises(NotPlanned) as raised:
        InstalledVllm(node, spark).plan(with_code(tmp_path), QUESTIONS)
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (node.cache / PLANS).exists()


def test_node_without_vllm_and_a_rehearsal_are_not_asked(node: Node, tmp_path: Path) -> None:
    spark = Spark(REPLY)
    spark.installed = False
    for each, why in ((node, "not installed here"), (replace(node, rehearsal=True), "rehearsal")):
        with pytest.raises(NotPlanned, match=why):
            InstalledVllm(each, spark).plan(with_code(tmp_path), QUESTIONS)
    assert spark.asked == []


def test_folder_for_temporary_files_that_cannot_be_written_is_a_reason(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(NotPlanned, match="cannot be written: No space left on device"):
        InstalledVllm(node, Spark(REPLY)).plan(with_code(tmp_path), QUESTIONS)


def test_cache_that_cannot_be_written_does_not_matter(node: Node, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    spark = Spark(REPLY)
    for _ in range(2):
        assert InstalledVllm(node, spark).plan(with_code(tmp_path), QUESTIONS).plans
    assert len(spark.asked) == 2
