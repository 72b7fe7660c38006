"""Generalized supervised contrastive loss for PyTorch: hard labels, soft labels or none, exact, in linear memory."""

from genscl_loss.cached import cached_backward
from genscl_loss.diagnostics import contrastive_accuracy
from genscl_loss.functional import auto_backend, available_backends, collapsed_loss, gen_supcon_loss, validate
from genscl_loss.labels import cutmix, mixup, mixup_cutmix, smooth_labels, teacher_labels
from genscl_loss.module import GenSupConLoss
from genscl_loss.queue import FeatureQueue

__version__ = "0.1.0"

__all__ = [
    "FeatureQueue",
    "GenSupConLoss",
    "__version__",
    "auto_backend",
    "available_backends",
    "cached_backward",
    "collapsed_loss",
    "contrastive_accuracy",
    "cutmix",
    "gen_supcon_loss",
    "mixup",
    "mixup_cutmix",
    "smooth_labels",
    "teacher_labels",
    "validate",
]
