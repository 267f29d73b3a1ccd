"""Makes `oracle` importable from every folder of this room (pytest puts a conftest's folder on the path)."""
