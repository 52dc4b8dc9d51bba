"""Hugging Face models as modules in memory: loading, adapting, quantising, and the names their weights have on disk."""
