"""The ``triton`` backend: kernels for NVIDIA GPUs, and for Triton's interpreter on a CPU. See docs/triton.md."""
