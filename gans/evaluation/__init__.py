"""How good images are, where attention looks, and figures of a run."""
