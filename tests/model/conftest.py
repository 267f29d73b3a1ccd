"""Makes the helpers here importable (pytest puts a conftest's folder on the path), and `float64` of the ops."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "ops"))
