"""Using a trained model. Today: plain sampling without a cache."""
