"""Use cases of one node, the engine, and the catalogue of steps, checks and fixes."""
