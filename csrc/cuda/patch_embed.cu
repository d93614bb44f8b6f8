// The patch-embedding kernel for NVIDIA GPUs.
