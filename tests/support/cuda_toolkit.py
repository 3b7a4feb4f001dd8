"""NVIDIA's CUDA 13.0 compiler from the package index, for tests that need real GPU code but no GPU.

It is unpacked below the user's cache folder, once, and not installed. The host compiler is the machine's gcc.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from uv import find_uv_bin

# The CUDA of DGX OS 7. `cuobjdump` is not needed to compile, and the index has no 13.0 of it.
PACKAGES = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-nvtx==13.0.85",
    "nvidia-cuda-cuobjdump==13.5.37",
)

INSTALL_SECONDS = 900


def toolkit() -> Path:
    """The CUDA_HOME: `bin/nvcc`, `bin/cuobjdump`, `include`, `lib64/libcudart.so`; installed if it is missing.

    About 300 MB the first time. Raises `RuntimeError` with the end of the installer's output.
    """
    kept = _cache_dir() / "cuda-13.0"
    if not kept.is_dir():
        _install(kept)
    return kept / "nvidia" / "cu13"


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sparkinstall" / "tests"


def _install(kept: Path) -> None:
    # Built beside its path and renamed: an interrupted run leaves no half toolkit, and two runs may race.
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".cuda-") as beside:
        site = Path(beside) / "site"
        _fetch(site)
        link_like_a_toolkit(site / "nvidia" / "cu13")
        try:
            site.rename(kept)
        except OSError:
            if not kept.is_dir():
                raise


def _fetch(site: Path) -> None:
    command = [find_uv_bin(), "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--target", str(site)]
    run = subprocess.run([*command, *PACKAGES], capture_output=True, text=True, timeout=INSTALL_SECONDS)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}: {run.stderr.strip()[-2000:]}")


def link_like_a_toolkit(home: Path) -> None:
    """Add to the wheels' run-time names what makefiles need: lib64 and -lcudart."""
    (home / "lib64").symlink_to("lib")
    (home / "lib" / "libcudart.so").symlink_to("libcudart.so.13")
