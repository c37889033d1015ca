"""What runs a problem: one module for each backend, and the choice among them.

- ``choice``: the registry of the fused backends, and which of all backends runs a problem, and why.
- ``support``: what the fused backends share: the dtypes, sizes and GPUs that they can take.
- ``reference``: plain PyTorch, the definition in code; any device, any derivative order.
- ``cpu``, ``cuda``: the compiled kernels of csrc/cpu and csrc/cuda.
- ``triton``: kernels in Triton, in a folder of their own.
- ``origin``: where the keys lie, for l2 scores (``reference``, ``cuda``, ``triton``).
"""
