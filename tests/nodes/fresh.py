"""A fresh Debian node with the checkout on it, and the commands that a user types there."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.lab import cache, commands
from tests.lab.commands import Completed
from tests.lab.node import Bind, FreshNode
from tests.support import cpu_stack
from tests.support.bytecode import compile_modules
from tests.support.cuda_toolkit import toolkit
from tests.support.nccl_source import tarball

REPOSITORY = Path(__file__).resolve().parents[2]
LEFT_OUT = (".git", ".venv", ".mypy_cache", ".ruff_cache", ".hypothesis", "__pycache__")
CHECKOUT = "/home/spark/sparkinstall"
COMMAND = "/home/spark/.local/bin/sparkinstall"
# Checks of a Spark's hardware; all others must pass here too.
NOT_A_SPARK = ("machine", "arch", "os", "driver", "memory", "disk")
SPARK_UID = 1000
FULL_STACK = f"{CHECKOUT}/tests/lab/stacks/lab-full.yaml"
STACK = "/srv/stack"
CPU_STACK = f"{STACK}/{cpu_stack.NAME}.yaml"
CUDA_LIBRARIES = "/srv/cuda-libraries"
CONFIG = """\
stack: {stack}
nccl:
  source: /srv/nccl/{tarball}
  version: 2.29.7
  only_functions: AllReduce Sum f32 RING SIMPLE
"""

CACHE = "/home/spark/.cache/sparkinstall"
CCACHE = "/srv/ccache"
NVCC = Path(__file__).with_name("nvcc")
BEFORE_THE_COMPILER = Path(__file__).with_name("ccache")
# ccache itself takes what has such a name for ccache, and looks for the compiler behind it.
BEFORE = "/srv/ccache-and-files"
HOME_OF_TOOL = "home/spark/.local/share/sparkinstall"


@contextmanager
def fresh_node(whose: str, *more: Bind, on_cpu: bool = False) -> Iterator[FreshNode]:
    """A node on this machine's network with a CUDA toolkit in its usual place and a cache that outlives it.

    `whose`: the test file that asks. Files run in parallel, and each has a cache of its own. `on_cpu`: with the wheels
    of vLLM for the CPU.
    """
    # Of two runs at once the second has another one.
    cache_name = cache.own_name(f"{whose}-cache")
    # NCCL must be built in this run.
    shutil.rmtree(kept_folder(cache_name) / "nccl/built", ignore_errors=True)
    binds = [*what_nccl_is_built_of(), *own_cache(cache_name, on_cpu=on_cpu), *more]
    with FreshNode(bind=binds) as node:
        node.run("chown", "spark:spark", "/home/spark/.cache")
        node.push(REPOSITORY, CHECKOUT, owner="spark", exclude=LEFT_OUT)
        node.write("/etc/sparkinstall.yaml", CONFIG.format(stack=FULL_STACK, tarball=tarball().name))
        put_before_the_compiler(node)
        yield node


def install_tool(node: FreshNode) -> None:
    """Run the checkout's install.sh, which finds what it has made of the same files on another node, if it has.

    Else it takes ten seconds of a processor, on each of a dozen nodes. `test_fresh_node.py` runs it as users do.
    """
    kept, there = cache.folder() / "tool", node.root / HOME_OF_TOOL
    made_from = "tool/made-from"
    with cache.locked(cache.folder() / "tool.lock"):
        if (kept / made_from).is_file():
            node.run("mkdir", "-p", f"/{HOME_OF_TOOL}", user="spark")
            commands.run("cp", "-a", f"{kept}/.", str(there))
        node.run("./install.sh", "--tool-only", user="spark", cwd=CHECKOUT, timeout=1200)
        if not (kept / made_from).is_file() or (kept / made_from).read_text() != (there / made_from).read_text():
            _replace(kept, there)


def _replace(kept: Path, source: Path) -> None:
    """Copy a tree to `kept`; a killed run leaves the former one or none."""
    new = kept.with_name(f"{kept.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    commands.run("cp", "-a", str(source), str(new))
    shutil.rmtree(kept, ignore_errors=True)
    new.rename(kept)


def own_cache(name: str, *, on_cpu: bool = False) -> list[Bind]:
    """The cache `name` for one node, so that it has no builds of the others; the wheelhouse is shared.

    `on_cpu`: the wheelhouse has vLLM for the CPU (`CPU_STACK`), and the node what PyTorch loads besides.
    """
    own = Bind(kept_folder(name), CACHE, read_only=False)
    if not on_cpu:
        return [own, Bind(kept_folder("node-cache/wheels"), f"{CACHE}/wheels", read_only=False)]
    return [own, Bind(cpu_stack.tree() / "wheels", f"{CACHE}/wheels", read_only=False), *beside_the_wheels()]


def beside_the_wheels() -> list[Bind]:
    """The stack for the CPU, and the libraries of CUDA, which its wheels lack."""
    return [Bind(cpu_stack.tree() / "stack", STACK), Bind(cpu_stack.tree() / "cuda", CUDA_LIBRARIES)]


def let_pytorch_find_cuda(node: FreshNode) -> None:
    """On a node with `beside_the_wheels`."""
    node.write("/etc/ld.so.conf.d/cuda.conf", f"{CUDA_LIBRARIES}\n")
    node.run("ldconfig")


def what_nccl_is_built_of() -> list[Bind]:
    """The CUDA toolkit in its usual place, NCCL's source, and what was compiled before, for all nodes and later runs.

    Most of the time of NCCL's build is that of the compilers. The toolkit's nvcc is one of ours (tests/nodes/nvcc).
    """
    cuda = [Bind(toolkit(), "/usr/local/cuda"), Bind(toolkit(), "/srv/cuda"), Bind(NVCC, "/usr/local/cuda/bin/nvcc")]
    kept = [Bind(kept_folder("ccache"), CCACHE, read_only=False), Bind(BEFORE_THE_COMPILER, BEFORE)]
    return [*cuda, *kept, Bind(tarball().parent, "/srv/nccl")]


def put_before_the_compiler(node: FreshNode, *, used: bool = True) -> None:
    """Let ccache answer for g++ and nvcc; if it is not `used`, they compile each time."""
    for name in ("g++", "ccache"):
        node.run("ln", "-sf", BEFORE, f"/usr/local/bin/{name}")
    # NCCL's files are unpacked just before; what they contain tells whether they have changed.
    settings = f"cache_dir = {CCACHE}\ndisable = {str(not used).lower()}\n"
    node.write("/etc/ccache.conf", f"{settings}sloppiness = include_file_mtime,include_file_ctime,time_macros\n")


def compiled_checkout(scratch: Path, place: str) -> Bind:
    """A copy of the checkout below `scratch`, to read at `place`, with the bytecode that its many processes need."""
    scratch.chmod(0o755)
    copy = shutil.copytree(REPOSITORY, scratch / "checkout", ignore=shutil.ignore_patterns(*LEFT_OUT))
    compile_modules(copy, place)
    return Bind(copy, place)


def kept_folder(name: str) -> Path:
    """A folder of the user `spark` that outlives the nodes."""
    folder = cache.folder()
    for part in name.split("/"):
        folder /= part
        folder.mkdir(exist_ok=True)
        os.chown(folder, SPARK_UID, SPARK_UID)
    return folder


def ignoring() -> list[str]:
    """`--ignore` for each check that asks for the hardware of a Spark."""
    return [word for name in NOT_A_SPARK for word in ("--ignore", name)]


def sparkinstall(node: FreshNode, *argv: str, check: bool = True, timeout: float = 1800) -> Completed:
    """The installed command, as the ordinary user `spark`."""
    return node.run(COMMAND, *argv, user="spark", cwd="/home/spark", check=check, timeout=timeout)


def file_metadata(node: FreshNode, *folders: str) -> str:
    """All files with inode, size, owner, mode and times, including the ctime, which every write changes."""
    return node.run("find", *folders, "-printf", "%p %i %s %u %m %T@ %C@ %l\\n").stdout


def objects(node: FreshNode, prefix: str, *, age: float = 0) -> dict[str, float]:
    """The object files of the NCCL build below `prefix` that are done, each with its time of change (s).

    `age`: only those that are so many seconds older than the newest file of the build, and what they depend on too.
    """
    times = {path: _changed(path) for path in _build(node, prefix) if path.suffix}
    newest = max(times.values(), default=0.0)
    # A compiler that is asked for the dependencies may take seconds; the product removes each file by its own age.
    return {
        str(path): at
        for path, at in times.items()
        if _is_done(path) and at and max(at, _changed(path.with_suffix(".d"))) <= newest - age
    }


def grow_old(node: FreshNode, prefix: str, seconds: int) -> None:
    """Date the files of the NCCL build below `prefix` back, as if they had been written so much earlier."""
    for path in _build(node, prefix):
        # Temporary files go meanwhile.
        with suppress(FileNotFoundError):
            at = path.stat().st_mtime_ns - seconds * 10**9
            os.utime(path, ns=(at, at))


def _build(node: FreshNode, prefix: str) -> list[Path]:
    build = node.root / prefix.lstrip("/") / "nccl"
    # Folders go while they are listed: walk passes over one that is gone, glob does not.
    walked = (each for top in build.glob("build-*") for each in os.walk(top))
    return [Path(folder, name) for folder, _, names in walked for name in names]


def _is_done(path: Path) -> bool:
    """Whether it is an object file that a make which is ended now leaves: it removes that of a rule which still runs.

    After the object a rule of NCCL's writes, by a temporary file, what it depends on; not so for the device's code.
    """
    dependencies = path.with_suffix(".d")
    written = dependencies.exists() and not Path(f"{dependencies}.tmp").exists()
    return path.suffix == ".o" and (written or "device" in path.parts)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def wait_for_objects(
    node: FreshNode, prefix: str, *, age: float = 0, after: float = 0, seconds: float = 600
) -> dict[str, float]:
    """Return `objects` when one of them was written after a time."""
    until = time.monotonic() + seconds
    found = objects(node, prefix, age=age)
    while max(found.values(), default=0) <= after:
        assert time.monotonic() < until, f"only {objects(node, prefix)} in {seconds:g} s"
        time.sleep(0.1)
        found = objects(node, prefix, age=age)
    return found


# dpkg copies its own files to /var/backups at midnight.
NOT_COMPARED = (
    "/proc", "/sys", "/dev", "/run", "/tmp", "/var/tmp", "/var/log", "/var/cache", "/var/lib/apt", "/var/lib/dpkg",
    "/var/backups", "/var/lib/systemd", "/etc/ld.so.cache", "/home/spark/.cache", "/home/spark/.local", CHECKOUT,
    "/usr/local/cuda", "/srv", "/usr/share/man", "/usr/lib/python3*/__pycache__", "*/__pycache__",
)  # fmt: skip
