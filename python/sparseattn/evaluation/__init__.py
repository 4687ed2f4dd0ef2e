"""Synthetic long-context tasks, and the small model trained on them."""
