"""Set up a native, patched and verified vLLM on a DGX Spark, and undo it."""

__version__ = "0.1.0"
