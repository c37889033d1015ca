"""What is seen of a run while it trains: progress bar, logs, grids of samples, distance, curves."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gans.common.files import PARTIAL, new_file
from gans.data import loading
from gans.data.images import GAP, grid
from gans.data.sources import ImageSource
from gans.evaluation.metrics import distances, make_metric
from gans.models.conditioning import bind
from gans.recipes.config import RunConfig, TrainConfig, to_dict
from gans.training import checkpoint
from gans.training.checkpoint import writing
from gans.training.logs import RunLog, read
from gans.training.resume import Start
from gans.training.state import TrainState
from gans.training.status import banner, status_line

EVALUATION_SEED = 20210214
FILES = ("config.json", "curves.png", "report.html", "samples/real.png", "samples/step-*.png")
"""What is written here, in the run's folder; other commands write there as well."""


def remove_leftovers(out: Path) -> None:
    """Removes what processes of the run in `out` that were killed have left half written."""
    checkpoint.remove_leftovers(out / "checkpoints")
    for name in FILES:
        folder, _, file = name.rpartition("/")
        for leftover in (out / folder).glob(PARTIAL + file):
            leftover.unlink()


@contextmanager
def evaluation_rng(device: torch.device, seed: int = EVALUATION_SEED) -> Iterator[None]:
    """Inside, random numbers are those of `seed`; training's are not disturbed."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def generate(
    generator: nn.Module,
    count: int,
    labels: Tensor | None = None,
    *,
    seed: int = EVALUATION_SEED,
    batch: int = 64,
) -> Tensor:
    """`count` float32 images on the CPU from the z of `seed`; the first are the same for any count. `labels` `(count,)`
    for a generator with classes.
    """
    like = next(generator.parameters())
    with evaluation_rng(like.device, seed):
        z = torch.stack([torch.randn(generator.config.latent_dim) for _ in range(count)]).to(like)
        own = [None] * -(-count // batch) if labels is None else labels.to(like.device).split(batch)
        parts = zip(z.split(batch), own, strict=True)
        return torch.cat([bind(generator, label)(part).float().cpu() for part, label in parts])


def class_rows(classes: int, count: int) -> Tensor | None:
    """Labels of `count` images that show every class in turn; None without classes."""
    return torch.arange(count) % classes if classes else None


def class_shares(labels: Sequence[int] | None, count: int) -> Tensor | None:
    """`count` labels in the shares that they have in `labels`; None for None."""
    if labels is None:
        return None
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(labels)[order[torch.arange(count) % len(labels)]]


def memory_mib(device: torch.device) -> float:
    """The most memory that torch has used on a GPU so far, or what this process holds now on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def _start_wandb(run: RunConfig) -> Any:
    """A run of Weights & Biases in the project `run.wandb` that listens to TensorBoard's writers from here on."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(f"wandb is {run.wandb!r}, which needs the package wandb: pip install wandb") from error
    name = Path(run.out).name
    return wandb.init(project=run.wandb, name=name, dir=run.out, sync_tensorboard=True, config={"run": to_dict(run)})


class Monitor:
    """Writes everything but the checkpoints of a run into its folder; a context for the whole of training.

    Costs nothing in the training's random numbers. Silent in all processes but the main one, which the others
    await at their next exchange of gradients.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunConfig,
        start: Start,
        state: TrainState,
        source: ImageSource,
        labels: Sequence[int] | None = None,
        *,
        progress: bool,
    ) -> None:
        assert run.sample_every
        self.config = config
        self.run = run
        self.state = state
        self._shown = class_rows(config.classes, run.sample_count)
        self._measured = class_shares(labels, run.metric_images)
        self.out = Path(run.out)

        def real(limit: int) -> Tensor:
            size, channels, broken = config.generator.image_size, config.generator.channels, config.images.broken
            return loading.load_images(source, size=size, channels=channels, limit=limit, broken=broken)

        # What may be refused comes first: a run that is leaves no file behind.
        self.device = next(state.networks.generator.parameters()).device
        self.metric = make_metric(run.metric, real(run.metric_images).to(self.device)) if run.metric_every else None
        tiles = None if (self.out / "samples" / "real.png").exists() else real(run.sample_count)
        remove_leftovers(self.out)
        self._wandb = _start_wandb(run) if run.wandb else None  # before TensorBoard's writer, which it listens to
        self.log = RunLog(self.out, state.step, start.describe())
        self._values: dict[str, list[float]] = defaultdict(list)
        self._latest: dict[str, float] = {}  # the bar has lazy penalties in its sums between their updates as well
        self._images = state.position
        self._begun = self._started = time.perf_counter()
        self._first, self._tick = state.step, 0
        self._progress = progress
        self._distance: float | None = None
        self._best = math.inf
        self._improved = False
        self._bar = tqdm(total=config.steps, initial=state.step, unit="step", disable=not progress, dynamic_ncols=True)

        if run.init and start.checkpoint:
            self._say(f"init {run.init!r} is not used: the run goes on from {start.checkpoint}")
        if start.relearned:
            changed = ", ".join(f"{name} ({change})" for name, change in start.relearned.items())
            self._say(f"from step {state.step} on with another recipe: {changed}")
        if self.metric:
            past = distances(read(self.out), self.metric.floor) if state.step else []
            self._best = min((line["distance"] for line in past), default=math.inf)
            floor = f"real against real (two halves of {self.metric.count} images) {self.metric.floor:.4g}"
            self._say(f"{self.metric.name}: {floor}")
        if tiles is not None:
            self._save_grid(tiles, "real")
        if state.step == 0:
            self._sample()
            self._measure()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        with nullcontext() if kind is None else suppress(OSError):  # what went wrong first is what is reported
            self.log.close()
            if self._wandb:
                self._wandb.finish(exit_code=0 if kind is None else 1)
        if kind is None:
            from gans.evaluation.plots import plot_curves  # matplotlib takes a second to load
            from gans.evaluation.report import write_report

            name = self.metric.name if self.metric else "distance"
            lines = read(self.out)
            with self._file(self.out / "curves.png") as path:
                plot_curves(lines, path, name)
            with self._file(self.out / "report.html") as path:
                write_report(self.out, lines, self.out / "curves.png", path)

    def _say(self, text: str) -> None:
        self._bar.write(text)

    def begin(self, resolved: Mapping[str, Any], images: int) -> None:
        """Says what is going to be done, of so many images, and writes `config.json`."""
        if self._progress:
            self._say(banner(self.config, self.run, resolved, self.state.step, images))
            for line in resolved.get("init", []):
                self._say(line)
        with self._file(self.out / "config.json") as path:
            path.write_text(json.dumps(resolved, indent=2) + "\n")

    def step_done(self, logs: Sequence[dict[str, float]], *, stopped: bool) -> bool:
        """Takes the logs of a step's updates, of which the files get the means, and writes what is due.

        `stopped` says that the run ends here, before its last step. Returns whether a distance was measured that is the
        smallest of the run so far, of those with this network and number of images.
        """
        self._improved = False
        for values in logs:
            for name, value in values.items():
                self._values[name].append(value)
        state, run = self.state, self.run
        self._bar.update()
        last = state.step == self.config.steps
        due = last or stopped or state.step % run.log_every == 0
        first = state.step == self._first + 1
        if due:
            self._write_means()
        elif first:  # losses are seen from the first step on; the log has means over whole ticks
            self._latest |= self._means()
        if self.metric and (last or state.step % run.metric_every == 0):
            self._measure()
        if due or first:
            self._show_tick()
        if last or state.step % run.sample_every == 0:
            self._sample()
        return self._improved

    def _write_means(self) -> None:
        line = self._means()
        self.log.write(self.state.step, line)
        self._latest |= line
        self._values.clear()
        self._images, self._started = self.state.position, time.perf_counter()

    def _means(self) -> dict[str, float]:
        """What the log says of the steps since its last line."""
        seconds = time.perf_counter() - self._started
        return {name: sum(values) / len(values) for name, values in self._values.items()} | {
            "skipped": self.state.skipped,
            "real_images": self.state.position,
            "images_per_second": (self.state.position - self._images) / seconds,
            "memory_mib": memory_mib(self.device),
        }

    def _show_tick(self) -> None:
        """The status line, and the numbers beside the bar."""
        losses = {
            letter: sum(
                value for name, value in self._latest.items() if name.startswith(network) and not name.endswith("_norm")
            )
            for letter, network in (("D", "discriminator/"), ("G", "generator/"))
        }
        state, elapsed = self.state, time.perf_counter() - self._begun
        speed, memory = self._latest["images_per_second"], self._latest["memory_mib"]
        if self._progress:
            text = status_line(
                tick=self._tick,
                thousands=state.position / 1000,
                elapsed=elapsed,
                per_thousand=1000 / max(speed, 1e-9),
                memory=memory,
                losses=losses,
                left=elapsed / (state.step - self._first) * (self.config.steps - state.step),
                distance=self._distance,
                best=self._improved,
            )
            self._say(text)
        self._tick += 1
        shown = {name: f"{value:.3g}" for name, value in losses.items()}
        shown |= {"images/s": f"{speed:.3g}", "MiB": f"{memory:.0f}"}
        self._bar.set_postfix(shown | ({"skipped": str(state.skipped)} if state.skipped else {}))

    def _measure(self) -> None:
        if self.metric:
            images = generate(self.state.average.model, self.run.metric_images, self._measured)
            images = images.clamp(-1, 1)  # as they would be saved
            self._distance = distance = self.metric(images.to(self.device))
            self.log.write(self.state.step, {"distance": distance, "floor": self.metric.floor})
            self._improved, self._best = distance < self._best, min(distance, self._best)

    def _sample(self) -> None:
        images = generate(self.state.average.model, self.run.sample_count, self._shown)
        self._save_grid(images, f"step-{self.state.step:08d}")

    def _save_grid(self, images: Tensor, name: str) -> None:
        with self._file(self.out / "samples" / f"{name}.png") as path:
            grid(images, gap=GAP).save(path)

    @contextmanager
    def _file(self, path: Path) -> Iterator[Path]:
        """A file of the run to write: complete, or with a message about what to do."""
        with writing(path, self.out / "checkpoints"), new_file(path) as partial:
            yield partial
