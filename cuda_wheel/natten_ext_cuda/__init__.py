"""The CUDA kernels of natten_ext, which loads them from here (natten_ext/backends/cuda.py)."""
