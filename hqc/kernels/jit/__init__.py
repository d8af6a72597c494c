"""The Triton kernels themselves: every module here imports triton, so import them only where a kernel is used."""
