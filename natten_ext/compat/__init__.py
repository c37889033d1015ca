"""The two-dimensional functions of NATTEN 0.17 under their names there, for code written against it.

NATTEN removed the unfused ``na2d_qk`` and ``na2d_av`` and the relative position table in 0.20, so StyleNAT, NAT, DiNAT
and others no longer run. Put this module in its place and they do::

    import sys, natten_ext.compat
    sys.modules["natten.functional"] = natten_ext.compat

or change ``from natten.functional import na2d_qk, na2d_av`` to ``from natten_ext.compat import na2d_qk, na2d_av``.
The older names ``natten2dqkrpb`` and ``natten2dav`` are here too.

The scores between the two calls are a tensor of their own, ``kernel_height * kernel_width`` numbers a query and head:
that is what the unfused interface is. ``natten_ext.neighborhood_attention`` never stores them; move to it where memory
or speed counts. These functions work on any device and to any derivative order (in reverse mode, also
by ``torch.func``), in memory proportional to their arguments. On a GPU the backward pass adds in no fixed order unless
``torch.use_deterministic_algorithms`` asks for it.
"""

from .natten_017 import na2d, na2d_av, na2d_qk, natten2dav, natten2dqkrpb

__all__ = ["na2d", "na2d_av", "na2d_qk", "natten2dav", "natten2dqkrpb"]
