"""Networks for 32 x 32 images: ResNet-18, ResNet-50, one that trains on a CPU, and whatever else you name; teachers.

The stem of the residual networks is that of CIFAR: one 3 x 3 convolution instead of a 7 x 7 one with stride and
pooling. Their shapes are of https://arxiv.org/abs/1512.03385, their first weights of https://arxiv.org/abs/1502.01852.
"""

from __future__ import annotations

import importlib
import pickle
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = {"batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, 8)}  # the second takes no account of other images


class Block(nn.Module):
    """Add to the input what convolutions make of it: two of 3 x 3, or 1 x 1, 3 x 3 and 1 x 1 around a bottleneck."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int, norm: str) -> None:
        super().__init__()
        outputs = width * expansion
        # (inputs, outputs, kernel, stride) of each convolution
        plain = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        bottleneck = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        shapes = plain if expansion == 1 else bottleneck
        layers = [layer for shape in shapes for layer in (*convolution(*shape, norm), nn.ReLU(inplace=True))]
        self.residual = nn.Sequential(*layers[:-1])  # the last activation comes after the sum
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride, norm))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Images (N, 3, H, W) -> features (N, num_features).

    Args:
        widths: Channels of each stage before expansion.
        depths: Blocks in each stage. Every stage but the first halves the size of the image.
        expansion: 1 for plain blocks, 4 for bottlenecks.
        stem_stride: 2 halves the size of the image at once.
        norm: "batch" or "group".
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        expansion: int = 1,
        stem_stride: int = 1,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        channels = widths[0]
        layers = [*convolution(3, channels, 3, stem_stride, norm), nn.ReLU(inplace=True)]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Block(channels, width, stride, expansion, norm))
                channels = width * expansion
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def convolution(inputs: int, outputs: int, kernel: int, stride: int, norm: str) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), NORMS[norm](outputs)


ENCODERS = {
    "resnet18": partial(ResNet, (64, 128, 256, 512), (2, 2, 2, 2)),
    "resnet50": partial(ResNet, (64, 128, 256, 512), (3, 4, 6, 3), expansion=4),
    "small": partial(ResNet, (32, 64, 128, 256), (1, 1, 1, 1), stem_stride=2),  # 1.2 million weights
    "tiny": partial(ResNet, (16, 32, 64, 128), (1, 1, 1, 1), stem_stride=2),  # 0.3 million weights
}


class Network(nn.Module):
    """Encoder and head: images (N, 3, H, W) in [0, 1] -> embeddings or logits (N, outputs).

    Args:
        encoder: Maps standardised images to features (N, num_features), and has that attribute.
        outputs: Width of what the head returns.
        projects: Whether the head is a projection of two layers, as of SupCon, or a linear classifier.
        mean, std: Of each channel, for standardising.
    """

    def __init__(self, encoder: nn.Module, outputs: int, projects: bool, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.encoder = encoder
        width = encoder.num_features
        hidden = [nn.Linear(width, width), nn.ReLU(inplace=True)] if projects else []
        self.head = nn.Sequential(*hidden, nn.Linear(width, outputs))

    def features(self, images: Tensor) -> Tensor:
        return self.encoder((images - self.mean) / self.std)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class CheckpointError(Exception):
    """What is wrong with a network or a file of weights, and what to do about it."""


def make_network(config: dict, num_classes: int, mean: list[float], std: list[float]) -> Network:
    """The network of a run with these options of `train_cifar.py`."""
    projects, name = config["method"] != "ce", config["arch"]
    encoder = ENCODERS[name](norm=config["norm"]) if name in ENCODERS else call_by_name("--arch", name)
    if not isinstance(getattr(encoder, "num_features", None), int):
        raise CheckpointError(f"--arch {name} must return a module with num_features, the width of what it returns")
    return Network(encoder, config["projection"] if projects else num_classes, projects, mean, std)


def call_by_name(option: str, name: str) -> nn.Module:
    """What the function `module:function` returns."""
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        known = f"one of {', '.join(ENCODERS)}, or module:function"
        raise CheckpointError(f"{option} {name}: {error}. It must be {known}.") from error
    if not isinstance(made, nn.Module):
        raise CheckpointError(f"{option} {name} must return a torch.nn.Module; got {type(made).__name__}")
    return made


def read_checkpoint(path: Path, trusted: bool = False) -> object:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError as error:
        hint = "" if trusted else "; if it is a whole module, of a source that you trust, add --trust-teacher"
        raise CheckpointError(f"{path} is damaged, or holds more than tensors{hint}") from error
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def load_teacher(path: Path, model: str | None, trusted: bool, classes: list[str], size: int) -> nn.Module:
    """A network from images (N, 3, size, size) in [0, 1] to logits (N, classes).

    Args:
        path: A checkpoint of `train_cifar.py --method ce`, weights of another network, or, if trusted, a whole module.
        model: `module:function`, which makes the network that the weights are for.
        trusted: Whether the file may run code.
        classes: Names of the classes of the data.
        size: Height and width of the images.
    """
    saved = read_checkpoint(path, trusted)
    if isinstance(saved, nn.Module):
        teacher = saved
    elif isinstance(saved, dict) and saved.keys() >= {"config", "classes", "model"}:
        if saved["config"]["method"] != "ce":
            raise CheckpointError(f"--teacher {path} was trained with {saved['config']['method']}: it has no logits")
        if saved["classes"] != classes:
            raise CheckpointError(f"--teacher {path} was trained on other classes: {', '.join(saved['classes'])}")
        teacher = make_network(saved["config"], len(classes), [0.0] * 3, [1.0] * 3)
        teacher.load_state_dict(saved["model"])
    else:
        if model is None:
            raise CheckpointError(f"--teacher {path} holds weights only: name their network with --teacher-model")
        teacher = call_by_name("--teacher-model", model)
        try:
            teacher.load_state_dict(saved.get("state_dict", saved))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise CheckpointError(f"--teacher {path} does not fit --teacher-model {model}: {error}") from error
    teacher.eval().requires_grad_(False)
    outputs = tuple(teacher(torch.rand(2, 3, size, size)).shape)
    if outputs != (2, len(classes)):
        raise CheckpointError(f"--teacher {path} must give {len(classes)} logits for an image; got {outputs} for two")
    return teacher
