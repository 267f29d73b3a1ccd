"""The DeepSeek-V3 architecture over `tessera.ops`: latent attention, experts, multi-token prediction."""

from tessera.model.names import hugging_face_state, load_hugging_face
from tessera.model.router import Router, Routing
from tessera.model.transformer import Output, Transformer

__all__ = ["Output", "Router", "Routing", "Transformer", "hugging_face_state", "load_hugging_face"]
