"""The archive of a bundle: every byte of it follows from its manifest, and any other byte is one clear error."""

import errno
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkinstall.errors import BadBundle
from sparkinstall.payloads import bundle_archive
from sparkinstall.payloads.bundle_archive import Manifest, Member, Refused
from tests.support.bundles import FILES, HERE, OTHER, block, forged, manifest, packed, written
from tests.support.rehearsals import Tree, envelope, in_this_process, output_of, sparkinstall, tree

WHOLE = packed()


def _refusal(folder: Path, content: bytes) -> str:
    with pytest.raises(Refused) as refused:
        bundle_archive.read(written(folder, content))
    assert refused.value.hint
    return refused.value.message


# --- whole


def test_whole_bundle_is_read(tmp_path: Path) -> None:
    found = bundle_archive.read(written(tmp_path, WHOLE))
    assert found == manifest()
    assert found.size == len(WHOLE)


def test_tar_unpacks_a_bundle(tmp_path: Path) -> None:
    """The first command on the node."""
    path = written(tmp_path, WHOLE)
    done = subprocess.run(["tar", "-xf", path, "sparkinstall"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "sparkinstall/install.sh").read_bytes() == FILES["sparkinstall/install.sh"]
    assert (tmp_path / "sparkinstall/install.sh").stat().st_mode & 0o777 == 0o755
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bundle.tar", "sparkinstall"]


def test_sha256sum_checks_the_manifest(tmp_path: Path) -> None:
    subprocess.run(["tar", "-xf", written(tmp_path, WHOLE)], cwd=tmp_path, check=True)
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "manifest.sha256"], cwd=tmp_path)
    assert checked.returncode == 0


def test_large_file_that_is_only_checked_is_not_kept_in_memory(tmp_path: Path) -> None:
    path = written(tmp_path, packed({**FILES, "debs/large.deb": bytes(64 << 20)}))
    tracemalloc.start()
    try:
        bundle_archive.read(path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 16 << 20


def test_manifest_is_encoded_once_however_large_the_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    times, encoded = [0], Manifest.encoded

    def counted(self: Manifest) -> bytes:
        times[0] += 1
        return encoded(self)

    monkeypatch.setattr(Manifest, "encoded", counted)
    large = {"debs/large.deb": bytes(16 << 20)}
    bundle_archive.write(io.BytesIO(), manifest(large), large, bundle_archive.silent)
    # For its text, and for the size of the archive.
    assert times == [2]


@pytest.mark.parametrize("length", [40, 99, 100, 101, 180, 900])
def test_names_are_those_that_tar_reads(tmp_path: Path, length: int) -> None:
    path = f"wheels/{'n' * (length - len('wheels/-1-py3-none-any.whl'))}-1-py3-none-any.whl"
    content = packed({path: b"content"})
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        (found,) = (each for each in tar.getmembers() if not each.name.startswith("manifest"))
        assert (found.name, found.size, found.mode, found.isreg()) == (path, 7, 0o644, True)
    bundle = written(tmp_path, content)
    listed = subprocess.run(["tar", "-tf", bundle], capture_output=True, text=True)
    assert (listed.stdout.split(), listed.stderr) == (["manifest.json", "manifest.sha256", path], "")
    assert bundle_archive.read(bundle).size == len(content)


def test_same_contents_give_the_same_bytes() -> None:
    backwards = dict(reversed(FILES.items()))
    assert packed(backwards) == WHOLE


def test_file_that_changes_while_it_is_packed_is_refused(tmp_path: Path) -> None:
    files = {path: written(tmp_path, content, path.replace("/", "-")) for path, content in FILES.items()}
    files["sparkinstall/README.md"].write_bytes(b"READ me\n")
    with pytest.raises(Refused, match=r"README.md does not have its hash any more"):
        bundle_archive.write(io.BytesIO(), manifest(), files, bundle_archive.silent)


# --- damaged


@settings(deadline=None, max_examples=150)
@given(st.integers(0, len(WHOLE) - 1))
def test_bundle_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    assert _refusal(tmp_path_factory.getbasetemp(), WHOLE[:length])


def test_bundle_cut_at_every_block_is_refused(tmp_path: Path) -> None:
    """A tar that ends between two members is whole for tar."""
    for length in range(0, len(WHOLE), 512):
        message = _refusal(tmp_path, WHOLE[:length])
        assert length < 4096 or f"it ends after {length} of {len(WHOLE)} bytes" in message


@settings(deadline=None, max_examples=400)
@given(st.integers(0, len(WHOLE) * 8 - 1))
def test_bundle_with_one_flipped_bit_is_refused(tmp_path_factory: pytest.TempPathFactory, bit: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[bit // 8] ^= 1 << bit % 8
    assert _refusal(tmp_path_factory.getbasetemp(), bytes(damaged))


def test_bundle_with_one_flipped_bit_in_each_byte_is_refused(tmp_path: Path) -> None:
    for at in range(0, len(WHOLE), 7):
        damaged = bytearray(WHOLE)
        damaged[at] ^= 1 << at % 8
        assert _refusal(tmp_path, bytes(damaged))


def test_bundle_with_more_behind_its_end_is_refused(tmp_path: Path) -> None:
    assert _refusal(tmp_path, WHOLE + b"\0") == "it has 1 bytes more than its manifest lists"


@pytest.mark.parametrize("content", [b"", b"\0" * 10240, b"PK\x03\x04" * 200, b"<html>" * 400, b"\x1f\x8b" * 600])
def test_other_files_are_no_bundle(tmp_path: Path, content: bytes) -> None:
    assert "it is no bundle of sparkinstall" in _refusal(tmp_path, content)


def test_another_tar_is_no_bundle(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bundle.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("manifest.json"), io.BytesIO())
    with pytest.raises(Refused, match="no bundle"):
        bundle_archive.read(tmp_path / "bundle.tar")


# --- hostile


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/etc/passwd", "leaves the folder"),
        ("wheels/../../x.whl", "leaves the folder"),
        ("..", "leaves the folder"),
        ("wheels/.hidden", "no bundle has"),
        ("wheels//x.whl", "no bundle has"),
        ("wheels/", "no bundle has"),
        ("elsewhere/x", "no bundle has"),
        ("wheels/x\n.whl", "no bundle has"),
        ("wheels/\x1b[2J.whl", "no bundle has"),
        ("wheels/ä.whl", "no bundle has"),
        (f"nccl/{'n' * 1000}", "too long"),
    ],
)
@pytest.mark.parametrize("where", ["members", "kept"])
def test_path_that_no_bundle_has_is_refused(tmp_path: Path, path: str, why: str, where: str) -> None:
    members = (Member(path, 0, "0" * 64),)
    plain = manifest({})
    listed = replace(plain, members=members) if where == "members" else replace(plain, kept=members)
    message = _refusal(tmp_path, forged(listed, b""))
    assert why in message
    assert message.isascii() and message.isprintable()


@pytest.mark.parametrize("name", [f"x-1-py3-none-manylinux_2_28_{OTHER}.whl", "x.tar.gz", "x-1-py3-none-any"])
@pytest.mark.parametrize("folder", ["wheels", "tool"])
def test_wheel_for_another_architecture_is_refused(tmp_path: Path, name: str, folder: str) -> None:
    message = _refusal(tmp_path, packed({f"{folder}/{name}": b""}))
    assert message == f"{folder}/{name} is not a wheel for {HERE}"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_files_are_refused(tmp_path: Path, kind: bytes) -> None:
    entry = tarfile.TarInfo("sparkinstall/README.md")
    entry.type, entry.linkname = kind, "/etc/passwd"
    listed = manifest({"sparkinstall/README.md": b""})
    message = _refusal(tmp_path, forged(listed, entry.tobuf() + bytes(1024)))
    assert "'sparkinstall/README.md" in message and "where its manifest lists sparkinstall/README.md" in message


def test_member_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    hidden = block("wheels/evil-1-py3-none-any.whl", b"x")
    listed = manifest({"sparkinstall/README.md": b""})
    assert "more than its manifest lists" in _refusal(
        tmp_path, forged(listed, block("sparkinstall/README.md", b"") + hidden + bytes(1024))
    )


def test_member_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    listed = manifest({"sparkinstall/README.md": b""})
    message = _refusal(tmp_path, forged(listed, block("sparkinstall/EVIL.md", b"") + bytes(1024)))
    assert "it has the file 'sparkinstall/EVIL.md' where" in message


def test_path_listed_twice_is_refused(tmp_path: Path) -> None:
    path = "tool/a-1-py3-none-any.whl"
    twice = replace(manifest({}), members=(Member(path, 0, hashlib.sha256().hexdigest()),) * 2)
    assert f"lists {path} twice" in _refusal(tmp_path, forged(twice, b""))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("members"),
        lambda data: data.update(members=[{"path": 1, "size": 1, "sha256": "0" * 64}]),
        lambda data: data.update(members=[{"path": "nccl/x", "size": -1, "sha256": "0" * 64}]),
        lambda data: data.update(members=[{"path": "nccl/x", "size": 1 << 50, "sha256": "0" * 64}]),
        lambda data: data.update(members=[{"path": "nccl/x", "size": 1, "sha256": "0"}]),
        lambda data: data.update(members={"nccl/x": 1}),
        lambda data: data.update(packages=["git"]),
        lambda data: data.update(packages={"git": 1}),
        lambda data: data.update(platform=[]),
        lambda data: data.update(surplus=1),
        lambda data: data.update(nodes="1"),
        lambda data: data.update(nodes=0),
        lambda data: data.update(stack="a\x1b[31mb"),
        lambda data: data.update(system="x" * 3000),
        lambda data: data.update(packages={"git\n": ""}),
        lambda data: data.update(packages={"git": "\u202e"}),
        lambda data: data.update(models=["m"]),
    ],
)
def test_manifest_of_another_shape_is_refused(change: Callable[[dict[str, object]], object]) -> None:
    data = json.loads(manifest().encoded())
    change(data)
    with pytest.raises(Refused, match="its manifest is damaged"):
        bundle_archive.decoded((json.dumps(data, indent=1, sort_keys=True) + "\n").encode())


@pytest.mark.parametrize("text", [b"[]", b"1", b"{", b"null", b"\xff", b"[" * 100_000, b'{"format": 1}'])
def test_manifest_that_is_no_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(Refused, match="its manifest is damaged"):
        bundle_archive.decoded(text)


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    message = _refusal(tmp_path, forged(replace(manifest({}), platform="riscv64"), b""))
    assert "unknown architecture, 'riscv64'" in message


def test_newer_format_is_refused_with_the_way_out() -> None:
    newer = manifest().encoded().replace(b'"format": 1', b'"format": 2')
    with pytest.raises(Refused, match=r"newer sparkinstall made it \(format 2") as refused:
        bundle_archive.decoded(newer)
    assert "./sparkinstall/install.sh --bundle FILE" in refused.value.hint


# --- the verbs


def _unchanged(folder: Path) -> Tree:
    return tree(folder)


def test_verify_describes_a_whole_bundle(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    run = in_this_process("bundle", "verify", path, "--json")
    data = envelope(run)["data"]
    assert run.returncode == 0
    assert (data["stack"], data["platform"], data["bytes"]) == ("tiny", HERE, len(WHOLE))
    assert data["files"] == {"nccl": 1, "sparkinstall": 2, "tool": 1, "wheels": 3}
    shown = in_this_process("bundle", "verify", path).stdout
    assert f"sha256 of its manifest: {data['manifest']}" in shown
    assert "is whole" in shown and "The node must have these Debian packages: git" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (WHOLE[:-600], "it ends after"),
        (WHOLE[:5000] + b"?" + WHOLE[5001:], "damaged"),
        (packed(tool="0.0.9"), "an older sparkinstall made it (0.0.9, and this is"),
        (packed(tool="999.1"), "a newer sparkinstall made it"),
    ],
)
def test_verify_of_a_bad_bundle_is_one_error_and_changes_nothing(tmp_path: Path, content: bytes, why: str) -> None:
    path = written(tmp_path, content)
    before = _unchanged(tmp_path)
    run = in_this_process("bundle", "verify", path, "--json")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (1, "bundle")
    assert error["message"].startswith(f"the bundle {path} cannot be used: ") and why in error["message"]
    assert error["hint"]
    assert _unchanged(tmp_path) == before


@pytest.mark.parametrize("name", ["missing.tar", ".", "/dev/null"])
def test_verify_of_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    run = in_this_process("bundle", "verify", tmp_path / name, "--json")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (2, "usage")
    assert ("there is no bundle" if name == "missing.tar" else "is not a regular file") in error["message"]


def test_verify_of_what_this_user_may_not_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bundle_archive.Manifest:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(bundle_archive, "manifest_of", refuse)
    run = in_this_process("bundle", "verify", written(tmp_path, WHOLE))
    assert run.returncode == 1 and "cannot be read: Permission denied" in output_of(run)
    assert "chmod a+r" in output_of(run)


def test_diff_names_packages_with_versions_and_sizes(tmp_path: Path) -> None:
    newer = {name: content for name, content in FILES.items() if "empty" not in name and "vllm" not in name}
    newer |= {"wheels/vllm-0.22.1-py3-none-any.whl": b"V" * 900, "wheels/torch-2.0-py3-none-any.whl": b"t" * 5}
    old = written(tmp_path, packed(), "old.tar")
    new = written(tmp_path, packed(newer, tool="9.9", stack="next"), "new.tar")
    data = envelope(in_this_process("bundle", "diff", old, new, "--json"))["data"]
    found = {each.pop("name"): tuple(each.values())[1:] for each in data["changes"]}
    assert found == {
        "empty": ("1.0", "", 0, 0),
        "torch": ("", "2.0", 0, 5),
        "vllm": ("0.18.1", "0.22.1", 700, 900),
    }
    assert data["bytes_new"] == 905 and (data["stack_before"], data["stack_after"]) == ("tiny", "next")
    shown = in_this_process("bundle", "diff", old, new).stdout
    assert "0.18.1" in shown and f"after: stack next for {HERE}, sparkinstall 9.9" in shown
    assert "the same content" in in_this_process("bundle", "diff", old, old).stdout


def test_install_sh_reads_bundles_with_pythons_own_library_only(tmp_path: Path) -> None:
    """The file runs where nothing is installed."""
    path, lock = written(tmp_path, WHOLE[:-1]), written(tmp_path, b"", "lock")
    alone = [sys.executable, "-I", "-S", bundle_archive.__file__, *map(str, (path, tmp_path, lock))]
    done = subprocess.run(alone, capture_output=True, text=True)
    assert done.returncode == 1 and "made by another sparkinstall than this one" in done.stderr, done.stderr


def test_error_names_the_bundle_and_what_to_do(tmp_path: Path) -> None:
    assert BadBundle("x").code == "bundle"
    run = in_this_process("bundle", "verify", written(tmp_path, WHOLE[:-1]))
    assert "copy the file again" in run.stdout + run.stderr


@pytest.mark.parametrize("words", ["bundle verify", "bundle diff only-one", "bundle create --nodes 0"])
def test_usage_error_names_both_words_of_the_verb(words: str) -> None:
    run = sparkinstall(*words.split(), "--json")
    assert (run.returncode, envelope(run)["command"]) == (2, " ".join(words.split()[:2]))


def test_empty_value_names_its_option() -> None:
    (error,) = envelope(sparkinstall("all", "--bundle=", "--json"))["errors"]
    assert error["message"] == "the value of --bundle is empty"
