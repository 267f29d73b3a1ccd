"""Blocks of the model whose memory crosses layer borders: each one autograd Function with its saves written down.

Shapes: T tokens (flattened batch), H hidden, N, K a linear layer's output and input, S slots (a token times its
experts, sorted by expert), E experts, I intermediate, V vocabulary.
"""
