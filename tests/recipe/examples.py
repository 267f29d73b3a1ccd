"""The smallest complete recipe, which the tests of this room vary."""

from pathlib import Path

ROOT = Path(__file__).parents[2]

MINIMAL = """\
[model]
vocab_size = 64
hidden_size = 8
intermediate_size = 16
moe_intermediate_size = 8
num_hidden_layers = 3
num_attention_heads = 2
n_routed_experts = 8
num_experts_per_tok = 2
kv_lora_rank = 4
qk_nope_head_dim = 4
qk_rope_head_dim = 2
v_head_dim = 4

[data]
source = "text"
sequence_length = 16
batch_size = 4

[optimizer]
learning_rate = 1e-3

[training]
steps = 10
"""
