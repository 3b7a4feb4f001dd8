"""Bundles: one archive with everything that a node without a network needs to be set up."""
