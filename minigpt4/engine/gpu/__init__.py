"""The decoder for GPUs: Triton kernels on int8 weights, replayed as CUDA graphs."""
