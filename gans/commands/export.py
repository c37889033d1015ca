"""`python -m gans export`: a generator as a folder that others can use, in the layout of the Hugging Face hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from gans.commands.generators import Weights, check_backend, find_weights, load_generator, render
from gans.common.files import new_folder, save_tensors
from gans.data.images import GAP, grid, save_png
from gans.recipes.config import to_dict
from gans.training import checkpoint
from natten_ext.version import __version__

SAMPLES = 16
"""Images of the model card's picture, of the first seeds."""


@dataclass(frozen=True)
class ExportArguments:
    """Writes model.safetensors, config.json, README.md (a model card) and samples.png.

    sample and the others read the folder (`--checkpoint`), and a training run can start from it (`--init`).
    `hf upload NAME FOLDER` puts it on the hub.
    """

    checkpoint: Path
    """A run's folder (its newest checkpoint), a checkpoint, or a folder that convert has written."""
    out: Path
    """Folder to write; it must not exist."""
    name: str = ""
    """The model's name on its card; that of the folder if not given."""
    license: str = "other"
    """The license of the weights, as the hub names it (mit, cc-by-4.0...). It depends on the data too."""
    data: str = ""
    """What the data were, for the card; by default the name that the run knows."""
    weights: Weights = "generator_ema"
    """The averaged generator, or the one under training."""


def card(name: str, license: str, data: str, config: dict[str, Any], generator: nn.Module) -> str:
    """The model card: its front matter as the hub reads it, and how to use the model."""
    sizes = generator.config
    kind, count = config["recipe"]["generator"]["kind"], sum(p.numel() for p in generator.parameters())
    names = config.get("classes") or []
    more = f"{', ...' if len(names) > 20 else ''}"
    classes = f"\n- classes: {', '.join(names[:20])}{more}" if names else ""
    steps = f"\n- steps: {config['step']:,} of batches of {config['recipe']['batch_g']}" if "step" in config else ""
    return f"""---
license: {license}
library_name: natten_ext
pipeline_tag: unconditional-image-generation
tags: [gan, transformer, {kind}]
---

# {name}

A {kind} generator, trained with `gans` of natten_ext {__version__}.

![16 samples, not chosen](samples.png)

- images: {sizes.image_size}x{sizes.image_size}, {sizes.channels} channels
- parameters: {count:,}
- data: {data or "not stated"}{classes}{steps}

## Use

    python -m gans sample --checkpoint FOLDER --seeds 0-15 --out samples.png

`FOLDER` is this repository on your disk. Or in Python:

```python
from pathlib import Path

import torch
from gans.commands.generators import load_generator, render

generator = load_generator(Path("FOLDER"), torch.device("cpu"))
(images,) = render(generator, seeds=range(4))  # {(4, sizes.channels, sizes.image_size, sizes.image_size)}, in [-1, 1]
```

`model.safetensors` holds the weights, `config.json` all settings of the training.
"""


def run(arguments: list[str]) -> None:
    options = tyro.cli(ExportArguments, args=arguments, prog="python -m gans export")
    source, _ = find_weights(options.checkpoint, options.weights)
    saved = checkpoint.load_config(source)
    generator = load_generator(source, torch.device("cpu"), options.weights)
    check_backend(generator, None)  # of the environment
    config = {"model_type": saved["recipe"]["generator"].get("kind", "transgan"), "recipe": saved["recipe"]}
    config["recipe"]["generator"] = to_dict(generator.config)
    config |= {key: saved[key] for key in ("classes", "converted_from", "versions") if key in saved}
    if (source / checkpoint.STATE).exists():
        config["step"] = checkpoint.load_state(source)["step"]
    data = options.data or Path(saved.get("run", {}).get("data", "")).name
    (images,) = render(generator, range(SAMPLES), batch=SAMPLES)
    with new_folder(options.out) as folder:
        save_tensors(generator.state_dict(), folder / "model.safetensors", {"format": "pt"})
        (folder / checkpoint.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        name = options.name or options.out.name
        (folder / "README.md").write_text(card(name, options.license, data, config, generator), encoding="utf-8")
        save_png(grid(images, gap=GAP), folder / "samples.png", scale=max(1, 128 // generator.config.image_size))
        checkpoint.write_checksums(folder)
    print(f"wrote {options.out}: model.safetensors, config.json, README.md, samples.png")
