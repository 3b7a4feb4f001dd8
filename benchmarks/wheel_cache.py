"""A cache of sparkinstall with only the wheels of this user's, so that they are not downloaded again."""

from pathlib import Path

from sparkinstall.assets import user_cache


def cache_of_wheels(folder: Path) -> Path:
    """Create such a cache in `folder`. Returns the value for XDG_CACHE_HOME."""
    wheels = user_cache() / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    (folder / "sparkinstall").mkdir(parents=True)
    (folder / "sparkinstall/wheels").symlink_to(wheels)
    return folder
