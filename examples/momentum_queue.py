"""GenSCL with a momentum encoder and a queue, on one process or several: training, resuming and judging.

MoCo's recipe with soft labels. An encoder makes queries of one view of the images, a moving average of it makes keys of
another, both views mixed by mixup or cutmix. Queries are contrasted with the keys of the batch and with those of many
earlier batches, which wait in a queue with their soft labels. The data are scikit-learn's digits (8 x 8 pixels), a
few of them labelled; the frozen encoder is judged by a linear probe and by nearest neighbours on 800 others.

    python examples/momentum_queue.py                                  # less than a minute
    python examples/momentum_queue.py --smoke                          # seconds: does it run at all?
    python examples/momentum_queue.py --checkpoint run.pt              # run again after an interruption: it goes on
    torchrun --nproc-per-node 2 examples/momentum_queue.py             # each process has its share of the batch
"""

from __future__ import annotations

import argparse
import copy
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads gain little here, and lose on a busy machine

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # now: its default arguments keep a group that exists, and gloo's threads, to the very end
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from genscl_loss import FeatureQueue, GenSupConLoss, collapsed_loss, mixup_cutmix

CLASSES, TEST_IMAGES = 10, 800
FEATURES, PROJECTION = 128, 64  # the widths of what is judged and of what is contrasted
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01
TEMPERATURE = 0.2


# ------------------------------------------------------------------ data
def load_images(per_class: int) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """All images (1797, 1, 8, 8) in [0, 1], their labels, and the row numbers of labelled and of test images."""
    digits = load_digits()
    rows = np.arange(len(digits.target))
    pool, test = train_test_split(rows, test_size=TEST_IMAGES, stratify=digits.target, random_state=0)
    labelled = np.concatenate([pool[digits.target[pool] == c][:per_class] for c in range(CLASSES)])
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target), labelled, test


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shear and shift every image a little: add random numbers to the affine map that changes nothing."""
    spread = torch.tensor([[0.15, 0.3, 0.25], [0.3, 0.15, 0.25]])
    maps = torch.eye(2, 3) + spread * (2 * torch.rand(len(images), 2, 3, generator=generator) - 1)
    return F.grid_sample(images, F.affine_grid(maps, list(images.shape), align_corners=False), align_corners=False)


# ------------------------------------------------------------------ model
def make_model() -> nn.Sequential:
    """Encoder and projection, (N, 1, 8, 8) -> (N, PROJECTION).

    Without batch statistics, through which keys could tell queries of the same batch from the rows of the queue.
    """

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(8, outputs), nn.ReLU()]

    layers = [*block(1, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), nn.MaxPool2d(2), *block(64, FEATURES)]
    encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    projection = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, PROJECTION))
    return nn.Sequential(encoder, projection)


@dataclass
class Run:
    """All that changes during training, and so all that a checkpoint holds."""

    model: nn.Module
    momentum_model: nn.Module
    queue: FeatureQueue
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # of all processes, one for each step

    @staticmethod
    def start(queue_size: int, seed: int) -> Run:
        torch.manual_seed(seed)
        model = make_model()
        group = "world" if dist.is_initialized() else None  # with it, the queue holds the keys of all
        queue = FeatureQueue(queue_size, PROJECTION, CLASSES, group=group)
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        return Run(model, copy.deepcopy(model).requires_grad_(False), queue, optimizer)

    def parts(self) -> dict:
        names = ("model", "momentum_model", "queue", "optimizer")
        return {name: getattr(self, name) for name in names}

    def save(self, path: Path) -> None:
        """Write the checkpoint under another name first: an interruption must not leave half of one."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        unfinished = path.with_name(path.name + ".tmp")
        torch.save({**state, "losses": self.losses}, unfinished)
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.losses = state["losses"]


# ------------------------------------------------------------------ training
def train(run: Run, images: Tensor, labels: Tensor, arguments: argparse.Namespace) -> None:
    """Train from where the run stands up to the last step, or to `arguments.stop_at`."""
    criterion = GenSupConLoss(TEMPERATURE, base_temperature=None)
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = DistributedDataParallel(run.model) if dist.is_initialized() else run.model
    first, last = len(run.losses), min(arguments.steps, arguments.stop_at or arguments.steps)
    for step in tqdm(range(first, last), initial=first, total=arguments.steps, mininterval=0.5, disable=rank > 0):
        # Random numbers come from the step (and the process), so that a resumed run draws those that it would have had.
        common = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
        batch = torch.randperm(len(images), generator=common)[: arguments.batch][rank::processes]
        own = torch.Generator().manual_seed((arguments.seed * 1_000_003 + step) * processes + rank)
        views = [augment(images[batch], own) for _ in range(2)]
        (x_query, y_query), (x_key, y_key) = (mixup_cutmix(v, labels[batch], CLASSES, generator=own) for v in views)

        queries = model(x_query)
        with torch.no_grad():
            keys = run.momentum_model(x_key)
        # The queue holds the keys of earlier steps only, of all processes. No `group` for the loss, which would take
        # every row of the queue once from each process.
        contrasts, contrast_labels = torch.cat([keys, run.queue.features]), torch.cat([y_key, run.queue.labels])
        loss = criterion(queries, y_query, contrast_features=contrasts, contrast_labels=contrast_labels)
        run.queue.enqueue(keys, y_key)

        run.optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / arguments.steps)) / 2
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(run.momentum_model.parameters(), run.model.parameters(), strict=True):
                slow.lerp_(fast, 1 - arguments.momentum)
        run.losses.append(mean_over_processes(loss.detach()))
        if arguments.checkpoint and rank == 0 and ((step + 1) % arguments.save_every == 0 or step + 1 == last):
            run.save(arguments.checkpoint)


def mean_over_processes(value: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


@torch.no_grad()
def judge(model: nn.Sequential, images: Tensor, labels: Tensor, train_rows: np.ndarray, test_rows: np.ndarray):
    """Accuracy in % of a linear probe and of 5 nearest neighbours on the features of the frozen encoder."""
    train_features, test_features = (model[0](images[rows]).numpy() for rows in (train_rows, test_rows))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    neighbours = KNeighborsClassifier(n_neighbors=5, metric="cosine")
    fitted = [one.fit(train_features, labels[train_rows].numpy()) for one in (probe, neighbours)]
    return [100 * one.score(test_features, labels[test_rows].numpy()) for one in fitted]


# ------------------------------------------------------------------ the script
def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images per step, of all processes (%(default)s)")
    parser.add_argument("--queue-size", type=int, default=512, help="keys in the queue (default: %(default)s)")
    parser.add_argument("--momentum", type=float, default=0.99, help="of the moving average (default: %(default)s)")
    parser.add_argument("--per-class", type=int, default=5, help="labelled images per digit (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and augmentation (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="go on from this file if it is there, and save to it")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--stop-at", type=int, help="stop after this step, as if interrupted")
    parser.add_argument("--smoke", action="store_true", help="60 steps: seconds, numbers without meaning")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.steps, arguments.queue_size = 60, 100
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if min(arguments.steps, arguments.batch, arguments.queue_size, arguments.save_every) < 1:
        parser.error("--steps, --batch, --queue-size and --save-every must be at least 1")
    if not 1 <= arguments.per_class <= 90 or arguments.batch > CLASSES * arguments.per_class:
        parser.error("--per-class must be 1 to 90, and --batch no more than all labelled images")
    if arguments.batch % processes:
        parser.error(f"--batch must be a multiple of the number of processes, {processes}")  # DDP weighs them equally
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    images, labels, labelled, test = load_images(arguments.per_class)
    run = Run.start(arguments.queue_size, arguments.seed)
    before = judge(run.model, images, labels, labelled, test) if is_first else None
    if arguments.checkpoint and arguments.checkpoint.exists():
        run.load(arguments.checkpoint)
    train(run, images[labelled], labels[labelled], arguments)
    if is_first:
        after = judge(run.model, images, labels, labelled, test)
        processes = dist.get_world_size() if dist.is_initialized() else 1
        contrasts = arguments.batch // processes + len(run.queue)
        collapsed = collapsed_loss(contrasts, TEMPERATURE, base_temperature=None)
        loss = np.mean(run.losses[-max(1, len(run.losses) // 20) :])
        print(f"\nProcesses: {processes}. Images: {len(labelled)} labelled for training, {len(test)} for the test.")
        print(f"Loss after {len(run.losses)} steps, {contrasts} keys: {loss:.3f} ({collapsed:.3f} if collapsed)")
        print(f"\n{'Test accuracy in %':<20}{'linear probe':>14}{'kNN':>9}")
        for name, (probe, neighbours) in (("untrained", before), ("trained", after)):
            print(f"{name:<20}{probe:>14.2f}{neighbours:>9.2f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
