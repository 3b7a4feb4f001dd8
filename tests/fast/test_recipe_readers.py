"""Recipes of other projects: files shaped like theirs, and hostile ones. The numbers are those of docs/recipes.md."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparkinstall import safe_yaml
from sparkinstall.core.recipe_list import fit
from sparkinstall.recipes import ReadRecipe, Recipe, RecipeError
from sparkinstall.recipes.readers import recipes_of
from sparkinstall.recipes.render import command
from sparkinstall.recipes.serve_options import serve_call
from sparkinstall.stacks import load
from tests.support.rehearsals import envelope, in_this_process

pytestmark = pytest.mark.usefixtures("empty_cache")

SPARKRUN = """\
recipe_version: "2"
model: Qwen/Qwen3.6-27B-FP8
runtime: vllm
container: example.org/vllm-nightly:latest
metadata:
  description: A dense model in FP8
  model_params: 27B
defaults:
  port: 8000
  host: 0.0.0.0
  tensor_parallel: 1
  gpu_memory_utilization: 0.80
  max_model_len: 262144
  drafted: 2
  speculative_config: '{"method": "mtp", "num_speculative_tokens": {drafted}}'
env:
  VLLM_MARLIN_USE_ATOMIC_ADD: "1"
command: |
  vllm serve {model} \\
    --host {host} \\
    --port {port} \\
    --max-model-len {max_model_len} \\
    --gpu-memory-utilization {gpu_memory_utilization} \\
    --enable-auto-tool-choice \\
    --tool-call-parser qwen3_coder \\
    --reasoning-parser qwen3 \\
    --speculative-config '{speculative_config}' \\
    --hf-overrides '{"text_config": {"rope": {"factor": 4}}}' \\
    -tp {tensor_parallel}
"""

EUGR = """\
# measured by the author: 41 tokens/s
recipe_version: "1"
name: Lightning (NVFP4)
description: a hybrid model with a draft model
model: nvidia/Lightning-NVFP4
container: vllm-node
cluster_only: false
solo_only: false
defaults:
  port: 8000
  host: 0.0.0.0
  tensor_parallel: 2
  gpu_memory_utilization: 0.7
  max_model_len: auto
  max_num_batched_tokens: 16k
  num_speculative_tokens: 7
command: |
  vllm serve nvidia/Lightning-NVFP4 \\
    --host {host} --port {port} \\
    --max-model-len {max_model_len} \\
    --max_num_batched_tokens {max_num_batched_tokens} \\
    --gpu-memory-utilization={gpu_memory_utilization} \\
    --speculative_config.method dspark \\
    --speculative_config.num_speculative_tokens {num_speculative_tokens} \\
    --compilation-config '{{"mode": 3, "sizes": {{"a": {num_speculative_tokens}}}}}' \\
    -tp {tensor_parallel} --distributed-executor-backend ray
"""

NEMOCLAW = """\
# SPDX-License-Identifier: Apache-2.0
apiVersion: nemoclaw.nvidia.com/managed-inference/v1
kind: ServingRecipe
metadata: {id: vllm.nano.spark-single.v1, displayName: Nano with vLLM}
spec:
  backend: vllm
  model:
    id: nvidia/Nano-FP8
    revision: 0dcd680e5585c791728c83342b311d0a0026dbeb
    servedName: nano
    downloadSizeBytes: 5280000000
    preparation: {ref: none/v1}
  runtime:
    image: vllm/vllm-openai@sha256:3af90144a0926e5c5fe46ee16e5201e763dd854538b9d7ce433755f11dadaf78
    sharedMemoryBytes: 34359738368
    ulimits: {memlock: -1}
    environment: {VLLM_USE_RUST_FRONTEND: "0", NCCL_DEBUG: WARN}
  execution: {nodeCount: 1}
  serve:
    executable: /usr/local/bin/vllm
    arguments:
      - {name: --max-model-len, value: 65536}
      - {name: --gpu-memory-utilization, value: 0.65}
      - {name: --enable-prefix-caching}
      - {name: --speculative-config, value: '{"method":"mtp","num_speculative_tokens":1}'}
      - {name: --enable-auto-tool-choice}
      - {name: --tool-call-parser, value: qwen3_coder}
  readiness: {timeoutSeconds: 1800, expectedModel: nano}
"""

VLLM = """\
meta:
  title: A MoE model
  date_added: 2026-04-16
  description: 35B in total
  hardware: {dgx_spark_gb10: verified, h100: verified}
model:
  model_id: Qwen/Qwen9-35B
  min_vllm_version: "0.28.0"
  base_args: [--max-num-seqs, "512", --trust-remote-code]
  base_env: {A_LAYER: base, B_LAYER: base}
dependencies:
  - {note: a package, command: pip install something}
features:
  tool_calling:
    args: [--enable-auto-tool-choice, --tool-call-parser, qwen3_coder, --chat-template, examples/tool.jinja]
    hardware_overrides:
      dgx_spark_gb10: {args: [--enable-auto-tool-choice, --tool-call-parser, qwen3_xml]}
  reasoning: {args: [--reasoning-parser, qwen3]}
  spec_decoding: {args: [--speculative-config, '{"method":"mtp","num_speculative_tokens":3}']}
  drafting:
    default_mode: mtp
    modes:
      mtp: {args: [--draft-mode, mtp]}
      dflash: {args: [--draft-mode, dflash], variants: [fp8]}
opt_in_features: [spec_decoding]
variants:
  default: {precision: bf16, vram_minimum_gb: 84}
  fp8:
    model_id: Qwen/Qwen9-35B-FP8
    vram_minimum_gb: 42
    default_modes: {drafting: dflash}
    extra_args: [--kv-cache-dtype, fp8]
    hardware_overrides:
      dgx_spark_gb10: {extra_args: [--max-num-seqs, "8"], extra_env: {B_LAYER: spark}}
      rtx_5090: {extra_args: [--max-num-seqs, "1"]}
      a_card_of_the_future: {extra_args: [--max-num-seqs, "99"]}
  nvfp4: {model_id: nvidia/Qwen9-35B-NVFP4, tp: {dgx_spark_gb10: 2, default: 4}}
  large: {model_id: Qwen/Qwen9-300B, vram_minimum_gb: 340}
  station_only: {model_id: Qwen/Qwen9-X, supported_hardware: [gb300]}
compatible_strategies: [single_node_tp, multi_node_tp]
hardware_overrides:
  amd: {extra_args: [--amd-only]}
  blackwell: {extra_args: [--max-num-seqs, "64", --generation, blackwell], extra_env: {A_LAYER: blackwell}}
strategy_overrides:
  single_node_tp: {tp: 8}
  multi_node_tp: {extra_args: [--several]}
guide: |
  ### DGX Spark
  vllm serve Qwen/Qwen9-35B
"""


def read(tmp_path: Path, text: str | bytes, name: str = "a.yaml") -> tuple[ReadRecipe, ...]:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return recipes_of(str(path)).recipes


def one(tmp_path: Path, text: str | bytes) -> ReadRecipe:
    (found,) = read(tmp_path, text)
    return found


def by_id(tmp_path: Path, text: str) -> dict[str, Recipe]:
    return {each.recipe.id: each.recipe for each in read(tmp_path, text)}


def args(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    return {each[0]: each[1:] for each in recipe.args}


def done(found: ReadRecipe, how: str) -> list[str]:
    return [each.what for each in found.changes if each.done == how]


def message(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(RecipeError) as error:
        read(tmp_path, text)
    return error.value.message


# --- rule 1: every format becomes the same


def test_sparkrun(tmp_path: Path) -> None:
    found = one(tmp_path, SPARKRUN)
    recipe = found.recipe
    assert (found.format, recipe.model, recipe.nodes) == ("sparkrun", "Qwen/Qwen3.6-27B-FP8", 1)
    assert (recipe.memory, recipe.context) == (0.8, 262144)
    assert (recipe.tool_parser, recipe.reasoning_parser) == ("qwen3_coder", "qwen3")
    assert recipe.env == {"VLLM_MARLIN_USE_ATOMIC_ADD": "1"}
    assert recipe.notes == ("A dense model in FP8",)
    assert recipe.sources[0].path == "a.yaml"


def test_eugr(tmp_path: Path) -> None:
    found = one(tmp_path, EUGR)
    recipe = found.recipe
    assert (found.format, recipe.id) == ("eugr/spark-vllm-docker", "lightning-nvfp4")
    assert (recipe.nodes, recipe.tensor_parallel, recipe.context, recipe.batched_tokens) == (2, 2, "auto", 16000)
    assert "its tool serves it on one node too, then with tensor parallel 1" in recipe.notes


def test_nemoclaw(tmp_path: Path) -> None:
    found = one(tmp_path, NEMOCLAW)
    recipe = found.recipe
    assert (recipe.model, recipe.revision) == ("nvidia/Nano-FP8", "0dcd680e5585c791728c83342b311d0a0026dbeb")
    assert (recipe.bytes, recipe.context, recipe.memory) == (5280000000, 65536, 0.65)
    assert (recipe.sources[0].licence, recipe.image and recipe.image[:16]) == ("Apache-2.0", "vllm/vllm-openai")
    assert args(recipe)["--served-model-name"] == ("nano",)
    assert recipe.needs_build is None
    assert command(recipe, 8000, Path("/h")).head.docker


def test_vllm_project_gives_one_recipe_for_each_variant_that_a_spark_may_use(tmp_path: Path) -> None:
    found = by_id(tmp_path, VLLM)
    assert list(found) == ["qwen9-35b", "qwen9-35b-fp8", "qwen9-35b-nvfp4", "qwen9-300b"]
    assert {each.needs_vllm for each in found.values()} == {"0.28.0"}
    assert fit(found["qwen9-35b"], load("0.22.1")).stack == "0.29.0"


def test_vllm_project_layers_are_in_the_order_of_its_site(tmp_path: Path) -> None:
    fp8 = by_id(tmp_path, VLLM)["qwen9-35b-fp8"]
    assert fp8.sequences == 8, "the exact machine wins over the generation, and that over the base"
    assert args(fp8)["--generation"] == ("blackwell",)
    assert fp8.env == {"A_LAYER": "blackwell", "B_LAYER": "spark"}
    assert not {"--amd-only", "--several", "--speculative-config"} & set(args(fp8))
    assert (fp8.tool_parser, fp8.reasoning_parser) == ("qwen3_xml", "qwen3")
    assert args(fp8)["--draft-mode"] == ("dflash",)
    assert args(by_id(tmp_path, VLLM)["qwen9-35b"])["--draft-mode"] == ("mtp",)


def test_vllm_project_says_what_its_data_does_not(tmp_path: Path) -> None:
    notes = by_id(tmp_path, VLLM)["qwen9-35b-fp8"].notes
    assert "off unless asked for: spec_decoding" in notes
    assert any("the guide in the file speaks of the Spark" in note for note in notes)
    assert done(read(tmp_path, VLLM)[0], "ignored") == ["dependencies"]
    other = by_id(tmp_path, VLLM.replace("dgx_spark_gb10: verified, ", ""))["qwen9-35b"]
    assert "the file does not say that it runs on a Spark" in other.notes


def test_vllm_project_variants_of_one_model_have_different_ids(tmp_path: Path) -> None:
    text = VLLM.replace("Qwen/Qwen9-300B", "Qwen/Qwen9-35B-FP8").replace("model_id: nvidia/Qwen9-35B-NVFP4, ", "")
    assert list(by_id(tmp_path, text)) == ["qwen9-35b", "qwen9-35b-fp8", "qwen9-35b-nvfp4", "qwen9-35b-fp8-large"]


# --- rule 2: the command as vLLM's parser takes it


def test_spellings_of_options(tmp_path: Path) -> None:
    recipe = one(tmp_path, EUGR).recipe
    assert args(recipe)["--speculative-config.method"] == ("dspark",)
    assert args(recipe)["--speculative-config.num_speculative_tokens"] == ("7",)
    assert recipe.memory == 0.7


@pytest.mark.parametrize(
    ("text", "words", "env", "other"),
    [
        ("vllm serve a/b --x 1", ("a/b", "--x", "1"), {}, ()),
        ("A=1 B='x y' /usr/bin/vllm serve a/b", ("a/b",), {"A": "1", "B": "x y"}, ()),
        ("pip install x && exec vllm serve a/b --x 1;rm -rf /", ("a/b", "--x", "1"), {}, ("pip", "install", "x", "&&")),
        ("vllm serve a/b \\  \n  --x '{\"a\": [1, 2]}' \\\r\n --y", ("a/b", "--x", '{"a": [1, 2]}', "--y"), {}, ()),
        ("# with a comment\nvllm serve a/b --x a#b", ("a/b", "--x", "a#b"), {}, ()),
        ("vllm serve a/b --x $(cat /etc/passwd) `id`", ("a/b", "--x", "$(cat", "/etc/passwd)", "`id`"), {}, ()),
    ],
)
def test_serve_call(text: str, words: tuple[str, ...], env: dict[str, str], other: tuple[str, ...]) -> None:
    found = serve_call(text)
    assert (found.words, found.env) == (words, env)
    assert found.other[: len(other)] == other


def test_flag_twice_and_its_negation(tmp_path: Path) -> None:
    text = SPARKRUN.replace("-tp {tensor_parallel}", "--max-num-seqs 4 --max-num-seqs 8 --enable-x --no-enable-x")
    found = one(tmp_path, text)
    assert found.recipe.sequences == 8
    assert "--no-enable-x" in args(found.recipe)
    assert "--enable-x" not in args(found.recipe)
    assert done(found, "overridden") == ["--max-num-seqs 4", "--enable-x"]


def test_negative_number_is_a_value(tmp_path: Path) -> None:
    found = one(tmp_path, SPARKRUN.replace("-tp {tensor_parallel}", "--stride -1 --next"))
    assert args(found.recipe)["--stride"] == ("-1",)
    assert one(tmp_path, SPARKRUN.replace("{max_model_len}", "-1")).recipe.context == "auto"


# --- rule 3: braces


def test_json_of_sparkrun_stays_and_a_default_may_hold_a_placeholder(tmp_path: Path) -> None:
    found = args(one(tmp_path, SPARKRUN).recipe)
    assert json.loads(found["--speculative-config"][0]) == {"method": "mtp", "num_speculative_tokens": 2}
    assert json.loads(found["--hf-overrides"][0]) == {"text_config": {"rope": {"factor": 4}}}


def test_doubled_braces_of_eugr_become_single(tmp_path: Path) -> None:
    found = args(one(tmp_path, EUGR).recipe)
    assert json.loads(found["--compilation-config"][0]) == {"mode": 3, "sizes": {"a": 7}}


def test_doubled_braces_count_in_a_file_of_version_2_too(tmp_path: Path) -> None:
    text = SPARKRUN.replace('\'{"text_config": {"rope": {"factor": 4}}}\'', "'{{\"n\": {drafted}}}'")
    assert json.loads(args(one(tmp_path, text).recipe)["--hf-overrides"][0]) == {"n": 2}


def test_single_braces_count_in_a_file_of_version_1_without_doubled_ones(tmp_path: Path) -> None:
    text = EUGR.replace('{{"mode": 3, "sizes": {{"a": {num_speculative_tokens}}}}}', '{"mode": 3}')
    assert json.loads(args(one(tmp_path, text).recipe)["--compilation-config"][0]) == {"mode": 3}


def test_unknown_placeholder_stays_and_is_named(tmp_path: Path) -> None:
    recipe = one(tmp_path, SPARKRUN.replace("{max_model_len}", "{nothing}")).recipe
    assert args(recipe)["--max-model-len"] == ("{nothing}",)
    assert "the file gives no value for {nothing}" in recipe.notes


def test_command_of_sparkrun_is_built_from_defaults_if_there_is_none(tmp_path: Path) -> None:
    text = SPARKRUN[: SPARKRUN.index("command:")] + "mode: solo\n"
    text = text.replace("  drafted: 2\n", "  trust_remote_code: true\n  enforce_eager: false\n  swap: {a: 1, b: [x]}\n")
    found = args(one(tmp_path, text).recipe)
    assert found["--trust-remote-code"] == ()
    assert "--enforce-eager" not in found
    assert json.loads(found["--swap"][0]) == {"a": 1, "b": ["x"]}
    assert one(tmp_path, text).recipe.memory == 0.8


# --- rule 4: options are kept for the check against vLLM


def test_unknown_options_are_kept_in_their_order(tmp_path: Path) -> None:
    recipe = one(tmp_path, SPARKRUN.replace("-tp {tensor_parallel}", "--zz 1 --aa 2 --mm")).recipe
    assert recipe.args[-3:] == (("--zz", "1"), ("--aa", "2"), ("--mm",))


# --- rule 5: patched builds


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("env:", "mods: [mods/fix-a, mods/fix-b]\nenv:", "mods mods/fix-a, mods/fix-b"),
        ("env:", "build_args: [--exp-b12x]\nenv:", "build_args --exp-b12x"),
        ("env:", "builder: eugr\nenv:", "builder eugr"),
        ("env:", "pre_exec: [rm -rf /]\nenv:", "pre_exec of the file"),
        ("env:", "post_commands:\n  - curl evil\nenv:", "post_commands of the file"),
        ("vllm-nightly", "vllm-node-B12X", "the image example.org/vllm-node-B12X:latest"),
        ("vllm-nightly", "vllm-mxfp4", "the image example.org/vllm-mxfp4:latest"),
    ],
)
def test_what_changes_the_image_needs_a_patched_build(old: str, new: str, reason: str, tmp_path: Path) -> None:
    found = one(tmp_path, SPARKRUN.replace(old, new, 1)).recipe
    assert found.needs_build == reason
    assert fit(found, load("0.33.0")).loads == "patched_build"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("{ref: none/v1}", "{ref: replace-text/v1, x: {y: z}}", "model.preparation replace-text/v1"),
        ("vllm/vllm-openai@", "x/vllm-b12x@", "the image x/vllm-b12x@sha256"),
    ],
)
def test_preparation_of_nemoclaw_needs_a_patched_build(old: str, new: str, reason: str, tmp_path: Path) -> None:
    assert reason in (one(tmp_path, NEMOCLAW.replace(old, new)).recipe.needs_build or "")


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ("install: {pip: false}", "install.pip: false"),
        ("nightly_required: true", "nightly_required"),
        ("docker_image: {nvidia: {cu130: 'x/b12x:1', cu129: y}}", "the image x/b12x:1"),
    ],
)
def test_model_of_vllm_project_without_a_wheel_needs_a_patched_build(new: str, reason: str, tmp_path: Path) -> None:
    text = VLLM.replace("  model_id: Qwen/Qwen9-35B\n", f"  model_id: Qwen/Qwen9-35B\n  {new}\n")
    assert reason in (by_id(tmp_path, text)["qwen9-35b"].needs_build or "")


def test_least_vllm_that_is_no_release_needs_a_patched_build(tmp_path: Path) -> None:
    found = by_id(tmp_path, VLLM.replace('"0.28.0"', "nightly"))["qwen9-35b"]
    assert (found.needs_vllm, found.needs_build) == (None, "min_vllm_version nightly, which is no release")


# --- rules 6 and 7: files of the image, and the container


def test_files_of_the_image_are_named(tmp_path: Path) -> None:
    more = "--chat-template unsloth.jinja --reasoning-parser-plugin nano.py --other /tmp/x.json --fine a/b"
    recipe = one(tmp_path, SPARKRUN.replace("-tp {tensor_parallel}", more)).recipe
    assert recipe.expects == ("unsloth.jinja", "nano.py", "/tmp/x.json")
    text = in_this_process("recipes", "show", tmp_path / "a.yaml", "--root", tmp_path / "node").stdout
    assert "missing file     unsloth.jinja: the recipe takes it from its image" in text


def test_container_is_ignored_and_said_once(tmp_path: Path) -> None:
    assert done(one(tmp_path, SPARKRUN), "ignored") == ["container example.org/vllm-nightly:latest"]
    (ignored,) = done(one(tmp_path, NEMOCLAW), "ignored")
    assert "sharedMemoryBytes, ulimits" in ignored


# --- rule 8: what sparkinstall decides


def test_owned_options_and_variables_are_dropped(tmp_path: Path) -> None:
    text = SPARKRUN.replace(
        "-tp {tensor_parallel}", "--nnodes 2 --node-rank 1 --master-addr x --headless --download-dir /x"
    )
    names = (
        "NCCL_IB_HCA",
        "GLOO_SOCKET_IFNAME",
        "VLLM_HOST_IP",
        "HF_HOME",
        "VLLM_CACHE_ROOT",
        "LD_PRELOAD",
        "HF_TOKEN",
    )
    text = text.replace("env:\n", "env:\n" + "".join(f"  {name}: s3cr3t\n" for name in names))
    found = one(tmp_path, text)
    assert set(found.recipe.env) == {"VLLM_MARLIN_USE_ATOMIC_ADD"}
    assert set(args(found.recipe)) == {"--speculative-config", "--hf-overrides"}
    assert done(found, "dropped") == [
        *("--host 0.0.0.0", "--port 8000", "--nnodes 2", "--node-rank 1", "--master-addr x", "--headless"),
        *("--download-dir /x", *(f"{name}=s3cr3t" for name in names[:-1]), "HF_TOKEN"),
    ]
    made = command(found.recipe, 8000, Path("/h"))
    assert not {"0.0.0.0", "--nnodes", "--headless"} & set(made.head.argv)
    assert done(one(tmp_path, EUGR), "dropped")[-1] == "--distributed-executor-backend ray"


# --- rules 9 to 12: memory, nodes, length, several nodes


def test_memory_is_a_ceiling_and_what_is_no_share_stays_an_option(tmp_path: Path) -> None:
    recipe = one(tmp_path, SPARKRUN.replace("0.80", "85")).recipe
    assert (recipe.memory, args(recipe)["--gpu-memory-utilization"]) == (None, ("85",))


@pytest.mark.parametrize(
    ("text", "nodes", "ranks"),
    [
        (SPARKRUN.replace("-tp {tensor_parallel}", "-tp 2 -pp 3"), 6, (2, 3)),
        (SPARKRUN.replace("runtime: vllm", "runtime: vllm-ray\nmax_nodes: 1").replace("-tp {t", "-tp 4{t"), 1, (1, 1)),
        (EUGR, 2, (2, 1)),
        (EUGR.replace("solo_only: false", "solo_only: true"), 1, (1, 1)),
        (NEMOCLAW.replace("{nodeCount: 1}", "{nodeCount: 2, tensorParallelSize: 2, rendezvousPort: 1}"), 2, (2, 1)),
    ],
)
def test_nodes_are_ranks(text: str, nodes: int, ranks: tuple[int, int], tmp_path: Path) -> None:
    recipe = one(tmp_path, text).recipe
    assert (recipe.nodes, (recipe.tensor_parallel, recipe.pipeline_parallel)) == (nodes, ranks)


def test_solo_overrides_the_ranks_and_says_so(tmp_path: Path) -> None:
    assert "tensor_parallel" in done(one(tmp_path, EUGR.replace("solo_only: false", "solo_only: yes")), "overridden")


def test_nodes_that_differ_from_the_ranks_are_noted(tmp_path: Path) -> None:
    recipe = one(tmp_path, SPARKRUN.replace("runtime: vllm", "min_nodes: 3")).recipe
    assert "the file names 3 nodes, but its options make 1: one node has one GPU" in recipe.notes


def test_nodes_of_vllm_project_follow_from_tp_by_hardware_or_from_memory(tmp_path: Path) -> None:
    found = by_id(tmp_path, VLLM)
    assert {name: each.nodes for name, each in found.items()} == {
        "qwen9-35b": 1, "qwen9-35b-fp8": 1, "qwen9-35b-nvfp4": 2, "qwen9-300b": 4,
    }  # fmt: skip
    assert "--several" in args(found["qwen9-300b"])
    unknown = VLLM.replace("dgx_spark_gb10: 2, default: 4", "a_card_of_the_future: 8")
    assert by_id(tmp_path, unknown)["qwen9-35b-nvfp4"].nodes == 1
    alone = VLLM.replace("[single_node_tp, multi_node_tp]", "[single_node_tp]")
    large = by_id(tmp_path, alone)["qwen9-300b"]
    assert large.nodes == 1
    assert "the file asks for 340 GB of memory, more than one Spark has" in large.notes


def test_strategy_layer_of_a_generation_replaces_the_common_one(tmp_path: Path) -> None:
    own = "{extra_args: [--several], hardware_overrides: {blackwell: {extra_args: [--instead]}}}"
    large = by_id(tmp_path, VLLM.replace("{extra_args: [--several]}", own))["qwen9-300b"]
    assert {"--several", "--instead"} <= set(args(large))
    assert "--generation" not in args(large)


@pytest.mark.parametrize("length", ["auto", "AUTO", "-1"])
def test_length_auto(length: str, tmp_path: Path) -> None:
    recipe = one(tmp_path, EUGR.replace("max_model_len: auto", f"max_model_len: {length}")).recipe
    assert recipe.context == "auto"
    assert "auto" in command(recipe, 8000, Path("/h")).head.argv


def test_several_nodes_are_rendered_without_autotune_unless_the_recipe_decides(tmp_path: Path) -> None:
    made = command(one(tmp_path, EUGR).recipe, 8000, Path("/h"))
    assert "--no-enable-flashinfer-autotune" in made.head.argv
    assert made.env["VLLM_ENGINE_READY_TIMEOUT_S"] == "3600"
    own = one(tmp_path, EUGR.replace("-tp {t", "--enable-flashinfer-autotune -tp {t")).recipe
    assert "--no-enable-flashinfer-autotune" not in command(own, 8000, Path("/h")).head.argv


# --- rule 13: hostile files


def bomb(levels: int) -> str:
    lines = ['a0: &a0 ["x", "x"]', *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels))]
    return SPARKRUN.replace("defaults:", "\n".join([*lines, "defaults:"]) + f"\n  bomb: *a{levels - 1}")


def growing(levels: int) -> str:
    """Return values that refer to the next one forty times."""
    values = {f"t{n}": f"{{t{n + 1}}}" * 40 for n in range(levels)} | {f"t{levels}": "xx"}
    return "".join(f"  {name}: '{value}'\n" for name, value in values.items())


HOSTILE: dict[str, tuple[str | bytes, str]] = {
    "anchors": (bomb(12), "its aliases stand for more than 20000 values"),
    "itself": (SPARKRUN + "x: &a [*a]\n", "its aliases stand for more than 20000 values"),
    "deep": (SPARKRUN + "x: " + "[" * 30 + "]" * 30 + "\n", "larger or deeper than any file of ours"),
    "large": (SPARKRUN + "#" + "x" * (2 << 20), "a.yaml is larger than 1 MiB"),
    "repeated": (SPARKRUN + "model: other\n", "the key `model` is repeated"),
    "tabs": (SPARKRUN.replace("  port:", "\tport:"), "there is a tab in line 9"),
    "python": (SPARKRUN + "x: !!python/object/apply:os.system [id]\n", "not YAML"),
    "template": (
        SPARKRUN.replace("  drafted: 2\n", growing(8)),
        "the values of `defaults` make its command longer than 64 KiB",
    ),
    "circle": (
        SPARKRUN.replace("drafted: 2", "drafted: '{a}'\n  a: '{b}'\n  b: '{drafted}'"),
        "refer to each other without an end",
    ),
    "quote": (SPARKRUN.replace("'{speculative_config}'", "'{speculative_config}"), "`command` cannot be read"),
    "other command": (SPARKRUN.replace("vllm serve", "rm -rf"), "`command` cannot be read: it has no `vllm serve`"),
    "other engine": (SPARKRUN.replace("runtime: vllm", "runtime: sglang"), "it is for sglang, not for vLLM"),
    "env of lists": (SPARKRUN.replace('ADD: "1"', "ADD: [1]"), "`env.VLLM_MARLIN_USE_ATOMIC_ADD` must be text"),
    "name of a variable": (SPARKRUN.replace("VLLM_MARLIN_USE_ATOMIC_ADD", '"A=1; B"'), "the name of a variable"),
    "model with an option": (SPARKRUN.replace("vllm serve {model}", "vllm serve ../../x"), "`model` must be"),
    "preset": (NEMOCLAW.replace("ServingRecipe", "ServingPreset"), "it is a ServingPreset of NemoClaw"),
    "model elsewhere": (
        NEMOCLAW.replace("  model:", "  modelRef: ../../../etc/passwd\n  notes:"),
        "its model is in another file: ../../../etc/passwd",
    ),
    "argument": (NEMOCLAW.replace("name: --max-model-len", "name: x"), "must be an option, such as --max-num-seqs"),
    "wrong part": (VLLM.replace("base_args: [", "base_args: ["[:-1] + "5 #"), "`extra_args` must be a list of text"),
    "variants": (VLLM.replace("variants:\n", "variants: 5\nx:\n"), "`variants` must be a mapping"),
    "text": ("hello", "it has none of the known formats"),
    "bytes": (b"\xff\xfe\x00", "not YAML"),
    "empty": ("", "it has none of the known formats"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    text, wrong = HOSTILE[name]
    began = time.process_time()
    assert wrong in message(tmp_path, text)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", [SPARKRUN, EUGR, NEMOCLAW, VLLM], ids=["sparkrun", "eugr", "nemoclaw", "vllm"])
def test_line_ends_of_windows_change_nothing(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, text.replace("\n", "\r\n")) == read(tmp_path, text)


@pytest.mark.parametrize("name", ["missing.yaml", "a-folder.yaml"])
def test_file_that_cannot_be_read_is_one_clear_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "a-folder.yaml").mkdir()
    run = in_this_process("recipes", "show", tmp_path / name, "--json", "--root", tmp_path / "node")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (2, "config")
    assert "cannot be read" in error["message"] or "has no recipe" in error["message"]


def test_variables_stay_as_they_are_written(tmp_path: Path) -> None:
    text = SPARKRUN.replace('ADD: "1"', 'ADD: 1\n  A: 0.80\n  B: "1"\n  C: yes\n  D: 1e3\n  E: 010\n  F: 2026-01-01')
    found = one(tmp_path, text).recipe.env
    assert found == {
        "VLLM_MARLIN_USE_ATOMIC_ADD": "1", "A": "0.80", "B": "1", "C": "yes", "D": "1e3", "E": "010", "F": "2026-01-01",
    }  # fmt: skip


def test_tabs_within_a_command_are_blanks(tmp_path: Path) -> None:
    assert one(tmp_path, SPARKRUN.replace("--host {host}", "--host\t{host}")) == one(tmp_path, SPARKRUN)


def test_model_may_be_a_path(tmp_path: Path) -> None:
    found = one(tmp_path, SPARKRUN.replace("model: Qwen/Qwen3.6-27B-FP8", "model: /models/my model"))
    assert found.recipe.model == "/models/my"
    quoted = SPARKRUN.replace("model: Qwen/Qwen3.6-27B-FP8", "model: /models/qwen").replace("{model}", "'{model}'")
    assert one(tmp_path, quoted).recipe.model == "/models/qwen"


def test_hooks_are_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    hooks = f"pre_exec: ['touch {mark}']\npost_exec: touch {mark}\nmods: [mods/x]\nenv:"
    text = SPARKRUN.replace("env:", hooks, 1).replace("vllm serve", f"touch {mark} && vllm serve")
    text = text.replace("{host}", f"$(touch {mark})")
    path = tmp_path / "a.yaml"
    path.write_text(text)
    for verb in ("show", "render"):
        run = in_this_process("recipes", verb, path, "--json", "--root", tmp_path / "node")
        assert run.returncode == 0
        assert "no program of a file is ever run" in run.stdout
    assert not mark.exists()
    assert "&&" not in envelope(run)["data"]["command"]["ranks"][0]["argv"]


def test_model_of_nemoclaw_is_read_from_the_named_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "managed-inference"
    (folder / "recipes").mkdir(parents=True)
    (folder / "models").mkdir()
    text = NEMOCLAW.replace("  model:", "  modelRef: vllm.nano.v1\n  unused:")
    (folder / "recipes/nano.yaml").write_text(text)
    assert "name the folder managed-inference" in hint(folder / "recipes/nano.yaml")
    outside = tmp_path / "secret.yaml"
    outside.write_text("kind: ServingModel\nspec: {id: nvidia/Outside}\n")
    (folder / "models/vllm.nano.v1.yaml").symlink_to(outside)
    with pytest.raises(RecipeError, match="outside of the folder"):
        recipes_of(str(folder))
    (folder / "models/vllm.nano.v1.yaml").unlink()
    (folder / "models/vllm.nano.v1.yaml").write_text("kind: ServingModel\nspec: {id: nvidia/Nano, revision: abc}\n")
    found = recipes_of(str(folder))
    assert [(each.recipe.model, each.recipe.revision) for each in found.recipes] == [("nvidia/Nano", "abc")]


def hint(path: Path) -> str:
    with pytest.raises(RecipeError) as error:
        recipes_of(str(path))
    return error.value.hint


def test_shown_text_has_no_control_characters(tmp_path: Path) -> None:
    text = SPARKRUN.replace("A dense model in FP8", '"a\\e[31mb\\u202ec"').replace(
        "drafted: 2", 'drafted: "2\\e]0;x\\a"'
    )
    path = tmp_path / "a.yaml"
    path.write_text(text)
    run = in_this_process("recipes", "show", path, "--root", tmp_path / "node")
    assert run.returncode == 0
    assert not [each for each in run.stdout if not each.isprintable() and each != "\n"]


# --- rules 14 and 15


@pytest.mark.parametrize(
    ("config", "stack"),
    [('{"method": "dflash"}', "0.22.1"), ('{"method":"dspark"}', "0.29.0"), ('{"method": "mtp"}', "")],
)
def test_method_of_drafting_asks_for_a_release(config: str, stack: str, tmp_path: Path) -> None:
    found = one(tmp_path, SPARKRUN.replace("'{speculative_config}'", f"'{config}'")).recipe
    assert fit(found, load("0.18.1")).stack == stack
    assert "`num_speculative_tokens` is not given: some models need it" in found.notes


def test_class_is_said_of_every_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    patched = SPARKRUN.replace("env:", "mods: [x]\nenv:", 1)
    files = {"a": SPARKRUN, "b": EUGR, "c": NEMOCLAW, "d": VLLM, "e": patched}
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    run = in_this_process("recipes", "show", folder, "--stack", "0.18.1", "--json", "--root", tmp_path / "node")
    found = {each["recipe"]["id"]: each["fit"]["loads"] for each in envelope(run)["data"]["recipes"]}
    assert found["lightning-nvfp4"] == found["qwen9-35b"] == "other_stack"
    assert found["vllm.nano.spark-single.v1"] == "unknown"
    assert found["e"] == "patched_build"


# --- parts of another type than the format has


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each part of a file."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def with_part(data: Any, path: tuple[Any, ...], part: Any) -> Any:
    """Return a copy of a file's data with one part replaced."""
    copy = json.loads(json.dumps(data, default=str))
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = part
    return copy


@pytest.mark.parametrize("text", [SPARKRUN, EUGR, NEMOCLAW, VLLM], ids=["sparkrun", "eugr", "nemoclaw", "vllm"])
@pytest.mark.parametrize("part", [5, None, [["a"]], {"a": ["b"]}, [{"name": "x"}]], ids=repr)
def test_part_of_any_type_is_a_recipe_or_one_clear_error(text: str, part: Any, tmp_path: Path) -> None:
    data = safe_yaml.load(text.encode())
    outcomes = set()
    for path in places(data):
        try:
            for found in read(tmp_path, json.dumps(with_part(data, path, part))):
                assert command(found.recipe, 8000, tmp_path).head.argv[:2] == ("vllm", "serve")
                outcomes.add("read")
        except RecipeError as error:
            assert error.message.startswith("a.yaml: ") or "a.yaml has no recipe" in error.message
            outcomes.add("refused")
    assert "read" in outcomes
