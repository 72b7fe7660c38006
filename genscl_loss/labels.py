"""Soft-label builders: label smoothing, teacher probabilities, mixup and cutmix.

Pure functions: inputs are never modified, no state is kept. Labels go in as class numbers (N,) or as label vectors
(N, C) and come out as label vectors, in float32, or in float64 where float64 went in.

Random numbers come from `generator`, or from torch's global CPU generator where it is None; the global state is not
touched when a generator is given. Draws are made on the generator's device and moved to the images' device. With a CPU
generator (the default) nothing waits for an accelerator, and one seed gives the same mix on every device. With a
generator on an accelerator `mixup` does not wait either, `cutmix` reads its box back (one wait), and `mixup_cutmix`
reads its choice as well.
"""

import math
from numbers import Integral

import torch
from torch import Generator, Tensor

from genscl_loss._checks import check_number, kind, may_look_at


def smooth_labels(labels: Tensor, num_classes: int | None = None, smoothing: float = 0.1) -> Tensor:
    """Move a share of every label's mass to the uniform distribution.

    y' = (1 - s) y + s mean(y), with s = `smoothing` and the mean over the C classes: s / C for rows that sum to one.

    The loss compares label vectors by their cosine, which weighs smoothing more than a cross-entropy does. Two samples
    of different classes have y'_i . y'_j = s (2 - s) / C, two of the same class have that plus (1 - s)^2, so

        cos(different) = s (2 - s) / (C (1 - s)^2 + s (2 - s)),

    and in a large balanced batch the share of the positive mass that lies on other classes is (1 - 1/C) s (2 - s):
    17.1 % for C = 10, s = 0.1. The loss of an anchor is a cross-entropy against its normalised positive weights, so it
    cannot fall below their entropy times temperature / base_temperature: log(number of positives) for hard labels,
    more after smoothing, never 0.

    Args:
        labels: class numbers (N,), any integer dtype or bool, or label vectors (N, C), any real dtype.
        num_classes: C, required for class numbers; for label vectors it may be given, and has to agree.
        smoothing: s in [0, 1].

    Returns:
        (N, C), a new tensor. Every row keeps its sum; a row of zeros (unlabelled) stays one.

    Raises:
        TypeError: an argument has the wrong type, or `labels` of shape (N,) are floating point.
        ValueError: wrong shape, `smoothing` outside [0, 1], `num_classes` missing or not the width of `labels`, or a
            class number outside [0, C). On an accelerator, which would have to wait, the last is looked for
            within `validate()` only, and such a row counts as zeros.

    Example:
        >>> import torch
        >>> smooth_labels(torch.tensor([0, 1]), num_classes=4, smoothing=0.2)
        tensor([[0.8500, 0.0500, 0.0500, 0.0500],
                [0.0500, 0.8500, 0.0500, 0.0500]])

    References:
        - Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", https://arxiv.org/abs/1512.00567
        - Kim et al., "Generalized Supervised Contrastive Learning", https://arxiv.org/abs/2206.00384
    """
    check_number("smoothing", smoothing, at_most=1)
    soft = _label_vectors(labels, num_classes)
    return (1 - smoothing) * soft + smoothing * soft.mean(1, keepdim=True)


def teacher_labels(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Turn a teacher's logits into label vectors that carry no gradient.

    y = softmax(logits / T), with T = `temperature`. A higher T spreads the mass over more classes.

    Args:
        logits: (..., C), floating point. Half precision is computed in float32.
        temperature: T > 0.

    Returns:
        (..., C), float32 (float64 for float64 logits), detached, rows sum to one.

    Raises:
        TypeError: `logits` is not a floating point tensor, or `temperature` not a number.
        ValueError: `logits` is a scalar, or looks like probabilities (looked for on CPU, elsewhere within `validate()`:
            an accelerator would have to wait), or `temperature` is not positive and finite.

    Example:
        >>> import torch
        >>> teacher_labels(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), temperature=2.0)
        tensor([[0.5000, 0.5000],
                [0.2689, 0.7311]])

    References:
        - Hinton et al., "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531
        - Kim et al., "Generalized Supervised Contrastive Learning", https://arxiv.org/abs/2206.00384
    """
    _check_tensor("logits", logits, "(..., C)", 1, floating=True)
    check_number("temperature", temperature, positive=True)
    scores = logits.detach()
    scores = scores if scores.dtype == torch.float64 else scores.float()
    _check_not_probabilities(scores, logits.dtype)
    scores = scores - scores.amax(-1, keepdim=True)  # which a small temperature would turn into infinity
    return torch.softmax(scores / temperature, dim=-1)


def _check_not_probabilities(scores: Tensor, given: torch.dtype) -> None:
    """Refuse what is a softmax already; a second one would flatten it to almost nothing."""
    if scores.shape[-1] < 2 or scores.numel() == 0 or not may_look_at(scores):
        return
    rounding = 4 * scores.shape[-1] ** 0.5 * torch.finfo(given).eps
    if bool((scores >= 0).all()) and bool(((scores.sum(-1) - 1).abs() <= max(rounding, 1e-5)).all()):
        raise ValueError(
            "logits has rows that sum to one, like probabilities: pass those to the loss as they are, or "
            "logits.log() here, which gives them back and lets a temperature spread them"
        )


def mixup(
    images: Tensor,
    labels: Tensor,
    num_classes: int | None = None,
    alpha: float = 1.0,
    *,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Blend every sample, and its label, with a random partner from the batch.

    x'_i = lambda x_i + (1 - lambda) x_p(i) and y'_i = lambda y_i + (1 - lambda) y_p(i), with one lambda ~
    Beta(alpha, alpha) and one random permutation p for the batch. alpha = 0 means lambda = 1: nothing is mixed.

    Args:
        images: (N, ...), floating point.
        labels: class numbers (N,) or label vectors (N, C), on the images' device.
        num_classes: C, required for class numbers.
        alpha: a number >= 0; 1 draws lambda uniformly, smaller ones nearer to 0 and 1.
        generator: source of the random numbers, on any device; None is torch's global CPU generator.

    Returns:
        Mixed images, shape and dtype of `images`, and label vectors (N, C). A single sample is its own partner, an
        empty batch stays empty.

    Raises:
        TypeError: an argument has the wrong type, or `images` are not floating point.
        ValueError: `images` and `labels` of different N or device, `alpha` negative or infinite, or `labels` that
            `smooth_labels` refuses.

    Example:
        >>> import torch
        >>> images, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> mixed, soft = mixup(images, labels, num_classes=3, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(mixed, soft)  # here image n is the one-hot vector of label n
        True

    References:
        - Zhang et al., "mixup: Beyond Empirical Risk Minimization", https://arxiv.org/abs/1710.09412
    """
    _check_tensor("images", images, "(N, ...)", 1, floating=True)
    check_number("alpha", alpha)
    soft, order = _pair(images, labels, num_classes, generator)
    share = _symmetric_beta(alpha, _uniform(2, generator))
    # A share on the host costs nothing to read; one on an accelerator stays a tensor, so that nothing waits for it.
    kept = share.item() if share.device.type == "cpu" else share
    return _blend(images, order, kept), _blend(soft, order, kept)


def cutmix(
    images: Tensor,
    labels: Tensor,
    num_classes: int | None = None,
    alpha: float = 1.0,
    *,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Paste a random box of a random partner into every image, and blend the labels by area.

    The box has sides sqrt(1 - lambda) (H, W), rounded to whole pixels, with lambda ~ Beta(alpha, alpha), around a
    uniformly random pixel, and is cut off at the border. Then y'_i = k y_i + (1 - k) y_p(i), where k is the share of
    pixels that image i really keeps. One box and one random permutation p for the batch; alpha = 0 pastes nothing.

    Args:
        images: (N, ..., H, W), any dtype.
        labels: class numbers (N,) or label vectors (N, C), on the images' device.
        num_classes: C, required for class numbers.
        alpha: a number >= 0; 1 draws the kept area uniformly (before the border cuts), smaller ones nearer to 0 and 1.
        generator: source of the random numbers, on any device; None is torch's global CPU generator.

    Returns:
        Mixed images, shape and dtype of `images`, and label vectors (N, C). A single sample is its own partner, an
        empty batch stays empty, and into images without pixels nothing is pasted.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: as `mixup`, or `images` of fewer than three dimensions.

    Example:
        >>> import torch
        >>> images = torch.arange(3).reshape(3, 1, 1, 1).expand(3, 1, 8, 8)  # every pixel holds its sample's label
        >>> labels = torch.tensor([0, 1, 2])
        >>> mixed, soft = cutmix(images, labels, num_classes=3, generator=torch.Generator().manual_seed(0))
        >>> counts = torch.stack([(mixed == c).sum(dim=(1, 2, 3)) for c in range(3)], dim=1)
        >>> torch.allclose(soft, counts / 64)
        True

    References:
        - Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
          https://arxiv.org/abs/1905.04899
    """
    _check_tensor("images", images, "(N, ..., H, W)", 3)
    check_number("alpha", alpha)
    soft, order = _pair(images, labels, num_classes, generator)
    height, width = images.shape[-2:]
    rows, columns = _box(height, width, alpha, generator)
    mixed = images.clone()
    mixed[..., rows, columns] = images[..., rows, columns][order]
    pasted = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, _blend(soft, order, 1 - pasted / max(height * width, 1))


def mixup_cutmix(
    images: Tensor,
    labels: Tensor,
    num_classes: int | None = None,
    alpha: float = 1.0,
    cutmix_alpha: float | None = None,
    switch_prob: float = 0.5,
    *,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply `mixup` or `cutmix` to the batch, chosen at random.

    With probability `switch_prob` the batch goes through `cutmix`, otherwise through `mixup`.

    Args:
        images: (N, ..., H, W), floating point.
        labels: class numbers (N,) or label vectors (N, C), on the images' device.
        num_classes: C, required for class numbers.
        alpha: the alpha of `mixup`, >= 0.
        cutmix_alpha: the alpha of `cutmix`, >= 0; None takes `alpha`.
        switch_prob: probability of `cutmix`, in [0, 1].
        generator: source of the random numbers, on any device; None is torch's global CPU generator.

    Returns:
        Mixed images, shape and dtype of `images`, and label vectors (N, C).

    Raises:
        TypeError: as `mixup` and `cutmix`, whichever is chosen.
        ValueError: as `mixup` and `cutmix`, whichever is chosen, or `switch_prob` outside [0, 1].

    Example:
        >>> import torch
        >>> images, labels = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])
        >>> mixed, soft = mixup_cutmix(images, labels, num_classes=3, generator=torch.Generator().manual_seed(0))
        >>> mixed.shape, soft.shape
        (torch.Size([4, 3, 8, 8]), torch.Size([4, 3]))

    References:
        - Kim et al., "Generalized Supervised Contrastive Learning", https://arxiv.org/abs/2206.00384
    """
    # Everything that either branch refuses is refused here: an error must not depend on the draw.
    _check_tensor("images", images, "(N, ..., H, W)", 3, floating=True)
    check_number("alpha", alpha)
    check_number("switch_prob", switch_prob, at_most=1)
    cutmix_alpha = alpha if cutmix_alpha is None else cutmix_alpha
    check_number("cutmix_alpha", cutmix_alpha)
    if _uniform(1, generator).item() < switch_prob:
        return cutmix(images, labels, num_classes, cutmix_alpha, generator=generator)
    return mixup(images, labels, num_classes, alpha, generator=generator)


def _label_vectors(labels: Tensor, num_classes: int | None) -> Tensor:
    """Class indices (N,) or label vectors (N, C) -> label vectors (N, C), float64 if they were, else float32."""
    _check_tensor("labels", labels, "(N,) or (N, C)", 1)
    if labels.ndim > 2:
        raise ValueError(f"labels must have shape (N,) or (N, C); got {tuple(labels.shape)}")
    if labels.is_complex() or (labels.ndim == 1 and labels.is_floating_point()):
        raise TypeError(f"labels must be integers (N,) or real (N, C); got {labels.dtype} {tuple(labels.shape)}")
    if not isinstance(num_classes, Integral | None):
        raise TypeError(f"num_classes must be an int; got {type(num_classes).__name__}")
    if labels.ndim == 1:
        return _one_hot(labels, num_classes)
    if num_classes not in (None, labels.shape[1]) or labels.shape[1] == 0:
        raise ValueError(f"num_classes must be the width C >= 1 of labels {tuple(labels.shape)}; got {num_classes}")
    return labels if labels.dtype == torch.float64 else labels.float()


def _one_hot(labels: Tensor, num_classes: int | None) -> Tensor:
    if num_classes is None:
        raise ValueError("num_classes is missing: labels are class numbers (N,)")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1; got {num_classes}")
    indices = labels.long()
    if indices.numel() > 0 and may_look_at(indices):
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= num_classes:
            hint = "; a row of zeros in label vectors (N, C) says that a sample has no label" if low < 0 else ""
            raise ValueError(f"labels must be class numbers in [0, {num_classes}); got {low} to {high}{hint}")
    return (indices[:, None] == torch.arange(num_classes, device=indices.device)).float()


def _pair(
    images: Tensor, labels: Tensor, num_classes: int | None, generator: Generator | None
) -> tuple[Tensor, Tensor]:
    """Label vectors (N, C) and the permutation (N,) that gives every sample its partner, on the images' device."""
    soft = _label_vectors(labels, num_classes)
    if soft.shape[0] != images.shape[0]:
        raise ValueError(f"labels must have one row per sample of images; got {soft.shape[0]} for {images.shape[0]}")
    if soft.device != images.device:
        raise ValueError(f"labels must be on the device of images, {images.device}; got {soft.device}")
    order = torch.randperm(images.shape[0], generator=generator, device=_source(generator))
    # Without waiting only from the host: a copy that goes to the host must have arrived before it is used.
    return soft, order.to(images.device, non_blocking=order.device.type == "cpu")


def _blend(values: Tensor, order: Tensor, kept: Tensor | float) -> Tensor:
    """Return kept * values + (1 - kept) * values[order], exact for kept = 0 or 1 and for equal rows."""
    weight = kept.to(values.device, values.dtype) if isinstance(kept, Tensor) else kept
    return torch.lerp(values[order], values, weight)


def _box(height: int, width: int, alpha: float, generator: Generator | None) -> tuple[slice, slice]:
    """Rows and columns of a random box; on the host, since slices need numbers there."""
    uniform = _uniform(4, generator)
    share, row, column = torch.stack((_symmetric_beta(alpha, uniform[:2]), uniform[2], uniform[3])).tolist()
    side = math.sqrt(1 - share)
    return _span(height, side, row), _span(width, side, column)


def _span(size: int, side: float, centre: float) -> slice:
    length = round(side * size)
    start = int(centre * size) - length // 2
    return slice(max(start, 0), min(start + length, size))


def _source(generator: Generator | None) -> torch.device:
    """Where random numbers are drawn."""
    if generator is None:
        return torch.device("cpu")
    if not isinstance(generator, Generator):
        raise TypeError(f"generator must be a torch.Generator or None; got {type(generator).__name__}")
    return generator.device


def _uniform(count: int, generator: Generator | None) -> Tensor:
    device = _source(generator)
    dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32  # the others may have no float64
    return torch.rand(count, generator=generator, device=device, dtype=dtype)


def _symmetric_beta(alpha: float, uniform: Tensor) -> Tensor:
    """One draw of Beta(alpha, alpha), 0-dimensional, from two uniforms (2,) in [0, 1).

    torch.distributions.Beta takes no generator, and a ratio of gamma draws is wrong for small alpha: they underflow and
    are clamped, which at alpha = 1e-3 turns most float32 ratios into 1/2. This form is exact for every alpha. With u, v
    uniform, T = sqrt(2 alpha (u^(-1/alpha) - 1)) cos(2 pi v) has Student's t distribution with 2 alpha degrees of
    freedom (Bailey 1994, Mathematics of Computation 62), and (1 + T / sqrt(2 alpha + T^2)) / 2 is Beta(alpha, alpha).
    """
    if alpha == 0:
        return torch.ones_like(uniform[0])
    # Numerator and denominator of T / sqrt(2 alpha + T^2) times u^(1/(2 alpha)): u^(-1/alpha) would overflow.
    rest = -torch.expm1(torch.log(uniform[0]) / alpha)  # 1 - u^(1/alpha)
    cosine, sine = torch.cos(2 * math.pi * uniform[1]), torch.sin(2 * math.pi * uniform[1])
    ratio = cosine * torch.sqrt(rest / (cosine.square() + (1 - rest) * sine.square()))
    return (0.5 + 0.5 * ratio).clamp(0, 1)


def _check_tensor(name: str, value: Tensor, shape: str, least_ndim: int, *, floating: bool = False) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {kind(value)}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name} must be floating-point; got {value.dtype}")
    if value.ndim < least_ndim:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")
