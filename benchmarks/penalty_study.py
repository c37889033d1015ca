"""R1 and R2 by double backward against their estimates: accuracy, cost, and what they learn.

    python -m benchmarks.penalty_study --out DIR                  # accuracy and cost: some ten minutes
    python -m benchmarks.penalty_study --out DIR --seconds 150    # and training curves: 2 modes, 3 seeds, 150 s each

- accuracy: bias and scatter of the penalty's gradient in the weights of ViTGAN's scaled-down discriminator, on scanned
  digits, at initial weights and after ``--steps`` steps of training, by step size and precision, against double
  backward in float64;
- cost: a discriminator's update with R1 and R2, by number of tokens, with fused and with naive attention;
- curves: the demo's recipe with R1 and R2 in every update, at equal processor time.

DIR gets ``penalty_study.json`` and ``penalty_study.md``, whole at any time, and ``curves.png``. What is there already
from an earlier start is kept: ``--only`` measures a part anew. The page that shows it all is docs/penalties.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.environment import describe_environment
from benchmarks.penalties import accuracy, cost, page, training
from benchmarks.penalties.page import MODES, PARTS
from benchmarks.record import output_folder, write_whole
from gans.losses.adversarial import LossConfig
from gans.recipes.config import TrainConfig
from gans.recipes.named import preset


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="penalty_study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=output_folder, required=True, metavar="DIR", help="made if need be")
    add("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to measure (default: all)")
    add("--batch", type=int, default=16, help="images of an accuracy (default 16)")
    add("--draws", type=int, default=64, help="directions of an accuracy (default 64)")
    add("--steps", type=int, default=200, help="training before the second accuracy (default 200)")
    add("--tokens", type=int, choices=cost.PATCHES, nargs="+", default=[64, 256, 1024], help="of a cost")
    add("--cost-batch", type=int, default=4, help="images of a cost (default 4)")
    add("--repeats", type=int, default=9, help="updates timed of a cost (default 9)")
    add("--seconds", type=float, default=0.0, help="processor time of a training run; 0 (default): no curves")
    add("--seeds", type=int, default=3, help="training runs of each mode (default 3)")
    add("--points", type=int, default=10, help="distances of a training run (default 10)")
    add("--threads", type=int, default=1, help="of the CPU (default 1)")
    options = parser.parse_args(arguments)
    for name in ("batch", "draws", "cost_batch", "repeats", "seeds", "points", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.steps < 0 or options.seconds < 0:
        parser.error("--steps and --seconds cannot be negative")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures the parts that are asked for; returns the exit status."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    path = options.out / "penalty_study.json"
    result = json.loads(path.read_text()) if path.exists() else {}

    def save(part: str, rows: list[dict]) -> None:
        told = describe_environment(torch.device("cpu"), torch.float32)
        result[part] = {"environment": told, "arguments": {k: str(v) for k, v in vars(options).items()}, "rows": rows}
        write_whole(path, json.dumps(result, indent=1) + "\n")
        write_whole(options.out / "penalty_study.md", page.page(result))
        print(f"{part}: {len(rows)} rows", flush=True)

    if "accuracy" in options.only:
        save("accuracy", accuracies(options.batch, options.draws, options.steps))
    if "cost" in options.only:
        rows = []
        for tokens in options.tokens:
            rows += cost.measure(tokens, options.cost_batch, options.repeats, options.threads)
            save("cost", rows)
    if "curves" in options.only and options.seconds:
        rows = []
        for seed in range(options.seeds):
            for mode in MODES:
                rows += training.curve(curve_recipe(), mode, seed, options.seconds, options.points)
                save("curves", rows)
        plot(rows, options.out / "curves.png")
    print(f"written: {path} and penalty_study.md")
    return 0


def discriminating_recipe() -> TrainConfig:
    """``vitgan32-small`` on grey images with a light R1."""
    small = preset("vitgan32-small")
    return replace(
        small,
        generator=replace(small.generator, channels=1),
        discriminator=replace(small.discriminator, channels=1),
        loss=LossConfig("relativistic", gp_weight=0, drift=0, r1=0.1, r2=0.1, penalty_every=4),
        lr_d=1e-3,
    )


def curve_recipe() -> TrainConfig:
    """The demo's, at a constant learning rate, with penalties in every update and a gamma that is made for that."""
    demo = preset("digits")
    return replace(demo, loss=replace(demo.loss, r1=0.05, r2=0.05, penalty_every=1), decay_end=0, decay_start=0)


def accuracies(batch: int, draws: int, steps: int) -> list[dict]:
    recipe = discriminating_recipe()
    images = training.digits(recipe.generator.image_size)
    learning = training.Training(recipe, images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    batches = images[order[: batch * (len(images) // batch)]].unflatten(0, (-1, batch))[: draws + 1]
    rows = []
    for step in (0, steps) if steps else (0,):
        while learning.step < step:
            learning.advance()
        # DiffAug is no part of the question.
        model = learning.networks.discriminator
        model.config = replace(model.config, augment=())
        rows += [{"step": step} | row for row in accuracy.study(model, batches[0], draws, batches[1:])]
        model.config = recipe.discriminator
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Distances over processor time, a line for each run."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    colors = dict(zip(MODES, ("tab:blue", "tab:orange"), strict=True))
    labelled = set()
    for (mode, _), points in page.runs(rows).items():
        label = None if mode in labelled else mode
        labelled.add(mode)
        axis.semilogy(
            *zip(*((p["seconds"], p["distance"]) for p in points), strict=True), color=colors[mode], label=label
        )
    axis.set(xlabel="processor seconds", ylabel="distance (random)")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
