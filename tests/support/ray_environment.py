"""A node's environment for /opt/sparkinstall/venv with only Ray and what sparkinstall needs."""

import platform
from pathlib import Path

from uv import find_uv_bin

from tests.lab import cache, commands
from tests.support import pins
from tests.support.bytecode import PYTHON, compile_modules

RAY = "2.60.0"
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.lock"
PLACE = "/opt/sparkinstall/venv"
SECONDS = 1800

_RAY = f"#!{PLACE}/bin/python\nfrom ray.scripts.scripts import main\n\nmain()\n"
_ACTIVATE = f'PATH="{PLACE}/bin:$PATH"\nexport PATH\n'


def environment() -> Path:
    """The folder to bind to `PLACE`; 220 MB to download the first time."""
    return cache.kept(
        "ray", (RAY, REQUIREMENTS.read_text(), _constraints(), PYTHON, "compiled", _RAY, _ACTIVATE), _build
    )


def _constraints() -> str:
    return pins.constraints(pins.locks_with("ray")[RAY], beside=REQUIREMENTS.read_text())


def _build(tree: Path) -> None:
    site, programs = tree / f"lib/python{PYTHON}/site-packages", tree / "bin"
    programs.mkdir()
    target = (
        "--target",
        str(site),
        "--python-version",
        PYTHON,
        "--python-platform",
        f"{platform.machine()}-manylinux_2_39",
    )
    wanted = (f"ray=={RAY}", "-r", str(REQUIREMENTS), *pins.written(tree, _constraints()))
    commands.run(find_uv_bin(), "pip", "install", "--quiet", "--no-progress", *target, *wanted, timeout=SECONDS)
    (tree / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {PYTHON}\n")
    (tree / "sparkinstall.json").write_text("{}\n")
    for name in ("python", "python3"):
        (programs / name).symlink_to("/usr/bin/python3")
    (programs / "activate").write_text(_ACTIVATE)
    (programs / "ray").write_text(_RAY)
    (programs / "ray").chmod(0o755)
    compile_modules(tree, PLACE)
