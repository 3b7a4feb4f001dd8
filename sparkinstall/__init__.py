"""One command from a fresh NVIDIA DGX Spark to a native, mended and proven vLLM."""

__version__ = "0.1.0"
