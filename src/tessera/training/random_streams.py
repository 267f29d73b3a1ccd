"""The random streams of the process, as a checkpoint keeps them: text in hexadecimal, nothing pickled.

Training draws from torch's global generators only, and today from none of them: the data are drawn by hashes of their
position, the initial weights from generators of their own. They are kept all the same, so that what will draw from
them, such as dropout or stochastic rounding, goes on where it stopped. Python's and NumPy's streams are not touched.
"""

from collections.abc import Mapping
from typing import Any

import torch

from tessera.recipe import UserError


def seed_streams(seed: int) -> None:
    """Begin the streams of a fresh run."""
    torch.manual_seed(seed)  # of the GPUs too


def stream_states(device: torch.device) -> dict[str, str]:
    """Where the streams stand: the CPU's, and that of `device` if it is another one."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: bytes(state.tolist()).hex() for kind, state in states.items()}


def restore_streams(states: Any, device: torch.device) -> None:
    """Put the streams where `stream_states` saw them; one that was not kept stays as it is.

    Raises UserError for what is no state of this version of torch.
    """
    if not isinstance(states, Mapping) or "cpu" not in states:
        raise UserError('"random" must hold the states of the random streams')
    known = stream_states(device)
    for kind, text in states.items():
        if kind not in known:  # a run that moved from a GPU to a CPU
            continue
        try:
            state = torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
            if len(text) != len(known[kind]):
                raise ValueError("another length")
            torch.set_rng_state(state) if kind == "cpu" else torch.cuda.set_rng_state(state, device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f'"random" holds no {kind} state of torch {torch.__version__}: {error}') from None
