"""Transformer GANs that train with fused attention: `python -m gans train --help`.

Each folder imports only what stands above it here:

- `common`: files that appear whole, random numbers of images, processes, backends, empty names
- `features`: frozen networks that a projected discriminator looks at, or that distances are measured over
- `models`: generators and discriminators, their layers and augmentation, the average of a generator
- `losses`: adversarial losses, penalties, path length
- `data`: images from folders and archives, batches of them, PNG files
- `recipes`: configurations, what each of them builds, presets
- `evaluation`: distances to real images, figures of a run, where attention looks
- `training`: the loop, updates, checkpoints, logs, interruption, memory and time of a step
- `conversion`: published checkpoints, read safely and translated
- `commands`: `python -m gans COMMAND`, one module each
"""
