"""Images to train on that are drawn, not downloaded: classes differ in colour and in the direction of stripes."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red", "yellow")
COLOURS = dict(zip(CLASSES, ((40, 60, 220), (40, 200, 60), (220, 50, 40), (220, 210, 40)), strict=True))


def draw(name: str, number: int, size: int = 32) -> Image.Image:
    """Stripes of the colour of a class, which one class has upright, at a phase and contrast of the image's own."""
    random = np.random.default_rng([CLASSES.index(name), number])
    across = np.arange(size) + random.integers(8)
    stripes = (np.sin(across * (0.5 + 0.1 * CLASSES.index(name))) * random.uniform(0.2, 0.5) + 0.5)[:, None]
    pixels = np.broadcast_to(stripes if name != "red" else stripes.T, (size, size))[..., None] * COLOURS[name]
    return Image.fromarray((pixels + random.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8))


def write_images(folder: Path, train: int = 20, test: int = 6, size: int = 32) -> Path:
    for split, count in (("train", train), ("test", test)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                draw(name, number + 1000 * (split == "test"), size).save(folder / split / name / f"{number:04}.png")
    return folder


def pack(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:" + path.suffix[1:]) as tar:
        tar.add(folder, arcname=".")
    return path
