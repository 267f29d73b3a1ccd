"""Initial weights: every matrix normal with one standard deviation, every norm's gain 1 (report, section 4.2).

Each parameter has a generator of its own, seeded from the run's seed and the parameter's name, and draws on the
CPU: its values do not depend on the order of building, on other parameters, or on the device.
"""

import hashlib

import torch
from torch import nn

from tessera.model.projection import Norm


def initialise(model: nn.Module, deviation: float, seed: int) -> None:
    """Fill the parameters of `model` in place; parameters on device "meta" stay empty."""
    gains = {id(module.weight) for module in model.modules() if isinstance(module, Norm)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                continue
            if id(parameter) in gains:
                parameter.fill_(1.0)
                continue
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * deviation)


def seed_of(seed: int, name: str) -> int:
    """63 bits from the run's seed and a parameter's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
