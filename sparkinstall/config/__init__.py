"""The settings: types, checks, and layers of values."""

from sparkinstall.config.checks import safe_path
from sparkinstall.config.layers import DEFAULT_FILES, Layer, anchored, build, parse_assignment, read_layer
from sparkinstall.config.schema import (
    ClusterConfig,
    Config,
    NcclConfig,
    NetworkConfig,
    ServingConfig,
    Setting,
    settings,
)  # fmt: skip

__all__ = (
    "DEFAULT_FILES", "ClusterConfig", "Config", "Layer", "NcclConfig", "NetworkConfig", "ServingConfig", "Setting",
    "anchored", "build", "parse_assignment", "read_layer", "safe_path", "settings",
)  # fmt: skip
