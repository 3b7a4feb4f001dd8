"""NVIDIA's CUDA 13.0 compiler from the package index, for tests that need real GPU code but no GPU.

Nothing is installed on the machine: it is unpacked below the user's cache folder, once. The host compiler is
the machine's own gcc.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from uv import find_uv_bin

# The CUDA of DGX OS 7. `cuobjdump` has no part in compiling, and the index has no 13.0 of it.
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
    """The CUDA_HOME: `bin/nvcc`, `bin/cuobjdump`, `include`, `lib64/libcudart.so`; installs it if need be.

    About 300 MB the first time. Raises `RuntimeError` with the installer's last words.
    """
    kept = _cache_dir() / "cuda-13.0"
    if not kept.is_dir():
        _install(kept)
    return kept / "nvidia" / "cu13"


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sparkinstall" / "tests"


def _install(kept: Path) -> None:
    # Built beside its place and renamed: a run cut short leaves no half toolkit behind, and two may race.
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".cuda-") as beside:
        site = Path(beside) / "site"
        _fetch(site)
        _link_like_a_toolkit(site / "nvidia" / "cu13")
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


def _link_like_a_toolkit(home: Path) -> None:
    # The wheels carry run-time names only; makefiles look for lib64 and for -lcudart.
    (home / "lib64").symlink_to("lib")
    (home / "lib" / "libcudart.so").symlink_to("libcudart.so.13")
