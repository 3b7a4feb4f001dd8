"""elf.py reads real binaries: libraries from gcc, GPU code from nvcc, compared with the output of cuobjdump."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkinstall.elf import (
    GpuCode,
    NotALibrary,
    build_id,
    defined_symbols,
    gpu_code,
    needed,
    undefined_symbols,
)
from tests.support.cuda_toolkit import toolkit
from tests.support.wheel_member import wheel_member

BUILD_ID = "0123456789abcdef0123456789abcdef01234567"

QUESTIONS = (
    build_id,
    needed,
    gpu_code,
    lambda path: undefined_symbols(path, "n"),
    lambda path: defined_symbols(path, ""),
)

LIBRARY = """
extern int ncclNeeded(void), otherNeeded(void);
extern int ncclMayBeAbsent(void) __attribute__((weak));
static int ncclPrivate(void) { return otherNeeded(); }
__attribute__((visibility("hidden"))) int ncclHidden(void) { return ncclPrivate(); }
__attribute__((visibility("protected"))) int ncclProtected(void) { return 1; }
__attribute__((weak)) int ncclReplaceable(void) { return 2; }
int ncclOffered = 3;
int ncclOffer(void) { return ncclNeeded() + ncclHidden() + (ncclMayBeAbsent ? ncclMayBeAbsent() : 0); }
int otherOffer(void) { return 0; }
"""

KERNEL = "__global__ void scale(float *x, float by) { x[threadIdx.x] *= by; }\n"


def compiled(folder: Path, *options: str, source: str = LIBRARY) -> Path:
    library, code = folder / "libmade.so", folder / "made.c"
    code.write_text(source)
    run("gcc", "-shared", "-fPIC", "-o", str(library), str(code), *options)
    return library


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = [f"-Wl,--build-id=0x{BUILD_ID}", "-Wl,--no-as-needed", "-lm", "-lgcc_s"]
    return compiled(tmp_path_factory.mktemp("made"), *options)


class TestLinking:
    def test_build_id_is_the_one_given_to_the_linker(self, made: Path) -> None:
        assert build_id(made) == BUILD_ID

    def test_build_id_absent_is_none(self, tmp_path: Path) -> None:
        assert build_id(compiled(tmp_path, "-Wl,--build-id=none")) is None

    def test_needed_is_in_the_order_of_the_file(self, made: Path) -> None:
        assert needed(made) == ("libm.so.6", "libgcc_s.so.1", "libc.so.6")


class TestSymbols:
    def test_undefined_symbols_are_those_required_to_load(self, made: Path) -> None:
        assert undefined_symbols(made, "nccl") == {"ncclNeeded"}
        assert "otherNeeded" in undefined_symbols(made, "")

    def test_defined_symbols_are_those_other_libraries_can_use(self, made: Path) -> None:
        offered = {"ncclOffer", "ncclOffered", "ncclProtected", "ncclReplaceable"}
        assert defined_symbols(made, "nccl") == offered
        assert "otherOffer" in defined_symbols(made, "")

    def test_defined_symbols_have_no_version_in_the_name(self, tmp_path: Path) -> None:
        versions = tmp_path / "made.map"
        versions.write_text("MADE_1 { global: ncclOffer; local: *; };")
        library = compiled(tmp_path, f"-Wl,--version-script={versions}")
        assert defined_symbols(library, "nccl") == {"ncclOffer"}

    def test_defined_symbols_of_a_stripped_library_are_the_same(self, made: Path, tmp_path: Path) -> None:
        run("strip", "-o", str(tmp_path / "stripped.so"), str(made))
        assert defined_symbols(tmp_path / "stripped.so", "nccl") == defined_symbols(made, "nccl")


# One compilation takes sm_120 or sm_120f, not both: each has its own, and they are linked together.
ONE_LIBRARY = (
    "sm_90a",
    "sm_120",
    "sm_120a",
    "sm_120f",
    "sm_121",
    "compute_90a",
    "compute_120",
    "compute_120f",
)
A_SPARKS = ("sm_120f", "sm_121", "compute_120")
COMPRESSIONS = {"none": "none", "lz4": "speed", "zstd": "size"}


class GpuObjects:
    """Object files with the code of one architecture, each compiled once: two libraries may need the same."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def linked(self, compression: str, architectures: tuple[str, ...]) -> Path:
        """A library with the code of these architectures."""
        library = self._folder / f"lib{compression}-{len(architectures)}.so"
        if not library.exists():
            objects = [str(self._compiled(compression, each)) for each in architectures]
            run(nvcc(), "-shared", "-cudart", "none", *objects, "-o", str(library))
        return library

    def _compiled(self, compression: str, architecture: str) -> Path:
        source = self._folder / f"{architecture}.cu"
        made = self._folder / f"{architecture}-{compression}.o"
        if not made.exists():
            source.write_text(KERNEL.replace("scale", f"scale_{architecture}"))
            real = f"arch={architecture.replace('sm', 'compute')},code={architecture}"
            options = (
                "-Xfatbin",
                "-compress-all",
                f"-compress-mode={COMPRESSIONS[compression]}",
                "-Xcompiler",
                "-fPIC",
            )
            run(nvcc(), "-gencode", real, *options, "-c", str(source), "-o", str(made))
        return made


def nvcc() -> str:
    return str(toolkit() / "bin" / "nvcc")


def listed_by_cuobjdump(library: Path) -> Counter[GpuCode]:
    listing = run(str(toolkit() / "bin" / "cuobjdump"), str(library))
    pieces = re.findall(r"^Fatbin (elf|ptx) code:\n=+\narch = sm_(\w+)$", listing, re.MULTILINE)
    return Counter(GpuCode("cubin", f"sm_{a}") if k == "elf" else GpuCode("ptx", f"compute_{a}") for k, a in pieces)


@pytest.mark.network
class TestGpuCode:
    def test_gpu_code_distinguishes_every_architecture(self, gpu_objects: GpuObjects) -> None:
        library = gpu_objects.linked("zstd", ONE_LIBRARY)
        assert sorted(code.arch for code in gpu_code(library)) == sorted(ONE_LIBRARY)
        assert Counter(gpu_code(library)) == listed_by_cuobjdump(library)

    @pytest.mark.parametrize("compression", COMPRESSIONS)
    def test_gpu_code_is_the_same_in_every_compression(self, compression: str, gpu_objects: GpuObjects) -> None:
        library = gpu_objects.linked(compression, A_SPARKS)
        assert [code.arch for code in gpu_code(library)] == list(A_SPARKS)
        assert Counter(gpu_code(library)) == listed_by_cuobjdump(library)

    def test_gpu_code_has_the_kind_of_each_architecture(self, gpu_library: Path) -> None:
        kinds = [code.kind for code in gpu_code(gpu_library)]
        assert kinds == ["cubin", "cubin", "ptx"]

    def test_gpu_code_for_a_later_link_is_not_counted(self, tmp_path: Path) -> None:
        source, library = tmp_path / "later.cu", tmp_path / "liblater.so"
        source.write_text(KERNEL)
        options = ["-gencode=arch=compute_121,code=sm_121", "-rdc=true", "-Xcompiler", "-fPIC", "-shared"]
        run(nvcc(), *options, "-cudart", "shared", str(source), "-o", str(library))
        assert b"__nv_relfatbin" in library.read_bytes()
        assert Counter(gpu_code(library)) == listed_by_cuobjdump(library) == {GpuCode("cubin", "sm_121"): 1}

    def test_gpu_code_of_the_aarch64_wheel_has_family_code(self, tmp_path: Path) -> None:
        library = tmp_path / "_C.so"
        library.write_bytes(wheel_member("0.22.1", "vllm/_C_stable_libtorch.abi3.so"))
        assert "libcudart.so.13" in needed(library)
        kept = Counter(code.arch for code in gpu_code(library) if code.arch.startswith("sm_12"))
        assert kept == {"sm_120": 18, "sm_120f": 10}


class TestNotALibrary:
    def test_gpu_code_absent_is_empty(self, made: Path) -> None:
        assert gpu_code(made) == ()

    @pytest.mark.parametrize("content", [b"", b"\x7fELF", b"#!/bin/sh\n" * 20, b"\0" * 4096])
    def test_file_that_is_no_library_is_named(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "libnccl.so.2"
        path.write_bytes(content)
        for ask in QUESTIONS:
            with pytest.raises(NotALibrary, match=r"libnccl\.so\.2"):
                ask(path)

    def test_object_file_is_no_library(self, made: Path, tmp_path: Path) -> None:
        run("gcc", "-c", str(made.with_name("made.c")), "-o", str(tmp_path / "made.o"))
        with pytest.raises(NotALibrary, match="shared library"):
            needed(tmp_path / "made.o")

    def test_missing_file_raises_file_not_found(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            build_id(tmp_path / "absent.so")

    def test_truncated_library_is_no_library(self, made: Path, tmp_path: Path) -> None:
        # The section table is the last part of the file: any cut damages it.
        whole, cut = made.read_bytes(), tmp_path / "cut.so"
        for size in range(0, len(whole), 97):
            cut.write_bytes(whole[:size])
            with pytest.raises(NotALibrary):
                needed(cut)


def ask_everything(path: Path) -> None:
    for ask in QUESTIONS:
        try:
            ask(path)
        except NotALibrary:
            pass


# A flipped byte mostly hits code: whole words of extreme values damage sizes and offsets.
DAMAGE = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\xff" * 4])),
    ),
    min_size=1,
    max_size=12,
)


def damaged(whole: bytes, regions: list[tuple[int, int]], damage: list[tuple[float, bytes]]) -> bytes:
    data = bytearray(whole)
    for number, (where, what) in enumerate(damage):
        start, end = regions[number % len(regions)]
        at = start + int(where * (end - start))
        data[at : at + len(what)] = what
    return bytes(data[: len(whole)])


def regions_that_are_read(library: Path) -> list[tuple[int, int]]:
    """The header, the section table, and each table that a question reads; the whole file as the last."""
    size, lines = library.stat().st_size, run("readelf", "-SW", str(library)).splitlines()
    table = int(re.findall(r"starting at offset (0x[0-9a-f]+)", lines[0])[0], 16)
    pattern = r"\.(?:dynsym|dynstr|dynamic|note\S*|nv_fatbin|shstrtab)\s+\S+\s+\S+ (\w+) (\w+)"
    rows = [re.search(pattern, line) for line in lines]
    found = [(int(row[1], 16), int(row[1], 16) + int(row[2], 16)) for row in rows if row and int(row[2], 16)]
    return [(0, 64), (table, size), *found, (0, size)]


class TestDamage:
    @given(damage=DAMAGE)
    @settings(max_examples=400, deadline=None)
    def test_damaged_library_causes_no_crash(
        self, damage: list[tuple[float, bytes]], made: Path, scratch: Path
    ) -> None:
        scratch.write_bytes(damaged(made.read_bytes(), regions_of(made), damage))
        ask_everything(scratch)

    @pytest.mark.network
    @given(damage=DAMAGE)
    @settings(max_examples=400, deadline=None)
    def test_damaged_gpu_code_causes_no_crash(
        self, damage: list[tuple[float, bytes]], gpu_library: Path, scratch: Path
    ) -> None:
        scratch.write_bytes(damaged(gpu_library.read_bytes(), regions_of(gpu_library), damage))
        ask_everything(scratch)

    @given(garbage=st.binary(max_size=300))
    @settings(max_examples=200, deadline=None)
    def test_garbage_after_a_header_causes_no_crash(self, garbage: bytes, made: Path, scratch: Path) -> None:
        scratch.write_bytes(made.read_bytes()[:64] + garbage)
        ask_everything(scratch)


@pytest.fixture(scope="module")
def gpu_objects(tmp_path_factory: pytest.TempPathFactory) -> GpuObjects:
    return GpuObjects(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def gpu_library(gpu_objects: GpuObjects) -> Path:
    return gpu_objects.linked("zstd", A_SPARKS)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "damaged.so"


_REGIONS: dict[Path, list[tuple[int, int]]] = {}


def regions_of(library: Path) -> list[tuple[int, int]]:
    if library not in _REGIONS:
        _REGIONS[library] = regions_that_are_read(library)
    return _REGIONS[library]
