from __future__ import annotations

import numpy as np

from gans.evaluation.plots import nearest


def test_nearest_finds_copies_and_then_the_next_in_brightness():
    real = np.stack([np.full((4, 4, 3), value, dtype=np.uint8) for value in (250, 10, 200, 90)])
    assert nearest(real[2], real, 3).tolist() == [2, 0, 3]
    assert nearest(np.full((4, 4, 3), 40, dtype=np.uint8), real, 2).tolist() == [1, 3]
