"""The ops: each validates its arguments, calls its torch.library op, and that asks backends.pick for a kernel."""
