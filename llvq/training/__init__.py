"""Training a VQ-VAE: its state, its step, and what feeds and measures the steps."""
