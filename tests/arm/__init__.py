"""A whole installation on aarch64, emulated: see tests/arm/run."""
