"""NATTEN's functions and modules, for code written against it: docs/natten.md.

NATTEN removed the unfused functions (``na2d_qk``, ``na2d_av``, ...) and the relative position table in 0.20, so
StyleNAT, NAT, DiNAT and others no longer run. With this package they do::

    import natten_ext.compat

    natten_ext.compat.install()  # before whatever imports natten

or change ``from natten.functional import na2d_qk, na2d_av`` to ``from natten_ext.compat import na2d_qk, na2d_av``.

Names that mean the same in all of NATTEN's versions are here, and of the others those of 0.17: ``na1d``, ``na2d``,
``na3d`` with its order of arguments, and its modules. ``natten_ext.compat.natten_021`` has them as in 0.21, and
``natten_ext.compat.natten_014`` the modules as before 0.17.
"""

from .installation import install, uninstall
from .natten_014 import (
    NATTEN1DAVFunction,
    NATTEN1DQKRPBFunction,
    NATTEN2DAVFunction,
    NATTEN2DQKRPBFunction,
    NATTEN3DAVFunction,
    NATTEN3DQKRPBFunction,
    na1d_qk_with_bias,
    na2d_qk_with_bias,
    na3d_qk_with_bias,
    natten1dav,
    natten1dqk,
    natten1dqkrpb,
    natten2dav,
    natten2dqk,
    natten2dqkrpb,
    natten3dav,
    natten3dqk,
    natten3dqkrpb,
)
from .natten_017 import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    na1d,
    na2d,
    na3d,
)
from .natten_021 import attention, merge_attentions, neighborhood_attention_generic
from .unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

__all__ = [
    "NATTEN1DAVFunction",
    "NATTEN1DQKRPBFunction",
    "NATTEN2DAVFunction",
    "NATTEN2DQKRPBFunction",
    "NATTEN3DAVFunction",
    "NATTEN3DQKRPBFunction",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "attention",
    "install",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na1d_qk_with_bias",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na2d_qk_with_bias",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "na3d_qk_with_bias",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
    "neighborhood_attention_generic",
    "uninstall",
]
