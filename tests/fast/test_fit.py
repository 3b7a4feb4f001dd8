"""`sparkinstall fit`: weights by headers, the KV cache by formulas, the verdict, and input that cannot be used."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sparkinstall.core import fit as use
from sparkinstall.core.memory import GIB, SPARK_TOTAL, Memory, memory_of
from sparkinstall.core.model_source import source_of
from sparkinstall.models import Figure, ModelError
from sparkinstall.models.files import LocalFiles
from sparkinstall.models.kv_cache import BLOCK, Formulas, Layers, Load
from sparkinstall.models.layout import layout_of
from sparkinstall.models.weights import INDEX, Tensor, read_by_token, read_weights
from sparkinstall.recipes import Recipe
from sparkinstall.recipes.catalogue import shipped
from sparkinstall.system import Result, read_only
from tests.support.hub_server import COMMIT, Hub, served
from tests.support.machine import Machine
from tests.support.model_files import LLAMA, TENSORS, Shapes, size_of, write_model, write_shard
from tests.support.rehearsals import envelope, in_this_process, output_of, sparkinstall

TOKEN = "hf_" + "x" * 30
ROOM = Memory(Figure(100 * GIB, "given"), SPARK_TOTAL)
OLD, NEW = "0.18.1", "0.29.0"


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the user's cache of models nor a login of theirs."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def config(kind: str, layers: int, **more: Any) -> dict[str, Any]:
    """config.json of a small model: 512 bytes of cache for a token and layer."""
    return {
        "model_type": kind, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 64, "hidden_size": 512, "max_position_embeddings": 8192, **more,
    }  # fmt: skip


MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_key_value_heads": 8}
GEMMA3 = config("gemma3_text", 12, sliding_window=512)
GEMMA2 = config("gemma2", 8, sliding_window=1024)
GPT_OSS = config("gpt_oss", 6, sliding_window=128, layer_types=["sliding_attention", "full_attention"] * 3)
SLIDING = config("mistral", 4, sliding_window=512)


def sequence(of: dict[str, Any], context: int = 8192, **more: int) -> int:
    """The bytes of one sequence."""
    load = replace(Load(context=context, sequences=1, batched_tokens=8192, element=2), **more)
    return Formulas(layout_of(of).layers).of_sequence(load)


# --- the KV cache against vLLM's own allocator


@pytest.mark.parametrize(
    ("of", "by_vllm"),
    [
        (config("qwen3", 6), 25_166_208),
        (config("qwen3_moe", 4, num_experts=8, num_experts_per_tok=2), 16_777_216),
        (config("deepseek_v2", 5, **MLA), 47_189_340),
        (GEMMA3, 50_413_568),
        (GEMMA2, 33_587_200),
        (GPT_OSS, 25_190_784),
        (SLIDING, 16_809_984),
    ],
    ids=["dense", "moe", "mla", "gemma3", "gemma2", "gpt-oss", "sliding"],
)
def test_formula_equals_what_vllm_0_18_1_allocates_as_a_gb10(of: dict[str, Any], by_vllm: int) -> None:
    """Measured with vLLM's own code for one sequence of 8192 tokens; the smallest steps are its rounding."""
    assert sequence(of) == pytest.approx(by_vllm, rel=0.0002)


def test_formula_equals_vllm_for_gpt_oss_120b() -> None:
    of = config("gpt_oss", 36, num_attention_heads=64, num_key_value_heads=8, sliding_window=128)
    assert sequence(of, 131_072) == pytest.approx(5.139e9, rel=0.001)


def test_padded_groups_count_like_full_ones() -> None:
    """Gemma 3 27B: 52 sliding layers in groups of 10, the last of which has 2."""
    of = config("gemma3_text", 62, sliding_window=1024)
    full, sliding = 8192 // BLOCK, (min(8192, 1023 + 2048) + BLOCK - 1) // BLOCK + 1
    assert sequence(of, batched_tokens=2048) == (full + 6 * sliding) * 10 * 512 * BLOCK


def test_few_more_layers_of_a_kind_make_one_larger_group() -> None:
    layers = (Layers("full", 13, 2, 128), Layers("sliding", 12, 2, 128, 128))
    load = Load(context=8192, sequences=1, batched_tokens=8192, element=2)
    assert Formulas(layers).of_sequence(load) == (512 + 513) * 13 * 512 * BLOCK


def test_keys_and_values_may_differ_in_size() -> None:
    assert sequence(config("llama", 6, v_head_dim=32)) == sequence(config("llama", 6)) * 3 // 4


@pytest.mark.parametrize(("of", "share"), [(config("llama", 6), 2), (config("deepseek_v3", 5, **MLA), 1)])
def test_nodes_share_the_heads_but_not_the_cache_of_mla(of: dict[str, Any], share: int) -> None:
    assert sequence(of, tensor_parallel=2) * share == sequence(of)


def test_no_node_has_less_than_one_head() -> None:
    assert sequence(config("llama", 6), tensor_parallel=8) * 2 == sequence(config("llama", 6))


def test_fp8_takes_half_of_16_bits() -> None:
    assert sequence(GEMMA3, element=1) * 2 == sequence(GEMMA3)


def test_context_is_rounded_up_to_a_block() -> None:
    assert sequence(config("llama", 6), 8177) == sequence(config("llama", 6), 8192)


def test_fewer_batched_tokens_shrink_sliding_layers_only() -> None:
    blocks = -(-(511 + 2048) // BLOCK) + 1
    assert sequence(SLIDING, batched_tokens=2048) == blocks * BLOCK * 4 * 512
    assert sequence(config("llama", 6), batched_tokens=2048) == sequence(config("llama", 6))


def test_newer_vllm_keeps_the_tokens_of_two_batches(tmp_path: Path) -> None:
    """As the source of 0.29.0 says: with asynchronous scheduling, its default, a second batch is in flight."""
    files = LocalFiles(write_model(tmp_path / "m", {**SLIDING, "max_position_embeddings": 65536}))
    sizes = [use.fit("m", files, use.FitOptions(), ROOM, vllm).memory.kv_cache.value for vllm in (OLD, "0.22.1", NEW)]
    block = BLOCK * 4 * 512
    assert sizes[0] == sizes[1] == ((511 + 8192 + 15) // 16 + 2) * block
    assert sizes[2] == ((511 + 2 * 8192 + 15) // 16 + 2) * block


# --- layouts


@pytest.mark.parametrize(
    ("of", "why"),
    [
        (config("qwen3_next", 8, full_attention_interval=4), "GatedDeltaNet"),
        (config("qwen3_5_moe_text", 8), "GatedDeltaNet"),
        (config("nemotron_h", 8, hybrid_override_pattern="M*M-"), "Mamba2"),
        (config("granitemoehybrid", 8, layer_types=["mamba", "attention"] * 4), "Mamba2"),
        (config("kimi_linear", 8), "KDA"),
        (config("llama", 8, ssm_state_size=128), "Mamba"),
        (config("llama", 2, layer_types=["full_attention", "linear_attention"]), "'linear_attention'"),
        (config("minimax_m2", 2, attn_type_list=[1, 0]), "linear attention"),
        (config("deepseek_v3", 8, index_topk=2048, **MLA), "index"),
        (config("llama4_text", 8, attention_chunk_size=8192), "chunks"),
        (config("gemma3n_text", 8, num_kv_shared_layers=4), "share the cache"),
        (config("qwen2", 8, use_sliding_window=True, sliding_window=4096), "only some of its layers"),
        (config("qwen3", 2, layer_types=["full_attention", "sliding_attention"]), "'qwen3'"),
        (config("brand_new", 8), "'brand_new'"),
        (config("deepseek_v2", 8), "kv_lora_rank"),
        ({"num_hidden_layers": 2}, "no `model_type`"),
        ({"model_type": "llama", "num_hidden_layers": 2}, "num_attention_heads"),
        ({"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2}, "hidden_size"),
    ],
)
def test_unknown_layout_has_a_reason_and_no_number(of: dict[str, Any], why: str, tmp_path: Path) -> None:
    assert layout_of(of).layers == ()
    assert why in layout_of(of).why
    run = in_this_process("fit", write_model(tmp_path / "m", of), "--memory", "100GiB", "--json")
    data = envelope(run)["data"]
    assert (run.returncode, data["verdict"], data["why"]) == (3, "unknown", layout_of(of).why), output_of(run)
    assert data["memory"]["kv_cache"]["value"] is data["largest_context"] is data["most_sequences"] is None
    assert data["serve"] == data["serve_largest"] == []


def test_layers_of_minimax_m2_are_all_full() -> None:
    found = layout_of(config("minimax_m2", 3, attn_type_list=[1, 1, 1]))
    assert found.layers == (Layers("full", 3, 2, 128),)


def test_window_that_qwen_does_not_use_does_not_count() -> None:
    found = layout_of(config("qwen2", 3, use_sliding_window=False, sliding_window=4096))
    assert found.layers == (Layers("full", 3, 2, 128),)


def test_config_json_of_gemma_3_leaves_out_the_defaults() -> None:
    text = {"model_type": "gemma3_text", "num_hidden_layers": 34, "hidden_size": 2560, "sliding_window": 1024}
    found = layout_of({"model_type": "gemma3", "text_config": text})
    assert found.layers == (Layers("full", 5, 4, 512), Layers("sliding", 29, 4, 512, 1024))
    assert (found.context, found.heads, found.tied) == (131072, 8, True)


@pytest.mark.parametrize(
    ("quantization", "kv_dtype", "method"),
    [
        (None, "auto", ""),
        ({"quant_method": "mxfp4"}, "auto", "mxfp4"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "fp8",
         "compressed-tensors"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 4, "type": "int"}}, "{", "compressed"),
        ({"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}}, "fp8", "modelopt"),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "NVFP4"}, "'NVFP4'", "modelopt"),
    ],
)  # fmt: skip
def test_checkpoint_may_ask_for_a_type_of_cache(quantization: Any, kv_dtype: str, method: str) -> None:
    found = layout_of({**LLAMA, "quantization_config": quantization})
    assert found.kv_dtype.startswith(kv_dtype)
    assert found.quantization.startswith(method)


def test_quantization_in_a_file_of_its_own_counts(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    quant = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(quant))
    found = use.fit("m", LocalFiles(folder), use.FitOptions(), ROOM, NEW)
    assert (found.quantization, found.kv_dtype) == ("NVFP4", "fp8")
    assert found.files.loaded.value is None


# --- weights


def test_weights_are_the_sum_of_the_offsets(tmp_path: Path) -> None:
    shards: list[Shapes] = [TENSORS, {"a": ("F8_E4M3", (10, 3)), "b": ("F4", (10, 4)), "c": ("F32", ())}]
    weights = read_weights(LocalFiles(write_model(tmp_path / "m", LLAMA, *shards)))
    assert weights.size == sum(map(size_of, shards)) == size_of(TENSORS) + 30 + 20 + 4
    assert weights.by_dtype() == {"BF16": size_of(TENSORS), "F8_E4M3": 30, "F4": 20, "F32": 4}
    assert len(weights.files) == 2


def test_only_what_the_index_names_counts(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", LLAMA, TENSORS, {"a": ("BF16", (1,))})
    write_shard(folder / "consolidated.safetensors", TENSORS)
    weights = read_weights(LocalFiles(folder))
    assert weights.size == size_of(TENSORS) + 2
    assert weights.left_out == ["consolidated.safetensors"]


def test_whole_file_wins_over_mistrals_own(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    write_shard(folder / "consolidated.safetensors", TENSORS)
    assert read_weights(LocalFiles(folder)).files == ["model.safetensors"]
    (folder / "model.safetensors").unlink()
    assert read_weights(LocalFiles(folder)).size == size_of(TENSORS)


def test_long_header_is_read_to_its_end(tmp_path: Path) -> None:
    many: Shapes = {f"model.layers.{number}.weight": ("BF16", (2, 2)) for number in range(5000)}
    weights = read_weights(LocalFiles(write_model(tmp_path / "m", LLAMA, many)))
    assert (len(weights.tensors), weights.size) == (5000, 40000)


def test_loaded_bytes_are_16_bits_a_weight_without_drafts_and_a_tied_head(tmp_path: Path) -> None:
    tensors: Shapes = {
        **TENSORS,
        "model.layers.0.norm.weight": ("F32", (512,)),
        "model.layers.2.mlp.weight": ("BF16", (99, 99)),
        "mtp.layers.0.weight": ("BF16", (9, 9)),
    }
    folder = write_model(tmp_path / "m", {**LLAMA, "tie_word_embeddings": True}, tensors)
    files = use.fit("m", LocalFiles(folder), use.FitOptions(), ROOM, NEW).files
    assert files.bytes == size_of(tensors)
    assert files.loaded == Figure(size_of(TENSORS) - 1000 * 512 * 2 + 512 * 2, "estimate", "16 bits a weight")
    assert files.counted == files.loaded


@pytest.mark.parametrize(("method", "factor"), [("mxfp4", 1.1), ("fp8", 1.0)])
def test_loaded_bytes_of_quantized_weights_are_unknown(method: str, factor: float, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {**LLAMA, "quantization_config": {"quant_method": method}})
    files = use.fit("m", LocalFiles(folder), use.FitOptions(), ROOM, NEW).files
    assert files.loaded.basis == "unknown" and method in files.loaded.why
    assert files.counted.value == int(size_of(TENSORS) * factor)


# --- the decode ceiling


MOE: Shapes = {
    "model.language_model.embed_tokens.weight": ("BF16", (1000, 64)),
    "lm_head.weight": ("BF16", (1000, 64)),
    "model.language_model.layers.0.mlp.gate.weight": ("F32", (8, 64)),
    "model.language_model.layers.0.mlp.shared_experts.up.weight": ("BF16", (64, 64)),
    "model.language_model.layers.0.mlp.experts.gate_up_proj": ("BF16", (8, 64, 64)),
    "model.language_model.layers.2.mlp.experts.gate_up_proj": ("BF16", (8, 64, 64)),
    "model.visual.blocks.0.weight": ("BF16", (500, 500)),
}


def test_token_reads_neither_the_embedding_nor_drafts_nor_the_encoder(tmp_path: Path) -> None:
    weights = read_weights(LocalFiles(write_model(tmp_path / "m", LLAMA, MOE)))
    read = read_by_token(weights.tensors, 2, narrow=False)
    assert (read.always, read.experts) == (2 * 1000 * 64 + 4 * 8 * 64 + 2 * 64 * 64, 2 * 8 * 64 * 64)
    assert read_by_token(weights.tensors, 2, narrow=True).always == read.always - 2 * 8 * 64


def test_embedding_that_is_the_head_too_is_read() -> None:
    tensors = [Tensor("model.embed_tokens.weight", "BF16", 100, 50), Tensor("model.norm.weight", "BF16", 10, 5)]
    assert read_by_token(tensors, 2, narrow=True).always == 110
    assert read_by_token([*tensors, Tensor("lm_head.weight", "BF16", 100, 50)], 2, narrow=True).always == 110


def test_ceiling_is_the_bandwidth_over_the_active_bytes(tmp_path: Path) -> None:
    moe = {**LLAMA, "num_experts": 8, "num_experts_per_tok": 2}
    found = use.fit("m", LocalFiles(write_model(tmp_path / "m", moe, MOE)), use.FitOptions(), ROOM, NEW)
    active = 2 * 1000 * 64 + 2 * 8 * 64 + 2 * 64 * 64 + 2 * 8 * 64 * 64 * 2 // 8
    assert found.decode.read == Figure(active, "estimate", "2 of 8 experts")
    assert found.decode.ceiling == pytest.approx(273e9 / active)
    cache = 8192 * 2 * (2 * 2 * 64 * 2)
    assert found.decode.ceiling_at_context == pytest.approx(273e9 / (active + cache))


def test_ceiling_of_experts_that_config_json_does_not_count_is_unknown(tmp_path: Path) -> None:
    found = use.fit("m", LocalFiles(write_model(tmp_path / "m", LLAMA, MOE)), use.FitOptions(), ROOM, NEW)
    assert (found.decode.read.value, found.decode.ceiling, found.decode.ceiling_at_context) == (None, None, None)


def test_sliding_layers_read_their_window_only() -> None:
    load = Load(context=8192, sequences=1, batched_tokens=8192, element=2)
    assert Formulas(layout_of(GEMMA3).layers).read_by_token(load) == 512 * (2 * 8192 + 10 * 512)


# --- the verdict


def big(tmp_path: Path, gigabytes: int, of: dict[str, Any] = LLAMA) -> Path:
    """A model whose files have that many GB, on paper."""
    shards: list[Shapes] = [
        {f"model.layers.{at % 80}.part{at}.weight": ("BF16", (500_000_000,))} for at in range(gigabytes)
    ]
    return write_model(tmp_path / "big", {**of, "num_hidden_layers": 80, "num_key_value_heads": 8}, *shards)


def test_need_is_the_sum_and_the_options_stay_below_what_is_available(tmp_path: Path) -> None:
    run = in_this_process("fit", big(tmp_path, 70), "--memory", "100GiB", "--sequences", "4", "--json")
    data = envelope(run)["data"]
    memory = data["memory"]
    parts = [memory[name]["value"] for name in ("weights", "kv_cache", "overhead", "reserve")]
    assert (run.returncode, data["verdict"]) == (0, "fits"), output_of(run)
    assert parts[0] == 70 * 10**9
    assert parts[1] == (4 * 512 + 1) * BLOCK * 80 * 8 * 64 * 2 * 2
    assert memory["need"] == {"value": sum(parts), "basis": "estimate", "why": ""}
    assert memory["short"] == sum(parts) - 100 * 2**30
    serve = dict(zip(data["serve"][::2], data["serve"][1::2], strict=True))
    assert serve["--kv-cache-memory-bytes"] == str(parts[1])
    share = float(serve["--gpu-memory-utilization"]) * 121.69 * 2**30
    assert sum(parts[:3]) <= share <= sum(parts[:3]) + 0.002 * 121.69 * 2**30 < 100 * 2**30
    assert (serve["--max-model-len"], serve["--max-num-seqs"]) == ("8192", "4")


def test_largest_context_and_most_sequences_are_the_last_that_fit(tmp_path: Path) -> None:
    files = LocalFiles(big(tmp_path, 70, {**LLAMA, "max_position_embeddings": 1 << 20}))
    ask = use.FitOptions(context=32768, sequences=2)
    found = use.fit("m", files, ask, ROOM, NEW)

    def verdict(**changed: int) -> str:
        return use.fit("m", files, replace(ask, **changed), ROOM, NEW).verdict

    assert found.largest_context and found.most_sequences
    assert verdict(context=found.largest_context) == "fits"
    assert verdict(context=found.largest_context + 1) == "does_not_fit"
    assert verdict(sequences=found.most_sequences) == "fits"
    assert verdict(sequences=found.most_sequences + 1) == "does_not_fit"
    assert "--max-model-len" in found.serve_largest and str(found.largest_context) in found.serve_largest


def test_auto_context_is_the_largest_that_fits(tmp_path: Path) -> None:
    files = LocalFiles(big(tmp_path, 70, {**LLAMA, "max_position_embeddings": 1 << 20}))
    assert use.fit("m", files, use.FitOptions(), ROOM, NEW).verdict == "does_not_fit"
    found = use.fit("m", files, use.FitOptions(context="auto"), ROOM, NEW)
    assert (found.verdict, found.context) == ("fits", found.largest_context)


def test_what_does_not_fit_names_what_would_make_it_fit(tmp_path: Path) -> None:
    of = {**LLAMA, "max_position_embeddings": 1 << 18}
    run = in_this_process("fit", big(tmp_path, 70, of), "--memory", "100GiB", "--sequences", "1", "--json")
    data = envelope(run)["data"]
    assert (run.returncode, data["verdict"], data["serve"]) == (3, "does_not_fit", []), output_of(run)
    ways = {" ".join(each["options"]): each for each in data["ways"]}
    versions = {each["version"]: each["need"] for each in data["ways"] if each["version"]}
    assert set(ways) == {"--kv-dtype fp8", "--tensor-parallel 2", "--kv-dtype fp8 --tensor-parallel 2", ""}
    cache = data["memory"]["kv_cache"]["value"]
    fixed = sum(data["memory"][name]["value"] for name in ("overhead", "reserve"))
    assert ways["--kv-dtype fp8"]["need"] == data["memory"]["need"]["value"] - cache // 2
    assert ways["--tensor-parallel 2"] == {
        "options": ["--tensor-parallel 2"], "need": 35 * 10**9 + cache // 2 + fixed, "fits": True, "version": "",
    }  # fmt: skip
    weights = {"8 bits a weight": 0.55, "4 bits a weight": 0.32}
    assert versions == {name: int(70 * 10**9 * share) + cache + fixed for name, share in weights.items()}
    assert data["outgrown"] is None
    assert ways["--kv-dtype fp8 --tensor-parallel 2"]["fits"]


def test_fewer_batched_tokens_are_a_way_for_sliding_layers_only(tmp_path: Path) -> None:
    of = {**GEMMA3, "max_position_embeddings": 1 << 17}
    files = LocalFiles(big(tmp_path, 80, of))
    ways = [" ".join(each.options) for each in use.fit("m", files, use.FitOptions(sequences=64), ROOM, NEW).ways]
    assert ways[:3] == ["--kv-dtype fp8", "--batched-tokens 2048", "--kv-dtype fp8 --batched-tokens 2048"]


@pytest.mark.parametrize(("nodes", "rows"), [("1", 0), ("2", 1)])
def test_weights_are_told_once_where_loaded_is_the_same(nodes: str, rows: int, tmp_path: Path) -> None:
    run = in_this_process("fit", big(tmp_path, 20), "--memory", "100GiB", "--tensor-parallel", nodes)
    lines = [line.split()[0] for line in run.stdout.splitlines() if line]
    assert (lines.count("weights"), lines.count("loaded")) == (1, rows), output_of(run)


def test_model_that_is_larger_than_two_nodes_says_so(tmp_path: Path) -> None:
    run = in_this_process("fit", big(tmp_path, 400), "--memory", "100GiB")
    assert run.returncode == 3
    assert "It does not fit" in run.stdout and "even without a KV cache" in run.stdout, output_of(run)
    assert "the model has outgrown the machine" in run.stdout
    assert re.search(r"no change is enough; least in a version with 4 bits a weight: 14\d\.\d\d GB", run.stdout)
    assert "largest context" not in run.stdout and "that fit" not in run.stdout, "none does"
    assert "use it over 8 nodes, or on a machine with 414." in run.stdout


def test_verdict_that_hangs_on_the_reported_overhead_says_so(tmp_path: Path) -> None:
    run = in_this_process("fit", big(tmp_path, 88), "--memory", "94GiB")
    assert (run.returncode, "which is unverified" in run.stdout) == (3, True), output_of(run)


def test_model_without_a_known_cache_may_be_too_large_all_the_same(tmp_path: Path) -> None:
    folder = big(tmp_path, 130, config("qwen3_next", 8))
    data = envelope(in_this_process("fit", folder, "--memory", "100GiB", "--json"))["data"]
    assert data["verdict"] == "does_not_fit"


def test_every_number_by_formula_is_marked(tmp_path: Path) -> None:
    run = in_this_process("fit", write_model(tmp_path / "m"), "--memory", "100GiB")
    assert run.returncode == 0, output_of(run)
    lines = [line for line in run.stdout.splitlines() if re.search(r"\d", line)][1:]
    marked = re.compile("estimate|exact|reported|chosen|given|as options of vLLM")
    assert [line for line in lines if not marked.search(line)] == []
    assert "unverified" in run.stdout


# --- memory


def spark(tmp_path: Path, available: int) -> Path:
    """A folder that looks like a Spark."""
    root = tmp_path / "node"
    device = root / "sys/bus/pci/devices/000f:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "device").write_text("0x2e12\n")
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal: 125000000 kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n")
    return root


def test_spark_has_what_is_available_now(tmp_path: Path) -> None:
    run = in_this_process("fit", write_model(tmp_path / "m"), "--json", "--root", spark(tmp_path, 110_000_000))
    memory = envelope(run)["data"]["memory"]
    assert run.returncode == 0, output_of(run)
    assert memory["available"] == {
        "value": 110_000_000 << 10, "basis": "measured", "why": "MemAvailable of this node, now",
    }  # fmt: skip
    assert memory["total"]["value"] == 125_000_000 << 10


@pytest.mark.parametrize(
    ("said", "least", "note"),
    [
        (Result((), 0, "MemAvailable: 90000000 kB\n", ""), (90_000_000 << 10, "MemAvailable of 192.0.2.2, now"), ""),
        (Result((), 0, "MemAvailable: 120000000 kB\n", ""), (110_000_000 << 10, "MemAvailable of this node, now"), ""),
        (Result((), 255, "", "ssh: no route\n"), (110_000_000 << 10, "MemAvailable of this node, now"), "no route"),
    ],
)
def test_of_several_nodes_the_least_counts(
    said: Result, least: tuple[int, str], note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    reader = Machine(str(spark(tmp_path, 110_000_000)))

    def ask(*argv: str, **_: object) -> Result:
        asked.append(argv)
        return said

    monkeypatch.setattr(reader, "ask", ask)
    memory = memory_of(reader, None, ("192.0.2.2",))
    assert (memory.available.value, memory.available.why) == least
    assert asked == [("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "192.0.2.2", "cat /proc/meminfo")]
    assert read_only.allows(asked[0])
    model = LocalFiles(write_model(tmp_path / "m"))
    notes = use.fit("m", model, use.FitOptions(tensor_parallel=2), memory, NEW).notes
    assert any("does not tell its memory" in each for each in notes) == any(note in each for each in notes if note)
    assert any("each of the 2 nodes is taken" in each for each in notes) == bool(note)


def test_spark_that_is_in_use_says_so(tmp_path: Path) -> None:
    run = in_this_process("fit", write_model(tmp_path / "m"), "--root", spark(tmp_path, 10_000_000))
    assert (run.returncode, "what runs now counts" in run.stdout) == (3, True), output_of(run)


def test_given_memory_wins_over_the_nodes_own(tmp_path: Path) -> None:
    root = spark(tmp_path, 1_000_000)
    run = in_this_process("fit", write_model(tmp_path / "m"), "--memory", "64 GB", "--json", "--root", root)
    assert envelope(run)["data"]["memory"]["available"]["value"] == 64 * 10**9


def test_other_machine_needs_a_figure(tmp_path: Path) -> None:
    run = in_this_process("fit", write_model(tmp_path / "m"), "--root", tmp_path)
    assert run.returncode == 3
    assert "Whether it fits is unknown" in run.stdout and "--memory, such as 101GiB" in run.stdout, output_of(run)


# --- recipes


def test_options_of_a_recipe_are_taken() -> None:
    recipe = Recipe(
        id="a", model="a/b", nodes=2, tensor_parallel=2, context=1000, sequences=3, batched_tokens=4000,
        args=(("--kv-cache-dtype", "fp8_e4m3"), ("--speculative-config.method", "mtp"), ("--enable-lora",)),
    )  # fmt: skip
    found = use.options_of_recipe(recipe)
    assert (found.context, found.sequences, found.batched_tokens, found.tensor_parallel) == (1000, 3, 4000, 2)
    assert (found.kv_dtype, len(found.uncounted), found.no_formula) == ("fp8", 2, "")
    plain = use.options_of_recipe(Recipe(id="a", model="a/b"))
    assert plain == use.FitOptions()


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (Recipe(id="a", model="a/b", args=(("--kv-cache-dtype", "nvfp4_ds_mla"),)), "nvfp4_ds_mla"),
        (Recipe(id="a", model="a/b", args=(("--block-size", "256"),)), "--block-size"),
        (Recipe(id="a", model="a/b", nodes=2, pipeline_parallel=2), "pipeline parallel"),
    ],
)
def test_recipe_whose_cache_has_no_formula_is_unknown(recipe: Recipe, why: str, tmp_path: Path) -> None:
    files = LocalFiles(write_model(tmp_path / "m"))
    found = use.fit("m", files, use.options_of_recipe(recipe), ROOM, NEW)
    assert (found.verdict, found.memory.kv_cache.value) == ("unknown", None)
    assert why in found.why


def test_shipped_recipe_takes_its_model_from_a_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {**GPT_OSS, "max_position_embeddings": 131072})
    recipe = next(each for each in shipped() if each.id == "gpt-oss-20b")
    run = in_this_process("fit", "gpt-oss-20b", "--folder", folder, "--memory", "100GiB", "--json")
    data = envelope(run)["data"]
    assert (run.returncode, data["recipe"], data["model"]) == (0, "gpt-oss-20b", "openai/gpt-oss-20b"), output_of(run)
    assert data["place"] == str(folder)
    asked = use.options_of_recipe(recipe)
    assert (data["sequences"], data["batched_tokens"]) == (asked.sequences, asked.batched_tokens)
    own = in_this_process("fit", "gpt-oss-20b", "--folder", folder, "--memory", "100GiB", "--json", "--sequences", "7")
    assert envelope(own)["data"]["sequences"] == 7


def in_cache(tmp_path: Path, model: str, *shards: Shapes) -> Path:
    """A snapshot in the cache of the hub."""
    folder = tmp_path / "hf/hub" / f"models--{model.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    return write_model(folder / "snapshots" / COMMIT, LLAMA, *shards)


def test_recipe_file_takes_its_model_from_the_cache(tmp_path: Path) -> None:
    snapshot = in_cache(tmp_path, "org/mine", TENSORS, {"a": ("BF16", (1,))})
    path = tmp_path / "mine.yaml"
    path.write_text("id: mine\nmodel: org/mine\ncontext: 4096\nsequences: 2\n")
    data = envelope(in_this_process("fit", path, "--memory", "100GiB", "--json"))["data"]
    assert (data["recipe"], data["place"], data["revision"]) == ("mine", str(snapshot), COMMIT)
    assert (data["context"], data["sequences"], data["verdict"]) == (4096, 2, "fits")


def test_recipe_with_a_draft_counts_its_weights_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    in_cache(tmp_path, "org/mine", TENSORS, {"a": ("BF16", (1,))})
    path = tmp_path / "mine.yaml"
    speculation = 'args: [[--speculative-config, \'{"method": "x", "model": "org/draft"}\']]\n'

    def counted(more: str = "") -> tuple[int, list[str]]:
        path.write_text(f"id: mine\nmodel: org/mine\ncontext: 4096\n{more}")
        data = envelope(in_this_process("fit", path, "--memory", "100GiB", "--json"))["data"]
        return data["memory"]["weights"]["value"], data["notes"]

    alone, _ = counted()
    without, notes = counted(speculation)
    assert without == alone
    assert "not counted: the draft of speculative decoding, with its own weights and cache" in notes
    in_cache(tmp_path, "org/draft", {"a": ("BF16", (1000, 1000))}, {"b": ("BF16", (500_000,))})
    with_draft, notes = counted(speculation)
    assert with_draft == alone + 3_000_000
    assert "counted with 3 MB of the model that drafts, org/draft" in notes
    assert "not counted: the cache of the model that drafts" in notes


def test_model_of_the_hub_comes_from_the_cache_only_if_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = in_cache(tmp_path, "org/model", TENSORS, {"a": ("BF16", (1,))})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert source_of("org/model").files.place == str(snapshot)
    next(snapshot.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        source_of("org/model")


# --- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    many: Shapes = {f"model.layers.0.mlp.experts.{at}.weight": ("BF16", (1000, 10)) for at in range(3000)}
    folder = write_model(tmp_path / "model", LLAMA, TENSORS, many)
    with served(Hub(folder)) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url + "/")
        yield found


def on_hub(*more: str) -> Any:
    return in_this_process("fit", "org/model", "--memory", "100GiB", "--json", *more)


def test_hub_gives_the_same_as_a_folder_by_ranges(hub: Hub) -> None:
    data = envelope(on_hub())["data"]
    local = envelope(in_this_process("fit", hub.folder, "--memory", "100GiB", "--json"))["data"]
    assert (data["place"], data["revision"]) == (f"{hub.url}/org/model", COMMIT)
    differ = {name for name in data if data[name] != local[name]}
    assert differ == {"model", "place", "revision"}
    assert data["files"]["bytes"] > 60_000_000
    assert hub.sent < 1_000_000
    assert hub.logins == [""] * len(hub.asked)


def test_hub_without_ranges_sends_no_more_than_the_headers_need(hub: Hub) -> None:
    hub.ranges = False
    with_ranges = size_of(TENSORS)
    data = envelope(on_hub())["data"]
    assert data["files"]["bytes"] == 60_000_000 + with_ranges


@pytest.mark.parametrize("variable", ["", "HF_TOKEN_PATH"])
def test_login_of_the_user_opens_a_private_model(
    variable: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = TOKEN
    path = tmp_path / "hf/token" if not variable else tmp_path / "elsewhere"
    path.parent.mkdir(exist_ok=True)
    path.write_text(TOKEN + "\n")
    if variable:
        monkeypatch.setenv(variable, str(path))
    run = on_hub()
    assert run.returncode == 0, output_of(run)
    assert set(hub.logins) == {f"Bearer {TOKEN}"}
    assert TOKEN not in output_of(run)


def test_token_of_netrc_is_not_sent(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert on_hub().returncode == 0
    assert set(hub.logins) == {""}


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_token_of_the_environment_wins_over_the_login(
    variable: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = TOKEN
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text("hf_of_the_login")
    monkeypatch.setenv(variable, TOKEN)
    run = on_hub()
    assert (run.returncode, set(hub.logins)) == (0, {f"Bearer {TOKEN}"}), output_of(run)
    assert TOKEN not in output_of(run)


def test_token_does_not_follow_to_the_storage(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text(TOKEN)
    with served(Hub(hub.folder)) as storage:
        hub.storage = storage.url.replace("127.0.0.1", "localhost")
        assert on_hub().returncode == 0
        assert len(storage.asked) > 2
        assert set(storage.logins) == {""}


@pytest.mark.parametrize(
    ("status", "message", "hint"),
    [
        (401, "no public model org/model (401)", "HF_TOKEN"),
        (403, "does not let you read org/model (403)", "accept the model's conditions"),
        (404, "no model org/model with the revision 'main'", "check the name"),
        (429, "answers with 429", "later"),
        (503, "answers with 503", "later"),
    ],
)
def test_refusal_of_the_hub_is_one_clear_error(status: int, message: str, hint: str, hub: Hub, tmp_path: Path) -> None:
    hub.status = status
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text(TOKEN)
    run = on_hub()
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (1, "command")
    assert message in error["message"] and hint in error["hint"]
    assert TOKEN not in output_of(run)


def test_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    run = on_hub()
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["message"]) == (1, "the hub http://127.0.0.1:1 cannot be reached")
    assert "Connection refused" in error["cause"]


def test_connection_that_closes_early_is_one_clear_error(hub: Hub) -> None:
    hub.cut = 500
    (error,) = envelope(on_hub())["errors"]
    assert "cannot be reached" in error["message"]


@pytest.mark.parametrize(
    "info", [b"<html>", b"[]", b'{"sha": "../..", "siblings": []}', b'{"sha": 1}', b"\xff", b"[" * 100_000]
)
def test_server_that_is_no_hub_is_one_clear_error(info: bytes, hub: Hub) -> None:
    hub.info = info
    (error,) = envelope(on_hub())["errors"]
    assert (error["code"], error["hint"]) == ("command", "check HF_ENDPOINT")


@pytest.mark.parametrize("address", ["huggingface.co", "ftp://a/b", "http://", "http://a:b"])
def test_endpoint_that_is_no_address_is_one_clear_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    run = on_hub()
    assert (run.returncode, envelope(run)["errors"][0]["code"]) == (2, "usage")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("content", [None, b"two words", b"\xff\xfe", b"x" * 5000])
def test_token_file_that_cannot_be_used_is_one_clear_error(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("HF_TOKEN_PATH", str(path))
    run = on_hub()
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (2, "usage")
    assert "two words" not in error["message"]


# --- input that cannot be used


def one_error(run: Any) -> str:
    """The message of the only error, of input that cannot be used."""
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) in ((2, "config"), (2, "usage")), output_of(run)
    assert error["hint"]
    assert "Traceback" not in output_of(run)
    return str(error["message"])


def test_folder_without_config_json_is_one_clear_error(tmp_path: Path) -> None:
    assert "has no config.json" in one_error(in_this_process("fit", tmp_path, "--json"))
    (tmp_path / "params.json").write_text("{}")
    assert "Mistral's own format" in one_error(in_this_process("fit", tmp_path, "--json"))


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a JSON object but []"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_config_that_is_not_json_is_one_clear_error(content: bytes, wrong: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "config.json").write_bytes(content)
    assert wrong in one_error(in_this_process("fit", folder, "--json"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**12),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", "many"),
        ("num_hidden_layers", True),
        ("num_attention_heads", 0),
        ("num_attention_heads", 1.5),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", [2, 2]),
        ("head_dim", 10**30),
        ("max_position_embeddings", -5),
        ("max_position_embeddings", 1e300),
        ("layer_types", ["full_attention"]),
        ("sliding_window", -4),
        ("num_experts_per_tok", 9),
    ],
)
def test_absurd_number_is_one_clear_error(key: str, value: Any, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {**LLAMA, "num_experts": 8, key: value})
    assert f"config.json: `{key}` must be" in one_error(in_this_process("fit", folder, "--json"))


def damaged(folder: Path, content: bytes) -> str:
    (folder / "model.safetensors").write_bytes(content)
    return one_error(in_this_process("fit", folder, "--json"))


def header(entry: object) -> bytes:
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text


GOOD = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "has 0 bytes, too few for a header"),
        (b"\0\0\0", "has 3 bytes, too few for a header"),
        ((1000).to_bytes(8, "little") + b"{}", "is truncated: its header has 1,000 bytes, the file 10"),
        (b"\xff" * 100, "is no safetensors file"),
        ((2).to_bytes(8, "little") + b"{x", "has a damaged header"),
        (header(1), "has a damaged header"),
        (header({**GOOD, "data_offsets": [0]}), "has a damaged header"),
        (header({**GOOD, "data_offsets": [4, 0]}), "negative size"),
        (header({**GOOD, "data_offsets": [0, 6]}) + b"123456", "which is not what its shape needs"),
        (header({**GOOD, "shape": [-1]}) + b"1234", "negative size"),
        (header(GOOD) + b"123", "is truncated: it has"),
        (header(GOOD) + b"12345", "declares only"),
        (header({**GOOD, "dtype": 5}) + b"1234", "has a damaged header"),
    ],
)
def test_damaged_header_is_one_clear_error(content: bytes, wrong: str, tmp_path: Path) -> None:
    assert wrong in damaged(write_model(tmp_path / "m"), content)


def test_index_that_names_a_missing_shard_is_one_clear_error(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", LLAMA, TENSORS, {"a": ("BF16", (1,))})
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = one_error(in_this_process("fit", folder, "--json"))
    assert "names model-00002-of-00002.safetensors, but" in message


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": {"a": "../x.safetensors"}}, {"weight_map": {"a": 1}}, []]
)
def test_index_that_is_none_is_one_clear_error(index: object, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / INDEX).write_text(json.dumps(index))
    assert INDEX in one_error(in_this_process("fit", folder, "--json"))


def test_model_without_safetensors_is_one_clear_error(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model.gguf")
    assert "no safetensors files (it has .gguf files)" in one_error(in_this_process("fit", folder, "--json"))


def test_file_in_place_of_a_folder_is_one_clear_error(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    assert "is a file, not the folder" in one_error(in_this_process("fit", folder / "config.json", "--json"))
    assert "there is no folder" in one_error(in_this_process("fit", tmp_path / "gone", "--json"))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert "no safetensors files" in one_error(in_this_process("fit", folder, "--json"))


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["gpt-os-20b"], "there is no recipe 'gpt-os-20b'"),
        (["gone.yaml"], "cannot be read"),
        (["gpt-oss-20b", "--id", "x"], "--id is for a file"),
        ([".", "--folder", "x"], "--folder is for a recipe"),
        (["MODEL", "--memory", "128"], "--memory '128' is no size"),
        (["MODEL", "--memory", "0GiB"], "is no size"),
        (["MODEL", "--context", "1e9"], "is no number of tokens"),
        (["MODEL", "--context", "0"], "is no number of tokens"),
        (["MODEL", "--kv-dtype", "fp16"], "--kv-dtype 'fp16' is not known"),
        (["MODEL", "--tensor-parallel", "3"], "8 attention heads cannot be divided by 3"),
    ],
)
def test_words_that_cannot_be_used_are_one_clear_error(words: list[str], wrong: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    given = [str(folder) if word == "MODEL" else word for word in words]
    (error,) = envelope(in_this_process("fit", *given, "--json"))["errors"]
    assert wrong in error["message"]


def test_number_out_of_range_is_a_usage_error(tmp_path: Path) -> None:
    run = sparkinstall("fit", write_model(tmp_path / "m"), "--sequences", "0", "--json")
    assert "--sequences" in one_error(run)


# --- code of a model, and speed


def test_code_of_a_model_is_named_and_never_run(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": ["modeling_x.X", None]}
    folder = write_model(tmp_path / "m", {**LLAMA, "auto_map": auto_map})
    trap = tmp_path / "was-run"
    for name in ("configuration_x.py", "modeling_x.py", "sitecustomize.py"):
        (folder / name).write_text(f"open({str(trap)!r}, 'w')")
    run = sparkinstall("fit", folder, "--memory", "100GiB", "--json")
    data = envelope(run)["data"]
    assert data["remote_code"] == ["configuration_x.XConfig", "modeling_x.X"]
    assert any("--trust-remote-code" in note for note in data["notes"])
    assert not trap.exists()


def test_time_grows_with_the_number_of_shards_and_not_with_its_square(tmp_path: Path) -> None:
    few, many = (_seconds_to_fit(tmp_path / f"{shards}", shards) for shards in (25, 100))
    assert many < 8 * few + 0.5


def _seconds_to_fit(folder: Path, count: int) -> float:
    """Of the processor: others may use it too."""
    shards: list[Shapes] = [
        {f"model.layers.{at}.mlp.experts.{number}.weight": ("BF16", (1000, 500)) for number in range(250)}
        for at in range(count)
    ]
    write_model(folder, {**LLAMA, "num_hidden_layers": count}, *shards)
    began = time.process_time()
    run = in_this_process("fit", folder, "--memory", "100GiB", "--json")
    took = time.process_time() - began
    assert envelope(run)["data"]["files"]["bytes"] == count * 250 * 1_000_000
    return took
