"""Parts of ``benchmarks.penalty_study``: R1 and R2 by double backward against estimates of them."""
