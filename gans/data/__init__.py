"""Real images: where they come from, how they become batches; images as files."""
