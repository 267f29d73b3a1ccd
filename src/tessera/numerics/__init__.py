"""FP8 with numerics one can trust: formats, tiles, the three GEMMs, accumulation.

Needs no recipe. `convert(module, policy)` makes any nn.Module's linear layers train in FP8.
"""

from tessera.numerics.convert import convert
from tessera.numerics.formats import E4M3, E5M2, E5M6, Format
from tessera.numerics.health import Recorder
from tessera.numerics.precision import Accumulation, Policy, Precision, Quantisation, RoleKind
from tessera.numerics.role import Role, Weight
from tessera.numerics.tiled_tensor import TiledTensor, quantise
from tessera.numerics.tiles import BLOCK, COLUMN, ROW, TENSOR, VECTOR, Tile

__all__ = [
    "BLOCK",
    "COLUMN",
    "E4M3",
    "E5M2",
    "E5M6",
    "ROW",
    "TENSOR",
    "VECTOR",
    "Accumulation",
    "Format",
    "Policy",
    "Precision",
    "Quantisation",
    "Recorder",
    "Role",
    "RoleKind",
    "Tile",
    "TiledTensor",
    "Weight",
    "convert",
    "quantise",
]
