"""NCCL built from source for one GPU architecture, and rebuilt only if an input changes."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from msgspec import Struct
from msgspec.structs import asdict

from sparkinstall import elf, payloads, schema
from sparkinstall.errors import BadConfig, Blocked
from sparkinstall.facts.decisions import as_text, recorded
from sparkinstall.facts.machine import cores
from sparkinstall.own_files import read_regular
from sparkinstall.resources import Drift, Ok, State, not_a_folder
from sparkinstall.resources.nccl_source import NcclSource
from sparkinstall.system import Reader, System
from sparkinstall.system.locks import folder_locked

KEPT_LIBRARY, KEPT_STAMP = "libnccl.so", "build.json"

# Seconds before a kill in which a compiler may have last written to an unfinished output. Observed: 0.6.
# nvcc, ld and generate.py write in place, and make treats any existing file as complete.
_SETTLED = 30
_CUDART_VERSION = re.compile(rb"#define\s+CUDART_VERSION\s+(\d+)")


class Recipe(Struct, frozen=True):
    """Everything that determines the built library. Equal recipes need no second build."""

    version: str
    arch: str
    compiler: str
    source: str
    only_functions: str | None

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


class Stamp(Struct, frozen=True):
    """A library's recipe and identity; `library`: size and mtime_ns of its file."""

    recipe: Recipe
    sha256: str = ""
    build_id: str | None = None
    library: tuple[int, int] | None = None


class NcclLibrary(Struct, frozen=True):
    """`folder`/lib/libnccl.so.2, built from `source` by the toolkit in `cuda_home` (a real path)."""

    folder: str
    source: NcclSource
    arch: str
    cuda_home: str | None
    jobs: int
    only_functions: str | None
    left: str = ""
    """Why a rehearsal cannot build it here, or ""."""

    @property
    def key(self) -> str:
        return f"nccl:{self.library}"

    @property
    def library(self) -> str:
        return f"{self.folder}/lib/libnccl.so.2"

    def node_only(self, on: Reader) -> str:
        # An installed or cached library needs no source.
        if self.left or isinstance(self.check(on), Ok) or self._kept_stamp(self.recipe()):
            return self.left
        why = self.source.out_of_reach(on)
        return f"building NCCL {self.source.version} ({why})" if why else ""

    def check(self, on: Reader) -> State:
        if taken := not_a_folder(on, self.folder):
            return taken
        stamp = recorded(on, self.stamp_path, Stamp)
        recipe = self.recipe()
        if stamp and stamp.recipe == recipe and stamp.library == self._identity(on):
            return Ok(f"{recipe.version} for sm_{self.arch}, build-id {str(stamp.build_id)[:12]}")
        is_kept, name = bool(self._kept_stamp(recipe)), f"NCCL {recipe.version} for sm_{self.arch}"
        what = f"install {name} from the cache" if is_kept else f"build {name} from {self.source.where}"
        if not is_kept and os.path.lexists(stamp_of_kept := self.kept(recipe) / KEPT_STAMP):
            what += f" ({stamp_of_kept} is damaged)"
        return Drift(what, _as_lines(stamp.recipe) if stamp else "", _as_lines(recipe))

    @property
    def stamp_path(self) -> str:
        """The node path of the file that says what was built, and from what."""
        return f"{self.folder}/build.json"

    def recipe(self) -> Recipe:
        return Recipe(
            self.source.version, self.arch, compiler_id(self.cuda_home), self.source.identity(), self.only_functions
        )

    def _identity(self, on: Reader) -> tuple[int, int] | None:
        """Return size and time of the library file, to detect changes; None if there is none."""
        try:
            found = os.stat(on.real(self.library))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size, found.st_mtime_ns

    def kept(self, recipe: Recipe) -> Path:
        """Return the real cache folder for this recipe: built here before, or by another node."""
        return self.source.cache / "built" / recipe.id

    def _kept_stamp(self, recipe: Recipe) -> Stamp | None:
        try:
            stamp = schema.read_json(Stamp, read_regular(self.kept(recipe) / KEPT_STAMP), KEPT_STAMP)
            return stamp if stamp.recipe == recipe else None
        except (OSError, ValueError):
            return None

    def apply(self, on: System) -> None:
        # --force rebuilds an up-to-date library from source.
        rebuild = isinstance(self.check(on), Ok)
        on.claim(self.folder)
        if rebuild or not self._take_kept(on):
            self._build(on)

    def _take_kept(self, on: System) -> bool:
        """Install the cached library of this recipe if it is valid; return whether it was."""
        recipe = self.recipe()
        stamp, library = self._kept_stamp(recipe), self.kept(recipe) / KEPT_LIBRARY
        try:
            content = read_regular(library)
            if stamp is None or stamp.sha256 != hashlib.sha256(content).hexdigest():
                return False
            self._prove(on, str(library), recipe)
        except (OSError, ValueError, Blocked):
            # A bad cached library is no error: build instead.
            return False
        self._install(on, recipe, content)
        return True

    def _install(self, on: System, recipe: Recipe, content: bytes) -> None:
        build, name = f"build-{recipe.id}", f"libnccl.so.{recipe.version.split('-')[0]}"
        on.clear(f"{self.folder}/{build}")
        on.write(f"{self.folder}/{build}/lib/{name}", content, 0o755)
        on.link(f"{self.folder}/{build}/lib/libnccl.so.2", name)
        on.link(f"{self.folder}/lib", f"{build}/lib")
        self._write_stamp(on, recipe)

    def _build(self, on: System) -> None:
        source = self.source.bring(on, f"{self.folder}/source")
        recipe = self.recipe()
        build = f"build-{recipe.id}"
        self._make(on, on.real(source), on.real(f"{self.folder}/{build}"))
        self._prove(on, on.real(f"{self.folder}/{build}/lib/libnccl.so.2"), recipe)
        on.link(f"{self.folder}/lib", f"{build}/lib")
        on.clear(f"{self.folder}/{build}/obj")
        self._write_stamp(on, recipe)
        # Cache the library for reuse: after an uninstall, below another prefix, by another stack.
        folder, files = self.kept(recipe), {KEPT_LIBRARY: self.library, KEPT_STAMP: self.stamp_path}
        # An unwritable cache only costs a later build.
        with suppress(OSError), folder_locked(folder):
            for name, path in files.items():
                shutil.copyfile(on.real(path), folder / f"{name}.new")
                (folder / f"{name}.new").replace(folder / name)

    def _make(self, on: System, source: str, build: str) -> None:
        unfinished = _unfinished(Path(build))
        if unfinished:
            on.run("rm", "-rf", "--", *unfinished)
        jobs = self.jobs or cores()
        argv = ["make", f"-j{jobs}", "-C", source, "src.build", f"BUILDDIR={build}", f"CUDA_HOME={self.cuda_home}"]
        argv.append(f"NVCC_GENCODE=-gencode=arch=compute_{self.arch},code=sm_{self.arch}")
        if self.only_functions:
            argv.append(f"ONLY_FUNCS={self.only_functions}")
        listed = on.ask(*argv, "-n", timeout=120).out
        on.run(*argv, watch=_Compiled(on.progress, total=listed.count("Compiling")).read)

    def _prove(self, on: System, library: str, recipe: Recipe) -> None:
        archs = {code.arch for code in elf.gpu_code(Path(library))}
        if f"sm_{self.arch}" not in archs:
            raise Blocked(f"the built NCCL has no sm_{self.arch} code", cause=f"it has {sorted(archs)}")
        answer = on.ask(sys.executable, "-c", payloads.source("nccl_version"), library)
        if answer.out.strip() != str(version_number(recipe.version)):
            raise Blocked(
                f"the built NCCL is not {recipe.version}: it reports {answer.out.strip() or answer.err.strip()}",
                hint="`nccl.source` is the source of another version: name the right one, or set `nccl.version`",
            )

    def _write_stamp(self, on: System, recipe: Recipe) -> None:
        real = Path(on.real(self.library))
        digest = hashlib.sha256(real.read_bytes()).hexdigest()
        stamp = Stamp(recipe, digest, elf.build_id(real), self._identity(on))
        on.write(self.stamp_path, as_text(stamp).encode())


def _as_lines(recipe: Recipe) -> str:
    return "".join(f"{name}: {value}\n" for name, value in asdict(recipe).items() if value is not None)


class _Compiled(Struct):
    """Counts compiled units in make's output."""

    on_progress: Callable[[int, int, str], None]
    total: int
    done: int = 0

    def read(self, line: str) -> None:
        if line.startswith("Compiling"):
            self.done += 1
            self.on_progress(self.done, self.total, "files")


def _unfinished(build: Path) -> list[str]:
    """Return files that a killed build may have left unfinished: those written last, and related generated and
    linked files."""
    paths = [Path(base, name) for base, _, names in os.walk(build) for name in names]
    files = {path: path.lstat() for path in paths}
    if not files:
        return []
    newest = max(found.st_mtime for found in files.values())
    doubtful = [path for path, found in files.items() if found.st_size == 0 or found.st_mtime > newest - _SETTLED]
    # generate.py writes many files, then their list; without the list make does not notice missing ones.
    generated = {parent for path in doubtful for parent in path.parents if parent.name == "gensrc"}
    linked = [build / "lib", build / "bin"]
    return sorted(str(path) for path in {*doubtful, *generated, *linked})


def version_number(version: str) -> int:
    """Return `2.28.9` as ncclGetVersion() reports it: 22809 (NCCL's NCCL_VERSION macro)."""
    numbers = [int(part) for part in version.split("-")[0].split(".")]
    if len(numbers) != 3:
        raise BadConfig(f"`nccl.version` must be three numbers such as 2.28.9, not {version}")
    return numbers[0] * 10000 + numbers[1] * 100 + numbers[2]


def compiler_id(cuda_home: str | None) -> str:
    """Identify the CUDA compiler without running it."""
    if cuda_home is None:
        return "none"
    header = Path(cuda_home, "include", "cuda_runtime_api.h")
    found = _CUDART_VERSION.search(header.read_bytes()) if header.is_file() else None
    version = int(found[1]) if found else 0
    return f"CUDA {version // 1000}.{version % 1000 // 10}, nvcc of {Path(cuda_home, 'bin/nvcc').stat().st_size} bytes"
