"""The training loop. `train` reads from top to bottom; what it calls is above it."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import natten_ext
from gans import checkpoint, data
from gans.config import RunConfig, TrainConfig, differences, to_dict
from gans.ema import EMA
from gans.images import grid, save_png
from gans.logs import RunLog
from gans.losses import Loss, Terms
from gans.metrics import RandomFeatureFrechet
from gans.registry import build

EVALUATION_SEED = 20210214


class NonFiniteError(RuntimeError):
    """A loss term or a gradient stopped being finite; the weights are those of the step before."""


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU if torch sees one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, the parameters of `model` require no gradient: it passes gradients on and collects none."""
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(True)


@contextmanager
def evaluation_rng(device: torch.device, seed: int = EVALUATION_SEED) -> Iterator[None]:
    """Inside, random numbers are those of `seed`; training's are not disturbed."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def generate(
    generator: nn.Module, count: int, device: torch.device, *, seed: int = EVALUATION_SEED, batch: int = 64
) -> Tensor:
    """`count` images on the CPU from the z of `seed`; the first are the same for any count."""
    with evaluation_rng(device, seed):
        z = torch.stack([torch.randn(generator.config.latent_dim) for _ in range(count)])
        return torch.cat([generator(part.to(device)).cpu() for part in z.split(batch)])


def backward(terms: Terms, parts: int, totals: dict[str, Tensor]) -> None:
    """Adds the gradients of the terms' sum over `parts`, and the terms to `totals`."""
    (torch.stack(list(terms.values())).sum() / parts).backward()
    for name, term in terms.items():
        totals[name] = totals.get(name, 0) + term.detach() / parts


def update(
    name: str,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    terms: dict[str, Tensor],
    clip: float,
) -> dict[str, float]:
    """Clips the gradients and steps the optimiser, unless a term or the gradient norm is not finite.

    Returns the terms and the gradient norm before clipping as numbers; raises NonFiniteError.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    names = [f"{name}/{term}" for term in terms] + [f"{name}/gradient_norm"]
    values = dict(zip(names, torch.stack([*terms.values(), norm]).tolist(), strict=True))
    for key, value in values.items():
        if not math.isfinite(value):
            shown = ", ".join(f"{k} = {v:.6g}" for k, v in values.items())
            raise NonFiniteError(
                f"step {step}: {key} is {value} ({shown}). The step was not applied: resume from the last "
                "checkpoint with a lower learning rate, or with --backend reference to rule out a kernel"
            )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return values


def discriminator_step(
    step: int,
    config: TrainConfig,
    loss: Loss,
    generator: nn.Module,
    discriminator: nn.Module,
    optimizer: torch.optim.Optimizer,
    real: Tensor,
) -> dict[str, float]:
    """One update of the discriminator on a batch of real images and as many generated ones; returns its log."""
    z = torch.randn(len(real), config.generator.latent_dim, device=real.device)
    totals: dict[str, Tensor] = {}
    for real_part, z_part in zip(real.chunk(config.accumulate), z.chunk(config.accumulate), strict=True):
        with torch.no_grad():
            fake = generator(z_part)
        backward(loss.discriminator(discriminator, real_part, fake), config.accumulate, totals)
    return update("discriminator", step, discriminator, optimizer, totals, config.clip)


def generator_step(
    step: int,
    config: TrainConfig,
    loss: Loss,
    generator: nn.Module,
    discriminator: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> dict[str, float]:
    """One update of the generator; returns its log."""
    z = torch.randn(config.batch_g, config.generator.latent_dim, device=device)
    totals: dict[str, Tensor] = {}
    with frozen(discriminator):
        for z_part in z.chunk(config.accumulate):
            backward(loss.generator(discriminator, generator(z_part)), config.accumulate, totals)
    return update("generator", step, generator, optimizer, totals, config.clip)


class Means:
    """Running means of named numbers between two lines of the log."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._values[name].append(value)

    def take(self) -> dict[str, float]:
        """The means since the last call, which start anew."""
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return means


def adam(model: nn.Module, lr: float, betas: tuple[float, float]) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=lr, betas=betas)


def check_resumable(path: Path, root: Path, config: TrainConfig) -> None:
    """ValueError unless the checkpoint was made by the same recipe and is the newest of the folder we write to."""
    changed = differences(checkpoint.load_config(path)["recipe"], to_dict(config))
    changed = [name for name in changed if not name.startswith("steps ")]
    if changed:
        raise ValueError(f"cannot resume {path} with another recipe; it differs in {', '.join(changed)}")
    later = [other.name for other in checkpoint.list_checkpoints(root) if other.name > path.name]
    if later:
        raise ValueError(f"cannot resume {path}: {root} has later checkpoints ({', '.join(later)}); move them away")


def train(config: TrainConfig, run: RunConfig, *, progress: bool = True) -> Path:
    """Trains a recipe and returns the last checkpoint's path.

    Resuming continues exactly: on one device, backend and number of threads the weights are bit for bit those
    of a run that was never interrupted. Logs, grids and measurements draw from a generator of their own, so
    how often they happen changes nothing.

    Raises NonFiniteError when training diverges, FileExistsError when `out` holds a run and `resume` is not
    given.
    """
    out = Path(run.out)
    checkpoints = out / "checkpoints"
    device = choose_device(run.device)
    if run.threads:
        torch.set_num_threads(run.threads)
    torch.backends.cudnn.deterministic = True

    resume_from = checkpoint.find(run.resume, checkpoints) if run.resume else None
    if resume_from:
        check_resumable(resume_from, checkpoints, config)
    elif checkpoint.list_checkpoints(checkpoints):
        raise FileExistsError(f"out {str(out)!r} holds a run; continue it with resume 'latest' or give another out")

    # Data
    source = data.open_source(run.data)
    size, channels = config.generator.image_size, config.generator.channels
    stream = data.Stream(source, size=size, channels=channels, seed=config.seed, flip=config.images.flip)

    # Models, optimisers, average
    torch.manual_seed(config.seed)
    generator: nn.Module = build(config.generator).to(device)
    discriminator: nn.Module = build(config.discriminator).to(device)
    loss: Loss = build(config.loss)
    average = EMA(generator, config.ema)
    optimizer_g = adam(generator, config.lr_g, config.betas)
    optimizer_d = adam(discriminator, config.lr_d, config.betas)
    models = {"generator": generator, "generator_ema": average.model, "discriminator": discriminator}
    step, position = 0, 0
    latest = resume_from

    if resume_from:
        for name, model in models.items():
            checkpoint.load_weights(resume_from, name, model)
        state = checkpoint.load_state(resume_from)
        if state["images"] != len(source):
            raise ValueError(
                f"data {run.data!r} has {len(source)} images; {resume_from} was made with {state['images']}"
            )
        optimizer_g.load_state_dict(state["optimizer_g"])
        optimizer_d.load_state_dict(state["optimizer_d"])
        step, position = state["step"], state["position"]
        checkpoint.set_rng_state(state["rng"])

    resolved: dict[str, Any] = {
        "recipe": to_dict(config),
        "run": to_dict(run),
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "versions": {"torch": torch.__version__, "natten_ext": natten_ext.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }

    def save_checkpoint() -> Path:
        state = {
            "step": step,
            "position": position,
            "images": len(source),
            "optimizer_g": optimizer_g.state_dict(),
            "optimizer_d": optimizer_d.state_dict(),
            "rng": checkpoint.rng_state(),
        }
        return checkpoint.save(checkpoints, step, models=models, state=state, config=resolved, keep=run.keep)

    def save_samples() -> None:
        images = generate(average.model, run.sample_count, device)
        save_png(grid(images), out / "samples" / f"step-{step:08d}.png")

    def due(every: int) -> bool:
        return every > 0 and step % every == 0

    backend = natten_ext.use_backend(run.backend) if run.backend else nullcontext()
    with backend, RunLog(out, step) as log:
        (out / "config.json").write_text(json.dumps(resolved, indent=2) + "\n")
        metric = None
        if run.metric_every:
            real = data.load_images(source, size=size, channels=channels, limit=run.metric_images)
            metric = RandomFeatureFrechet(real)
            tqdm.write(f"{metric.name}: real against real (two halves of {metric.count} images) {metric.floor:.4g}")

        def measure(metric: RandomFeatureFrechet) -> dict[str, float]:
            distance = metric(generate(average.model, run.metric_images, device))
            return {"distance": distance, "floor": metric.floor}

        if step == 0:
            real = data.load_images(source, size=size, channels=channels, limit=run.sample_count)
            save_png(grid(real), out / "samples" / "real.png")
            save_samples()
            if metric:
                log.write(step, measure(metric))

        real_batches = data.batches(stream, config.batch_d, start=position, workers=config.images.workers)
        means = Means()
        bar = tqdm(total=config.steps, initial=step, unit="step", disable=not progress, dynamic_ncols=True)
        while step < config.steps:
            started = time.perf_counter()
            for _ in range(config.n_critic):
                real = next(real_batches).to(device)
                position += config.batch_d
                means.add(discriminator_step(step + 1, config, loss, generator, discriminator, optimizer_d, real))
            means.add(generator_step(step + 1, config, loss, generator, discriminator, optimizer_g, device))
            step += 1
            average.update(generator, images=step * config.batch_g, batch=config.batch_g)
            means.add({"seconds_per_step": time.perf_counter() - started})

            bar.update()
            if due(run.log_every) or step == config.steps:
                line = means.take() | {"real_images": position}
                if device.type == "cuda":
                    line["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
                log.write(step, line)
                bar.set_postfix(
                    D=f"{line['discriminator/wasserstein']:.3g}",
                    G=f"{line['generator/adversarial']:.3g}",
                    refresh=False,
                )
            if metric and (due(run.metric_every) or step == config.steps):
                log.write(step, measure(metric))
            if due(run.sample_every) or step == config.steps:
                save_samples()
            if due(run.checkpoint_every) or step == config.steps:
                latest = save_checkpoint()
        bar.close()
    return latest or save_checkpoint()
