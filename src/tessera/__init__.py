"""tessera: train DeepSeek-V3-style mixture-of-experts language models in FP8, with numerics one can trust."""

__version__ = "0.1.0"
