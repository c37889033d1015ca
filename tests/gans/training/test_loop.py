from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gans.common.distributed import World
from gans.data.loading import Stream, batches, to_unit_range
from gans.data.sources import open_source
from gans.evaluation.plots import sample_steps
from gans.losses.adversarial import GANLoss
from gans.recipes import registry
from gans.recipes.config import RunConfig
from gans.training import checkpoint, logs, monitor
from gans.training.loop import train
from gans.training.monitor import generate
from gans.training.steps import (
    NonFiniteError,
    discriminator_step,
    frozen,
    generator_step,
    lr_factor,
    make_networks,
)

ALONE = World(torch.device("cpu"))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.stem}.{name}": tensor
        for file in sorted(path.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_resume_is_exact(tiny, tiny_run, tmp_path):
    """Six steps at once against two and then four, with more logged: DiffAug, noise, flips, Adam and EMA included.

    And from a named checkpoint into another folder.
    """
    at_once = train(tiny, tiny_run, progress=False)
    parts = replace(tiny_run, out=str(tmp_path / "parts"))
    first = train(replace(tiny, steps=2), parts, progress=False)
    assert first.name == "step-00000002"
    torch.manual_seed(99)  # whatever the process did before must not matter
    busy = replace(parts, resume="latest", log_every=1, sample_every=1, metric_every=1, metric_images=10)
    second = train(tiny, busy, progress=False)
    assert second.name == "step-00000006"
    assert same(weights(at_once), weights(second))
    assert not same(weights(at_once), weights(first))
    one, two = (checkpoint.load_state(path) for path in (at_once, second))
    assert torch.equal(one["rng"]["cpu"], two["rng"]["cpu"])
    assert one["position"] == two["position"] == 6 * 2 * 4
    for name in ("optimizer_g", "optimizer_d"):
        for a, b in zip(one[name]["state"].values(), two[name]["state"].values(), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)

    middle = Path(tiny_run.out) / "checkpoints" / "step-00000004"
    moved = replace(tiny_run, out=str(tmp_path / "moved"), resume=str(middle))
    assert same(weights(at_once), weights(train(tiny, moved, progress=False)))


def test_run_folder(tiny, tiny_run):
    out = Path(tiny_run.out)
    train(tiny, replace(tiny_run, metric_every=3, metric_images=20, keep=1), progress=False)
    assert [p.name for p in checkpoint.list_checkpoints(out / "checkpoints")] == ["step-00000006"]
    assert sorted(p.name for p in (out / "samples").iterdir()) == [
        "real.png",
        "step-00000000.png",
        "step-00000003.png",
        "step-00000006.png",
    ]
    grid = np.asarray(Image.open(out / "samples" / "step-00000006.png"))
    (out / "samples" / "step-00000006 (copy).png").write_bytes(b"of the user")
    assert sample_steps(out) == [0, 3, 6]
    assert grid.shape == (18, 18)  # a gap of two
    lines = logs.read(out)
    assert [line["step"] for line in lines if "generator/adversarial" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "distance" in line] == [0, 3, 6]
    assert lines[-2]["real_images"] == 48
    assert (out / "config.json").exists() and (out / "curves.png").exists()
    assert list(out.glob("events.out.tfevents.*"))


def test_the_metric_sees_images_as_they_are_saved(tiny, tiny_run, monkeypatch):
    """Values outside [-1, 1], which a file cannot hold, do not count."""
    seen = []

    class Extremes:
        name, count, floor = "extremes", 4, 1.0

        def __call__(self, images):
            seen.append((images.min().item(), images.max().item()))
            return 2.0

    monkeypatch.setattr(monitor, "make_metric", lambda choice, real: Extremes())
    monkeypatch.setattr(monitor, "generate", lambda model, count, labels: torch.linspace(-3, 3, 48).view(1, 3, 4, 4))
    train(replace(tiny, steps=1), replace(tiny_run, metric_every=1, metric_images=4), progress=False)
    assert seen == [(-1.0, 1.0)] * 2


def test_what_a_resumed_run_logs_again_counts_once(tiny, tiny_run):
    train(replace(tiny, steps=4), replace(tiny_run, log_every=1, checkpoint_every=3), progress=False)
    out = Path(tiny_run.out)
    before = logs.read(out)
    newest = out / "checkpoints" / "step-00000004"
    newest.rename(out / "elsewhere")
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "cut sho')  # what a crash leaves
    text = (out / "log.jsonl").read_bytes()
    train(replace(tiny, steps=4), replace(tiny_run, log_every=1, resume="latest"), progress=False)
    assert (out / "log.jsonl").read_bytes().startswith(text)
    after = logs.read(out)
    assert [line["step"] for line in after] == [1, 2, 3, 4]
    drop = {"images_per_second", "memory_mib"}
    assert [{k: v for k, v in line.items() if k not in drop} for line in before] == [
        {k: v for k, v in line.items() if k not in drop} for line in after
    ]


@pytest.mark.parametrize("steps, checkpoints, grids", [(500_000, 10, 20), (800, 10, 20), (224, 10, 19), (7, 7, 7)])
def test_default_intervals(steps, checkpoints, grids):
    """About 10 checkpoints and 20 grids a run; the last step has both, whether or not it is one of them."""
    run = RunConfig(data="x", out="y").with_intervals(steps)
    assert math.ceil(steps / run.checkpoint_every) == checkpoints
    assert math.ceil(steps / run.sample_every) == grids
    chosen = RunConfig(data="x", out="y", sample_every=3, checkpoint_every=4)
    assert chosen.with_intervals(steps) == chosen


def test_runs_with_default_intervals(tiny, tiny_run):
    run = replace(tiny_run, checkpoint_every=None, sample_every=None, keep=100)
    train(replace(tiny, steps=12, n_critic=1, batch_d=2, batch_g=2), run, progress=False)
    found = checkpoint.list_checkpoints(Path(run.out) / "checkpoints")
    assert [checkpoint.step_of(path) for path in found] == [2, 4, 6, 8, 10, 12]
    assert sample_steps(Path(run.out)) == list(range(13))


def test_resume_latest_of_an_empty_folder_starts_afresh(tiny, tiny_run):
    path = train(replace(tiny, steps=1), replace(tiny_run, resume="latest"), progress=False)
    assert path.name == "step-00000001"
    assert train(replace(tiny, steps=1), replace(tiny_run, resume="latest"), progress=False) == path


def test_refusals(tiny, tiny_run, folder):
    train(replace(tiny, steps=4), tiny_run, progress=False)
    with pytest.raises(FileExistsError, match="holds a run"):
        train(tiny, tiny_run, progress=False)
    resume = replace(tiny_run, resume="latest")
    with pytest.raises(ValueError, match=r"another recipe; it differs in n_critic \(2 -> 3\)$"):
        train(replace(tiny, n_critic=3, lr_d=0.5), resume, progress=False)
    with pytest.raises(ValueError, match="has 12 images"):
        train(tiny, replace(resume, data=str(folder)), progress=False)
    older = Path(tiny_run.out) / "checkpoints" / "step-00000002"
    with pytest.raises(ValueError, match="has later checkpoints"):
        train(tiny, replace(tiny_run, resume=str(older)), progress=False)


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def unchanged(model, before) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_steps_give_the_other_network_no_gradient(tiny):
    networks = make_networks(tiny, ALONE.device)
    generator, discriminator = networks.generator, networks.discriminator
    before = copies(discriminator)
    generator_step(0, tiny, networks, None, ALONE)
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())
    assert unchanged(discriminator, before)

    before = copies(generator)
    discriminator_step(0, 0, tiny, networks, torch.randn(4, 1, 8, 8), ALONE)
    assert all(p.grad is None for p in generator.parameters())
    assert unchanged(generator, before)


def test_frozen_leaves_what_was_frozen_before():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with frozen(model):
        assert not model.weight.requires_grad
    assert model.weight.requires_grad and not model.bias.requires_grad


def test_each_step_moves_its_own_network(tiny):
    networks = make_networks(tiny, ALONE.device)
    models = torch.nn.ModuleList([networks.generator, networks.discriminator])
    before = copies(models)
    discriminator_step(0, 0, tiny, networks, torch.randn(4, 1, 8, 8), ALONE)
    generator_step(0, tiny, networks, None, ALONE)
    assert all(not torch.equal(a, b) for a, b in zip(before, models.parameters(), strict=True))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_whole_batch(tiny, parts):
    """With noise and DiffAug, whose draws belong to images; without the drift term, which is not a mean over them."""
    whole = replace(tiny, loss=replace(tiny.loss, drift=0.0), batch_d=8, batch_g=8, precision="fp64")
    real = torch.randn(8, 1, 8, 8, dtype=torch.float64)
    results = []
    for config in (whole, replace(whole, accumulate=parts)):
        networks = make_networks(config, ALONE.device)
        logged = discriminator_step(0, 0, config, networks, real, ALONE)
        logged |= generator_step(0, config, networks, None, ALONE)
        results.append((logged, [*networks.generator.parameters(), *networks.discriminator.parameters()]))
    (log_a, weights_a), (log_b, weights_b) = results
    assert log_a == pytest.approx(log_b, rel=1e-9)
    for a, b in zip(weights_a, weights_b, strict=True):
        # Adam's first step is lr * sign(gradient), so compare where rounding cannot turn the sign.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_clipping(tiny):
    config = replace(tiny, clip=1e-3)
    networks = make_networks(config, ALONE.device)
    networks.optimizer_d = torch.optim.SGD(networks.discriminator.parameters(), lr=1.0)
    before = copies(networks.discriminator)
    logged = discriminator_step(0, 0, config, networks, torch.randn(4, 1, 8, 8), ALONE)
    moved = [(p - q).square().sum() for p, q in zip(networks.discriminator.parameters(), before, strict=True)]
    assert logged["discriminator/gradient_norm"] > 1e-2  # logged before clipping
    assert float(torch.stack(moved).sum().sqrt().detach()) == pytest.approx(1e-3, rel=1e-2)


def test_learning_rates_warm_up_and_decay(tiny):
    config = replace(tiny, warmup=4, decay_start=10, decay_end=20, decay_to=0.1)
    factors = [lr_factor(config, step) for step in (0, 3, 4, 10, 15, 20, 100)]
    assert factors == pytest.approx([0.25, 1, 1, 1, 0.55, 0.1, 0.1])
    assert lr_factor(tiny, 10**9) == 1


class Lazy(GANLoss):
    """Notes at which updates the penalties were asked for."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.seen = []

    def discriminator_penalty(self, discriminator, real, fake, *, step):
        terms = super().discriminator_penalty(discriminator, real, fake, step=step)
        self.seen.append((step, list(terms)))
        return terms


def test_lazy_penalties_count_discriminator_updates(tiny):
    config = replace(tiny, loss=replace(tiny.loss, penalty_every=3))
    networks = make_networks(config, ALONE.device)
    networks.loss = loss = Lazy(config.loss)
    for step in range(2):
        for index in range(2):
            discriminator_step(step, index, config, networks, torch.randn(4, 1, 8, 8), ALONE)
    assert loss.seen == [(0, ["penalty"]), (1, []), (2, []), (3, ["penalty"])]


@pytest.mark.parametrize("where", ["term", "gradient"])
def test_non_finite_numbers_stop_before_the_update(tiny, where):
    networks = make_networks(tiny, ALONE.device)

    class Broken(GANLoss):
        def discriminator_penalty(self, discriminator, real, fake, *, step):
            terms = super().discriminator_penalty(discriminator, real, fake, step=step)
            if where == "term":
                return {"penalty": terms["penalty"] * float("nan")}
            weight = next(discriminator.parameters())
            return {"penalty": terms["penalty"] + (weight - weight.detach()).abs().sqrt().sum()}

    networks.loss = Broken(tiny.loss)
    before = copies(networks.discriminator)
    message = r"step 17: discriminator/penalty is nan" if where == "term" else r"step 17: .*gradient_norm is"
    with pytest.raises(NonFiniteError, match=message):
        discriminator_step(16, 0, tiny, networks, torch.randn(4, 1, 8, 8), ALONE)
    assert unchanged(networks.discriminator, before)
    assert all(p.grad is None for p in networks.discriminator.parameters())


def test_divergence_stops_a_run_and_leaves_the_last_checkpoint(tiny, tiny_run):
    train(replace(tiny, steps=2), tiny_run, progress=False)
    path = Path(tiny_run.out) / "checkpoints" / "step-00000002"
    state = torch.load(path / checkpoint.STATE, weights_only=True)
    state["optimizer_d"]["state"][0]["exp_avg_sq"].fill_(float("nan"))  # the next D step breaks its weights
    torch.save(state, path / checkpoint.STATE)
    checkpoint.write_checksums(path)
    with pytest.raises(NonFiniteError, match="step 3: discriminator/"):
        train(tiny, replace(tiny_run, resume="latest"), progress=False)
    assert [p.name for p in path.parent.iterdir()] == ["step-00000002"]


class SometimesBroken(GANLoss):
    """The generator's loss is not finite in calls number 2 and 3."""

    calls = 0

    def generator(self, discriminator, real, fake):
        terms = super().generator(discriminator, real, fake)
        self.calls += 1
        return {name: term * (float("inf") if self.calls in (2, 3) else 1) for name, term in terms.items()}


def test_skipping_what_is_not_finite(tiny, tiny_run, monkeypatch):
    monkeypatch.setitem(
        registry._NAMED, type(tiny.loss), ("standard", registry.Entry(type(tiny.loss), SometimesBroken))
    )
    run = replace(tiny_run, log_every=1)
    with pytest.raises(
        NonFiniteError, match=r"step 2: generator/adversarial is .*Last good checkpoint: .*step-00000001"
    ):
        train(tiny, replace(run, checkpoint_every=1), progress=False)
    skip = replace(run, non_finite="skip", out=run.out + "-skip")
    path = train(tiny, skip, progress=False)
    lines = logs.read(Path(skip.out))
    assert [line["skipped"] for line in lines] == [0, 1, 2, 2, 2, 2]
    assert "generator/adversarial" not in lines[1] and "discriminator/adversarial" in lines[1]
    assert checkpoint.load_state(path)["skipped"] == 2
    with pytest.raises(NonFiniteError, match="step 2: generator"):
        train(tiny, replace(skip, out=run.out + "-limit", max_skips=1), progress=False)


def test_samples_come_from_fixed_z(tiny):
    generator = make_networks(tiny, ALONE.device).generator
    state = torch.get_rng_state()
    ten = generate(generator, 10)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(generate(generator, 4), ten[:4])
    assert not torch.equal(generate(generator, 10, seed=1), ten)


def test_wasserstein_estimate_grows_when_only_the_discriminator_learns(tiny):
    """Training does what it should: D alone separates real digits from an untrained generator's images."""
    discriminator = replace(tiny.discriminator, augment=(), noise=False)
    config = replace(tiny, discriminator=discriminator, batch_d=8, lr_d=5e-3)
    networks = make_networks(config, ALONE.device)
    real = batches(Stream(open_source("digits"), size=8, channels=1, seed=0, flip=False), 8)
    history = [discriminator_step(step, 0, config, networks, to_unit_range(next(real)), ALONE) for step in range(50)]
    early, late = (
        {name: np.mean([h[f"discriminator/{name}"] for h in part]) for name in ("adversarial", "penalty")}
        for part in (history[:10], history[-10:])
    )
    assert late["adversarial"] < early["adversarial"] - 0.5
    assert late["penalty"] < early["penalty"]
