"""What a label means to the losses of PyTorch."""

IGNORED = -100
"""Label of a position that is not trained on: the default ``ignore_index`` of PyTorch's cross-entropy."""
