"""Programs that run inside the node's own Python environment."""
