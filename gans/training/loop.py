"""The training loop. `train` reads from top to bottom; an update of a network is in `gans.training.steps`."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import natten_ext
from gans.common.distributed import World, choose_device
from gans.data import loading
from gans.data.sources import ImageSource, class_labels, open_source
from gans.models.ema import EMA
from gans.recipes.config import RunConfig, TrainConfig, to_dict
from gans.training import checkpoint
from gans.training.dry_run import check_backend
from gans.training.interrupt import Interrupted, StopSignals
from gans.training.lock import locked
from gans.training.monitor import Monitor
from gans.training.recompute import recompute_blocks
from gans.training.resume import check_classes, find_start, refuse_later
from gans.training.state import TrainState
from gans.training.steps import NonFiniteError, discriminator_step, generator_step, make_networks, set_learning_rates
from gans.training.transfer import transfer


def configure_torch(run: RunConfig) -> None:
    """Threads, TF32 and repeatability; for the whole process."""
    if run.threads:
        torch.set_num_threads(run.threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = run.tf32
    torch.set_float32_matmul_precision("high" if run.tf32 else "highest")


def synchronize_batch_norm(model: nn.Module, world: World, *, penalized: bool = False) -> nn.Module:
    """`model` with batch norms that see the whole batch; ValueError where several processes cannot have that, or not
    with penalties on its gradient (`penalized`).
    """
    trained = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    if world.size == 1 or not trained:
        return model
    if world.device.type != "cuda":
        raise ValueError(f"{type(model).__name__} has batch norms, which need GPUs to train in {world.size} processes")
    if penalized:  # neither a double backward (pytorch/pytorch issue 61222) nor a forward mode
        raise ValueError(
            f"{type(model).__name__} has batch norms, whose form for {world.size} processes cannot have penalties on "
            "gradients: make loss.gp_weight, loss.r1 and loss.r2 0, or train in one process"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def resolved_config(config: TrainConfig, run: RunConfig, state: TrainState, world: World) -> dict[str, Any]:
    """Everything that a run was made of, for JSON."""
    device = world.device
    return {
        "recipe": to_dict(config),
        "run": to_dict(run),
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in state.models().items()},
        "versions": {"torch": torch.__version__, "natten_ext": natten_ext.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": world.size,
        "threads": torch.get_num_threads(),
    }


def train(config: TrainConfig, run: RunConfig, *, world: World | None = None, progress: bool = True) -> Path:
    """Trains a recipe and returns the last checkpoint's path.

    In a `world` of several processes (see `gans.common.distributed`) all work on each batch together. The weights
    do not depend on how many there are, other than by rounding. Resuming continues exactly: on one device, backend
    and number of threads and processes the weights are bit for bit those of a run that was never interrupted. Logs,
    grids and measurements draw from a generator of their own, so how often they happen changes nothing.

    SIGINT (Ctrl-C) and SIGTERM let a step end, and write a checkpoint, before Interrupted is raised.

    Raises NonFiniteError when training diverges, FileExistsError when `out` holds a run and `resume` is not
    given, or while another process trains there, and OSError when a file cannot be written.
    """
    world = world or World(choose_device(run.device))
    config.check_processes(world.size)
    config.check_run(run)
    configure_torch(run)
    source = open_source(run.data, config.images.split)
    check_backend(config, run)
    out = Path(run.out)
    try:
        with locked(out) if world.is_main else nullcontext():
            return _train(config, run.with_intervals(config.steps), source, out, world, progress)
    except Interrupted:
        raise
    except KeyboardInterrupt as error:
        raise Interrupted(signal.SIGINT, f"stopped at once. {checkpoint.way_on(out / 'checkpoints')}") from error


def _train(config: TrainConfig, run: RunConfig, source: ImageSource, out: Path, world: World, progress: bool) -> Path:
    assert run.checkpoint_every
    checkpoints = out / "checkpoints"
    start = find_start(config, run, checkpoints)
    latest = start.checkpoint
    labels = class_labels(source, config.classes, run.data)

    networks = make_networks(config, world.device)
    state = TrainState(networks, EMA(networks.generator, config.ema))
    networks.generator = synchronize_batch_norm(networks.generator, world)
    penalized = any(getattr(config.loss, name, 0) for name in ("gp_weight", "r1", "r2"))
    networks.discriminator = synchronize_batch_norm(networks.discriminator, world, penalized=penalized)
    if run.gradient_checkpointing:
        recompute_blocks(networks.generator)
        recompute_blocks(networks.discriminator)
    if latest:
        state.restore(latest, images=len(source))
        refuse_later(checkpoints, latest, state.step)
        if labels is not None:
            check_classes(latest, source.classes, run.data)
    resolved = resolved_config(config, run, state, world)
    if run.init and not latest:
        resolved["init"] = transfer(run.init, state.models(), little=run.init_little)
    if labels is not None:
        resolved["classes"] = source.classes

    stream = loading.Stream(
        source,
        size=config.generator.image_size,
        channels=config.generator.channels,
        seed=config.seed,
        flip=config.images.flip,
        broken=config.images.broken,
        labels=labels,
    )
    # A step takes the batches of its discriminator updates, and one more if the generator's loss wants real images, or
    # labels to generate.
    more = networks.loss.uses_real or labels is not None
    sizes = [config.batch_d] * config.n_critic + ([config.batch_g] if more else [])
    batches = loading.batches(
        stream,
        sizes,
        start=state.position,
        workers=config.images.workers,
        rank=world.rank,
        processes=world.size,
        pin_memory=world.device.type == "cuda",
    )

    def next_real(size: int) -> tuple[Tensor, Tensor | None]:
        """Images, and their labels if the networks have classes."""
        state.position += size
        batch = next(batches)
        images, own = (batch, None) if labels is None else batch
        images = loading.to_unit_range(images.to(world.device, non_blocking=True))
        dtype = next(networks.discriminator.parameters()).dtype
        return images.to(dtype), None if own is None else own.to(world.device, non_blocking=True)

    # Of each network by itself, with and without a lazy penalty: what goes well elsewhere must not hide them.
    skips_in_a_row: Counter[tuple[str, ...]] = Counter()

    def diverged(what: object, names: tuple[str, ...] = ()) -> NonFiniteError:
        return NonFiniteError(
            f"{what}. {checkpoint.way_on(checkpoints)}. Try a lower learning rate (--lr-d, --lr-g), "
            "--precision fp32, or --backend reference to rule out a kernel",
            names,
        )

    def attempt(update: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
        """What `update` returns; nothing if it was not finite and the run skips such updates."""
        try:
            values = update(*arguments)
        except NonFiniteError as error:
            state.skipped += 1
            skips_in_a_row[error.names] += 1
            if run.non_finite == "skip" and skips_in_a_row[error.names] < run.max_skips:
                return {}
            raise diverged(error, error.names) from error
        skips_in_a_row[tuple(values)] = 0
        return values

    def save_checkpoint() -> Path:
        if broken := state.not_finite():
            raise diverged(f"step {state.step}: {broken} is not finite; no checkpoint was written")
        if world.is_main:
            state.save(checkpoints, images=len(source), config=resolved, keep=run.keep)
        world.barrier()
        return checkpoint.path_of(checkpoints, state.step)

    backend = natten_ext.use_backend(run.backend) if run.backend is not None else nullcontext()
    stopped = False
    with (
        backend,
        Monitor(config, run, start, state, source, labels, progress=progress)
        if world.is_main
        else nullcontext() as monitor,
        StopSignals(announce=world.is_main) as signals,
    ):
        if monitor:
            monitor.begin(resolved, len(source))
        while state.step < config.steps and not stopped:
            logs = [{"lr_factor": set_learning_rates(config, networks, state.step)}]
            for index in range(config.n_critic):
                real, own = next_real(config.batch_d)
                for what in config.updates:
                    update = (state.step, index, config, networks, real, world, what, own)
                    logs.append(attempt(discriminator_step, *update))
            real, own = next_real(config.batch_g) if more else (None, None)
            for what in config.updates:
                logs.append(attempt(generator_step, state.step, config, networks, real, world, what, own))
            state.step += 1
            state.average.update(networks.generator, images=state.step * config.batch_g, batch=config.batch_g)

            stopped = world.any(signals.received is not None) and state.step < config.steps
            if monitor and monitor.step_done(logs, stopped=stopped) and not state.not_finite():
                state.save(checkpoints, images=len(source), config=resolved, keep=run.keep, best=True)
            if stopped or state.step % run.checkpoint_every == 0 or state.step == config.steps:
                latest = save_checkpoint()
    if stopped:
        way_on = checkpoint.way_on(checkpoints)
        message = f"stopped after step {state.step}. {way_on}"
        raise Interrupted(signals.received or signal.SIGTERM, message, together=True)
    return latest or save_checkpoint()
