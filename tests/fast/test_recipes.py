"""The shipped recipes, and `sparkinstall recipes`."""

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparkinstall import stacks
from sparkinstall.assets import asset
from sparkinstall.cli import recipes as cli
from sparkinstall.core import recipe_list
from sparkinstall.core.memory import OVERHEAD, RESERVE, SPARK_TOTAL, memory_of
from sparkinstall.facts import vllm_releases
from sparkinstall.facts.vllm_options import refusals
from sparkinstall.models import Figure
from sparkinstall.recipes import Recipe, RecipeError, Speed
from sparkinstall.recipes.catalogue import find, shipped
from sparkinstall.recipes.owned import env_without_owned, without_owned
from sparkinstall.recipes.render import LINK_VARIABLES, command, options_of, shell
from sparkinstall.recipes.serve_options import key, last_of_each, options
from tests.support.machine import Machine
from tests.support.rehearsals import envelope, in_this_process, output_of

pytestmark = pytest.mark.usefixtures("empty_cache")

RECIPES = {each.id: each for each in shipped()}
PLAIN = [each for each in shipped() if not each.needs_build]
PATCHED = [each for each in shipped() if each.needs_build]
HOME = Path("/home/spark")

OWN = """
id: mine
model: openai/gpt-oss-20b
memory: 0.5
args:
  - [--host, 0.0.0.0]
  - [--nnodes, '2']
  - [--max-num-seqs, '4']
  - [--api-key, s3cr3t-key]
env: {NCCL_DEBUG: INFO, HF_TOKEN: s3cr3t-key, VLLM_MARLIN_USE_ATOMIC_ADD: '1'}
loads_from: 0.18.1
"""


def write(tmp_path: Path, text: str, name: str = "mine.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


# --- the catalogue


def test_catalogue_has_plain_recipes_and_those_that_need_a_patched_build() -> None:
    assert len(RECIPES) == len(shipped())
    assert len(PLAIN) >= 25
    assert {each.nodes for each in PLAIN} == {1, 2}
    assert {"deepseek-v4-flash", "glm-5.3-flash-nvfp4", "inkling-small-nvfp4"} <= {each.id for each in PATCHED}


@pytest.mark.parametrize("recipe", PLAIN, ids=lambda recipe: recipe.id)
def test_plain_recipe_names_a_shipped_stack(recipe: Recipe) -> None:
    assert recipe.loads_from in stacks.names()
    assert recipe.memory


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.id)
def test_shipped_recipe_is_sound(recipe: Recipe) -> None:
    assert recipe.sources
    assert recipe.nodes == recipe.tensor_parallel * recipe.pipeline_parallel
    stray, args = options([word for option in recipe.args for word in option])
    assert (stray, args) == ((), recipe.args), "long names, as vLLM spells them"
    assert len({key(each) for each in args}) == len(args)
    assert without_owned(args)[1] == env_without_owned(recipe.env)[1] == ()
    fields = options_of(Recipe(id="x", model="x/y", memory=1, context=1, sequences=1, batched_tokens=1))
    assert not {key(each) for each in args} & {key(each) for each in fields}
    for option in args:
        for value in option[1:]:
            assert not value.startswith("{") or json.loads(value)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.id)
def test_shipped_recipe_names_no_parser_that_no_vllm_has(recipe: Recipe) -> None:
    assert recipe.tool_parser not in ("nemotron_v3", "openai_gptoss", "qwen3")
    assert recipe.reasoning_parser not in ("qwen3_coder", "nano_v3", "super_v3")


@pytest.mark.parametrize("recipe", PLAIN, ids=lambda recipe: recipe.id)
def test_every_stack_that_loads_a_recipe_takes_its_options_and_variables(recipe: Recipe) -> None:
    words = [word for option in options_of(recipe) for word in option]
    takes = {each.release: refusals(words, recipe.env, each) for each in vllm_releases.shipped()}
    loading = [name for name in takes if recipe_list.fit(recipe, stacks.load(name)).loads == "loads"]
    assert loading
    assert not any(takes[name] for name in loading)


@pytest.mark.parametrize("recipe", PLAIN, ids=lambda recipe: recipe.id)
def test_load_format_is_in_the_lock_of_every_stack_that_loads_the_recipe(recipe: Recipe) -> None:
    formats = [each[1] for each in recipe.args if key(each) == "--load-format" and each[1] != "mistral"]
    for name in stacks.names():
        if recipe_list.fit(recipe, stacks.load(name)).loads == "loads":
            locked = {pin.name for pin in stacks.load(name).platforms["aarch64"].locked()}
            assert set(formats) <= locked


def test_figures_of_a_licence_that_asks_for_it_are_attributed() -> None:
    used = {each.source for recipe in shipped() for each in recipe.speed}
    licences = {each.repository: each.licence for recipe in shipped() for each in recipe.sources if each.licence}
    named = {name for name, licence in licences.items() if licence.startswith("CC-BY") and name in used}
    page = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
    assert named == {"djangodevreng/dgx-spark-benchmarks"}
    assert all(f"{name}](https://github.com/{name}), CC BY 4.0" in page for name in named)


@pytest.mark.parametrize("recipe", [each for each in shipped() if each.speed], ids=lambda recipe: recipe.id)
def test_dense_decode_is_not_faster_than_the_memory_allows(recipe: Recipe) -> None:
    """273 GB/s divided by the bytes of a dense model, unless it drafts."""
    if recipe.bytes and "27b" in recipe.id and "nvfp4" not in recipe.id:
        assert recipe_list.typical_speed(recipe).value < 273e9 / recipe.bytes  # type: ignore[union-attr]


# --- what a stack can load


@pytest.mark.parametrize(
    ("given", "stack", "loads", "with_stack"),
    [
        (Recipe(id="a", model="a/b", loads_from="0.18.1"), "0.18.1", "loads", ""),
        (Recipe(id="a", model="a/b", loads_from="0.29.0"), "0.22.1", "other_stack", "0.29.0"),
        (Recipe(id="a", model="a/b", loads_from="0.29.0"), "0.33.0", "loads", ""),
        (Recipe(id="a", model="a/b", needs_vllm="0.30.0"), "0.29.0", "other_stack", "0.33.0"),
        (Recipe(id="a", model="a/b", needs_vllm="0.99.0"), "0.33.0", "other_stack", ""),
        (Recipe(id="a", model="a/b", needs_build="a fork", loads_from="0.18.1"), "0.33.0", "patched_build", ""),
        (Recipe(id="a", model="a/b"), "0.33.0", "unknown", ""),
        (
            Recipe(id="a", model="a/b", args=(("--speculative-config.method", "dspark"),)),
            "0.22.1",
            "other_stack",
            "0.29.0",
        ),
        (
            Recipe(id="a", model="a/b", loads_from="0.18.1", args=(("--speculative-config", '{"method": "dflash"}'),)),
            "0.18.1",
            "other_stack",
            "0.22.1",
        ),
    ],
)  # fmt: skip
def test_fit_of_a_recipe_and_a_stack(given: Recipe, stack: str, loads: str, with_stack: str) -> None:
    found = recipe_list.fit(given, stacks.load(stack))
    assert (found.loads, found.stack) == (loads, with_stack)


@pytest.mark.parametrize(
    ("older", "newer"), [("0.9.2", "0.18.1"), ("0.29.0", "0.29.1.dev3+g1234"), ("0.27", "0.27.1"), ("x", "0.1")]
)
def test_release_compares_by_number(older: str, newer: str) -> None:
    assert recipe_list.release(older) < recipe_list.release(newer)


# --- recipes


def test_recipes_without_a_verb_lists_what_the_stack_loads(tmp_path: Path) -> None:
    run = in_this_process("recipes", "--json", "--root", tmp_path / "node")
    found = envelope(run)["data"]
    assert (run.returncode, found["stack"]) == (0, stacks.DEFAULT), output_of(run)
    assert len(found["recipes"]) == len(RECIPES)
    order = [each["loads"] for each in found["recipes"]]
    assert order == sorted(order, key=["loads", "other_stack", "patched_build"].index)
    lightning = next(each for each in found["recipes"] if each["id"] == "nemotron-3.5-lightning-30b-a3b-nvfp4")
    assert (lightning["loads"], lightning["good_on_gb10"], lightning["bytes"]) == ("loads", True, 21561882284)
    assert lightning["speed"]["value"] == 104.5


def test_recipes_of_an_older_stack_name_the_one_that_loads_them(tmp_path: Path) -> None:
    run = in_this_process("recipes", "--stack", "0.18.1", "--root", tmp_path / "node")
    lines = {line.split()[0]: line for line in run.stdout.splitlines() if line}
    assert " 0.29.0 " in lines["gemma-4-26b-a4b-nvfp4"], output_of(run)
    assert " 0.22.1 " in lines["mistral-small-4-119b-nvfp4"]
    assert " patched " in lines["deepseek-v4-flash"]
    assert re.search(r" 0.18.1\* +1 ", lines["qwen3.6-35b-a3b-fp8"]), "seen on a GB10 with a newer vLLM only"
    titles = [line for line in run.stdout.splitlines() if line in ("On one Spark", "On several Sparks")]
    assert [*titles, "With another stack", "With a patched build"] == [
        line for line in run.stdout.splitlines() if re.fullmatch(r"(On|With) .*[^.]", line)
    ]


@pytest.mark.parametrize(("width", "gpt_oss"), [
    (80, ["yes", "0.29.0", "1", "46.5"]),
    (100, ["yes", "0.29.0", "1", "128K", "14", "46.5"]),
    (140, ["yes", "0.29.0", "1", "128K", "14", "46.5", "djangodevreng/dgx-spark-benchmarks"]),
])  # fmt: skip
def test_list_on_a_terminal_has_every_id_whole_and_what_there_is_room_for(
    width: int, gpt_oss: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Console(width=width, file=io.StringIO(), force_terminal=True, no_color=True, highlight=False)
    monkeypatch.setattr(cli, "console", lambda: screen)
    assert in_this_process("recipes", "--root", tmp_path / "node").returncode == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.file.getvalue()).splitlines()  # type: ignore[attr-defined]
    assert set(RECIPES) <= {line.split()[0] for line in lines if line.strip()}
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    assert next(line.split() for line in lines if line.startswith("gpt-oss-20b ")) == ["gpt-oss-20b", *gpt_oss]


# --- whether a recipe fits

_HALF = 60_000_000_000


@pytest.mark.parametrize(
    ("given", "fits"),
    [
        ({"bytes": _HALF}, "fits"),
        ({"bytes": 2 * _HALF}, "does_not_fit"),
        ({"bytes": 2 * _HALF, "nodes": 2, "tensor_parallel": 2}, "fits"),
        ({"bytes": 2 * _HALF, "speed": (Speed(1, "a/b"),)}, "does_not_fit"),
        ({"bytes": 2 * _HALF, "needs_build": "one that keeps tables on the disk"}, "unknown"),
        ({"bytes": 2 * _HALF, "needs_build": "the same", "speed": (Speed(1, "a/b"),)}, "reported"),
        ({"speed": (Speed(1, "a/b"),)}, "reported"),
        ({"good_on_gb10_from": "0.26.0"}, "reported"),
        ({}, "unknown"),
    ],
)
def test_recipe_fits_if_its_weights_the_engine_and_the_system_do(given: dict[str, Any], fits: str) -> None:
    recipe = Recipe(id="a", model="a/b", loads_from="0.18.1", **given)
    (found,) = recipe_list.recipe_list([recipe], stacks.load("0.18.1"), Figure(100_000_000_000, "measured")).recipes
    assert found.fits == fits
    beside = (OVERHEAD.value or 0) + (RESERVE.value or 0)
    assert found.need == (recipe.bytes // recipe.nodes + beside if recipe.bytes else None)


@pytest.mark.parametrize(("available", "fits"), [(96_000_000, "yes"), (64_000_000, "no")])
def test_list_on_a_spark_counts_what_is_available_now(
    available: int, fits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spark = Machine(str(tmp_path / "spark"))
    (tmp_path / "spark/proc").mkdir(parents=True)
    (tmp_path / "spark/proc/meminfo").write_text(f"MemTotal: 127600000 kB\nMemAvailable: {available} kB\n")
    gpu = tmp_path / "spark/proc/driver/nvidia/gpus/000f:01:00.0/information"
    gpu.parent.mkdir(parents=True)
    gpu.write_text("Model: NVIDIA GB10\n")
    monkeypatch.setattr(recipe_list, "memory_of", lambda _on, given: memory_of(spark, given))
    run = in_this_process("recipes", "--root", tmp_path / "node")
    lines = {line.split()[0]: line.split() for line in run.stdout.splitlines() if line}
    assert lines["qwen3.6-35b-a3b"][1] == fits, output_of(run)
    assert f"the {available * 1024 / 1e9:.1f} GB available now" in run.stdout


def test_list_elsewhere_says_what_an_idle_spark_does(tmp_path: Path) -> None:
    run = in_this_process("recipes", "--json", "--root", tmp_path / "node")
    found = envelope(run)["data"]
    assert (found["memory"]["value"], found["memory"]["basis"]) == (SPARK_TOTAL.value, "reported")
    fits = {each["id"]: each["fits"] for each in found["recipes"]}
    assert fits["nemotron-3-super-120b-a12b-nvfp4"] == "fits" and fits["deepseek-v4.1-flash"] == "unknown"
    assert "does_not_fit" not in {fits[each.id] for each in shipped() if each.good_on_gb10_from}


# --- recipes show


def test_show_names_sources_speeds_and_notes(tmp_path: Path) -> None:
    run = in_this_process("recipes", "show", "qwen3.6-35b-a3b-nvfp4", "--root", tmp_path / "node")
    assert "97.7 tokens/s by vllm-project/recipes" in run.stdout, output_of(run)
    assert "models/Qwen/Qwen3.6-35B-A3B.yaml at 8959cf64189c (Apache-2.0)" in run.stdout
    assert "option           --moe-backend marlin" in run.stdout
    assert "stack 0.29.0     loads" in run.stdout


def test_show_by_the_name_of_the_model(tmp_path: Path) -> None:
    data = envelope(in_this_process("recipes", "show", "openai/gpt-oss-20b", "--json", "--root", tmp_path / "n"))[
        "data"
    ]
    assert [each["recipe"]["id"] for each in data["recipes"]] == ["gpt-oss-20b"]


def test_model_with_several_recipes_names_them() -> None:
    with pytest.raises(RecipeError) as error:
        find("nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4")
    assert "nemotron-3.5-lightning-30b-a3b-nvfp4-mtp" in error.value.hint


def test_show_of_an_unknown_recipe_names_the_nearest(tmp_path: Path) -> None:
    run = in_this_process("recipes", "show", "gpt-os-20b", "--json", "--root", tmp_path / "node")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (2, "config")
    assert error["message"] == "there is no recipe 'gpt-os-20b'"
    assert error["hint"].startswith("did you mean `gpt-oss-20b`? `sparkinstall recipes` lists them")


# --- recipes render


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.id)
def test_rendered_command_is_one_shell_command(recipe: Recipe) -> None:
    made = command(recipe, 8000, HOME)
    assert len(made.ranks) == recipe.nodes
    for rank in made.ranks:
        assert rank.argv[:3] == ("vllm", "serve", recipe.model)
        assert shlex.split(shell(rank.argv).replace("\\\n", "")) == list(rank.argv)
        assert len({key(each) for each in options(rank.argv[3:])[1]}) == len(options(rank.argv[3:])[1])
        assert bool(rank.docker) == (recipe.image is not None) != bool(made.no_docker)


def test_docker_has_the_pinned_image_the_variables_and_the_same_options() -> None:
    recipe = RECIPES["nemotron-3.5-lightning-30b-a3b-nvfp4-mtp"]
    made = command(recipe, 8001, HOME)
    at = list(made.head.docker).index(recipe.image or "")
    assert made.head.docker[at - 2 : at] == ("--entrypoint", "vllm")
    assert made.head.docker[at + 1 :] == tuple(made.head.argv[1:])
    assert "VLLM_USE_RUST_FRONTEND=0" in made.head.docker
    assert made.head.argv[-4:] == ("--host", "127.0.0.1", "--port", "8001")


def test_several_nodes_get_no_autotune_and_a_long_patience() -> None:
    made = command(RECIPES["minimax-m2.7-nvfp4"], 8000, HOME)
    assert "--no-enable-flashinfer-autotune" in made.head.argv
    assert made.env["VLLM_ENGINE_READY_TIMEOUT_S"] == "3600"
    own = command(Recipe(id="a", model="a/b", nodes=2, args=(("--enable-flashinfer-autotune",),)), 8000, HOME)
    assert "--no-enable-flashinfer-autotune" not in own.head.argv


def test_each_rank_of_several_has_its_place_and_meets_the_head() -> None:
    recipe = RECIPES["deepseek-v4-flash"]
    head, worker = command(recipe, 8000, HOME, ("10.0.0.1", "10.0.0.2"), 29502).ranks
    meets = ("--master-addr", "10.0.0.1", "--master-port", "29502")
    by_mp = ("--distributed-executor-backend", "mp", "--nnodes", "2", "--node-rank")
    assert head.argv[-14:] == ("--host", "127.0.0.1", "--port", "8000", *by_mp, "0", *meets)
    assert worker.argv[-11:] == ("--headless", *by_mp, "1", *meets)
    assert head.argv[:-14] == worker.argv[:-11]
    for rank in (head, worker):
        at = list(rank.docker).index(recipe.image or "")
        assert rank.docker[at + 1 :] == tuple(rank.argv)
        assert {"/dev/infiniband", "VLLM_ENGINE_READY_TIMEOUT_S=3600", *LINK_VARIABLES} <= set(rank.docker[:at])


def test_variables_of_the_link_are_those_of_the_environment_file() -> None:
    files = [(asset("templates") / name).read_text() for name in ("multi-node.env.j2", "roce-gid.sh.j2")]
    assert set(LINK_VARIABLES) <= set(re.findall(r"\b([A-Z][A-Z_]+)=", "\n".join(files)))


@pytest.mark.parametrize("name", ["qwen3.6-27b-fp8", "minimax-m2.7-nvfp4", "deepseek-v4.1-flash"])
def test_rendered_unit_is_the_one_that_serve_writes(name: str, tmp_path: Path) -> None:
    recipe, root = RECIPES[name], tmp_path / "node"
    found = envelope(in_this_process("recipes", "render", name, "--json", "--root", root))["data"]
    assert len(found["units"]) == recipe.nodes
    for at, (unit, rank) in enumerate(zip(found["units"], found["command"]["ranks"], strict=True)):
        assert (unit["address"], unit["path"]) == (rank["address"], f"{root}/etc/systemd/system/vllm.service")
        (started,) = re.findall(r"ExecStart=((?:.*\\\n)*.*)", unit["text"])
        words = shlex.split(started.replace("\\\n", ""))
        words = words[words.index("serve") + 2 :]
        # What `serve` and a person run is the same, in another order.
        assert sorted(last_of_each(options(words)[1])) == sorted(options(rank["argv"][3:])[1])
        assert all(f"Environment={name}={value}" in unit["text"] for name, value in recipe.env.items())
        assert ("with-head" in started) == (at > 0)
    settings = envelope(in_this_process("settings", "show", "--json", "--root", root))["data"]["settings"]
    assert settings["serving.model"]["value"] is None, "nothing is remembered"


def test_render_on_a_cluster_takes_its_addresses_and_its_executor(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("cluster: {role: head, head: 10.0.0.1, workers: [10.0.0.2], executor: mp, master_port: 29777}\n")
    run = in_this_process("recipes", "render", "minimax-m2.7-nvfp4", "--config", config, "--root", tmp_path / "node")
    assert run.returncode == 0, output_of(run)
    assert "# on 10.0.0.2 after `source " in run.stdout and "multi-node-worker.env`:" in run.stdout
    assert run.stdout.count("--master-addr 10.0.0.1") == 3, "two commands, and the head's unit; the worker's shares it"
    assert "# --- the same unit on 10.0.0.2, but with" in run.stdout
    assert "# no image for this recipe is known by its digest" in run.stdout


def test_render_of_a_file_drops_what_sparkinstall_decides_and_says_so(tmp_path: Path) -> None:
    run = in_this_process("recipes", "render", write(tmp_path, OWN), "--json", "--root", tmp_path / "node")
    assert "s3cr3t-key" not in run.stdout
    data = envelope(run)["data"]
    argv = data["command"]["ranks"][0]["argv"]
    assert argv == [
        *("vllm", "serve", "openai/gpt-oss-20b", "--gpu-memory-utilization", "0.5", "--max-num-seqs", "4"),
        *("--host", "127.0.0.1", "--port", "8000"),
    ]
    assert data["command"]["env"] == {"VLLM_MARLIN_USE_ATOMIC_ADD": "1"}
    dropped = [each["what"] for each in data["changes"] if each["done"] == "dropped"]
    assert dropped == ["--host 0.0.0.0", "--nnodes 2", "--api-key", "NCCL_DEBUG=INFO", "HF_TOKEN"]
    text = in_this_process("recipes", "render", tmp_path / "mine.yaml", "--root", tmp_path / "node").stdout
    assert "# dropped: --nnodes 2 (sparkinstall starts the ranks of several nodes itself)" in text
    assert "# no image for this recipe is known by its digest" in text


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (OWN.replace("memory: 0.5", "memory: 5"), "`memory` must be a number above 0, at most 1"),
        (OWN.replace("memory", "memmory"), "unknown key `memmory`"),
        (OWN.replace("0.18.1", "0.18.2"), "`loads_from` names no shipped stack: 0.18.2"),
        (OWN.replace("id: mine", "id: mine\nid: yours"), "the key `id` is repeated, line 3"),
        (OWN.replace("[--host, 0.0.0.0]", "[0.0.0.0]"), "`args` begins with '0.0.0.0', which is no option"),
        ("- 1", "must be a mapping"),
        ("[]", "mine.yaml has no recipe"),
        ("hello", "has none of the known formats"),
    ],
)
def test_file_that_is_no_recipe_is_one_clear_error(text: str, wrong: str, tmp_path: Path) -> None:
    run = in_this_process("recipes", "render", write(tmp_path, text), "--json", "--root", tmp_path / "node")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (2, "config")
    assert wrong in error["message"]


def test_render_of_a_file_with_several_recipes_wants_an_id(tmp_path: Path) -> None:
    both = "\n".join("- " + text.strip().replace("\n", "\n  ") for text in (OWN, OWN.replace("id: mine", "id: yours")))
    path = write(tmp_path, both)
    run = in_this_process("recipes", "render", path, "--root", tmp_path / "node")
    assert (run.returncode, "name one with `--id`: mine or yours" in run.stderr) == (2, True), output_of(run)
    assert in_this_process("recipes", "render", path, "--id", "yours", "--root", tmp_path / "node").returncode == 0
    near = in_this_process("recipes", "render", path, "--id", "your", "--root", tmp_path / "node")
    assert "did you mean `yours`?" in near.stderr


def test_folder_gives_its_recipes_and_names_files_without_one(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    (folder / "deep").mkdir(parents=True)
    write(folder, OWN)
    write(folder / "deep", OWN.replace("id: mine", "id: yours"))
    write(folder, "a: 1", "other.yaml")
    (tmp_path / "outside.yaml").write_text(OWN)
    (folder / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    (folder / "circle.yaml").symlink_to("circle.yaml")
    data = envelope(in_this_process("recipes", "show", folder, "--json", "--root", tmp_path / "node"))["data"]
    assert [each["recipe"]["id"] for each in data["recipes"]] == ["mine", "yours"]
    assert {each["what"] for each in data["skipped"]} == {"circle.yaml", "link.yaml", "other.yaml"}
    why = {each["what"]: each["why"] for each in data["skipped"]}
    assert "outside of the folder" in why["link.yaml"] and "in a circle" in why["circle.yaml"]


# --- options of vllm serve


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-tp", "2", "--a_b=1"], [("--tensor-parallel-size", "2"), ("--a-b", "1")]),
        (["--max-model-len", "-1", "--x"], [("--max-model-len", "-1"), ("--x",)]),
        (["--speculative_config.num_speculative_tokens", "3"], [("--speculative-config.num_speculative_tokens", "3")]),
        (["-cc.cudagraph_mode", "FULL", "-O3"], [("--compilation-config.cudagraph_mode", "FULL"), ("-O3",)]),
        (["--sizes", "1", "2", "--json", '{"a": "b=c"}'], [("--sizes", "1", "2"), ("--json", '{"a": "b=c"}')]),
        (['--json={"a":1}'], [("--json", '{"a":1}')]),
    ],
)
def test_options_are_spelled_as_vllm_names_them(words: list[str], expected: list[tuple[str, ...]]) -> None:
    assert options(["model", *words]) == (("model",), tuple(expected))


def test_last_option_wins_and_no_is_the_same_option() -> None:
    given = options(["--x", "1", "--enable-y", "--x", "2", "--no-enable-y"])[1]
    assert last_of_each(given) == (("--x", "2"), ("--no-enable-y",))


@pytest.mark.parametrize("name", ["NCCL_IB_HCA", "GLOO_SOCKET_IFNAME", "VLLM_HOST_IP", "HF_HOME", "VLLM_CACHE_ROOT"])
@pytest.mark.parametrize("more", [{}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}])
def test_variables_of_the_link_and_of_caches_are_dropped(name: str, more: dict[str, str]) -> None:
    kept, dropped = env_without_owned({name: "x", **more})
    assert kept == more
    assert [each.what for each in dropped] == [f"{name}=x"]


@pytest.mark.parametrize("word", ["--ho", "--conf", "--data-parallel-add", "--"])
def test_begin_of_an_option_of_the_tools_own_is_dropped_too(word: str) -> None:
    kept, dropped = without_owned([(word, "x"), ("--hf-overrides", "{}")])
    assert kept == (("--hf-overrides", "{}"),)
    assert [each.what for each in dropped] == [f"{word} x"]


def test_show_and_render_name_what_the_stack_does_not_take(tmp_path: Path) -> None:
    text = "id: mine\nmodel: a/b\nloads_from: 0.18.1\ntool_parser: qwen3\nargs: [[--calculate-kv-scales]]\n"
    path = write(tmp_path, text + "env: {VLLM_MARLIN_USE_ATOMIC: '1'}\n")
    told = (
        "no option `--calculate-kv-scales` (the last stack that has it is 0.22.1)",
        "does not take `qwen3` (did you mean `qwen3_xml`?)",
        "`VLLM_MARLIN_USE_ATOMIC` (did you mean `VLLM_MARLIN_USE_ATOMIC_ADD`?)",
    )
    for verb in ("show", "render"):
        run = in_this_process("recipes", verb, str(path), "--stack", "0.29.0")
        assert run.returncode == 0 and all(words in run.stdout for words in told), output_of(run)
    shown = envelope(in_this_process("recipes", "show", str(path), "--stack", "0.22.1", "--json"))
    (refused,) = [each["message"] for each in shown["data"]["recipes"][0]["refused"] if "VLLM_" not in each["message"]]
    assert "`qwen3`" in refused
