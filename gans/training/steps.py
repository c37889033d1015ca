"""One update of each network: the batch in parts, their gradients brought together, clipped and applied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gans.common import rng
from gans.common.distributed import World
from gans.losses.adversarial import Loss, Terms, has_levels
from gans.models.adaptive import ADA
from gans.models.conditioning import bind
from gans.models.spectral_norm import begin_step
from gans.recipes.config import TrainConfig
from gans.recipes.registry import build


class NonFiniteError(RuntimeError):
    """A loss term, a gradient or a buffer was not finite; the update was not applied.

    `names` are those of the update's log, which tell updates with a lazy penalty from those without.
    """

    def __init__(self, message: str, names: Iterable[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


@dataclass
class Networks:
    """What is under training, on the device and in the dtype of the run."""

    generator: nn.Module
    discriminator: nn.Module
    loss: Loss
    optimizer_g: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    ada: ADA | None = None

    def buffers(self) -> dict[str, Tensor]:
        """What an update moves besides weights, by name: the buffers that checkpoints hold, of both networks and the
        loss.
        """
        models = {"generator": self.generator, "discriminator": self.discriminator, "loss": self.loss}
        return {
            f"{name}.{key}": value
            for name, model in models.items()
            if isinstance(model, nn.Module)
            for key, value in model.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        }


@contextmanager
def undone_if_not_finite(networks: Networks) -> Iterator[None]:
    """An update that raises NonFiniteError inside leaves no trace in the buffers: batch norms' statistics, power
    iterations, the mean path length.
    """
    before = [(buffer, buffer.clone()) for buffer in networks.buffers().values()]
    try:
        yield
    except NonFiniteError:
        for buffer, value in before:
            buffer.copy_(value)
        raise


def make_networks(config: TrainConfig, device: torch.device) -> Networks:
    """Networks with the initial weights of the recipe's seed, and their optimisers."""
    torch.manual_seed(config.seed)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    generator: nn.Module = build(config.generator).to(device, dtype)
    discriminator: nn.Module = build(config.discriminator).to(device, dtype)
    loss = build(config.loss)
    relativistic = getattr(config.loss, "adversarial", "") == "relativistic"
    return Networks(
        generator,
        discriminator,
        loss.to(device, dtype) if isinstance(loss, nn.Module) else loss,
        adam(generator, config.lr_g, config.betas_g),
        adam(discriminator, config.lr_d, config.betas_d),
        ADA(config.ada, relativistic=relativistic) if config.ada.target else None,
    )


def adam(model: nn.Module, lr: float, betas: tuple[float, float]) -> torch.optim.Adam:
    return torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=lr, betas=betas)


def lr_factor(config: TrainConfig, step: int) -> float:
    """What the learning rates are multiplied by in step `step` (from 0): linear warm-up and linear decay."""
    factor = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.decay_end and step > config.decay_start:
        progress = min(1.0, (step - config.decay_start) / (config.decay_end - config.decay_start))
        factor *= 1 - progress * (1 - config.decay_to)
    return factor


def set_learning_rates(config: TrainConfig, networks: Networks, step: int) -> float:
    """Sets both optimisers' learning rates for a step; returns the factor."""
    factor = lr_factor(config, step)
    for optimizer, lr in ((networks.optimizer_g, config.lr_g), (networks.optimizer_d, config.lr_d)):
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
    return factor


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, the parameters of `model` require no gradient: it passes gradients on and collects none."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def local_parts(config: TrainConfig, world: World, batch: int) -> list[tuple[int, int]]:
    """First and last (excluded) image, counted in the whole batch, of each part that this process works on."""
    size = batch // (world.size * config.accumulate)
    first = world.rank * config.accumulate * size
    return [(first + i * size, first + (i + 1) * size) for i in range(config.accumulate)]


def draw_seed(config: TrainConfig, update: int) -> int:
    """The seed of all draws of the run's update number `update`, of either network.

    Neighbouring numbers, since torch's CPU generator looks at the lower 32 bits only; a multiplier keeps runs apart.
    """
    return (config.seed * 2_654_435_761 + update + 1) % 2**63


def precision(config: TrainConfig, device: torch.device, *, penalty: bool = False) -> torch.autocast:
    """Autocast as the recipe wants it, for a loss or for a penalty on gradients."""
    enabled = config.precision == "bf16" and not (penalty and config.penalty_precision == "full")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def latents(generator: nn.Module, count: int) -> Tensor:
    """z `(count, latent_dim)` from N(0, I), with the generator's device and dtype."""
    like = next(generator.parameters())
    return rng.randn(count, generator.config.latent_dim, device=like.device, dtype=like.dtype)


def make_images(config: TrainConfig, networks: Networks, z: Tensor, labels: Tensor | None) -> Tensor:
    """What the discriminator is given of z: images, with all of their levels where both networks have them."""
    options = {"levels": True} if has_levels(config.generator, config.discriminator) else {}
    return bind(networks.generator, labels)(z, **options).to(z.dtype)


def backward(terms: Terms, parts: int, totals: Terms, *, every: int = 1) -> None:
    """Adds the gradients of the terms' sum over `parts`, and the terms, for the log, to `totals`.

    A term that is computed only every `every` updates comes multiplied by that, which `totals` take out again.
    ValueError for a term that is not a scalar.
    """
    for name, term in terms.items():
        if term.dim():
            raise ValueError(f"the loss term {name!r} has shape {tuple(term.shape)}; a term is a scalar")
    if terms:
        (torch.stack(list(terms.values())).sum() / parts).backward()
    for name, term in terms.items():
        totals[name] = totals.get(name, torch.zeros_like(term)) + term.detach() / (parts * every)


def apply(
    name: str, step: int, config: TrainConfig, networks: Networks, terms: Terms, what: tuple[str, ...], world: World
) -> dict[str, float]:
    """Averages the gradients of the network called `name` over the processes, clips them and steps its optimiser.

    Returns the terms and the gradient norm before clipping as numbers; that of an update with nothing but penalties,
    which is not clipped, is called `penalty_gradient_norm`. Raises NonFiniteError, without stepping, where one of them
    or a buffer is not finite.
    """
    model, optimizer = (
        (networks.generator, networks.optimizer_g)
        if name == "generator"
        else (networks.discriminator, networks.optimizer_d)
    )
    world.average_gradients(model)
    norm_name, clip = ("gradient_norm", config.clip) if "loss" in what else ("penalty_gradient_norm", 0)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    buffers = networks.buffers()
    # A batch norm hides a variance that overflows: it divides by it.
    extent = nn.utils.get_total_norm([b for b in buffers.values() if b.is_floating_point()], math.inf)
    names = [*(f"{name}/{term}" for term in terms), f"{name}/{norm_name}"]
    *numbers, largest = world.mean(torch.stack([value.to(norm) for value in (*terms.values(), norm, extent)])).tolist()
    values = dict(zip(names, numbers, strict=True))
    broken = [f"{key} is {value}" for key, value in values.items() if not math.isfinite(value)]
    if not broken and not math.isfinite(largest):
        broken = [f"buffer {key} is not finite" for key, value in buffers.items() if not value.isfinite().all()]
        broken = broken or ["a buffer of another process is not finite"]
    if not broken:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if broken:
        shown = ", ".join(f"{key} = {value:.6g}" for key, value in values.items())
        raise NonFiniteError(f"step {step}: {broken[0]} ({shown}); the update was not applied", names)
    return values


EVERYTHING = ("loss", "penalty")


def _chunk(tensor: Tensor | None, parts: list[tuple[int, int]]) -> Sequence[Tensor | None]:
    """What of a tensor, if there is one, belongs to each part of a batch."""
    return [None] * len(parts) if tensor is None else tensor.chunk(len(parts))


def discriminator_gradients(
    step: int,
    index: int,
    config: TrainConfig,
    networks: Networks,
    real: Tensor,
    world: World,
    what: tuple[str, ...] = EVERYTHING,
    labels: Tensor | None = None,
) -> Terms:
    """Adds this process's gradients of the discriminator's loss; returns the terms. Arguments as for the step."""
    generator, loss = networks.generator, networks.loss
    totals: Terms = {}
    parts = local_parts(config, world, config.batch_d)
    for (start, stop), real_part, own in zip(parts, real.chunk(len(parts)), _chunk(labels, parts), strict=True):
        discriminator = bind(networks.discriminator, own)
        with rng.part(draw_seed(config, step * (config.n_critic + 1) + index), config.batch_d, start, stop):
            with precision(config, real.device), torch.no_grad():
                fake = make_images(config, networks, latents(generator, stop - start), own)
            if networks.ada:
                discriminator = networks.ada.watch(discriminator, real_part, fake)
            if "loss" in what:
                with precision(config, real.device):
                    terms = loss.discriminator(discriminator, real_part, fake)
                backward(terms, len(parts), totals)
            if "penalty" in what:
                with precision(config, real.device, penalty=True):
                    number = step * config.n_critic + index
                    terms = loss.discriminator_penalty(discriminator, real_part, fake, step=number)
                backward(terms, len(parts), totals, every=loss.discriminator_penalty_every)
    return totals


def generator_gradients(
    step: int,
    config: TrainConfig,
    networks: Networks,
    real: Tensor | None,
    world: World,
    what: tuple[str, ...] = EVERYTHING,
    labels: Tensor | None = None,
) -> Terms:
    """Adds this process's gradients of the generator's loss; returns the terms. Arguments as for the step."""
    loss = networks.loss
    totals: Terms = {}
    parts = local_parts(config, world, config.batch_g)
    seed = draw_seed(config, step * (config.n_critic + 1) + config.n_critic)
    for (start, stop), real_part, own in zip(parts, _chunk(real, parts), _chunk(labels, parts), strict=True):
        generator, discriminator = bind(networks.generator, own), bind(networks.discriminator, own)
        if networks.ada:
            discriminator = networks.ada.watch(discriminator)
        with rng.part(seed, config.batch_g, start, stop), frozen(networks.discriminator):
            z = latents(networks.generator, stop - start)
            if "loss" in what:
                with precision(config, z.device):
                    terms = loss.generator(discriminator, real_part, make_images(config, networks, z, own))
                backward(terms, len(parts), totals)
            if "penalty" in what:
                with precision(config, z.device, penalty=True):
                    terms = loss.generator_penalty(generator, z, step=step)
                backward(terms, len(parts), totals, every=loss.generator_penalty_every)
    return totals


def discriminator_step(
    step: int,
    index: int,
    config: TrainConfig,
    networks: Networks,
    real: Tensor,
    world: World,
    what: tuple[str, ...] = EVERYTHING,
    labels: Tensor | None = None,
) -> dict[str, float]:
    """Update `index` of the discriminator within step `step` (both from 0); returns its log.

    `real` holds this process's images `(batch_d / processes, C, H, W)`; as many are generated. `what` names the
    update's terms, one element of `config.updates`; one of penalties that are not due is none, and its log empty.
    `labels`, with classes, are those of the real images; the generated ones get the same.
    """
    if "loss" not in what and (step * config.n_critic + index) % networks.loss.discriminator_penalty_every:
        return {}
    if networks.ada:
        networks.ada.signs.clear()  # of an update that was not applied
    with undone_if_not_finite(networks):
        begin_step(networks.discriminator)
        terms = discriminator_gradients(step, index, config, networks, real, world, what, labels)
        values = apply("discriminator", step + 1, config, networks, terms, what, world) if terms else {}
    return values | adapt(networks.ada, config, world) if networks.ada else values


def adapt(ada: ADA, config: TrainConfig, world: World) -> dict[str, float]:
    """Moves the probability of augmentation after an update that has seen scores; returns what the log says of it."""
    if not ada.signs:
        return {}
    sign = world.mean(ada.take_sign()).item()
    ada.move(sign, config.batch_d)
    return {"ada/sign": sign, "ada/probability": ada.probability}


def generator_step(
    step: int,
    config: TrainConfig,
    networks: Networks,
    real: Tensor | None,
    world: World,
    what: tuple[str, ...] = EVERYTHING,
    labels: Tensor | None = None,
) -> dict[str, float]:
    """The update of the generator in step `step` (from 0); returns its log. `what` as for the discriminator.

    `real` holds this process's images `(batch_g / processes, C, H, W)` if the loss uses them, `labels` the labels
    of what is generated, with classes.
    """
    if "loss" not in what and step % networks.loss.generator_penalty_every:
        return {}
    with undone_if_not_finite(networks):
        begin_step(networks.generator)
        terms = generator_gradients(step, config, networks, real, world, what, labels)
        return apply("generator", step + 1, config, networks, terms, what, world) if terms else {}
