"""Makes `float64` importable (pytest puts a conftest's folder on the path)."""
