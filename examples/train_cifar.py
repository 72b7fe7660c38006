"""Generalized supervised contrastive learning on CIFAR, or on images of your own: the experiment of the GenSCL paper.

    python examples/train_cifar.py --method supcon --out runs/supcon
    python examples/train_cifar.py --method genscl --mix mixup_cutmix --out runs/mix

    torchrun --nproc-per-node 8 examples/train_cifar.py ...    # each process has its share of the batch
    python examples/train_cifar.py --smoke --data PATH         # within a minute: does it run at all?

After training, the frozen encoder is judged by a linear classifier and by its nearest neighbours. `--resume` goes on
with a run that was interrupted. Teachers, and data and networks of your own: `examples/README.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.distributed.nn  # now: its default arguments keep a group that exists, and gloo's threads, to the very end
import torch.nn.functional as F
from cifar_data import CIFAR, DataError, Images, Subset, load, make_augmentation
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from networks import ENCODERS, NORMS, CheckpointError, Network, load_teacher, make_network, read_checkpoint
from sklearn.manifold import TSNE
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from genscl_loss import (
    FeatureQueue,
    GenSupConLoss,
    collapsed_loss,
    contrastive_accuracy,
    cutmix,
    mixup,
    mixup_cutmix,
    smooth_labels,
    teacher_labels,
)

MIXES = {"none": None, "mixup": mixup, "cutmix": cutmix, "mixup_cutmix": mixup_cutmix}
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SOURCES = ("train_cifar.py", "cifar_data.py", "networks.py")
# Between a run and its continuation
MAY_DIFFER = {"out", "resume", "data", "data_folder", "device", "smoke", "save_every"}


class RunError(Exception):
    """What is wrong with a run, and what to do about it."""


# ------------------------------------------------------------------ processes
@dataclass(frozen=True)
class World:
    """This process among those that share the batch."""

    rank: int
    size: int
    device: torch.device

    @staticmethod
    def join(device: str | None) -> World:
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if "WORLD_SIZE" not in os.environ:
            return World(0, 1, torch.device(kind))
        if kind == "cuda":
            kind = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(kind)
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind.startswith("cuda") else "gloo")
        return World(dist.get_rank(), dist.get_world_size(), torch.device(kind))

    @property
    def group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if dist.is_initialized() else None


# ------------------------------------------------------------------ one run
@dataclass
class Run:
    """What a run consists of. Weights, optimizer, scaler, queue and history change: a checkpoint holds them."""

    config: dict
    classes: list[str]
    model: Network
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    queue: FeatureQueue | None
    history: list[dict]  # one entry for each epoch
    folder: Path
    saved: int = 0  # epochs that the checkpoint holds

    @property
    def checkpoint(self) -> Path:
        return self.folder / "last.pt"

    def parts(self) -> dict:
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler, "queue": self.queue}
        return {name: part for name, part in parts.items() if part is not None}

    def save(self) -> None:
        """Write under another name first: an interruption must not leave half of a checkpoint."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {"config": self.config, "classes": self.classes, "history": self.history}
        unfinished = self.checkpoint.with_suffix(".tmp")
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.checkpoint)
        self.saved = len(self.history)

    def write_metrics(self) -> None:
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        (self.folder / "metrics.jsonl").write_text(lines, encoding="utf-8")

    def resume(self) -> None:
        saved = read_checkpoint(self.checkpoint)
        for name in sorted(self.config.keys() - MAY_DIFFER):
            before, now = saved["config"].get(name), self.config[name]
            if before != now:
                what = name.replace("_", "-")
                raise RunError(f"{self.folder} has a run with {what} {before}, not {now}: choose another --out")
        if saved["classes"] != self.classes:
            raise RunError(f"{self.folder} is a run on other classes: {', '.join(saved['classes'])}")
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])
        self.history = saved["history"]
        self.saved = len(self.history)


def start(options: argparse.Namespace, images: Images, world: World) -> Run:
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    config |= {"train_images": len(images.train[1]), "test_images": len(images.test[1]), "images": images.digest()}
    config |= {"processes": world.size}
    torch.manual_seed(options.seed)
    model = make_network(config, len(images.classes), *images.statistics())
    model = model.to(world.device, memory_format=torch.channels_last)
    if world.size > 1 and world.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # which runs on GPUs only
    given = {"params": model.parameters(), "lr": options.lr, "weight_decay": options.weight_decay}
    is_sgd = options.optimizer == "sgd"
    optimizer = torch.optim.SGD(**given, momentum=0.9, nesterov=True) if is_sgd else torch.optim.AdamW(**given)
    scaler = torch.amp.GradScaler(world.device.type, enabled=options.amp == "fp16")
    queue = None
    if options.queue_size:
        has_vectors = (options.mix != "none" or options.smoothing > 0) and not options.hard_labels
        classes = len(images.classes) if has_vectors else None
        queue = FeatureQueue(options.queue_size, options.projection, classes, group=world.group).to(world.device)
    run = Run(config, images.classes, model, optimizer, scaler, queue, [], options.out)
    if options.resume and run.checkpoint.exists():
        run.resume()
    if world.rank == 0:
        (options.out / "source").mkdir(parents=True, exist_ok=True)
        try:  # exclusively: another run may be starting in the same folder
            with (options.out / "config.json").open("w" if options.resume else "x", encoding="utf-8") as file:
                file.write(json.dumps(config, indent=1) + "\n")
        except FileExistsError:
            raise RunError(f"another run has just begun in {options.out}: choose another --out") from None
        for name in SOURCES:
            shutil.copy(Path(__file__).parent / name, options.out / "source")
        run.write_metrics()
    return run


# ------------------------------------------------------------------ training
def make_objective(
    run: Run, images: Images, teacher: nn.Module | None, options: argparse.Namespace, world: World
) -> tuple[Callable[[Tensor], tuple[Tensor, list[Tensor], list[Tensor]]], float | None]:
    """The loss of two random views of some training images, as a function of their row numbers.

    It comes with the outputs and the labels of both views, and the function with its value if the model has collapsed
    and all embeddings are equal, None for cross-entropy.
    """
    x, y = images.train
    augment, mix = make_augmentation(options.augment, x.shape[-1]), MIXES[options.mix]
    model = torch.compile(run.model) if options.compile else run.model
    if world.group is not None:
        model = DistributedDataParallel(model)
    weight, queue, num_classes = options.teacher_weight, run.queue, len(images.classes)
    alone = weight == math.inf  # the teacher's labels take the place of the images' own
    terms = 1 + weight if teacher is not None and not alone else 1
    criterion = GenSupConLoss(
        options.temperature,
        teacher_weight=1 if alone else weight,
        empty_anchors=options.empty_anchors,
        group=None if queue is not None else world.group,  # a queue already holds the rows of all processes
    )
    contrasts = (
        options.batch_size // world.size + options.queue_size if queue is not None else 2 * options.batch_size - 1
    )
    collapsed = collapsed_loss(contrasts, options.temperature) * terms

    def contrastive(views: list[Tensor], labels: list[Tensor], opinions: list[Tensor] | None) -> Tensor:
        if queue is None:
            return criterion(views, labels, teacher_labels=opinions)
        # Each view against the other one and what the queue holds of earlier steps.
        past, past_labels = queue.features, queue.labels
        loss = sum(
            criterion(
                views[i],
                labels[i],
                contrast_features=torch.cat([views[1 - i], past]),
                contrast_labels=torch.cat([labels[1 - i], past_labels]),
            )
            for i in range(2)
        )
        queue.enqueue(torch.cat(views), torch.cat(labels))
        return loss / 2

    def objective(rows: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        views, labels = [augment(x[rows].float() / 255) for _ in range(2)], [y[rows]] * 2
        if mix is not None:  # every view has its own partners and its own lambda, and so its own soft labels
            mixed = [mix(view, y[rows], num_classes, options.mix_alpha) for view in views]
            views, labels = [view for view, _ in mixed], [soft for _, soft in mixed]
        if options.hard_labels:
            labels = [soft.argmax(1) for soft in labels]
        if options.smoothing:
            labels = [smooth_labels(label, num_classes, options.smoothing) for label in labels]
        batch, opinions = torch.cat(views).contiguous(memory_format=torch.channels_last), None
        with autocast(options, world):
            outputs = model(batch)
            if teacher is not None:  # it judges the mixed images
                opinions = teacher_labels(teacher(batch), options.teacher_temperature)
        if alone:
            labels, opinions = opinions.chunk(2), None
        if options.method != "ce":
            loss = contrastive(outputs.chunk(2), labels, None if opinions is None else opinions.chunk(2))
        else:
            loss = F.cross_entropy(outputs.float(), torch.cat(labels))
            if opinions is not None:
                loss = loss + weight * F.cross_entropy(outputs.float(), opinions)
        return loss, list(outputs.detach().chunk(2)), list(labels)

    return objective, None if options.method == "ce" else collapsed


def autocast(options: argparse.Namespace, world: World) -> torch.autocast:
    return torch.autocast(world.device.type, AMP[options.amp], enabled=options.amp != "off")


def multiplies_bfloat16(device: str | None) -> bool:
    """Whether the processor has instructions for it: emulated, it is many times slower than float32."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in old versions
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def learning_rate(options: argparse.Namespace, step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine."""
    if step < warmup:
        return options.lr * (step + 1) / warmup
    return options.lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def train(run: Run, images: Images, teacher: nn.Module | None, options: argparse.Namespace, world: World) -> None:
    objective, collapsed = make_objective(run, images, teacher, options, world)
    num_images, size = len(images.train[1]), options.batch_size
    per_epoch = num_images // size
    steps, warmup = options.epochs * per_epoch, options.warmup_epochs * per_epoch
    comparison = "" if collapsed is None else f" ({collapsed:.2f} if collapsed)"
    for epoch in range(len(run.history), options.epochs):
        run.model.train()
        shuffled = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        order = torch.randperm(num_images, generator=shuffled).to(world.device)
        losses, checked, began = torch.zeros(per_epoch, device=world.device), 0, time.perf_counter()
        total, name = 2 * size * per_epoch, f"epoch {epoch + 1}/{options.epochs}"  # both views of an image count
        bar = tqdm(total=total, desc=name, unit=" images", disable=world.rank > 0, mininterval=0.5)
        for number in range(per_epoch):
            step = epoch * per_epoch + number
            # Everything random in a step comes from its number: a resumed run draws what it would have drawn.
            torch.manual_seed((options.seed * 1_000_003 + step) * world.size + world.rank)
            loss, views, labels = objective(order[number * size : (number + 1) * size][world.rank :: world.size])
            run.optimizer.param_groups[0]["lr"] = learning_rate(options, step, steps, warmup)
            run.optimizer.zero_grad()
            run.scaler.scale(loss).backward()
            run.scaler.step(run.optimizer)
            run.scaler.update()
            losses[number] = loss.detach()
            if number % 20 == 19 or number + 1 == per_epoch:  # to read losses is to wait for the device
                check_finite(losses[: number + 1], epoch, run)
                text, checked = f"loss {losses[checked : number + 1].mean():.3f}{comparison}", number + 1
                if collapsed is not None:  # mixed labels resemble all others a little: positives are those by half
                    text += f", nearest is positive {contrastive_accuracy(views, labels, min_similarity=0.5):.0%}"
                bar.set_postfix_str(text, refresh=False)
            bar.update(2 * size)
        bar.close()
        seconds = time.perf_counter() - began
        if world.group is not None:
            dist.all_reduce(losses)
        values = (losses / world.size).tolist()
        mean, rate = math.fsum(values) / per_epoch, total / seconds
        entry = {"epoch": epoch + 1, "loss": mean, "last_loss": values[-1], "collapsed_loss": collapsed}
        entry |= {"lr": run.optimizer.param_groups[0]["lr"], "seconds": seconds, "images_per_second": rate}
        # The last step may have spoilt the weights, which no loss has shown yet.
        if not all(torch.isfinite(weights).all() for weights in run.model.parameters()):
            stop(f"the weights are not finite after epoch {epoch + 1}", run)
        run.history.append(entry)
        if world.rank == 0:
            if collapsed is not None and epoch > options.warmup_epochs and abs(mean / collapsed - 1) < 0.002:
                tqdm.write(f"warning: the loss is that of a collapsed model, {collapsed:.3f}: if it stays, lower --lr")
            if options.knn_every and (epoch + 1) % options.knn_every == 0:
                entry["knn"] = neighbours(*features_of(run, images, options, world))[0]
            if (epoch + 1) % options.save_every == 0 or epoch + 1 == options.epochs:
                run.save()
            run.write_metrics()


def check_finite(losses: Tensor, epoch: int, run: Run) -> None:
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        stop(f"the loss is not finite at step {int(bad[0]) + 1} of epoch {epoch + 1}", run)


def stop(what: str, run: Run) -> NoReturn:
    kept = f"{run.checkpoint} holds epoch {run.saved}" if run.saved else "there is no checkpoint yet"
    raise RunError(f"{what}: training stops; {kept}. A lower --lr, more --warmup-epochs or --amp off may help.")


# ------------------------------------------------------------------ evaluation
@torch.no_grad()
def features_of(run: Run, images: Images, options: argparse.Namespace, world: World) -> tuple[Tensor, ...]:
    """Features and labels of the training images, and of the test images."""
    run.model.eval()
    found = []
    for x, y in (images.train, images.test):
        chunks = (chunk.float().div(255).contiguous(memory_format=torch.channels_last) for chunk in x.split(1000))
        with autocast(options, world):
            found += [torch.cat([run.model.features(chunk).float() for chunk in chunks]), y]
    return tuple(found)


def accuracies(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 and top-5 in %; with fewer than five classes the second is 100."""
    best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    return 100 * best[:, 0].float().mean().item(), 100 * best.any(1).float().mean().item()


def neighbours(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 200, temperature: float = 0.1
) -> tuple[float, float]:
    """Weighted kNN: votes of the k nearest in cosine similarity s count exp(s / temperature)."""
    train, test = F.normalize(train), F.normalize(test)
    num_classes = int(train_labels.max()) + 1
    scores = []
    for chunk in test.split(1000):
        similarity, rows = (chunk @ train.T).topk(min(k, len(train)))
        votes = torch.zeros(len(chunk), num_classes, device=chunk.device)
        scores.append(votes.scatter_add_(1, train_labels[rows], (similarity / temperature).exp()))
    return accuracies(torch.cat(scores), test_labels)


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, decay: float = 1e-4
) -> tuple[float, float]:
    """Multinomial logistic regression on standardised features, to convergence."""
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    classifier = nn.Linear(train.shape[1], int(train_labels.max()) + 1, device=train.device)
    nn.init.zeros_(classifier.weight), nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(train), train_labels) + decay * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return accuracies(classifier(test).detach(), test_labels)


def evaluate(run: Run, images: Images, options: argparse.Namespace, world: World) -> dict:
    rows = features_of(run, images, options, world)
    results = {"linear": linear_probe(*rows), "knn": neighbours(*rows)}
    if options.method == "ce":
        results["classifier"] = accuracies(run.model.head(rows[2]).detach(), rows[3])
    judged = "validation" if options.validation else "test"
    print(f"\n{options.out}: {judged} accuracy in % after {len(run.history)} epochs\n{'':<18}{'top-1':>8}{'top-5':>8}")
    for name, (first, fifth) in results.items():
        print(f"{name:<18}{first:>8.2f}{fifth:>8.2f}")
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(run, rows[2].cpu(), rows[3].cpu())
    return results


def draw(run: Run, features: Tensor, labels: Tensor) -> None:
    judged = [(entry["epoch"], entry["knn"]) for entry in run.history if "knn" in entry]
    figure = Figure(figsize=(9 if judged else 5, 3.6), layout="constrained")
    left, *others = figure.subplots(1, 2 if judged else 1, squeeze=False)[0]
    left.plot([entry["epoch"] for entry in run.history], [entry["loss"] for entry in run.history], marker=".")
    if (collapsed := run.history[-1]["collapsed_loss"]) is not None:
        left.axhline(collapsed, color="tab:red", linestyle="--", label="collapsed model")
        left.legend()
    left.set(ylabel="training loss")
    for right in others:
        right.plot(*zip(*judged, strict=True), marker="o")
        right.set(ylabel="kNN accuracy in %")
    for axis in figure.axes:
        axis.set(xlabel="epoch"), axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(run.folder / "curves.png", dpi=130)

    shown = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:1000]  # not the first: all classes
    features, labels = F.normalize(features[shown]), labels[shown]
    points = TSNE(perplexity=min(30, (len(features) - 1) / 3), random_state=0).fit_transform(features)
    axis = Figure(figsize=(7.5, 5.5), layout="constrained").subplots()
    cmap, most = ("tab10", 9) if len(run.classes) <= 10 else ("nipy_spectral", len(run.classes) - 1)
    dots = axis.scatter(*points.T, c=labels, cmap=cmap, vmin=0, vmax=most, s=6, linewidths=0)
    if len(run.classes) <= 20:
        for i, name in enumerate(run.classes):
            axis.scatter([], [], color=dots.to_rgba(i), label=name)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    axis.set(xticks=[], yticks=[], title="Images not trained on: encoder features, t-SNE")
    axis.figure.savefig(run.folder / "embeddings.png", dpi=130)


# ------------------------------------------------------------------ the script
def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def add(name: str, help: str, **options) -> None:
        shown = "" if options.get("default") is None else " (default: %(default)s)"
        parser.add_argument(name, help=help + shown, **options)

    add("--data", default="cifar10", help=f"{', '.join(CIFAR)}, or a folder or tar of class folders")
    add("--data-folder", type=Path, default=Path("data"), help="where official archives are, or are downloaded to")
    add("--per-class", type=int, help="use so many training images of each class (default: all)")
    add("--subset-seed", type=int, help="of drawing these (default: the first ones are used)")
    add("--validation", type=int, default=0, help="judge on so many other training images of each class instead")
    add("--image-size", type=int, default=32, help="to which images of folders are scaled")
    kinds = ("standard", "randaugment", "none")  # RandAugment chooses its operations anew for each batch
    add("--augment", choices=kinds, default="standard", help="random changes of each view")
    add("--method", choices=("ce", "supcon", "genscl"), default="genscl", help="what is minimised")
    add("--mix", choices=MIXES, default="none", help="how images and labels are mixed, each view on its own")
    add("--mix-alpha", type=float, default=1.0, help="the mixing weight is drawn from Beta(alpha, alpha)")
    add("--hard-labels", action="store_true", help="mix images only: the label is that of the larger share")
    add("--smoothing", type=float, default=0.0, help="share of the label that is spread over all classes")
    add("--temperature", type=float, default=0.1, help="of the contrastive losses")
    add(
        "--queue-size",
        type=int,
        default=0,
        help="contrast with so many embeddings of earlier steps, too, which come from older weights: they can harm",
    )
    add("--empty-anchors", choices=("zero", "ignore"), default="zero", help="what anchors without positives count")
    add("--teacher", type=Path, help="checkpoint of a network that gives logits")
    add("--teacher-model", help="module:function that makes it, for a file of weights only")
    add("--trust-teacher", action="store_true", help="the file may run code: for a whole module that was saved")
    add("--teacher-weight", type=float, default=1.0, help="of its term; with few images 0.5 was worse; inf: alone")
    add("--teacher-temperature", type=float, default=1.0, help="of the teacher's probabilities")
    add("--arch", default="resnet18", help=f"{', '.join(ENCODERS)}, or module:function")
    add("--projection", type=int, default=128, help="width of the embeddings, which the head of two layers makes")
    add("--norm", choices=NORMS, default="batch", help="normalisation layers of the network")
    add("--epochs", type=int, default=100, help="times that all images are seen, in two views")
    add("--batch-size", type=int, default=1024, help="images per step, of all processes")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="sgd is with Nesterov momentum 0.9")
    add("--lr", type=float, help="highest learning rate (default: sgd batch size / 2048, adamw 0.001)")
    add("--weight-decay", type=float, help="(default: sgd 0.0001, adamw 0.05)")
    add("--warmup-epochs", type=int, help="epochs of linear warm-up (default: a tenth, 10 at most)")
    add("--knn-every", type=int, default=10, help="epochs between kNN evaluations; 0 for the end only")
    add("--save-every", type=int, default=1, help="epochs between checkpoints")
    text = (
        "type of products in the network; the loss is in float32 (default: bf16 where the device multiplies it, or off)"
    )
    add("--amp", choices=AMP, help=text)
    add("--compile", action="store_true", help="compile the network")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--device", choices=("cuda", "cpu"), help="(default: cuda if there is one)")
    add("--out", type=Path, default=Path("runs/last"), help="folder for everything that is written")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--smoke", action="store_true", help="2 epochs of the small network on few images; numbers without meaning")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.arch, options.per_class, options.epochs, options.batch_size, options.knn_every = "small", 32, 2, 64, 1
    if options.amp is None:
        options.amp = "bf16" if multiplies_bfloat16(options.device) else "off"
    elif options.amp == "bf16" and not multiplies_bfloat16(options.device):
        tqdm.write("warning: this processor only emulates bfloat16, which takes many times as long as --amp off")
    if options.lr is None:
        options.lr = options.batch_size / 2048 if options.optimizer == "sgd" else 1e-3
    if options.weight_decay is None:
        options.weight_decay = 1e-4 if options.optimizer == "sgd" else 0.05
    if options.warmup_epochs is None:
        options.warmup_epochs = min(10, options.epochs // 10)
    if options.method == "supcon" and (options.mix != "none" or options.teacher or options.smoothing):
        parser.error("--method supcon has hard labels only: --mix and --teacher need genscl or ce, as does --smoothing")
    if options.queue_size and (options.teacher or options.method == "ce"):
        parser.error("--queue-size needs genscl or supcon without --teacher, whose labels the queue does not hold")
    if options.teacher_weight == math.inf and not options.teacher:
        parser.error("--teacher-weight inf leaves nothing to learn without a --teacher")
    if options.hard_labels and options.mix == "none":
        parser.error("--hard-labels needs a --mix, without which labels are hard")
    at_least = {"per_class": 1, "image_size": 8, "epochs": 1, "batch_size": 2, "warmup_epochs": 0, "knn_every": 0}
    at_least |= {"validation": 0, "queue_size": 0, "projection": 1, "save_every": 1}
    for name, least in at_least.items():
        if (value := getattr(options, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    for name in ("lr", "temperature", "teacher_temperature"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    for name in ("weight_decay", "mix_alpha"):
        if not 0 <= getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    if not options.teacher_weight >= 0:
        parser.error("--teacher-weight must not be negative")
    if not 0 <= options.smoothing <= 1:
        parser.error("--smoothing must be between 0 and 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if options.batch_size % (processes := int(os.environ.get("WORLD_SIZE", "1"))):
        parser.error(f"--batch-size must be a multiple of the number of processes, {processes}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    try:
        if (options.out / "config.json").exists() and not options.resume:
            raise RunError(f"{options.out} holds a run already: --resume it, or choose another --out")
        subset = Subset(options.per_class, options.subset_seed, options.validation)
        images = load(options.data, options.data_folder, subset, options.image_size)
        if options.batch_size > len(images.train[1]):
            raise RunError(f"--batch-size {options.batch_size} is more than all {len(images.train[1])} training images")
        given = (options.teacher, options.teacher_model, options.trust_teacher, images.classes)
        teacher = load_teacher(*given, images.train[0].shape[-1]) if options.teacher else None
        world = World.join(options.device)
        images = images.to(world.device)
        run = start(options, images, world)
        if teacher is not None:
            teacher = teacher.to(world.device, memory_format=torch.channels_last)
        train(run, images, teacher, options, world)
        if world.rank == 0:
            evaluate(run, images, options, world)
    except (CheckpointError, DataError, RunError, OSError) as error:
        sys.exit(f"error: {error}")
    if dist.is_initialized():
        dist.barrier()  # not before the first process has judged the encoder
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
