"""Fix 5 on the files of real vLLM wheels, and patches on files written here."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from msgspec.structs import replace

from sparkinstall.assets import asset
from sparkinstall.patches import (
    PatchSet,
    UnknownContent,
    Variant,
    apply,
    digest,
    load,
    parse,
    revert,
)
from sparkinstall.schema import Malformed
from tests.support.wheel_member import needed_member

(CUTLASS,) = load(asset("patches"))

# At least one release of each variant; the first is the default.
RELEASES = ("0.18.1", "0.10.2", "0.11.0", "0.11.2", "0.12.0", "0.14.1", "0.22.1", "0.28.0", "0.33.0")

# Since 0.17.0; in 0.15 and 0.16 the classes were in `layers/quantization/kernels/scaled_mm`.
KERNEL_FILE = "vllm/model_executor/kernels/linear/scaled_mm/cutlass.py"
KERNEL_CHOICE = "vllm/model_executor/kernels/linear/__init__.py"

GATES = ("cutlass_fp8_supported", "cutlass_block_fp8_supported")


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def original(release: str) -> bytes:
    return needed_member(release, CUTLASS.target)


@pytest.fixture
def variant(original: bytes) -> Variant:
    return CUTLASS.known(original)


def gates(source: bytes) -> dict[str, object]:
    """The values of the two functions and their constants on CUDA 12.1 if the extension claims both kernels."""
    wanted = [node for node in ast.parse(source).body if is_gate(node)]
    capability = SimpleNamespace(to_int=lambda: 121)
    names: dict[str, Any] = {
        "current_platform": SimpleNamespace(is_cuda=lambda: True, get_device_capability=lambda: capability),
        "ops": SimpleNamespace(
            cutlass_scaled_mm_supports_fp8=lambda cc: cc == 121,
            cutlass_scaled_mm_supports_block_fp8=lambda cc: cc == 121,
        ),
    }
    exec(compile(ast.Module(wanted, []), "w8a8_utils.py", "exec"), names)
    constants = {name: value for name, value in names.items() if name.startswith("CUTLASS_")}
    return constants | {name: names[name]() for name in GATES}


def is_gate(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name in GATES
    return isinstance(node, ast.Assign) and "FP8_SUPPORTED" in ast.unparse(node.targets[0])


@pytest.mark.network
def test_file_of_a_listed_release_matches_its_variant(release: str, original: bytes) -> None:
    variant = CUTLASS.known(original)
    assert release in variant.releases
    assert digest(original) == variant.original


@pytest.mark.network
def test_patched_gates_are_false_where_the_original_is_true(original: bytes, variant: Variant) -> None:
    before, after = gates(original), gates(apply(original, variant))
    assert before.keys() == after.keys() >= {"CUTLASS_BLOCK_FP8_SUPPORTED", *GATES}
    assert set(before.values()) == {True}
    assert set(after.values()) == {False}


@pytest.mark.network
def test_patched_module_keeps_everything_but_the_gates(original: bytes, variant: Variant) -> None:
    def rest(source: bytes) -> list[str]:
        return [ast.unparse(node) for node in ast.parse(source).body if not is_gate(node)]

    assert rest(apply(original, variant)) == rest(original)


@pytest.mark.network
def test_revert_restores_the_original(original: bytes, variant: Variant) -> None:
    patched = apply(original, variant)
    assert CUTLASS.known(patched) == variant
    assert digest(patched) == variant.patched
    assert revert(patched, variant) == original


@pytest.mark.network
def test_apply_and_revert_twice_are_refused(original: bytes, variant: Variant) -> None:
    with pytest.raises(UnknownContent, match=variant.patched):
        apply(apply(original, variant), variant)
    with pytest.raises(UnknownContent, match=variant.original):
        revert(original, variant)


@pytest.mark.network
def test_file_with_some_hunks_applied_is_unknown(original: bytes, variant: Variant) -> None:
    for count in range(1, len(variant.hunks)):
        half = with_first_hunks(original, variant, count)
        assert half != original
        assert_unknown(half, variant)


def with_first_hunks(original: bytes, variant: Variant, count: int) -> bytes:
    content = original
    for hunk in variant.hunks[:count]:
        content = content.replace(b"".join(hunk.before), b"".join(hunk.after), 1)
    return content


def assert_unknown(content: bytes, variant: Variant) -> None:
    with pytest.raises(UnknownContent, match=rf"w8a8_utils\.py.*{digest(content)}"):
        CUTLASS.known(content)
    for change in (apply, revert):
        with pytest.raises(UnknownContent):
            change(content, variant)


def fp8_kernels(source: bytes) -> Iterator[tuple[str, Callable[..., tuple[bool, str | None]]]]:
    """Each FP8 class of a wheel's `cutlass.py` with its `is_supported`, on CUDA with the gates closed."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and "fp8" in node.name.lower():
            (function,) = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "is_supported"]
            function.decorator_list = []
            names: dict[str, Any] = {
                "current_platform": SimpleNamespace(is_cuda=lambda: True),
                "cutlass_fp8_supported": lambda: False,
                "CUTLASS_BLOCK_FP8_SUPPORTED": False,
            }
            exec(compile(ast.Module([function], []), "cutlass.py", "exec"), names)
            yield node.name, names["is_supported"]


@pytest.mark.network
@pytest.mark.parametrize(
    ("release", "follows_patch"),
    [
        ("0.18.1", set()),
        ("0.22.1", {"CutlassFp8BlockScaledMMKernel"}),
        ("0.28.0", {"CutlassFp8BlockScaledMMKernel"}),
        ("0.33.0", {"CutlassFP8ScaledMMLinearKernel", "CutlassFp8BlockScaledMMKernel"}),
    ],
)
def test_kernels_to_disable_of_a_wheel_are_all_its_fp8_classes(release: str, follows_patch: set[str]) -> None:
    kernels = dict(fp8_kernels(needed_member(release, KERNEL_FILE)))
    assert {name for name, function in kernels.items() if not function(None, 121)[0]} == follows_patch
    named = CUTLASS.kernels_for(release)
    assert named is not None
    assert set(named.disable) == kernels.keys()
    assert b"in envs.VLLM_DISABLED_KERNELS" in needed_member(release, KERNEL_CHOICE)


@pytest.mark.parametrize(
    ("release", "disable"),
    [
        ("0.10.2", ()),
        ("0.14.1", ()),
        ("0.15.0", ("CutlassFP8ScaledMMLinearKernel",)),
        ("0.18.1+cu130", ("CutlassFP8ScaledMMLinearKernel",)),
        ("0.19.2rc1.dev142", ("CutlassFP8ScaledMMLinearKernel",)),
        ("0.20.0", ("CutlassFP8ScaledMMLinearKernel", "CutlassFp8BlockScaledMMKernel")),
        ("0.100", ("CutlassFP8ScaledMMLinearKernel", "CutlassFp8BlockScaledMMKernel")),
    ],
)
def test_kernels_to_disable_follow_the_release(release: str, disable: tuple[str, ...]) -> None:
    named = CUTLASS.kernels_for(release)
    assert named is not None
    assert named.disable == disable


def test_kernels_to_disable_of_a_release_older_than_the_table_are_unknown() -> None:
    assert CUTLASS.kernels_for("0.9.2") is None


def test_listed_releases_have_one_range_of_kernels() -> None:
    for release in (r for variant in CUTLASS.variants for r in variant.releases):
        assert sum(kernels.holds(release) for kernels in CUTLASS.kernels) == 1


def test_patch_files_are_in_the_table_once() -> None:
    named = sorted(variant.patch for variant in CUTLASS.variants)
    assert named == sorted(path.name for path in asset("patches").glob("*.patch"))


# --- files written here, which allow each mistake without a wheel

BEFORE = b"one\ntwo\r\nthree\nfour\nfive\nsix\nseven\nend without a newline"
AFTER = b"one\nTWO\r\nthree\nfour\nfive\nmore\nsix\nseven\nend with one\n"
DIFF = (
    b"--- a/pkg/file.py\n+++ b/pkg/file.py\n@@ -1,3 +1,3 @@\n one\n-two\r\n+TWO\r\n three\n"
    b"@@ -5,4 +5,5 @@ def f():\n five\n+more\n six\n seven\n"
    b"-end without a newline\n\\ No newline at end of file\n+end with one\n"
)


def table() -> dict[str, Any]:
    """A valid table, which the tests change."""
    variant = {
        "releases": ["1.2.3"],
        "patch": "it.patch",
        "original": digest(BEFORE),
        "patched": digest(AFTER),
    }
    kernels = [{"since": "1.0.0", "below": "2.0.0", "disable": ["K"], "without_patch": True}]
    entry = {"name": "it", "fix": 9, "target": "pkg/file.py", "variants": [variant], "kernels": kernels}
    return {"patches": [entry]}


def loaded(folder: Path, content: object, diff: bytes | None = DIFF) -> PatchSet:
    (folder / "patches.yaml").write_text(yaml.safe_dump(content))
    if diff is not None:
        (folder / "it.patch").write_bytes(diff)
    (one,) = load(folder)
    return one


def test_apply_and_revert_keep_line_ends_and_a_missing_last_newline(tmp_path: Path) -> None:
    one = loaded(tmp_path, table())
    variant = one.known(BEFORE)
    assert apply(BEFORE, variant) == AFTER
    assert revert(AFTER, variant) == BEFORE


@pytest.mark.parametrize("at", range(len(BEFORE)))
def test_apply_to_a_file_with_one_changed_byte_is_refused(tmp_path: Path, at: int) -> None:
    one = loaded(tmp_path, table())
    changed = BEFORE[:at] + bytes([BEFORE[at] ^ 1]) + BEFORE[at + 1 :]
    with pytest.raises(UnknownContent, match=r"pkg/file\.py: sha256 " + digest(changed)):
        apply(changed, one.variants[0])


def test_apply_with_another_result_is_refused(tmp_path: Path) -> None:
    variant = loaded(tmp_path, table(), DIFF.replace(b"+more", b"+less")).variants[0]
    with pytest.raises(UnknownContent, match=r"pkg/file\.py after it\.patch"):
        apply(BEFORE, variant)


def test_apply_of_a_hunk_beyond_the_end_is_refused(tmp_path: Path) -> None:
    variant = loaded(tmp_path, table()).variants[0]
    far = replace(variant, hunks=tuple(replace(hunk, before_line=900) for hunk in variant.hunks))
    with pytest.raises(UnknownContent):
        apply(BEFORE, far)


def table_with(*path: str | int, value: object) -> dict[str, Any]:
    changed = table()
    at: Any = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


VARIANT = ("patches", 0, "variants", 0)
KERNELS = ("patches", 0, "kernels", 0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "it must be a mapping with the key patches, not null"),
        ({"patches": {}}, "line 1: `patches` must be a list"),
        ({}, "`patches` is missing: it must be a list"),
        (table_with("other", value=1), "unknown key `other`: use patches"),
        (table_with("patches", 0, value="x"), r"line 2: `patches\[0\]` must be a mapping"),
        (table_with("patches", 0, "fix", value=True), r"`patches\[0\].fix` must be a number, not True"),
        (table_with("patches", 0, "target", value=None), "target` must be text, not null"),
        (
            table_with(*VARIANT, "orginal", value="x"),
            r"variants\[0\].orginal`: .*did you mean `original`",
        ),
        (table_with(*VARIANT, "original", value="f411c8bc"), "original` must be 64 hexadecimal digits, not 'f411c8bc'"),
        (table_with(*VARIANT, "original", value=digest(AFTER)), "is repeated"),
        (table_with(*VARIANT, "releases", value=[]), "releases` must be a list of releases such as"),
        (table_with(*VARIANT, "releases", value=[0.18]), r"releases\[0\]` must be a release such as 0.18.1, not 0.18"),
        (table_with(*VARIANT, "releases", value=["new"]), r"releases\[0\]` must be a release such as"),
        (table_with(*VARIANT, "patch", value="none.patch"), r"none\.patch.*No such file"),
        (table_with(*KERNELS, "below", value=2.0), "below` must be a release such as"),
        (table_with(*KERNELS, "without_patch", value="yes"), "without_patch` must be true or false, not 'yes'"),
        (table_with(*KERNELS, "disable", value="K"), "disable` must be a list of text, not 'K'"),
    ],
)
def test_load_of_a_malformed_table_names_the_place(tmp_path: Path, content: object, says: str) -> None:
    with pytest.raises(Malformed, match=says):
        loaded(tmp_path, content)


@pytest.mark.parametrize("yaml_text", [b"patches: [", b"\xff\xfe\x00"])
def test_load_of_bad_yaml_fails(tmp_path: Path, yaml_text: bytes) -> None:
    (tmp_path / "patches.yaml").write_bytes(yaml_text)
    with pytest.raises(Malformed, match=r"patches\.yaml"):
        load(tmp_path)


def test_load_without_a_table_fails(tmp_path: Path) -> None:
    with pytest.raises(Malformed, match=r"patches\.yaml"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("diff", "says"),
    [
        (b"", "not a diff of"),
        (DIFF.replace(b"pkg/file.py", b"pkg/other.py"), "not a diff of"),
        (DIFF + DIFF, "5 and 6 lines under"),
        (b"".join(DIFF.splitlines(keepends=True)[:2]), "no hunk"),
        (DIFF.replace(b"@@ -5,4 +5,5 @@", b"@@ five @@"), "not a hunk"),
        (DIFF.replace(b"\n+more", b"\nmore"), "not a line of a hunk"),
        (DIFF.replace(b"+more\n", b""), "4 and 4 lines under"),
        (DIFF.replace(b" one", b"\\ one"), "not a line of a hunk"),
    ],
)
def test_load_of_a_malformed_patch_names_the_cause(tmp_path: Path, diff: bytes, says: str) -> None:
    with pytest.raises(Malformed, match=says):
        loaded(tmp_path, table(), diff)


def test_hunk_undone_twice_is_the_same() -> None:
    first, second = parse(DIFF, "pkg/file.py")
    assert first.before == (b"one\n", b"two\r\n", b"three\n")
    assert second.after == (b"five\n", b"more\n", b"six\n", b"seven\n", b"end with one\n")
    assert second.undone().undone() == second
