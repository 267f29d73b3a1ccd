"""Makes `shapes` and `slow_model` importable (pytest puts a conftest's folder on the path)."""
