"""Measure what is served: `bench` and what its numbers mean."""
