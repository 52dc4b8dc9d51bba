"""Where precisions come from.

fisher    the diagonal Fisher information, from per-example gradients and labels drawn from the model
"""
