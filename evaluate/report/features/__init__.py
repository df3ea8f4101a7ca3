"""One SAE's latents: where each fires, what it writes, which others are like it, and how each is shown."""
