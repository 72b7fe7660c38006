"""Calls that are right, for type checkers, and below them calls that are not.

mypy, which reads this file with the package, complains of an ignored error that is none; `test_types.py` has pyright
find the same ones.
"""

import torch
from torch import Tensor

from genscl_loss import FeatureQueue, GenSupConLoss, contrastive_accuracy, gen_supcon_loss

features, labels = torch.randn(4, 2, 8), torch.arange(4)
criterion = GenSupConLoss(0.1, "first", None, reduction="sum", empty_anchors="ignore", group="world", backend="tiled")
queue = FeatureQueue(16, 8)

loss: Tensor = criterion(features, labels, sample_weight=torch.ones(4))
loss = criterion([features[:, 0], features[:, 1]])
loss = criterion.forward(features, labels=[labels, labels])
loss = gen_supcon_loss(features, labels, temperature=torch.tensor(0.1), base_temperature=None, contrast_mode="all")
loss = gen_supcon_loss(features, contrast_features=queue.features, reduction="none", group=None)
share: Tensor = contrastive_accuracy(features, labels, contrast_mode="first")

GenSupConLoss(0.1, "al")  # type: ignore[arg-type]
GenSupConLoss(contrast_mode="al")  # type: ignore[arg-type]
GenSupConLoss(reduction="avg")  # type: ignore[arg-type]
GenSupConLoss(temprature=0.1)  # type: ignore[call-arg]
criterion(features, labells=labels)  # type: ignore[arg-type]
criterion(features, mask=torch.eye(4))  # type: ignore[arg-type]
criterion(features, labels, torch.eye(4))  # type: ignore[arg-type]
criterion(features, labels, sample_weight=1.0)  # type: ignore[arg-type]
criterion.forward(features, labells=labels)  # type: ignore[arg-type]
gen_supcon_loss(features, labells=labels)  # type: ignore[arg-type]
gen_supcon_loss(features, labels, backend="cuda")  # type: ignore[arg-type]
gen_supcon_loss(features, labels, empty_anchors="skip")  # type: ignore[arg-type]
gen_supcon_loss(features, labels, group="all")  # type: ignore[arg-type]
contrastive_accuracy(features, labels, contrast_mode="some")  # type: ignore[arg-type]
number: int = criterion(features, labels)  # type: ignore[assignment]
