"""Stacks and their locks: the shipped ones are consistent, and an invalid one is refused in one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uv import find_uv_bin

from sparkinstall import patches, stacks
from sparkinstall.config import Config
from sparkinstall.stacks import Pin, Platform, Stack, StackError, load, parse_lock, render_lock

ROOT = Path(__file__).parents[2]
LAB = ROOT / "tests/lab/stacks/lab-full.yaml"
EVERY = (*stacks.names(), str(LAB))
LOCKED = [
    pytest.param(stack, platform, id=f"{stack.name}-{arch}")
    for stack in map(load, EVERY)
    for arch, platform in stack.platforms.items()
]
COMPLETE = [param for param in LOCKED if isinstance(param.values[1], Platform) and param.values[1].complete]
ONLY_HOSTS = ("https://github.com/", "https://download.pytorch.org/whl/cu130/")
SHA = "sha256:" + "0" * 64
GOOD = """
name: own
summary: a user's stack
vllm: 0.22.1
python: 3.10
requirements: [vllm==0.22.1, ray==2.60.0]
nccl: {version: 2.28.9, tag: v2.28.9-1, commit: dbc86fd06e8b0c4517b95d8958a09ccacf9520c9}
platforms:
  aarch64:
    wheels:
      - url: https://example.org/a/vllm-0.22.1%2Bcu130-cp38-abi3-manylinux_2_35_aarch64.whl
"""


# --- the shipped stacks


def test_shipped_stacks_include_the_default() -> None:
    assert stacks.DEFAULT in stacks.names()
    assert Config().stack == stacks.DEFAULT
    assert stacks.names()[:2] == ("0.18.1", "0.22.1")


@pytest.mark.parametrize("name", stacks.names())
def test_shipped_stack_has_the_name_of_its_vllm_and_both_architectures(name: str) -> None:
    stack = load(name)
    pins = {pin.name: pin.version for pin in stack.requirements}
    assert (stack.name, stack.vllm, pins["vllm"]) == (name, name, name)
    assert set(stack.platforms) == {"aarch64", "x86_64"}
    assert stack.python == "3.12"
    assert pins["ray"]


@pytest.mark.parametrize("name", stacks.names())
def test_shipped_stack_has_a_variant_of_each_patch(name: str) -> None:
    vllm = load(name).vllm
    for each in patches.load(ROOT / "patches"):
        assert [variant for variant in each.variants if vllm in variant.releases], f"patches.yaml: {each.name}"
        assert each.kernels_for(vllm) is not None


@pytest.mark.parametrize("name", ["0.18.1", "0.22.1"])
def test_tested_stacks_pin_triton_transformers_and_nccl(name: str) -> None:
    stack = load(name)
    assert {Pin("triton", "3.6.0"), Pin("transformers", "4.57.6")} <= set(stack.requirements)
    assert stack.nccl.tag == "v2.28.9-1"
    assert stack.nccl.commit == "dbc86fd06e8b0c4517b95d8958a09ccacf9520c9"


@pytest.mark.parametrize(("stack", "platform"), LOCKED)
def test_lock_has_a_hash_for_each_package_not_listed_as_unhashed(stack: Stack, platform: Platform) -> None:
    pins = parse_lock(platform.lock_text())
    assert stacks.unhashed(pins) == tuple(sorted(platform.unhashed))
    assert platform.complete is not bool(platform.unhashed)
    assert len(pins) > 150, stack.name


@pytest.mark.parametrize(("stack", "platform"), LOCKED)
def test_lock_has_the_pins_of_its_stack(stack: Stack, platform: Platform) -> None:
    locked = {pin.name: pin for pin in parse_lock(platform.lock_text())}
    for pin in (*platform.requirements, *platform.needs):
        assert locked[pin.name].requirement == pin.requirement
    for pin in stack.requirements:
        # 2.10.0+cu130 is a build of the 2.10.0 in the stack.
        assert locked[pin.name].version.split("+")[0] == pin.version


@pytest.mark.parametrize(("stack", "platform"), LOCKED)
def test_lock_has_one_cuda_major_version(stack: Stack, platform: Platform) -> None:
    locked = {pin.name: pin.version for pin in parse_lock(platform.lock_text())}
    cuda_12 = stack.name == "0.18.1" and platform.arch == "x86_64"
    runtime = "nvidia-cuda-runtime-cu12" if cuda_12 else "nvidia-cuda-runtime"
    assert locked[runtime].startswith("12." if cuda_12 else "13.")
    assert ("nvidia-nccl-cu13" in locked) is not cuda_12
    compilers = {locked.get(f"nvidia-{part}") for part in ("cuda-nvcc", "cuda-crt", "nvvm")}
    assert compilers <= {None} or compilers == {"13.0.88"}


@pytest.mark.parametrize(("stack", "platform"), LOCKED)
def test_nccl_of_a_stack_is_the_version_of_torch(stack: Stack, platform: Platform) -> None:
    locked = {pin.name: pin.version for pin in parse_lock(platform.lock_text())}
    # Only the CUDA 12 stack, which is for development, differs.
    assert locked.get("nvidia-nccl-cu13", stack.nccl.version) == stack.nccl.version


@pytest.mark.parametrize(("stack", "platform"), LOCKED)
def test_lock_is_rendered_and_names_no_index(stack: Stack, platform: Platform) -> None:
    text = platform.lock_text()
    assert render_lock(parse_lock(text)) == text
    assert all(address.startswith(ONLY_HOSTS) for address in re.findall(r"\S*//\S*", text)), stack.name
    assert "--index" not in text


def test_incomplete_lock_is_only_that_of_0_18_1_for_aarch64() -> None:
    assert load("0.18.1").platforms["aarch64"].unhashed == ("vllm", "torchaudio")
    assert len(COMPLETE) == len(LOCKED) - 1


# --- a lock that is completed on the node


def test_close_fills_the_gaps_and_keeps_shipped_hashes() -> None:
    partial = load("0.18.1").platforms["aarch64"]
    found = [Pin(pin.name, pin.version, pin.url, ("sha256:" + "f" * 64,)) for pin in parse_lock(partial.open_text())]
    extra = Pin("asked-for-by-torch", "1.0", hashes=(SHA,))
    closed = {pin.name: pin for pin in parse_lock(partial.close(render_lock((*found, extra))))}
    shipped = {pin.name: pin for pin in parse_lock(partial.lock_text())}
    assert closed["vllm"].hashes == ("sha256:" + "f" * 64,)
    assert closed["torch"].hashes == shipped["torch"].hashes
    assert closed.keys() == {*shipped, "asked-for-by-torch"}


def test_close_with_a_gap_left_fails() -> None:
    partial = load("0.18.1").platforms["aarch64"]
    with pytest.raises(StackError, match="torchaudio, vllm"):
        partial.close(partial.open_text())


def test_open_text_of_an_incomplete_lock_has_no_hashes() -> None:
    assert "--hash" not in load("0.18.1").platforms["aarch64"].open_text()


# --- a user's stack


def write_stack(tmp_path: Path, text: str = GOOD) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return path


def test_load_of_a_stack_without_a_lock_succeeds(tmp_path: Path) -> None:
    stack = load(str(write_stack(tmp_path)))
    platform = stack.platforms["aarch64"]
    assert stack.python == "3.10", "a version is a text, never the number 3.1"
    assert (platform.lock, platform.complete) == (None, False)
    assert platform.open_text() == (
        "ray==2.60.0\nvllm @ https://example.org/a/vllm-0.22.1%2Bcu130-cp38-abi3-manylinux_2_35_aarch64.whl\n"
    )
    assert platform.requirements[-1].version == "0.22.1+cu130"
    with pytest.raises(StackError, match="has no lock for aarch64"):
        platform.lock_text()


def test_load_of_a_stack_reads_the_lock_beside_it(tmp_path: Path) -> None:
    path = write_stack(tmp_path, GOOD.replace("  aarch64:\n", "  aarch64:\n    lock: own.lock\n"))
    (tmp_path / "own.lock").write_text(f"ray==2.60.0 --hash={SHA}\n")
    assert parse_lock(load(str(path)).platforms["aarch64"].lock_text()) == (Pin("ray", "2.60.0", hashes=(SHA,)),)


def test_lock_text_of_a_missing_lock_names_the_tool(tmp_path: Path) -> None:
    path = write_stack(tmp_path, GOOD.replace("  aarch64:\n", "  aarch64:\n    lock: none.lock\n"))
    with pytest.raises(StackError, match=r"none\.lock does not exist: generate it with tools/lock\.py"):
        load(str(path)).platforms["aarch64"].lock_text()


BAD = {
    "unknown key": (GOOD + "pyhton: 3.12\n", "line 12: unknown key `pyhton`: .*did you mean `python`"),
    "unknown architecture": (
        GOOD.replace("aarch64:", "arm64:"),
        r"line 9: unknown key `platforms.arm64`: use aarch64 or x86_64",
    ),
    "unknown key of a wheel": (
        GOOD.replace("url:", "uri:"),
        r"wheels\[0\].uri`: .*did you mean `url`",
    ),
    "missing key": (GOOD.replace("summary:", "#"), "`summary` is missing"),
    "missing list": (GOOD.replace("requirements:", "#"), "`requirements` is missing"),
    "wrong type": (GOOD.replace("python: 3.10", "python: [3.10]"), "line 5: `python` must be a version"),
    "not a list": (GOOD.replace("[vllm==0.22.1, ray==2.60.0]", "ray"), "`requirements` must be a list"),
    "not a pin": (GOOD.replace("ray==2.60.0", "ray>=2.52"), r"line 6: `requirements\[1\]` must be a pin like"),
    "a hash in a pin": (GOOD.replace("ray==2.60.0", f"ray==2.60.0 --hash={SHA}"), "name and version alone"),
    "vllm unlike its pin": (GOOD.replace("vllm: 0.22.1", "vllm: 0.23.0"), "vllm must be in requirements too"),
    "short commit": (GOOD.replace("0c4517b95d8958a09ccacf9520c9", ""), "`nccl.commit` must be the 40"),
    "nccl a text": (re.sub(r"nccl: .*", "nccl: 2.28.9", GOOD), "`nccl` must be a mapping"),
    "platforms empty": (GOOD.split("platforms:")[0] + "platforms: {}\n", "`platforms` is empty"),
    "wheels a text": (
        re.sub(r"(?s)wheels:.*", "wheels: all\n", GOOD),
        "wheels` must be a list of mappings",
    ),
    "not a wheel": (GOOD.replace("_aarch64.whl", ".tar.gz"), "url must be the address of a wheel"),
    "not https": (GOOD.replace("https:", "http:"), r"wheels\[0\].url` must be an https address"),
    "bad sha256": (GOOD + "        sha256: abc\n", "sha256` must be 64 hexadecimal digits"),
    "not a day": (GOOD + "as_of: today\n", "`as_of` must be a day like"),
    "two pins of one": (GOOD.replace("[vllm", "[Ray==1.0, vllm"), "pins ray a second time"),
    "not a mapping": ("- a\n- b\n", "must be a mapping with the keys name"),
    "empty": ("", "must be a mapping"),
    "not YAML": ("a: [1, 2", "not YAML.* line 2"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_load_of_an_invalid_stack_fails_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(StackError, match=message) as caught:
        load(str(write_stack(tmp_path, text)))
    assert "\n" not in str(caught.value)


def test_load_of_an_unknown_name_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"no stack '0\.18\.2' \(did you mean `0\.18\.1`\?\)"):
        load("0.18.2")
    with pytest.raises(StackError, match=r"use 0\.18\.1, 0\.22\.1"):
        load(str(tmp_path / "none.yaml"))


def test_load_of_a_folder_or_bytes_fails(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="is a directory"):
        load(str(tmp_path))
    (tmp_path / "wheel.yaml").write_bytes(b"\x80\x81\xff")
    with pytest.raises(StackError, match="cannot be read"):
        load(str(tmp_path / "wheel.yaml"))


# --- locks


def test_parse_lock_reads_the_output_of_uv() -> None:
    text = f"# made by uv\nAnyio==4.1 \\\n    --hash={SHA} \\\n    --hash={SHA}\n    # via openai\n\nray==2.60.0\n"
    assert parse_lock(text) == (Pin("anyio", "4.1", hashes=(SHA, SHA)), Pin("ray", "2.60.0"))
    assert stacks.unhashed(parse_lock(text)) == ("ray",)


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://example.org/simple",
        "-r other.txt",
        "ray",
        "ray>=2.52",
        "ray[default]==2.60.0",
        "ray==2.60.0 ; python_version < '3.13'",
        "ray==2.60.0 --hash=md5:00",
        f"ray==2.60.0 --hash=sha256:{'A' * 64}",
        "ray @ file:///srv/ray.whl",
        "ray @ https://example.org/torch-2.10.0-cp312-cp312-linux_aarch64.whl",
        "ray @ https://example.org/ray.tar.gz",
        "ray==2.60.0 \\",
        "ray==2.60.0\nray==2.60.0",
    ],
)
def test_parse_lock_of_an_invalid_line_fails(line: str) -> None:
    with pytest.raises(StackError, match=r"Line \d of the lock"):
        parse_lock(line + "\n")


_LOCK_LIKE = st.lists(
    st.sampled_from(
        ["ray", "==", "2.60.0", " ", "\n", "\\\n", "#", "@", f"--hash={SHA}", "https://a/", "x-1-p-n-a.whl", "\r", ";"]
    )
).map("".join)


@settings(deadline=None)
@given(st.text() | _LOCK_LIKE)
def test_parse_lock_of_any_text_gives_pins_or_a_stack_error(text: str) -> None:
    try:
        pins = parse_lock(text)
    except StackError:
        return
    assert set(parse_lock(render_lock(pins))) == set(pins)


_YAML_LIKE = st.recursive(
    st.sampled_from(["a", "1", "null", "!!int ''", "!!timestamp x", "&a", "*a", "<<", "2024-13-45", "'"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda v: f"[{', '.join(v)}]")
        | st.dictionaries(inner, inner, max_size=3).map(
            lambda v: "{" + ", ".join(f"? {a} : {b}" for a, b in v.items()) + "}"
        )
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    st.binary()
    | st.text().map(str.encode)
    | _YAML_LIKE.map(str.encode)
    | st.tuples(st.sampled_from(GOOD.split()), _YAML_LIKE).map(lambda v: GOOD.replace(v[0], v[1], 1).encode())
)
def test_load_of_any_file_gives_a_stack_or_a_stack_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    try:
        load(str(path))
    except StackError as error:
        assert "\n" not in str(error)


@settings(deadline=None)
@given(st.text())
def test_load_of_any_name_gives_a_stack_or_a_stack_error(name: str) -> None:
    try:
        load(name)
    except StackError:
        return
    assert name in stacks.names()


def test_load_of_deep_nesting_is_a_stack_error(tmp_path: Path) -> None:
    with pytest.raises(StackError):
        load(str(write_stack(tmp_path, "[" * 5000)))


# --- the index


@pytest.mark.network
@pytest.mark.parametrize(("stack", "platform"), COMPLETE)
def test_complete_lock_is_accepted_by_uv(stack: Stack, platform: Platform, tmp_path: Path) -> None:
    # Resolves with dependencies, so a package that the lock lacks is an error. A dry run does not compare hashes.
    argv = [find_uv_bin(), "pip", "install", "--quiet", "--dry-run", "--require-hashes", "--only-binary", ":all:"]
    # Any Python does for a dry run: without `--python`, uv would look for the stack's.
    argv += ["--python", sys.executable, "--python-version", stack.python]
    argv += ["--python-platform", f"{platform.arch}-manylinux_2_39"]
    argv += ["--target", str(tmp_path), "-r", str(platform.lock)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
