"""Accuracy of a model under sparse prefill and ShadowKV decode: ``python -m sparseattn eval``; its
tasks, and the small model trained on them."""
