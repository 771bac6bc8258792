"""The model as a function over explicit tensors, its state on the device, and its steps."""
