"""E5M6 codes: two of 12 bits, a and b, in the three little-endian bytes of a | b << 12.

An E5M6 number is the first 12 bits of a float16 (formats.py), so a code shifted by four is a float16's bits, and the
conversion out of float16 decodes subnormals, infinities and NaN.
"""

import torch
from torch import Tensor


def pack(codes: Tensor) -> Tensor:
    """int16 [R, C], 12 bits used -> uint8 [R, ceil(C / 2) * 3]; an odd row ends with code 0."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    a, b = codes[:, 0::2], codes[:, 1::2]
    return torch.stack([a, a >> 8 | b << 4, b >> 4], dim=-1).to(torch.uint8).flatten(1)


def unpack_to_half(packed: Tensor, columns: int) -> Tensor:
    """Inverse of `pack`, as the values of the codes: float16 [R, columns]."""
    byte = packed.to(torch.int16).unflatten(1, (-1, 3))
    low, middle, high = byte.unbind(dim=-1)
    halves = torch.stack([low << 4 | middle << 12, middle & 0xF0 | high << 8], dim=-1)
    return halves.flatten(1).narrow(1, 0, columns).view(torch.float16)
