"""The ops: each validates its arguments, calls its torch op, and that asks backends.pick for a kernel."""
