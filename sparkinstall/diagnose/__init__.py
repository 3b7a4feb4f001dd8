"""Find known failures in logs and tell causes from consequences."""
