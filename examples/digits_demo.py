"""Four ways to train one small encoder on few labelled digits: cross-entropy, SupCon, GenSCL, GenSCL with distillation.

The data are the 1,797 handwritten digits (8 x 8 pixels) that ship inside scikit-learn: nothing is downloaded. 800 of
them are the test set. From the others, each seed draws a few labelled images per class, and no method sees more. The
draw, encoder, augmentation, optimizer, steps and images per step are the same for all four. The frozen encoder is then
judged by a linear probe and by nearest neighbours, fitted on the same labelled images and scored on the test set.

    python examples/digits_demo.py             # three to four minutes
    python examples/digits_demo.py --smoke     # seconds: does it run at all?
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads gain little here, and lose on a busy machine

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

from genscl_loss import GenSupConLoss, collapsed_loss, mixup_cutmix, teacher_labels

CLASSES = 10
TEST_IMAGES = 800
BATCH = 128  # images per step, each in two views; all labelled images where there are fewer
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01  # how these and the temperatures were chosen: examples/README.md
TEMPERATURE, TEACHER_TEMPERATURE = 0.2, 4.0  # of the contrastive losses; of the teacher's probabilities


@dataclass(frozen=True)
class Method:
    name: str
    contrastive: bool = True
    mixed: bool = False  # mixup or cutmix on each view
    distilled: bool = False  # the cross-entropy model of the same seed is the teacher

    def uninformed_loss(self, batch: int) -> float:
        """The loss when all outputs are equal: chance level, or an encoder that collapsed to one point."""
        collapsed = collapsed_loss(2 * batch - 1, TEMPERATURE, base_temperature=None)
        return collapsed * (1 + self.distilled) if self.contrastive else math.log(CLASSES)


METHODS = (
    Method("Cross-entropy", contrastive=False),
    Method("SupCon"),
    Method("GenSCL mixup-cutmix", mixed=True),
    Method("GenSCL mixup-cutmix + KD", mixed=True, distilled=True),
)


# ------------------------------------------------------------------ data
def load_images() -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """All images (1797, 1, 8, 8) in [0, 1], their labels, and the row numbers of the pool and of the test set."""
    digits = load_digits()
    rows = np.arange(len(digits.target))
    pool, test = train_test_split(rows, test_size=TEST_IMAGES, stratify=digits.target, random_state=0)
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target), pool, test


def draw_labelled(labels: Tensor, pool: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """`per_class` rows of every class out of the pool."""
    random, pool_labels = np.random.default_rng(seed), labels.numpy()[pool]
    return np.concatenate([random.choice(pool[pool_labels == c], per_class, replace=False) for c in range(CLASSES)])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate (up to 17 degrees), scale (15 %), shear and shift (one pixel) every image at random."""

    def uniform(limit: float) -> Tensor:
        return limit * (2 * torch.rand(len(images), generator=generator) - 1)

    angle, scale, shear = uniform(0.3), 1 + uniform(0.15), uniform(0.25)
    top = torch.stack([scale * angle.cos(), shear - angle.sin(), uniform(0.25)], dim=1)
    bottom = torch.stack([angle.sin(), scale * angle.cos(), uniform(0.25)], dim=1)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


# ------------------------------------------------------------------ model and training
def make_encoder() -> nn.Sequential:
    """Images (N, 1, 8, 8) -> features (N, 128)."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(1, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), nn.MaxPool2d(2), *block(64, 128)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def train(method: Method, images: Tensor, labels: Tensor, steps: int, seed: int, teacher: nn.Module | None, bar: tqdm):
    """Return the model (encoder, then classifier or projection) and its loss at every step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    projection = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
    model = nn.Sequential(make_encoder(), projection if method.contrastive else nn.Linear(128, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    contrastive_loss = GenSupConLoss(TEMPERATURE, base_temperature=None)
    losses = []
    for _ in range(steps):
        rows = torch.randperm(len(images), generator=generator)[:BATCH]
        views = [augment(images[rows], generator) for _ in range(2)]
        targets = [labels[rows]] * 2
        if method.mixed:  # every view has its own partners and its own mixing weight, and so its own soft labels
            mixed = [mixup_cutmix(view, labels[rows], CLASSES, generator=generator) for view in views]
            views, targets = [view for view, _ in mixed], [soft for _, soft in mixed]

        outputs = model(torch.cat(views)).chunk(2)
        if not method.contrastive:
            loss = F.cross_entropy(torch.cat(outputs), torch.cat(targets))
        elif method.distilled:  # the teacher judges the mixed images that the student sees
            with torch.no_grad():
                opinions = [teacher_labels(teacher(view), TEACHER_TEMPERATURE) for view in views]
            loss = contrastive_loss(outputs, targets, teacher_labels=opinions)
        else:
            loss = contrastive_loss(outputs, targets)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        bar.update()
    return model.eval(), losses


@torch.no_grad()
def evaluate(encoder: nn.Module, images: Tensor, labels: Tensor, train_rows: np.ndarray, test_rows: np.ndarray):
    """Accuracy in % of a linear probe and of 5 nearest neighbours on frozen test features, and these features."""
    train_features, test_features = encoder(images[train_rows]).numpy(), encoder(images[test_rows]).numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    neighbours = KNeighborsClassifier(n_neighbors=5, metric="cosine")
    fitted = [judge.fit(train_features, labels[train_rows].numpy()) for judge in (probe, neighbours)]
    return [100 * judge.score(test_features, labels[test_rows].numpy()) for judge in fitted], test_features


# ------------------------------------------------------------------ pictures
def plot_losses(losses: dict[Method, np.ndarray], batch: int, path: Path) -> None:
    figure = Figure(figsize=(15, 3.8), layout="constrained")
    for axis, (method, runs) in zip(figure.subplots(1, len(losses)), losses.items(), strict=True):
        window = max(1, runs.shape[1] // 20)
        smooth = np.array([np.convolve(run, np.full(window, 1 / window), mode="valid") for run in runs])
        steps = np.arange(smooth.shape[1]) + (window + 1) / 2  # the middles of the windows
        axis.plot(steps, smooth.T, color="tab:blue", alpha=0.4, linewidth=0.8)
        axis.plot(steps, smooth.mean(axis=0), color="navy", linewidth=2)
        axis.axhline(method.uninformed_loss(batch), color="tab:red", linestyle="--", linewidth=1.2)
        axis.set_title(method.name, fontsize=12)
        axis.set_xlabel("step")
        axis.margins(y=0.1)
        axis.grid(alpha=0.3)
    figure.supylabel("training loss", fontsize=11)
    figure.supxlabel("Thin: each seed, smoothed. Thick: mean. Dashed: all outputs equal. Scales differ.", fontsize=11)
    figure.savefig(path, dpi=130)


def plot_embeddings(features: dict[Method, np.ndarray], labels: np.ndarray, path: Path) -> None:
    """The test features of the first seed, scaled to unit length, in two dimensions (t-SNE). Legible on a phone."""
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    for axis, (method, rows) in zip(figure.subplots(1, len(features)), features.items(), strict=True):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
        points = TSNE(perplexity=30, random_state=0).fit_transform(unit)
        dots = axis.scatter(*points.T, c=labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=3, linewidths=0)
        axis.set_title(method.name, fontsize=11)
        axis.set(xticks=[], yticks=[])
    handles, _ = dots.legend_elements(num=range(CLASSES))
    places = {"loc": "outside lower center", "ncols": CLASSES, "handletextpad": 0, "columnspacing": 1}
    figure.legend(handles, range(CLASSES), frameon=False, **places)
    figure.savefig(path, dpi=160)


# ------------------------------------------------------------------ the comparison
def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps per run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default: %(default)s)")
    parser.add_argument("--per-class", type=int, default=5, help="labelled images per digit (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="where the PNGs go (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="2 seeds of 15 steps: seconds, numbers without meaning")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.seeds, arguments.steps = 2, 15
    if min(arguments.seeds, arguments.steps) < 1 or not 1 <= arguments.per_class <= 90:
        parser.error("--seeds and --steps must be at least 1, --per-class 1 to 90")
    return arguments


def print_tables(losses: dict, scores: dict, seconds: dict, batch: int) -> None:
    print("Test accuracy in %: mean ± standard deviation over seeds. Gain: over cross-entropy, seed by seed.\n")
    print(f"{'method':<25}{'linear probe':>15}{'gain':>15}{'kNN':>15}{'gain':>15}{'s/run':>7}")
    for method, values in scores.items():
        both = np.stack([values, values - scores[METHODS[0]]], axis=2).reshape(len(values), 4)  # accuracy, gain, twice
        spread = both.std(axis=0, ddof=min(1, len(both) - 1))
        cells = "".join(f"{f'{m:.2f} ± {s:.2f}':>15}" for m, s in zip(both.mean(axis=0), spread, strict=True))
        print(f"{method.name:<25}{cells}{np.mean(seconds[method]):>7.1f}")
    print("\nLoss over the last steps (and its value if all outputs were equal: chance, or a collapsed encoder)")
    for method, runs in losses.items():
        last = runs[:, -max(1, runs.shape[1] // 20) :].mean()
        print(f"{method.name:<25}{last:6.2f} ({method.uninformed_loss(batch):.2f})")


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    images, labels, pool, test_rows = load_images()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    losses, scores, seconds, features = ({method: [] for method in METHODS} for _ in range(4))
    with tqdm(total=len(seeds) * len(METHODS) * arguments.steps, unit="step", mininterval=0.5) as bar:
        for seed in seeds:
            rows = draw_labelled(labels, pool, arguments.per_class, seed)
            teacher = None
            for method in METHODS:
                bar.set_description(f"seed {seed}: {method.name}")
                start = time.perf_counter()
                model, curve = train(method, images[rows], labels[rows], arguments.steps, seed, teacher, bar)
                seconds[method].append(time.perf_counter() - start)
                accuracies, test_features = evaluate(model[0], images, labels, rows, test_rows)
                for record, value in ((losses, curve), (scores, accuracies), (features, test_features)):
                    record[method].append(value)
                teacher = model if teacher is None else teacher  # cross-entropy comes first

    losses, scores = ({m: np.array(runs) for m, runs in table.items()} for table in (losses, scores))
    split = f"{len(rows)} labelled training images ({arguments.per_class} per class), {len(test_rows)} test images"
    print(f"\n{split}, {len(seeds)} seeds, {arguments.steps} steps")
    batch = min(BATCH, len(rows))
    print_tables(losses, scores, seconds, batch)
    curves, embeddings = arguments.out / "digits_losses.png", arguments.out / "digits_embeddings.png"
    plot_losses(losses, batch, curves)
    shown = {method: runs[0] for method, runs in features.items() if not method.distilled}
    plot_embeddings(shown, labels[test_rows].numpy(), embeddings)
    print(f"\nLoss curves:     {curves}\nTest embeddings: {embeddings} (t-SNE, seed {seeds[0]})")


if __name__ == "__main__":
    main()
