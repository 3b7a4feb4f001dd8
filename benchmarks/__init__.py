"""How fast sparkinstall is, beside others and beside the plain way (README.md)."""
