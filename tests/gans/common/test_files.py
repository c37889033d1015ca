"""Files of weights have the mode that the umask gives to any new file, whoever writes them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gans.common.files import save_tensors
from gans.data.sources import open_source
from gans.evaluation.reference import Reference
from gans.features.judge import Judge, JudgeConfig, save_judge
from gans.features.network import VectorNetwork
from gans.training import checkpoint


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def expected_mode(request):
    """The mode of a new file under a umask that is set meanwhile."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(root: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*") if path.is_file()}


class Mean(VectorNetwork):
    name, num_features, about, fingerprint = "mean", 3, "means of the channels", "1"

    def forward(self, images):
        return images.mean((2, 3))


def test_modes_of_everything_that_is_written(tmp_path, folder, expected_mode):
    written = tmp_path / "written"
    models = {"generator": torch.nn.Linear(2, 2)}
    checkpoint.save(written, 1, models=models, state={"step": 1}, config={}, keep=1)
    save_judge(Judge(JudgeConfig(size=8, width=4, features=4)), written / "judge.safetensors", {})
    reference = Reference(open_source(folder), "folder", 8, 3)
    reference.features(Mean(), torch.device("cpu"), batch=4, workers=0, cache=written / "cache")
    found = modes(written)
    assert sum(name.endswith(".safetensors") for name in found) == 3
    assert found == dict.fromkeys(found, expected_mode)


def test_an_older_file_is_replaced(tmp_path, expected_mode):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"older")
    path.chmod(0o444)
    save_tensors({"x": torch.arange(3)}, path, {"key": "value"})
    assert load_file(path)["x"].tolist() == [0, 1, 2]
    assert modes(tmp_path) == {path.name: expected_mode}
