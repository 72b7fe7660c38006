"""Four ways to train one small encoder of text: cross-entropy and the contrastive loss, with and without smoothing.

The texts come with every Python: the docstrings of its standard library, read from the sources without importing them.
Each is cut to 40 words and loses the name of its library; the task is to tell which of 13 libraries it describes. From
a pool, each seed draws a few labelled texts per library, and no method sees more. The draw, encoder, dropout of words,
optimizer, steps and texts per step are the same for all four. The frozen encoder is then judged by a linear probe and
by nearest neighbours, fitted on the same labelled texts and scored on the test set.

    python examples/text.py             # a few minutes
    python examples/text.py --tune      # a grid of settings for each method, scored on texts kept for that
    python examples/text.py --smoke     # seconds: does it run at all?
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads gain nothing with so small a network

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

from genscl_loss import GenSupConLoss, smooth_labels

LIBRARIES = (
    "asyncio", "decimal", "email", "http", "importlib", "inspect", "ipaddress", "mailbox", "multiprocessing", "tarfile",
    "unittest", "urllib", "xml",
)  # fmt: skip
SOURCES = {"decimal": "_pydecimal"}  # where the docstrings are, if not in the module of that name
MOST_TEXTS, TEST_TEXTS = 200, 25  # of a library: kept at all, and for the test; as many again for --tune
WORDS = (5, 40)  # fewest and most of a text
BUCKETS = 2**14  # of hashed words, pairs of words and parts of words
DROPPED = 0.3  # share of these that a view of a text loses
BATCH = 128  # texts per step, each in two views


@dataclass(frozen=True)
class Method:
    name: str
    contrastive: bool
    learning_rate: float  # this and those below were chosen with --tune --first-seed 100 --seeds 2
    weight_decay: float
    smoothing: float = 0.0
    temperature: float = 0.3


METHODS = (
    Method("Cross-entropy", False, 0.1, 1.0),
    Method("Cross-entropy, smoothing", False, 0.03, 3.0, smoothing=0.1),
    Method("SupCon", True, 0.03, 3.0),
    Method("GenSCL, smoothing", True, 0.03, 3.0, smoothing=0.1),
)


def settings(method: Method) -> list[Method]:
    """Eight of each method: two learning rates and weight decays, with two values of what else it has, if anything."""
    decays, third = (1.0, 3.0), {"temperature": (0.3, 1.0)} if method.contrastive else {"smoothing": (0.1, 0.3)}
    if not method.contrastive and not method.smoothing:
        decays, third = (0.3, 1.0, 3.0, 10.0), {"smoothing": (0.0,)}
    (name, values), rates = *third.items(), (0.03, 0.1)
    grid = itertools.product(rates, decays, values)
    return [replace(method, learning_rate=rate, weight_decay=decay, **{name: value}) for rate, decay, value in grid]


# ------------------------------------------------------------------ data
def docstrings(library: str) -> Iterator[str]:
    """Every docstring in the sources of a library of Python, without its tests, in the order of the files."""
    root = Path(sysconfig.get_path("stdlib")) / SOURCES.get(library, library)
    for path in [root.with_suffix(".py")] if root.with_suffix(".py").exists() else sorted(root.rglob("*.py")):
        if not {"test", "tests"} & set(path.parts[len(root.parts) :]):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield ast.get_docstring(node) or ""


def load_texts() -> tuple[list[list[str]], np.ndarray]:
    """The words of each text, no text twice, and the number of its library."""
    texts: dict[tuple[str, ...], int] = {}
    for number, library in enumerate(LIBRARIES):
        known = (re.findall(r"[a-z_]{2,}", text.lower().replace(library, " ")) for text in docstrings(library))
        found = dict.fromkeys(tuple(words[: WORDS[1]]) for words in known)
        chosen = [words for words in found if len(words) >= WORDS[0] and words not in texts]
        np.random.default_rng(number).shuffle(chosen)
        texts.update((words, number) for words in chosen[:MOST_TEXTS])
    return [list(words) for words in texts], np.array(list(texts.values()))


def hashed(words: list[str]) -> Tensor:
    """The buckets of a text's words, of its pairs of words, and of all four letters in a row."""
    parts = [f" {word} "[i : i + 4] for word in words for i in range(len(word) - 1)]
    features = [*words, *map(" ".join, itertools.pairwise(words)), *(f"<{part}" for part in parts)]
    return torch.tensor([zlib.crc32(feature.encode()) % BUCKETS for feature in features])


def together(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """As an `EmbeddingBag` takes texts: all features in a row, and where each text begins."""
    lengths = torch.tensor([0, *map(len, texts[:-1])])
    return torch.cat(texts), lengths.cumsum(0)


def view(texts: list[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts without some of their features, drawn at random."""
    features, begins = together(texts)
    kept = torch.rand(len(features), generator=generator) >= DROPPED
    return features[kept], F.pad(kept.cumsum(0), (1, 0))[begins]


# ------------------------------------------------------------------ model and training
class Encoder(nn.Module):
    """Features of texts and where the texts begin -> (N, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(BUCKETS, 64, mode="mean")
        self.layers = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 128), nn.ReLU())

    def forward(self, features: Tensor, begins: Tensor) -> Tensor:
        return self.layers(self.bag(features, begins))


def train(method: Method, texts: list[Tensor], labels: Tensor, steps: int, seed: int, bar: tqdm) -> Encoder:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    projection = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
    encoder, head = Encoder(), projection if method.contrastive else nn.Linear(128, len(LIBRARIES))
    weights = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, method.learning_rate, weight_decay=method.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    criterion = GenSupConLoss(method.temperature, base_temperature=None)
    for _ in range(steps):
        rows = torch.randperm(len(texts), generator=generator)[:BATCH].tolist()
        views = [view([texts[row] for row in rows], generator) for _ in range(2)]
        outputs, targets = [head(encoder(*seen)) for seen in views], labels[rows]
        if not method.contrastive:
            loss = F.cross_entropy(torch.cat(outputs), targets.repeat(2), label_smoothing=method.smoothing)
        elif method.smoothing:
            loss = criterion(outputs, smooth_labels(targets, len(LIBRARIES), method.smoothing))
        else:
            loss = criterion(outputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.update()
    return encoder.eval()


@torch.no_grad()
def evaluate(encoder: Encoder, texts: list[Tensor], labels: np.ndarray, train_rows, test_rows) -> list[float]:
    """Accuracy in % of a linear probe and of 5 nearest neighbours on frozen features."""
    fitted, judged = (encoder(*together([texts[row] for row in rows])).numpy() for rows in (train_rows, test_rows))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    judges = (probe, KNeighborsClassifier(n_neighbors=5, metric="cosine"))
    return [100 * judge.fit(fitted, labels[train_rows]).score(judged, labels[test_rows]) for judge in judges]


# ------------------------------------------------------------------ the comparison
def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows for the test, rows for choosing settings, and rows to draw labelled texts from."""
    place = np.concatenate([np.arange(np.sum(labels == number)) for number in range(len(LIBRARIES))])
    return tuple(np.flatnonzero(np.minimum(place // TEST_TEXTS, 2) == part) for part in range(3))


def compare(methods, texts, labels, pool, judged, arguments) -> np.ndarray:
    """Accuracies (methods, seeds, 2)."""
    scores = np.zeros((len(methods), len(arguments.seeds), 2))
    with tqdm(total=len(methods) * len(arguments.seeds) * arguments.steps, unit="step", mininterval=0.5) as bar:
        for column, seed in enumerate(arguments.seeds):
            random = np.random.default_rng(seed)
            drawn = [random.choice(pool[labels[pool] == c], arguments.per_class, False) for c in range(len(LIBRARIES))]
            rows = np.concatenate(drawn)
            for row, method in enumerate(methods):
                bar.set_description(f"seed {seed}: {method.name}")
                seen = [texts[i] for i in rows]
                encoder = train(method, seen, torch.tensor(labels[rows]), arguments.steps, seed, bar)
                scores[row, column] = evaluate(encoder, texts, labels, rows, judged)
    return scores


def cell(values: np.ndarray, spread: float) -> str:
    return f"{f'{values.mean():.2f} ± {spread:.2f}':>17}"


def print_table(scores: np.ndarray) -> None:
    seeds = scores.shape[1]
    half = student.ppf(0.975, seeds - 1) / seeds**0.5
    print("Test accuracy in %: mean ± standard deviation over seeds. Gain: over cross-entropy, seed by seed, with half")
    print("of its 95 % interval (Student).\n")
    print(f"{'method':<25}{'linear probe':>17}{'gain':>17}{'kNN':>17}{'gain':>17}")
    for method, values in zip(METHODS, scores, strict=True):
        gains = values - scores[0]
        cells = [
            [cell(v, v.std(ddof=1)), cell(g, half * g.std(ddof=1))] for v, g in zip(values.T, gains.T, strict=True)
        ]
        print(f"{method.name:<25}" + "".join(sum(cells, [])))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="training steps per run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default: %(default)s)")
    parser.add_argument("--per-class", type=int, default=20, help="labelled texts per library (default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="score settings, on texts kept for that, not the test's")
    parser.add_argument("--smoke", action="store_true", help="2 seeds of 10 steps: seconds, numbers without meaning")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.seeds, arguments.steps = 2, 10
    if arguments.seeds < 2 or arguments.steps < 1 or not 5 <= arguments.per_class <= 20:
        parser.error("--seeds must be at least 2, --steps at least 1, --per-class 5 to 20")
    arguments.seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    return arguments


def main() -> None:
    arguments = parse_arguments()
    words, labels = load_texts()
    texts = [hashed(text) for text in words]
    test, kept, pool = split(labels)
    size = f"{arguments.per_class * len(LIBRARIES)} labelled texts ({arguments.per_class} per library)"
    print(f"{len(texts)} texts of {len(LIBRARIES)} libraries: {size}, {len(kept if arguments.tune else test)} judged")
    if arguments.tune:
        candidates = [setting for method in METHODS for setting in settings(method)]
        scores = compare(candidates, texts, labels, pool, kept, arguments).mean(axis=(1, 2))
        for setting, score in zip(candidates, scores, strict=True):
            print(f"{score:6.2f}  {setting}")
    else:
        print_table(compare(METHODS, texts, labels, pool, test, arguments))


if __name__ == "__main__":
    main()
