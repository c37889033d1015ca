"""Transformer GANs that train with fused attention: `python -m gans train --help`."""
