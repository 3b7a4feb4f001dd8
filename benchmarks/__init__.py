"""The speed of sparkinstall, compared with other tools and with the same work by hand (README.md)."""
