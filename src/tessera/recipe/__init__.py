"""The vocabulary of tessera: a run as one frozen, checked value.

One file a section, every field with its default, range and meaning; `load_recipe` reads a TOML file and
`Recipe.to_toml` writes the resolved one. Light on purpose: neither torch nor numpy is imported here.
"""

from tessera.recipe.data import DataSection
from tessera.recipe.errors import UserError
from tessera.recipe.load import load_recipe
from tessera.recipe.memory import MemorySection
from tessera.recipe.model import ModelSection, RopeScaling
from tessera.recipe.numerics import NumericsSection
from tessera.recipe.optimizer import OptimizerSection
from tessera.recipe.recipe import Recipe
from tessera.recipe.schedule import Schedule, Segment
from tessera.recipe.stability import StabilitySection
from tessera.recipe.training import TrainingSection

__all__ = [
    "DataSection",
    "MemorySection",
    "ModelSection",
    "NumericsSection",
    "OptimizerSection",
    "Recipe",
    "RopeScaling",
    "Schedule",
    "Segment",
    "StabilitySection",
    "TrainingSection",
    "UserError",
    "load_recipe",
]
