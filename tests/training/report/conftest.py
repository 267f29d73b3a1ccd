"""Makes `example_runs` and `browser` importable here (pytest puts a conftest's folder on the path)."""
