"""How fast a function of token sequences can change: the largest ratio |f(x) - f(y)| / |x - y| that can be found.

`python -m gans.evaluation.lipschitz` draws docs/img/vitgan_lipschitz.png: ViTGAN's attention with three kinds of scores
and values, over random and over adversarial inputs of growing size. What is found is a lower bound of the Lipschitz
constant; a function has one only if the ratio stops growing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from gans.models.vitgan_layers import ViTAttention

Function = Callable[[Tensor], Tensor]


def local_ratio(f: Function, x: Tensor, *, iterations: int = 20) -> Tensor:
    """The largest singular value of f's Jacobian at each of x `(B, N, C)`, `(B,)`, by power iteration.

    This is the limit of |f(x + d) - f(x)| / |d| for the worst small d. Products with the Jacobian come from the
    gradient of a gradient, so f is differentiated twice.
    """
    x = x.detach().requires_grad_(True)
    y = f(x)
    cotangent = torch.zeros_like(y, requires_grad=True)
    (pulled,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
    direction = torch.randn_like(x)
    for _ in range(iterations):
        direction = direction / direction.flatten(1).norm(dim=1)[:, None, None]
        (pushed,) = torch.autograd.grad(pulled, cotangent, direction, retain_graph=True)
        (direction,) = torch.autograd.grad(y, x, pushed, retain_graph=True)
    return pushed.flatten(1).norm(dim=1)


def of_size(x: Tensor, scale: float) -> Tensor:
    """x `(B, N, C)` with each example scaled to the root mean square `scale`."""
    return x * (scale / x.square().mean((1, 2), keepdim=True).sqrt())


def ascend(f: Function, start: Tensor, scale: float, *, steps: int) -> Tensor:
    """Inputs of size `scale` where f changes as fast as gradient ascent from `start` can find.

    What is ascended is the ratio for a pair of inputs a small step apart; the step is optimised as well.
    """
    x, d = of_size(start, scale).requires_grad_(True), torch.randn_like(start).requires_grad_(True)
    optimizer = torch.optim.Adam([{"params": [x], "lr": 0.05 * min(scale, 1)}, {"params": [d], "lr": 0.05}])
    best, best_ratio = x.detach().clone(), start.new_zeros(len(start))
    for _ in range(steps):
        centre, step = of_size(x, scale), of_size(d, 1e-3 * min(scale, 1))
        ratio = (f(centre + step / 2) - f(centre - step / 2)).flatten(1).norm(dim=1) / step.flatten(1).norm(dim=1)
        better = ratio.detach() > best_ratio
        best_ratio = torch.where(better, ratio.detach(), best_ratio)
        best[better] = centre.detach()[better]
        optimizer.zero_grad()
        (-ratio.log().sum()).backward()
        optimizer.step()
    return best


def starts(module: ViTAttention, tokens: int, count: int, scale: float) -> Tensor:
    """Where to look for adversarial inputs of size `scale`: `count` each of three kinds, `(3 * count, tokens, dim)`.

    Random ones; random ones whose first token is 0, so that dot products see no difference between the far-off
    others (Kim et al.'s counterexample, arXiv 2006.04710); and some whose tokens differ much, but little in what the
    first head's queries see of them.
    """
    query = module.query.effective_weight().detach()
    random = of_size(torch.randn(count, tokens, query.shape[1], dtype=query.dtype, device=query.device), scale)
    at_rest = random.clone()
    at_rest[:, 0] = 0
    seen = torch.linalg.svd(query[: len(query) // module.heads]).Vh
    coordinates = random @ seen.t()
    visible = len(query) // module.heads
    coordinates[..., :visible] *= min(1.0, 1 / scale)
    return of_size(torch.cat([random, at_rest, coordinates @ seen]), scale)


def sweep(
    module: ViTAttention, scales: list[float], *, tokens: int, count: int, steps: int
) -> tuple[list[float], list[float]]:
    """The largest local ratio at each input size: over `count` random inputs, and over adversarial ones."""
    randoms, adversaries = [], []
    for scale in scales:
        begin = starts(module, tokens, count, scale)
        ratios = local_ratio(module, torch.cat([begin, ascend(module, begin, scale, steps=steps)]))
        randoms.append(float(ratios[:count].max()))
        adversaries.append(float(ratios.max()))
    return randoms, adversaries


VARIANTS = {
    "dot product": {"score": "dot", "tied": False, "values": "plain"},
    "L2, values as printed (plain)": {"score": "l2", "values": "plain"},
    "L2, projected values (default)": {"score": "l2", "values": "projected"},
}


@dataclass(frozen=True)
class Arguments:
    """Measures how fast ViTGAN's attention changes, and draws it."""

    out: Path = Path("docs/img/vitgan_lipschitz.png")
    """PNG file to write."""
    dim: int = 96
    """Channels."""
    heads: int = 6
    """Attention heads."""
    tokens: int = 17
    """Tokens of an input."""
    count: int = 4
    """Random inputs of each size, and starts of each of three kinds for adversarial ones."""
    steps: int = 150
    """Steps of gradient ascent."""
    seed: int = 0
    """Decides weights and inputs."""


def main(arguments: Arguments) -> None:
    """Prints the ratios and writes the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    scales = [2.0**k for k in range(-2, 8)]
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (name, options), color in zip(tqdm(VARIANTS.items()), ("tab:red", "tab:orange", "tab:blue"), strict=True):
        torch.manual_seed(arguments.seed)
        module = ViTAttention(arguments.dim, arguments.heads, **options).double().requires_grad_(False)  # type: ignore[arg-type]
        randoms, adversaries = sweep(
            module, scales, tokens=arguments.tokens, count=arguments.count, steps=arguments.steps
        )
        axes.plot(scales, randoms, "--", color=color, marker=".", label=f"{name}: random inputs")
        axes.plot(scales, adversaries, "-", color=color, marker="o", label=f"{name}: adversarial inputs")
        for kind, values in (("random", randoms), ("adversarial", adversaries)):
            tqdm.write(f"{name}, {kind}: " + " ".join(f"{value:.3g}" for value in values))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="size of the input (root mean square)",
        ylabel="largest ratio found, |f(x) - f(y)| / |x - y|",
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=130)
    tqdm.write(f"wrote {arguments.out}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
