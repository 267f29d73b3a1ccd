"""What a model costs, from its recipe alone: parameters, FLOPs, bytes of cache, and MFU.

Nothing is allocated and torch is not imported: the weights of the architecture are written down once, as shapes, in
`weights`, and everything here is a sum over them.
"""

from tessera.accounting.cache import cache_bytes_per_token, mtp_cache_bytes_per_token
from tessera.accounting.flops import Flops, flops_per_token, mfu
from tessera.accounting.memory import Memory, memory
from tessera.accounting.parameters import Count, Parameters, parameters
from tessera.accounting.saved import SavedTensor, saved_rows, saved_tensors
from tessera.accounting.weights import Weight, mtp_weights, trunk_weights

__all__ = [
    "Count",
    "Flops",
    "Memory",
    "Parameters",
    "SavedTensor",
    "Weight",
    "cache_bytes_per_token",
    "flops_per_token",
    "memory",
    "mfu",
    "mtp_cache_bytes_per_token",
    "mtp_weights",
    "parameters",
    "saved_rows",
    "saved_tensors",
    "trunk_weights",
]
