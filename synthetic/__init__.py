"""Planted features: stores whose activations are sums of known features, and what SAEs recover of them."""
