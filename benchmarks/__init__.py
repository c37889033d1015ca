"""Benchmarks of natten_ext beside plain PyTorch and other attention libraries; see ``benchmarks.attn_bench``."""
