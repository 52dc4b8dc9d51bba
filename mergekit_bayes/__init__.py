"""Merge fine-tuned models as posteriors: a mean and a precision for every weight."""
