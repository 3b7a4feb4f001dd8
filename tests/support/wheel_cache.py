"""A cache of sparkinstall's that has the wheels of this user's, so that they are not downloaded again, and no more."""

from pathlib import Path

from sparkinstall.assets import user_cache


def cache_of_wheels(folder: Path) -> Path:
    """Make `folder` such a cache; its path, to be given as XDG_CACHE_HOME."""
    wheels = user_cache() / "uv"
    wheels.mkdir(parents=True, exist_ok=True)
    (folder / "sparkinstall").mkdir(parents=True)
    (folder / "sparkinstall/uv").symlink_to(wheels)
    return folder
