"""opkit's own reference layers in plain PyTorch, on a GPU or on the CPU."""
