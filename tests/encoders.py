"""Encoders for `train_cifar.py --arch encoders:NAME`, for tests that need more of a network than that it trains."""

from __future__ import annotations

from torch import nn


def constant_encoder() -> nn.Module:
    """Features that do not depend on the image."""
    layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8))
    nn.init.zeros_(layers[2].weight)
    layers[2].weight.requires_grad_(False)
    layers.num_features = 8
    return layers


def smooth_encoder() -> nn.Module:
    """Without kinks, and without regard to other images.

    Two runs that differ in the order of sums stay as near as rounding allows. With ReLU some of the hundreds of
    thousands of activations of a step lie within that of zero, and the gradients of such a one are all or nothing.
    """
    layers = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.GELU()),
        *(nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(8, 32), nn.GELU()),
        *(nn.Conv2d(32, 64, 3, 2, 1), nn.GroupNorm(8, 64), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    layers.num_features = 64
    return layers
