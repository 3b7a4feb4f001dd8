"""Read-only knowledge of this machine."""
