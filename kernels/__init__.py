"""Triton kernels: they serve CUDA tensors where the C++ extension was built without CUDA."""
