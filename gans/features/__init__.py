"""Frozen networks whose features a projected discriminator looks at, or distances are measured over."""
