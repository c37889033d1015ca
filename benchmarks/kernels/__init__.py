"""Commands for those who work on the kernels: what compilers make of them, the work they issue, their tile sizes."""
