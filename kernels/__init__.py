"""Triton kernels, the CUDA backend where the C++ extension was built without CUDA."""
