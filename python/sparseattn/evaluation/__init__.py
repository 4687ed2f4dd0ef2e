"""Accuracy of a model under sparse prefill and ShadowKV decode: ``python -m sparseattn eval``."""
