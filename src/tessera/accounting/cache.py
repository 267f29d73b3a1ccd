"""Bytes that a token leaves in the cache of multi-head latent attention.

A layer keeps the latent of keys and values, from which all heads' are computed again, and the one rotary key that
the heads share: kv_lora_rank + qk_rope_head_dim numbers. In DeepSeek-V3 these are 576, against 40,960 for keys and
values of 128 heads; in BF16, 61 layers keep 70,272 bytes.
"""

from tessera.recipe import ModelSection


def cache_bytes_per_token(model: ModelSection, bytes_per_element: int = 2) -> int:
    """Bytes a token occupies in the trunk's layers; 2 bytes an element in BF16, 1 in FP8 (without scales)."""
    return model.num_hidden_layers * _layer(model) * bytes_per_element


def mtp_cache_bytes_per_token(model: ModelSection, bytes_per_element: int = 2) -> int:
    """Bytes a token occupies in the blocks of multi-token prediction, when they draft."""
    return model.num_nextn_predict_layers * _layer(model) * bytes_per_element


def _layer(model: ModelSection) -> int:
    return model.kv_lora_rank + model.qk_rope_head_dim
