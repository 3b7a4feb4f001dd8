"""Build nccl-tests, NVIDIA's benchmark of NCCL, against our library, and run it."""

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from sparkinstall.facts import machine
from sparkinstall.facts.env_file import with_env_file
from sparkinstall.node import Node, cuda_home, nccl_library, site_packages
from sparkinstall.probes import Finding, Probe, failed, nccl, passed, skipped
from sparkinstall.system import Reader, Result
from sparkinstall.system.locks import folder_locked
from sparkinstall.system.workshop import Workshop

REPOSITORY = "https://github.com/NVIDIA/nccl-tests.git"
TAG, COMMIT = "v2.19.6", "a0b82b2260cf5152b9f8c061bbf7eaf0ba096432"
PROGRAMS = ("all_gather_perf", "all_reduce_perf")

_BUILD_LIMIT, _RUN_LIMIT = 900.0, 120.0
_GIB, _LEAST = 1 << 30, 1 << 23
# Each GPU holds the sent, received and expected data; and the node needs memory too.
_SHARE = 8
_VERSION = re.compile(rb"#define\s+NCCL_(?:MAJOR|MINOR|PATCH)\s+(\d+)")
_BANDWIDTH = re.compile(r"^# Avg bus bandwidth\s*:\s*([0-9.]+)", re.MULTILINE)
_LIBRARY = re.compile(r"nccl-library=(\d+)")
_WRONG = re.compile(r"^# Out of bounds values\s*:\s*(\d+)", re.MULTILINE)


class NotBuilt(Exception):
    """nccl-tests is unavailable here, and why."""


def probes(node: Node) -> Iterable[Probe]:
    """Yield the measurement between this node's GPUs, if it has several: a Spark has one."""
    if gpus() > 1:
        yield Probe(
            "nccl-local", "NCCL between the GPUs of this node", lambda on: _local(node, on), "gpu",
            "A model on several GPUs answers more slowly than possible.", load=True,
        )  # fmt: skip


def gpus() -> int:
    """Return the number of NVIDIA GPUs, by their device files."""
    names = (name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name))
    return sum(stat.S_ISCHR(os.stat(f"/dev/{name}").st_mode) for name in names)


# --- the build


def programs(node: Node, on: Reader) -> dict[str, Path]:
    """Return the programs by name, built for `nccl.arch` at the first call and cached.

    Raises:
        NotBuilt: NCCL, compiler or source is missing, or the build fails.
    """
    library, home = nccl_library(node, on), cuda_home(node)
    if library is None or on.entry(library) is None:
        raise NotBuilt("there is no NCCL to measure: `sparkinstall all`")
    if home is None:
        raise NotBuilt("there is no CUDA toolkit to build nccl-tests with: `nccl.cuda_home`")
    cache, recipe = workshop(node), _recipe(node, home)
    folder = cache.folder / recipe
    if not _are_built(folder):
        # Another run may be building them.
        with folder_locked(cache.folder):
            if not _are_built(folder):
                _build(cache, recipe, home, node, on.real(library), _headers(node, on))
    return {name: folder / name for name in PROGRAMS}


def _are_built(folder: Path) -> bool:
    return all((folder / name).is_file() for name in PROGRAMS)


def _recipe(node: Node, home: str) -> str:
    parts = (COMMIT, node.nccl_version, node.config.nccl.arch, str(Path(home, "bin/nvcc").stat().st_size))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _build(cache: Workshop, recipe: str, home: str, node: Node, library: str, headers: str) -> None:
    work = cache.new_folder(f"{recipe}.new")
    _source(cache, work / "source")
    # Our library and headers of its version, in the layout that nccl-tests expects.
    (work / "nccl/lib").mkdir(parents=True)
    (work / "nccl/lib/libnccl.so").symlink_to(library)
    (work / "nccl/include").symlink_to(headers)
    _run_or_raise(cache, *_make(node, home, work), doing="nccl-tests cannot be built")
    folder = cache.new_folder(recipe)
    for name in PROGRAMS:
        (work / "build" / name).rename(folder / name)
    cache.remove(work.name)


def workshop(node: Node) -> Workshop:
    """Return the folder of nccl-tests in the user's cache."""
    return Workshop(node.cache / "nccl-tests")


def mirror(cache: Workshop) -> Path:
    """Return the copy of the upstream repository, which may be missing."""
    return cache.folder / f"nccl-tests-{TAG}.git"


def _source(cache: Workshop, to: Path) -> None:
    copy = ("git", "clone", "--quiet", "--branch", TAG, str(_mirrored(cache)), str(to))
    _run_or_raise(cache, *copy, doing="nccl-tests cannot be unpacked")


def mirrored(cache: Workshop) -> Path:
    """Return the copy of the upstream repository at the expected commit; download it if it is missing.

    Raises:
        NotBuilt: it cannot be reached, or the tag is another commit.
    """
    with folder_locked(cache.folder):
        return _mirrored(cache)


def _mirrored(cache: Workshop) -> Path:
    copy = mirror(cache)
    if not (copy / "HEAD").exists():
        waiting = cache.new_folder(f"nccl-tests-{TAG}.new")
        clone = ("git", "clone", "--quiet", "--bare", "--depth", "1", "--branch", TAG, REPOSITORY)
        _run_or_raise(cache, *clone, str(waiting), doing=f"{REPOSITORY} cannot be fetched")
        waiting.rename(copy)
    head = cache.run("git", "-C", str(copy), "rev-parse", f"{TAG}^{{commit}}", timeout=30).out.strip()
    if head != COMMIT:
        raise NotBuilt(f"{TAG} of {REPOSITORY} is {head or 'missing'}, and {COMMIT} is expected")
    return copy


def _headers(node: Node, on: Reader) -> str:
    builds = [f"{node.nccl_folder}/{name}/include" for name in on.names(node.nccl_folder)]
    # A library built by another node comes without headers; those of torch's NCCL may have the same version.
    for folder in (*builds, f"{site_packages(node, on)}/nvidia/nccl/include"):
        version = b".".join(_VERSION.findall(on.read(f"{folder}/nccl.h") or b"")).decode()
        if version == node.nccl_version.split("-")[0]:
            return os.path.realpath(on.real(folder))
    raise NotBuilt(f"there is no nccl.h of NCCL {node.nccl_version} to build nccl-tests with")


def _make(node: Node, home: str, work: Path) -> tuple[str, ...]:
    arch = node.config.nccl.arch
    return (
        *("make", f"-j{node.config.nccl.jobs or machine.cores()}", "-C", str(work / "source/src"), "build"),
        *(f"BUILDDIR={work / 'build'}", f"NCCL_HOME={work / 'nccl'}", f"CUDA_HOME={home}", "CUDARTLIB=cudart_static"),
        f"NVCC_GENCODE=-gencode=arch=compute_{arch},code=sm_{arch}",
        f"BIN_FILES_LIST={' '.join(name.removesuffix('_perf') for name in PROGRAMS)}",
    )


def _run_or_raise(cache: Workshop, *argv: str, doing: str) -> None:
    answer = cache.run(*argv, timeout=_BUILD_LIMIT)
    if not answer.ok:
        raise NotBuilt(f"{doing}: {_last_line(answer)}")


def _last_line(answer: Result) -> str:
    lines = [line for line in (answer.err or answer.out).splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
    return (telling or lines or [f"exit code {answer.code}"])[0].strip()[:300]


# --- the measurement


class Measured(Struct, frozen=True):
    """The result of one program: bus bandwidth in GB/s, number of wrong values, and the loaded NCCL."""

    bandwidth: float
    wrong: int
    library: str


def read(output: str) -> Measured | None:
    """Parse the output of a program of nccl-tests; None if it did not finish."""
    bandwidth, wrong, library = (each.search(output) for each in (_BANDWIDTH, _WRONG, _LIBRARY))
    if not (bandwidth and wrong and library):
        return None
    return Measured(float(bandwidth[1]), int(wrong[1]), nccl.in_words(int(library[1])))


def size(available: int, count: int) -> int:
    """Return how many bytes `count` GPUs may exchange with `available` bytes free; 0: too few to measure."""
    found = min(_GIB, available // (_SHARE * count))
    return found if found >= _LEAST else 0


def _local(node: Node, on: Reader) -> Finding:
    if on.entry(node.env_file) is None:
        return failed("there is no env file", "run `sparkinstall all`")
    # The real machine's memory, even in a rehearsal.
    free = machine.parse_meminfo(Path("/proc/meminfo").read_bytes()).get("MemAvailable", 0) << 10
    if not (amount := size(free, gpus())):
        return skipped(f"only {free >> 20} MiB of memory are free: a measurement could freeze the node")
    try:
        built = programs(node, on)
    except NotBuilt as why:
        return skipped(str(why))
    return judged(node, {name: _run(node, on, path, amount) for name, path in built.items()})


def _run(node: Node, on: Reader, program: Path, amount: int) -> Result:
    argv = (str(program), "-b", str(amount), "-e", str(amount), "-g", str(gpus()))
    # NVLink multicast affects the whole fabric, which others may share; a Spark has none.
    return with_env_file(node, on, *argv, timeout=_RUN_LIMIT, NCCL_NVLS_ENABLE="0")


def judged(node: Node, answers: dict[str, Result]) -> Finding:
    wanted = f"NCCL {node.nccl_version}, and every value correct"
    found = []
    for name, answer in answers.items():
        measured = read(answer.out)
        if not answer.ok or measured is None:
            return failed(f"{name}: {_last_line(answer)}", "check with `nvidia-smi` that the GPUs are free", wanted)
        if measured.library != node.nccl_version.split("-")[0]:
            return failed(f"{name} had NCCL {measured.library} loaded", "run `sparkinstall run env-files`", wanted)
        if measured.wrong:
            return failed(f"{name}: {measured.wrong} values are wrong", "do not use this NCCL: report it", wanted)
        found.append(f"{name.removesuffix('_perf')} {measured.bandwidth:.1f} GB/s")
    return passed(f"{', '.join(found)} (bus bandwidth, {gpus()} GPUs)", wanted)
