"""What one rank does for all: the files of a checkpoint that are no tensors, and its name."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tessera.recipe import UserError


def on_first_rank(group: ProcessGroup | None, work: Callable[[], None]) -> None:
    """Do `work` on the first rank of `group` while the others wait; without a group just do it.

    What it raises is raised on the first rank, and a UserError on all others.
    """
    if group is None:
        work()
        return
    failed, error = torch.zeros(1, dtype=torch.int32), None
    if dist.get_rank(group) == 0:
        try:
            work()
        except BaseException as raised:  # told to the others first: they wait for it
            failed, error = torch.ones_like(failed), raised
    dist.broadcast(failed, dist.get_global_rank(group, 0), group=group)
    if error is not None:
        raise error
    if failed.item():
        raise UserError("the first rank could not write the checkpoint; its message says why")
