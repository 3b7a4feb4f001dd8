"""Bundles of tiny stacks: the same inputs give the same bytes, an update is small, and a rehearsal without a network
installs from one."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import click
import pytest

from sparkinstall.bundle import git_objects
from sparkinstall.bundle.supply import with_its_stack
from sparkinstall.cli.app import command as command_of
from sparkinstall.core.session import Target
from sparkinstall.payloads.bundle_archive import manifest_of
from sparkinstall.resources import nccl_source
from sparkinstall.resources.nccl_source import NcclSource
from sparkinstall.system.local import LocalSystem
from tests.support import stored_models
from tests.support.bundles import HERE, OTHER, WHEEL, Maker, Run, packed, written
from tests.support.model_hub import ModelHub, served
from tests.support.mounts import read_only, resize, small_disk
from tests.support.rehearsals import (
    command,
    envelope,
    environment,
    everything_with_times,
    output_of,
    sparkinstall,
    tree,
)
from tests.support.stored_models import MODEL
from tests.support.tiny_stack import small_stack, tiny_stack


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path, tiny_stack(tmp_path / "stack"))


def _error(run: Run) -> dict[str, Any]:
    (error,) = envelope(run)["errors"]
    assert error["hint"] and "Traceback" not in output_of(run)
    return dict(error)


# --- create


def test_bundle_has_the_tool_and_the_wheels_and_is_whole(maker: Maker, tmp_path: Path) -> None:
    made = maker.created(tmp_path / "b.tar")
    paths = [each.path for each in manifest_of(tmp_path / "b.tar").members]
    sources = ("install.sh", "sparkinstall/__main__.py", "templates/vllm.service.j2", "knowledge/hosts.yaml")
    assert {f"sparkinstall/{name}" for name in sources} <= set(paths)
    assert "tool/tool-1.0-py3-none-any.whl" in paths and "wheels/vllm-0.18.1-py3-none-any.whl" in paths
    assert made["packages"]["git"] == "", "apt of another architecture was not asked"
    again = sparkinstall("bundle", "verify", tmp_path / "b.tar", "--json")
    assert envelope(again)["data"] == made


def test_same_inputs_give_the_same_bytes(tmp_path: Path, maker: Maker) -> None:
    maker.created(tmp_path / "one.tar")
    other = Maker(tmp_path, maker.stack, "another-cache")
    other.created(tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_second_bundle_downloads_nothing(tmp_path: Path, maker: Maker) -> None:
    maker.created(tmp_path / "one.tar")
    next(maker.stack.parent.glob("*.whl")).unlink()
    maker.created(tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_file_that_exists_is_replaced_only_with_yes(tmp_path: Path, maker: Maker) -> None:
    (tmp_path / "b.tar").write_text("precious")
    run = maker.create(tmp_path / "b.tar")
    assert (run.returncode, _error(run)["code"]) == (2, "usage")
    assert (tmp_path / "b.tar").read_text() == "precious"
    maker.created(tmp_path / "b.tar", "--yes")
    assert manifest_of(tmp_path / "b.tar").stack == "tiny"


@pytest.mark.parametrize("name", ["missing/b.tar", "stack", "b.tar/x"])
def test_path_that_cannot_be_a_file_is_refused_before_anything_is_downloaded(
    tmp_path: Path, maker: Maker, name: str
) -> None:
    before = tree(tmp_path, everything_with_times)
    run = maker.create(tmp_path / name)
    assert (run.returncode, _error(run)["code"]) == (2, "usage")
    assert tree(tmp_path, everything_with_times) == before


def test_stack_without_all_hashes_is_refused(tmp_path: Path) -> None:
    maker = Maker(tmp_path, tiny_stack(tmp_path / "stack", locked=False))
    run = maker.create(tmp_path / "b.tar")
    assert (run.returncode, _error(run)["code"]) == (2, "config")
    assert "only wheels whose hash is known in advance" in _error(run)["message"]
    assert "give one of your own a lock (docs/offline.md)" in _error(run)["hint"]
    assert not (tmp_path / "b.tar").exists()


def test_wheel_with_another_hash_than_the_lock_is_refused(tmp_path: Path) -> None:
    maker = Maker(tmp_path, tiny_stack(tmp_path / "stack", hash_is_right=False))
    run = maker.create(tmp_path / "b.tar")
    assert run.returncode == 1 and "hash" in _error(run)["cause"], output_of(run)
    assert not list(tmp_path.glob("b.tar*"))


def test_disk_that_is_full_is_one_error_and_more_space_is_enough(tmp_path: Path, maker: Maker) -> None:
    with small_disk(tmp_path / "disk", "300k") as disk:
        run = maker.create(disk / "b.tar")
        assert (run.returncode, _error(run)["code"]) == (1, "storage")
        assert "the disk is full" in _error(run)["message"]
        assert list(disk.iterdir()) == []
        resize(disk, "20m")
        maker.created(disk / "b.tar")


def test_cache_that_is_full_is_one_error(tmp_path: Path, maker: Maker) -> None:
    with small_disk(tmp_path / "cache/sparkinstall/wheels", "4k,nr_inodes=3"):
        run = maker.create(tmp_path / "b.tar")
        assert (run.returncode, _error(run)["code"]) == (1, "storage"), output_of(run)
    assert not list(tmp_path.glob("b.tar*"))


# --- updates


def test_two_runs_do_not_write_the_same_bundle(tmp_path: Path, maker: Maker) -> None:
    part = written(tmp_path, packed()[:700], "b.tar.part")
    with open(part, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        run = maker.create(tmp_path / "b.tar")
    assert (run.returncode, _error(run)["code"]) == (1, "busy")
    assert f"another run is writing {tmp_path / 'b.tar'}" in _error(run)["message"]
    assert part.read_bytes() == packed()[:700] and not (tmp_path / "b.tar").exists()


def test_what_a_killed_run_left_is_written_over(tmp_path: Path, maker: Maker) -> None:
    written(tmp_path, packed() + bytes(100_000_000), "b.tar.part")
    made = maker.created(tmp_path / "b.tar")
    assert (tmp_path / "b.tar").stat().st_size == made["bytes"]
    assert not (tmp_path / "b.tar.part").exists()


def _about(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_mode, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize("kind", ["text", "folder", "pipe", "link", "link to nothing"])
def test_what_is_not_a_bundle_that_was_begun_is_not_written_over(tmp_path: Path, maker: Maker, kind: str) -> None:
    part = tmp_path / "b.tar.part"
    if kind == "text":
        part.write_text("precious")
    elif kind == "folder":
        part.mkdir()
    elif kind == "pipe":
        os.mkfifo(part)
    else:
        part.symlink_to(written(tmp_path, packed(), "other.tar") if kind == "link" else "nothing")
    before = sorted((each.name, _about(each)) for each in tmp_path.iterdir())
    run = maker.create(tmp_path / "b.tar")
    assert run.returncode in (1, 2) and str(part) in _error(run)["message"]
    assert "name another file" in _error(run)["hint"]
    assert sorted((each.name, _about(each)) for each in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["-", "b" * 252, "/proc/b.tar"])
def test_path_that_takes_no_bundle_is_one_error(tmp_path: Path, maker: Maker, name: str) -> None:
    run = maker.create(Path(name) if name == "-" else tmp_path / name)
    assert run.returncode in (1, 2) and "`--output FILE.tar`" in _error(run)["hint"]


def test_wheel_damaged_in_the_cache_is_not_packed(tmp_path: Path, maker: Maker) -> None:
    maker.created(tmp_path / "one.tar")
    wheel = maker.cache / "sparkinstall/wheels/vllm-0.18.1-py3-none-any.whl"
    found, content = wheel.stat(), bytearray(wheel.read_bytes())
    content[40] ^= 1
    wheel.write_bytes(content)
    os.utime(wheel, ns=(found.st_atime_ns, found.st_mtime_ns))
    run = maker.create(tmp_path / "two.tar")
    assert (run.returncode, _error(run)["code"]) == (1, "bundle")
    assert f"{wheel} does not have its hash any more" in _error(run)["message"]
    assert "`sparkinstall cache verify`" in _error(run)["hint"]
    assert sparkinstall("cache", "verify", **maker.env).returncode == 3
    maker.created(tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_package_of_the_tool_damaged_in_the_cache_is_not_packed(tmp_path: Path, maker: Maker) -> None:
    (folder,) = (maker.cache / "sparkinstall/own-packages").glob("*-3.12-*")
    (folder / "rich-15.0.0-py3-none-any.whl").write_bytes(b"damaged")
    maker.env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    run = maker.create(tmp_path / "b.tar")
    assert run.returncode == 1 and "the tool's own packages could not be downloaded" in _error(run)["message"]
    assert not folder.exists(), "they are downloaded again"


def test_cache_that_is_read_only_is_one_error(tmp_path: Path, maker: Maker) -> None:
    shutil.rmtree(maker.cache / "sparkinstall/own-packages")
    with read_only(maker.cache):
        run = maker.create(tmp_path / "b.tar")
    assert (run.returncode, _error(run)["code"]) == (1, "storage"), output_of(run)
    assert not list(tmp_path.glob("b.tar*"))


def test_last_lines_say_how_to_install(tmp_path: Path, maker: Maker) -> None:
    """A stack of one's own is not in the bundle."""
    place, options = tmp_path / "my bundle.tar", ("--platform", maker.platform, *WHEEL)
    run = sparkinstall("bundle", "create", "--stack", maker.stack, *options, "--output", place, **maker.env)
    assert run.returncode == 0, output_of(run)
    assert run.stdout.splitlines()[-2:] == [
        "Carry it to the node, with the files of stack tiny, and there:",
        "    tar -xf 'my bundle.tar' sparkinstall && "
        "./sparkinstall/install.sh --bundle 'my bundle.tar' --stack FILE.yaml",
    ]


def test_update_leaves_out_the_wheels_of_the_older_bundle(tmp_path: Path, maker: Maker) -> None:
    old, new = tmp_path / "old.tar", tmp_path / "new.tar"
    maker.created(old)
    made = maker.created(new, "--since", old)
    assert made["updates"] and made["files"].keys() == {"sparkinstall", "tool"}
    assert [each.path for each in manifest_of(new).kept] == ["wheels/vllm-0.18.1-py3-none-any.whl"]
    assert sparkinstall("bundle", "verify", new).returncode == 0
    diff = envelope(sparkinstall("bundle", "diff", old, new, "--json"))
    assert (diff["data"]["changes"], diff["data"]["bytes_new"]) == ([], 0)


def test_older_bundle_for_another_architecture_is_refused(tmp_path: Path, maker: Maker) -> None:
    old = written(tmp_path, packed(platform=HERE), "old.tar")
    run = maker.create(tmp_path / "new.tar", "--since", old)
    assert (run.returncode, _error(run)["code"]) == (2, "usage")
    assert f"{old} is for {HERE}, and the new bundle for {OTHER}" in _error(run)["message"]


def test_older_bundle_may_be_of_an_older_tool(tmp_path: Path, maker: Maker) -> None:
    maker.created(tmp_path / "new.tar", "--since", written(tmp_path, packed({}, tool="0.0.1", platform=OTHER)))
    assert manifest_of(tmp_path / "new.tar").kept == ()


# --- NCCL's source


def _upstream(folder: Path) -> tuple[Path, str]:
    """A repository with the tag of the tiny stack's NCCL, and its commit."""
    git = ("git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e")
    (folder / "makefiles").mkdir(parents=True)
    (folder / "src").mkdir()
    (folder / "src/nccl.cc").write_bytes(bytes(range(256)))
    (folder / "makefiles/version.mk").write_text("NCCL_MAJOR := 2\nNCCL_MINOR := 28\nNCCL_PATCH := 9\n")
    (folder / "Makefile").write_text("all:\n")
    (folder / "Makefile").chmod(0o755)
    times = {**os.environ, "GIT_COMMITTER_DATE": "@1000 +0000", "GIT_AUTHOR_DATE": "@1000 +0000"}
    for line in ("init --quiet", "add .", "commit --quiet --message one", "tag --annotate v2.28.9-1 --message two"):
        subprocess.run([*git, *line.split()], check=True, env=times)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    return folder, head


def _mirror(upstream: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    clone = ("git", "clone", "--quiet", "--bare", "--depth", "1", "--branch", "v2.28.9-1")
    subprocess.run([*clone, f"file://{upstream}", str(to)], check=True)
    return to


def test_repository_is_unpacked_as_it_was(tmp_path: Path) -> None:
    upstream, commit = _upstream(tmp_path / "upstream")
    one, two = (git_objects.packed(_mirror(upstream, tmp_path / name)) for name in ("one.git", "two.git"))
    assert one == two
    cache = tmp_path / "cache"
    source = NcclSource("2.28.9", "v2.28.9-1", commit, "git", None, cache, offline=True)
    git_objects.unpack(one, source.mirror, source.tag, commit)
    assert source.bring(LocalSystem(str(tmp_path / "node")), "/source") == "/source"
    shutil.rmtree(tmp_path / "node/source/.git")
    shutil.rmtree(upstream / ".git")
    assert tree(tmp_path / "node/source") == tree(upstream)
    subprocess.run(["git", "-C", source.mirror, "fsck", "--strict"], check=True, capture_output=True)
    assert git_objects.packed(source.mirror) == one


def test_repository_that_several_runs_need_at_once_is_downloaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream, commit = _upstream(tmp_path / "upstream")
    monkeypatch.setattr(nccl_source, "REPOSITORY", f"file://{upstream}")
    source = NcclSource("2.28.9", "v2.28.9-1", commit, "git", None, tmp_path / "cache", offline=False)
    with ThreadPoolExecutor(4) as runs:
        found = list(runs.map(lambda _: source.mirrored(LocalSystem(str(tmp_path / "node"))), range(4)))
    assert found == [source.mirror] * 4
    assert list((tmp_path / "cache").iterdir()) == [source.mirror]


@pytest.mark.parametrize("content", [b"", b"x", b"0 blob 5\nab", b"0 blob -1\n\n", b"0 what 0\n\n", b"0 blob 0\n\n"])
def test_objects_that_are_not_the_commit_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match="it "):
        git_objects.unpack(content, tmp_path / "nccl.git", "v1", "0" * 40)
    assert not (tmp_path / "nccl.git").exists()


def test_bundle_brings_the_source_of_nccl(tmp_path: Path) -> None:
    stack = tiny_stack(tmp_path / "stack")
    upstream, commit = _upstream(tmp_path / "upstream")
    stack.write_text(stack.read_text().replace("dbc86fd06e8b0c4517b95d8958a09ccacf9520c9", commit))
    maker = Maker(tmp_path, stack)
    _mirror(upstream, maker.cache / "sparkinstall/nccl/nccl-v2.28.9-1.git")
    made = maker.created(tmp_path / "b.tar", settings=())
    assert made["files"]["nccl"] == 1
    update = maker.created(tmp_path / "u.tar", "--since", tmp_path / "b.tar", settings=())
    assert "nccl" not in update["files"]


# --- install


def _offline(*args: str | Path, **env: str) -> Run:
    """A verb on a machine without certificates, in a network namespace with a loopback only, which is down."""
    return _alone(command(*args), env)


def _alone(argv: Sequence[str], env: Mapping[str, str]) -> Run:
    bare = ("sh", "-ec", 'mount -t tmpfs none /etc/ssl; exec "$@"', "sh")
    inside = ("unshare", "--map-root-user", "--net", "--mount", *bare, *argv)
    mine = environment(**env)
    return subprocess.run(inside, env=mine, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle of a stack that a rehearsal installs, and the stack."""
    folder = tmp_path_factory.mktemp("made")
    maker = Maker(folder, small_stack(folder / "stack"))
    maker.created(folder / "b.tar")
    return folder / "b.tar", maker.stack


class Offline:
    """A machine without a network and with an empty cache."""

    def __init__(self, folder: Path, stack: Path) -> None:
        self.root, self.cache = folder / "node", folder / "empty-cache"
        self.options = ("--root", self.root, "--stack", stack, "--platform", OTHER, *WHEEL)
        self.env = {"XDG_CACHE_HOME": str(self.cache), "HOME": str(folder), "HF_HOME": str(folder / "hf")}

    def run(self, verb: str, *more: str | Path) -> Run:
        return _offline(verb, *self.options, *more, **self.env)


@pytest.fixture
def node(tmp_path: Path, bundle: tuple[Path, Path]) -> Offline:
    return Offline(tmp_path, bundle[1])


@pytest.mark.network
def test_rehearsal_without_a_network_is_installed_from_a_bundle(
    node: Offline, bundle: tuple[Path, Path], tmp_path: Path
) -> None:
    """With a model, which stays in the cache of the hub."""
    maker, file = Maker(tmp_path / "m", bundle[1]), tmp_path / "model.tar"
    with served(ModelHub(MODEL, dict(stored_models.FILES))) as hub:
        maker.env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "m/hf")}
        maker.created(file, "--model", MODEL)
    planned = node.run("plan", "--bundle", file)
    assert planned.returncode == 0 and "--bundle" in planned.stdout, output_of(planned)
    assert not node.root.exists() and not (node.cache / "sparkinstall/wheels").exists(), "plan changes nothing"
    done = node.run("all", "--bundle", file, "--json")
    assert envelope(done)["data"]["changed"] is True, output_of(done)
    again = node.run("all", "--bundle", file, "--json")
    assert envelope(again)["data"]["changed"] is False, output_of(again)
    assert node.run("verify").returncode == 0
    undone = _offline("uninstall", "--root", node.root, **node.env)
    assert undone.returncode == 0 and not node.root.exists(), output_of(undone)
    (model,) = envelope(_offline("models", "list", "--json", **node.env))["data"]["models"]
    assert (model["id"], model["revisions"][0]["complete"]) == (MODEL, True)


@pytest.mark.network
def test_plan_and_all_name_what_the_bundle_lacks(tmp_path: Path, node: Offline, bundle: tuple[Path, Path]) -> None:
    old = manifest_of(bundle[0])
    update = Maker(tmp_path / "m", bundle[1])
    update.created(tmp_path / "u.tar", "--since", bundle[0])
    planned = envelope(node.run("plan", "--bundle", tmp_path / "u.tar", "--json"))
    (check,) = (each for each in planned["data"]["preflight"] if each["name"] == "bundle")
    assert check["verdict"] == "fail" and "it lacks wheels: vllm==0.18.1, torch==" in check["found"]
    assert f"install the bundle that it updates (its manifest has the sha256 {old.digest[:12]}" in check["hint"]
    refused = node.run("all", "--bundle", tmp_path / "u.tar", "--json")
    assert (refused.returncode, _error(refused)["code"]) == (4, "preflight")
    assert not node.root.exists() and not node.cache.exists()
    assert node.run("all", "--bundle", bundle[0]).returncode == 0
    assert node.run("run", "environment", "--force", "--bundle", tmp_path / "u.tar").returncode == 0


@pytest.mark.network
@pytest.mark.parametrize("damage", ["cut", "bit", "version"])
def test_damaged_bundle_is_one_error_and_changes_nothing(
    tmp_path: Path, node: Offline, bundle: tuple[Path, Path], damage: str
) -> None:
    content = bytearray(bundle[0].read_bytes())
    if damage == "cut":
        del content[-1024:]
    elif damage == "bit":
        content[len(content) // 2] ^= 1
    path = written(tmp_path, packed(tool="0.0.1") if damage == "version" else bytes(content))
    before = tree(tmp_path, everything_with_times)
    for verb in ("plan", "all", "run environment"):
        run = node.run(*verb.split(), "--bundle", path, "--json")
        assert (run.returncode, _error(run)["code"]) == (1, "bundle"), output_of(run)
    assert tree(tmp_path, everything_with_times) == before


@pytest.mark.network
def test_bundle_for_another_node_is_refused(node: Offline, bundle: tuple[Path, Path]) -> None:
    options = ("plan", "--root", node.root, *WHEEL, "--bundle", bundle[0], "--json")
    run = _offline(*options, "--stack", bundle[1], **node.env)
    assert run.returncode == 1 and f"it is for {OTHER}, and this is {HERE}" in _error(run)["message"]
    assert f"--platform {HERE}" in _error(run)["hint"]
    run = _offline(*options, "--platform", OTHER, **node.env)
    assert run.returncode == 1 and "it has the stack tiny, and this node's is 0.29.0" in _error(run)["message"]


@pytest.mark.network
def test_cache_that_is_full_while_installing_is_one_error(node: Offline, bundle: tuple[Path, Path]) -> None:
    with small_disk(node.cache, "100k"):
        run = node.run("all", "--bundle", bundle[0], "--json")
        assert (run.returncode, _error(run)["code"]) == (1, "storage"), output_of(run)
        assert not node.root.exists(), "nothing was changed"
        resize(node.cache, "200m")
        assert node.run("all", "--bundle", bundle[0]).returncode == 0


@pytest.mark.network
def test_cache_that_cannot_take_a_wheel_is_no_fault_of_the_bundle(node: Offline, bundle: tuple[Path, Path]) -> None:
    options = (*node.options, "--bundle", bundle[0], "--json")
    run = _alone(("prlimit", "--fsize=100000", *command("all", *options)), node.env)
    assert (run.returncode, _error(run)["code"]) == (1, "storage"), output_of(run)
    assert _error(run)["message"].startswith(
        f"unpacking {bundle[0]} to {node.cache}/sparkinstall failed: the file would be"
    )
    assert not node.root.exists() and not list((node.cache / "sparkinstall/arriving").iterdir())


def test_bundle_that_this_user_may_not_read_is_left_to_the_verb() -> None:
    """click would refuse it without a hint."""
    verbs = [command_of(verb) for verb in ("all", "multi-node", "plan", "run")]
    verbs += cast(click.Group, command_of("bundle")).commands.values()
    files = [each for verb in verbs for each in verb.params if each.name in ("bundle", "file", "old", "new", "since")]
    assert len(files) == 9 and not [each.name for each in files if cast(click.Path, each.type).readable]


def test_bundle_decides_the_stack_unless_another_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, packed(stack="0.22.1"))
    assert with_its_stack(Target(bundle=path)).stack == "0.22.1"
    assert with_its_stack(Target(bundle=path, stack="0.33.0")).stack == "0.33.0"
    assert with_its_stack(Target(bundle=path, settings=("stack=0.33.0",))).stack is None
    assert with_its_stack(Target()).stack is None
    assert with_its_stack(Target(bundle=written(tmp_path, packed(stack="mine"), "mine.tar"))).stack is None
