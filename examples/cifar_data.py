"""CIFAR-10 and CIFAR-100 from their official archives, or any images in class folders; and their augmentation."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import urllib.error
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import kornia.augmentation as K
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.hub import download_url_to_file
from tqdm import tqdm

SITE = "https://www.cs.toronto.edu/~kriz"


class Official(NamedTuple):
    """An archive, its checksum (SHA-256), and what is where in it."""

    archive: str
    checksum: str
    train: tuple[str, ...]
    test: str
    names: str
    label_key: bytes
    name_key: bytes


CIFAR = {
    "cifar10": Official(
        "cifar-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        *("test_batch", "batches.meta", b"labels", b"label_names"),
    ),
    "cifar100": Official(
        "cifar-100-python.tar.gz",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        ("train",),
        *("test", "meta", b"fine_labels", b"fine_label_names"),
    ),
}
TRAIN, TEST = ("train",), ("test", "val", "valid", "validation")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"}
NOT_READABLE = (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError)


class DataError(Exception):
    """What is wrong with the data, and what to do about it."""


@dataclass
class Images:
    """A training and a test set.

    `train` and `test` are pairs of images (N, 3, H, W), uint8, and class numbers (N,).
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: list[str]

    def to(self, device: torch.device) -> Images:
        (x, y), (a, b) = self.train, self.test
        return Images((x.to(device), y.to(device)), (a.to(device), b.to(device)), self.classes)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the training images in [0, 1]."""
        channels = self.train[0].transpose(0, 1).flatten(1)
        counts = torch.stack([torch.bincount(channel, minlength=256) for channel in channels]).double()
        levels = torch.arange(256, device=counts.device) / 255
        mean = (counts * levels).sum(1) / counts.sum(1)
        variance = (counts * (levels - mean[:, None]).square()).sum(1) / counts.sum(1)
        return mean.tolist(), variance.sqrt().clamp_min(1e-3).tolist()

    def digest(self) -> str:
        """Of all pixels and labels: two runs with the same one had the same images."""
        content = hashlib.sha256()
        for tensor in (*self.train, *self.test):
            content.update(tensor.contiguous().cpu().numpy().tobytes())
        return content.hexdigest()[:16]


class Subset(NamedTuple):
    """Which training images of each class are used: the first of an order, or of one that is drawn.

    `validation` images from the other end of the order take the place of the test images.
    """

    per_class: int | None = None
    seed: int | None = None
    validation: int = 0

    def rows(self, label: int, count: int) -> tuple[list[int], list[int]]:
        """Of the `count` training images of a class, those for training and those for validation."""
        order = list(range(count))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + label)
            order = torch.randperm(count, generator=generator).tolist()
        left = count - self.validation
        if self.validation and left < (self.per_class or 1):
            raise DataError(f"a class has {count} training images: too few to put {self.validation} aside")
        return order[:left][: self.per_class], order[left:]


def load(data: str, folder: Path, subset: Subset | None = None, size: int = 32) -> Images:
    """Read a data set.

    Args:
        data: "cifar10", "cifar100", or the path of a folder or tar of images: `train/<class>/*` and `test/<class>/*`
            (or `val`). Without these two, `<class>/*`, of which every fifth image of a class is a test image.
        folder: Where official archives are, or are downloaded to.
        subset: Which training images are used, in the order of the archive or by name; all if None.
        size: Height and width of images from folders. Others are scaled, and cut in the middle if not square.

    Raises:
        DataError: Data are missing, damaged, or not what they should be.
    """
    subset = subset or Subset()
    if data not in CIFAR:
        return _load_classes(Path(data), subset, size)
    images = _load_cifar(data, folder)
    if subset != Subset():
        x, y = images.train
        of_class = [(y == c).nonzero()[:, 0] for c in range(len(images.classes))]
        chosen = [[rows[part] for part in subset.rows(c, len(rows))] for c, rows in enumerate(of_class)]
        train, validation = (torch.cat(part) for part in zip(*chosen, strict=True))
        images.train = x[train], y[train]
        if subset.validation:
            images.test = x[validation], y[validation]
    return images


# ------------------------------------------------------------------ official archives
def _load_cifar(name: str, folder: Path) -> Images:
    official = CIFAR[name]
    archive = folder / official.archive
    if not archive.exists():
        _download(f"{SITE}/{official.archive}", archive, official.checksum)
    wanted = {*official.train, official.test, official.names}
    try:
        with tarfile.open(archive) as tar:
            files = {PurePosixPath(member.name).name: member for member in tar if member.isfile()}
            if not wanted <= files.keys():
                raise DataError(f"{archive} is not the archive of {name}: it holds {', '.join(sorted(files))}")
            parts = {file: _unpickle(tar.extractfile(files[file]).read()) for file in wanted}
    except (*NOT_READABLE, pickle.UnpicklingError, ValueError) as error:
        raise DataError(f"{archive} is damaged ({error}). Delete it, and it is downloaded again.") from error

    def collect(*files: str) -> tuple[Tensor, Tensor]:
        pixels = np.concatenate([parts[file][b"data"] for file in files]).reshape(-1, 3, 32, 32)
        return torch.from_numpy(pixels), torch.tensor([y for file in files for y in parts[file][official.label_key]])

    classes = [name.decode() for name in parts[official.names][official.name_key]]
    return Images(collect(*official.train), collect(official.test), classes)


def _download(url: str, path: Path, checksum: str) -> None:
    """Under another name until it is complete and its checksum right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"Downloading {url}")
    try:
        download_url_to_file(url, str(path), hash_prefix=checksum)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(
            f"{url} cannot be downloaded ({reason}). Without a network, put the file at {path}, or name a folder or "
            f"tar of images with --data."
        ) from error
    except RuntimeError as error:  # the checksum
        raise DataError(f"{url} did not arrive as it should ({error}). Nothing was kept; try again.") from error


class _Unpickler(pickle.Unpickler):
    """Reads arrays and built-in types, and nothing that could run code."""

    ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> object:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np._core.multiarray._reconstruct if hasattr(np, "_core") else np.core.multiarray._reconstruct
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which no data need")


def _unpickle(content: bytes) -> dict:
    return _Unpickler(io.BytesIO(content), encoding="bytes").load()


# ------------------------------------------------------------------ class folders
def _load_classes(path: Path, subset: Subset, size: int) -> Images:
    if not path.exists():
        raise DataError(f"--data {path} does not exist. It may also be {' or '.join(CIFAR)}.")
    found: dict[str, dict[str, list[tuple[str, bytes]]]] = defaultdict(lambda: defaultdict(list))
    for parts, content in _files_of_folder(path) if path.is_dir() else _files_of_tar(path):
        is_image = PurePosixPath(parts[-1]).suffix.lower() in SUFFIXES and not parts[-1].startswith(".")
        if is_image and len(parts) > 1:
            split = parts[-3].lower() if len(parts) > 2 else ""
            found[split][parts[-2]].append((str(path.joinpath(*parts)), content))
    for files in (files for classes in found.values() for files in classes.values()):
        files.sort()
    train = next((found[name] for name in TRAIN if name in found), None)
    test = next((found[name] for name in TEST if name in found), None)
    if train is None and test is None and len(found) == 1:
        (everything,) = found.values()
        test = {name: files[::5] for name, files in everything.items()}
        train = {name: [file for n, file in enumerate(files) if n % 5] for name, files in everything.items()}
        print(f"{path} has no train and test folders: every fifth image of a class is a test image")
    if not train or not test:
        raise DataError(f"{path} holds no images in train/<class>/ and test/<class>/ (or val/), nor in <class>/")
    if unknown := [name for name in test if not train.get(name)]:
        raise DataError(f"{path} has test images of classes without training images: {', '.join(sorted(unknown))}")
    classes = sorted(name for name, files in train.items() if files)
    if len(classes) < 2:
        raise DataError(f"{path} has training images of {', '.join(classes)} only; at least 2 classes are needed")
    chosen = {name: subset.rows(label, len(train[name])) for label, name in enumerate(classes)}
    if subset.validation:
        test = {name: [train[name][row] for row in rows] for name, (_, rows) in chosen.items()}
    train = {name: [train[name][row] for row in rows] for name, (rows, _) in chosen.items()}
    return Images(_decode_all(train, classes, size), _decode_all(test, classes, size), classes)


def _files_of_folder(path: Path) -> Iterator[tuple[tuple[str, ...], bytes]]:
    for file in path.rglob("*"):
        if file.suffix.lower() in SUFFIXES and file.is_file():
            yield file.relative_to(path).parts, file.read_bytes()


def _files_of_tar(path: Path) -> Iterator[tuple[tuple[str, ...], bytes]]:
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if member.isfile():
                    yield PurePosixPath(member.name).parts, tar.extractfile(member).read()
    except NOT_READABLE as error:
        raise DataError(f"{path} cannot be read to its end ({error}): is it a complete tar of images?") from error


def _decode_all(found: dict[str, list[tuple[str, bytes]]], classes: list[str], size: int) -> tuple[Tensor, Tensor]:
    files = [(label, *file) for label, name in enumerate(classes) for file in found.get(name, [])]
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for row, (_, name, content) in enumerate(tqdm(files, "reading images", leave=False, mininterval=0.5)):
        images[row] = _decode(content, name, size)
    return images, torch.tensor([label for label, _, _ in files])


def _decode(content: bytes, name: str, size: int) -> Tensor:
    try:
        image = Image.open(io.BytesIO(content)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name} is not an image that can be read ({error})") from error
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ------------------------------------------------------------------ augmentation
def make_augmentation(name: str, size: int) -> nn.Module:
    """Draws one transformation for each image, all of a batch at a time, on the device of the images."""
    if name == "none":
        return nn.Identity()
    crop = K.RandomResizedCrop((size, size), scale=(0.2, 1.0), cropping_mode="resample")
    flip = K.RandomHorizontalFlip()
    if name == "randaugment":
        return K.AugmentationSequential(crop, flip, K.auto.RandAugment(n=2, m=9))
    return K.AugmentationSequential(crop, flip, K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.2))
