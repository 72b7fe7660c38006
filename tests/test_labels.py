"""The soft-label builders against NumPy, pixel counts and closed-form moments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from genscl_loss import labels as L

SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.integers(1, 9)
MIXERS = [L.mixup, L.cutmix, L.mixup_cutmix]
IMAGES, INTS = torch.rand(4, 3, 5, 6), torch.tensor([0, 2, 1, 2])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def indexed(count: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Images whose every pixel holds the index of its sample."""
    return torch.arange(count).to(dtype).reshape(count, *[1] * len(shape)).expand(count, *shape).contiguous()


def soft_rows(count: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(count, classes, generator=seeded(seed), dtype=torch.float64).softmax(1).to(dtype)


# --- smooth_labels -----------------------------------------------------------------------------------------------


@given(seed=SEEDS, count=st.integers(0, 6), classes=st.integers(1, 7), smoothing=st.floats(0, 1))
def test_smoothing_is_the_formula(seed, count, classes, smoothing):
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, classes, count)
    expected = (1 - smoothing) * np.eye(classes)[indices] + smoothing / classes
    for dtype in (torch.int64, torch.int32, torch.uint8):
        got = L.smooth_labels(torch.tensor(indices).to(dtype), classes, smoothing)
        assert got.shape == (count, classes) and got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=2e-7)
    soft = rng.dirichlet(np.ones(classes), count)
    got = L.smooth_labels(torch.tensor(soft), smoothing=smoothing)
    np.testing.assert_allclose(got.numpy(), (1 - smoothing) * soft + smoothing / classes, rtol=0, atol=1e-15)
    np.testing.assert_allclose(got.sum(1).numpy(), 1, atol=1e-14)


def test_smoothing_defaults_and_special_rows():
    assert torch.equal(L.smooth_labels(INTS, 3), L.smooth_labels(INTS, 3, 0.1))
    assert torch.equal(L.smooth_labels(INTS, 3, 0), torch.eye(3)[INTS])
    assert torch.equal(L.smooth_labels(torch.tensor([True, False]), 2, 0.0), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert torch.equal(L.smooth_labels(torch.zeros(1, 4), smoothing=0.2), torch.zeros(1, 4))  # unlabelled rows stay so
    assert L.smooth_labels(torch.tensor([[1, 1, 0]]), 3, 0.0).tolist() == [[1.0, 1.0, 0.0]]


@pytest.mark.parametrize(("classes", "smoothing"), [(10, 0.1), (10, 0.2), (100, 0.1), (2, 0.5)])
def test_documented_share_of_mass_on_other_classes(classes, smoothing):
    per_class = 20
    indices = np.arange(classes).repeat(per_class)
    rows = L.smooth_labels(torch.tensor(indices), classes, smoothing).double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    weights = rows @ rows.T
    other = indices[:, None] != indices[None, :]
    mass = smoothing * (2 - smoothing)
    np.testing.assert_allclose(weights[other], mass / (classes * (1 - smoothing) ** 2 + mass), rtol=1e-5)
    share = (weights * other).sum(1) / weights.sum(1)
    np.testing.assert_allclose(share, (1 - 1 / classes) * mass, rtol=1e-5)
    if (classes, smoothing) == (10, 0.1):
        assert share[0] == pytest.approx(0.171, abs=1e-5)


def test_documented_floor_is_the_entropy_of_the_positive_weights():
    per_class, classes = 8, 10
    indices = torch.arange(classes).repeat_interleave(per_class)

    def target(smoothing: float) -> torch.Tensor:
        rows = torch.nn.functional.normalize(L.smooth_labels(indices, classes, smoothing).double(), dim=1)
        weights = (rows @ rows.T)[0, 1:]  # the first anchor without itself
        return weights / weights.sum()

    def loss(scores: torch.Tensor, weights: torch.Tensor) -> float:
        return -(weights * scores.log_softmax(0)).sum().item()

    hard, smooth = target(0.0), target(0.1)
    floor = torch.special.entr(smooth).sum().item()
    assert torch.special.entr(hard).sum().item() == pytest.approx(math.log(per_class - 1))
    assert floor > math.log(per_class - 1) + 0.3
    assert loss(smooth.log(), smooth) == pytest.approx(floor)
    for seed in range(20):
        noise = torch.randn(len(smooth), generator=seeded(seed), dtype=torch.float64)
        assert loss(smooth.log() + 0.1 * noise, smooth) > floor


# --- teacher_labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_teacher_is_a_detached_softmax_in_float32(dtype):
    logits = (8 * torch.randn(3, 2, 5, generator=seeded(0))).to(dtype).requires_grad_()
    got = L.teacher_labels(logits, temperature=3)
    scores = logits.detach().double().numpy() / 3
    expected = np.exp(scores - scores.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    assert not got.requires_grad
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-6, atol=1e-9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(L.teacher_labels(logits, temperature=3), got)


# --- mixup and cutmix --------------------------------------------------------------------------------------------


@given(seed=SEEDS, count=SIZES, shape=st.lists(SIZES, max_size=3), alpha=st.sampled_from([0.0, 1e-3, 0.2, 1.0, 8.0]))
def test_mixup_blends_images_and_labels_alike(seed, count, shape, alpha):
    images = torch.rand(count, *shape, generator=seeded(seed), dtype=torch.float64)
    mixed, soft = L.mixup(images, torch.eye(count, dtype=torch.float64), alpha=alpha, generator=seeded(seed))
    assert mixed.shape == images.shape and mixed.dtype == images.dtype
    np.testing.assert_allclose(soft.sum(1).numpy(), 1, atol=1e-15)
    assert soft.min() >= 0
    np.testing.assert_allclose(soft.sum(0).numpy(), 1, atol=1e-15)  # a permutation: every sample is used once
    np.testing.assert_allclose(mixed.reshape(count, -1), soft.numpy() @ images.reshape(count, -1).numpy(), atol=1e-14)
    off_diagonal = soft - torch.diag(soft.diagonal())
    shares = off_diagonal.sum(1)  # 1 - lambda, or 0 where a sample is its own partner
    assert ((shares == 0) | (shares - shares.max()).abs().le(1e-15)).all()
    assert ((off_diagonal > 0).sum(1) <= 1).all()


@given(
    seed=SEEDS,
    count=SIZES,
    channels=st.lists(st.integers(1, 3), max_size=2),
    height=SIZES,
    width=st.integers(1, 40),
    alpha=st.sampled_from([0.0, 1e-3, 0.2, 1.0, 8.0]),
    dtype=st.sampled_from([torch.uint8, torch.int64, torch.float16, torch.float32]),
)
def test_cutmix_labels_are_the_pixel_shares(seed, count, channels, height, width, alpha, dtype):
    images = indexed(count, *channels, height, width, dtype=dtype)
    mixed, soft = L.cutmix(images, torch.eye(count, dtype=torch.float64), alpha=alpha, generator=seeded(seed))
    assert mixed.shape == images.shape and mixed.dtype == dtype
    counts = torch.stack([(mixed == source).flatten(1).sum(1) for source in range(count)], 1)
    np.testing.assert_allclose(soft.numpy(), counts.numpy() / images[0].numel(), rtol=0, atol=1e-15)
    foreign = mixed != images
    box = foreign.flatten(0, -3).any(0)  # one box for the batch and all channels, and it is a rectangle
    assert torch.equal(box, box.any(1)[:, None] & box.any(0))
    changed = foreign.flatten(1).any(1)
    assert (foreign[changed] == box).all()


def test_cutmix_box_keeps_the_aspect_and_is_cut_at_the_border():
    cut, pasted, centres = 0, [], []
    images, eye = indexed(3, 40, 80), torch.eye(3)
    for seed in range(1500):
        mixed, _ = L.cutmix(images, eye, generator=seeded(seed))
        box = (mixed != images).any(0)
        rows, columns = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
        if len(rows) and rows[0] > 0 and rows[-1] < 39 and columns[0] > 0 and columns[-1] < 79:
            centres.append((rows.double().mean().item(), columns.double().mean().item()))
            assert abs(2 * len(rows) - len(columns)) <= 2
        elif len(rows):
            cut += 1
        if (mixed != images).any():
            pasted.append(box.double().mean().item())
    assert len(centres) > 150 and cut > 150
    assert abs(np.corrcoef(np.array(centres).T)[0, 1]) < 0.3  # the row is drawn apart from the column
    np.testing.assert_allclose(np.mean(centres, 0), (19.5, 39.5), rtol=0.1)
    # A side r = sqrt(u) around a uniform centre keeps r - r^2 / 4 of its length on average, in both directions:
    # E (r - r^2 / 4)^2 = 1/2 - 1/5 + 1/48 over u. One permutation of three in six moves nobody and is left out.
    assert np.mean(pasted) == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.03)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("seed", range(5))
def test_awkward_batches(mixer, seed):
    one = torch.rand(1, 3, 4, 5)
    mixed, soft = mixer(one, torch.tensor([1]), 3, generator=seeded(seed))
    assert torch.equal(mixed, one) and torch.equal(soft, torch.tensor([[0.0, 1.0, 0.0]]))
    mixed, soft = mixer(torch.rand(0, 3, 4, 5), torch.empty(0, dtype=torch.long), 3, generator=seeded(seed))
    assert mixed.shape == (0, 3, 4, 5) and soft.shape == (0, 3)
    mixed, soft = mixer(torch.rand(4, 3, 0, 5), INTS, 3, generator=seeded(seed))
    assert mixed.shape == (4, 3, 0, 5)
    np.testing.assert_allclose(soft.sum(1).numpy(), 1, atol=1e-6)
    mixed, soft = mixer(IMAGES, INTS, 3, 0.0, generator=seeded(seed))
    assert torch.equal(mixed, IMAGES) and torch.equal(soft, torch.eye(3)[INTS])
    mixed, soft = mixer(IMAGES, INTS, 3, 1e-3, generator=seeded(seed))
    assert mixed.isfinite().all() and soft.isfinite().all()


def test_cutmix_without_pixels_keeps_the_labels():
    assert torch.equal(L.cutmix(torch.rand(4, 3, 0, 5), INTS, 3)[1], torch.eye(3)[INTS])


def test_cutmix_of_one_pixel_takes_it_or_leaves_it():
    images = indexed(4, 1, 1)
    results = [L.cutmix(images, torch.eye(4), generator=seeded(seed)) for seed in range(60)]
    assert all(torch.equal(soft, torch.eye(4)[mixed.flatten().long()]) for mixed, soft in results)
    assert 5 < sum(torch.equal(mixed, images) for mixed, _ in results) < 55


def test_partners_are_a_uniform_permutation():
    seen = np.zeros((4, 4))
    for seed in range(1200):
        order = L.cutmix(indexed(4, 1, 1), torch.eye(4), alpha=1e-3, generator=seeded(seed))[1]
        seen += (order == 1).double().numpy() if not torch.equal(order, torch.eye(4)) else 0
    moved = seen / seen.sum(1, keepdims=True)
    # Uniform over the permutations of four other than the identity: a sample stays in 5 of 23, goes to each of the
    # others in 6 of 23. About 575 batches, so one standard deviation is below 0.019.
    np.testing.assert_allclose(moved, np.where(np.eye(4), 5 / 23, 6 / 23), atol=0.09)


# --- randomness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_a_generator_decides_everything_and_spares_the_global_state(mixer, alpha):
    state = torch.get_rng_state()
    first = mixer(IMAGES, INTS, 3, alpha, generator=seeded(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = mixer(IMAGES, INTS, 3, alpha, generator=seeded(3))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    generator = seeded(3)
    draws = [mixer(IMAGES, INTS, 3, 0.4, generator=generator)[1] for _ in range(8)]
    assert any(not torch.equal(draws[0], draw) for draw in draws[1:])


@pytest.mark.parametrize("mixer", MIXERS)
def test_without_a_generator_the_global_seed_decides(mixer):
    with torch.random.fork_rng(devices=[]):
        results = []
        for _ in range(2):
            torch.manual_seed(11)
            results.append(mixer(IMAGES, INTS, 3))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("float_labels", [False, True])
def test_inputs_are_not_modified_nor_returned(mixer, float_labels):
    images, labels = IMAGES.clone(), soft_rows(4, 3, dtype=torch.float32) if float_labels else INTS.clone()
    before = images.clone(), labels.clone()
    for seed in range(6):
        for alpha in (0.0, 1.0):
            mixed, soft = mixer(images, labels, 3, alpha, generator=seeded(seed))
            mixed.fill_(-1)
            soft.fill_(-1)
    L.smooth_labels(labels, 3, 0.0).fill_(-1)
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])


@pytest.mark.parametrize("alpha", [1e-30, 1e-3, 0.1, 0.2, 0.5, 1.0, 2.0, 7.5, 300.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_beta_moments(alpha, dtype):
    count = 200_000
    draws = L._symmetric_beta(alpha, torch.rand(2, count, generator=seeded(5), dtype=dtype)).double().numpy()
    assert draws.min() >= 0 and draws.max() <= 1
    variance, fourth = 1 / (4 * (2 * alpha + 1)), 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
    sixth = 15 / (64 * math.prod(2 * alpha + odd for odd in (1, 3, 5)))
    eighth = 105 / (256 * math.prod(2 * alpha + odd for odd in (1, 3, 5, 7)))
    centred = draws - 0.5
    for power, mean, second in ((1, 0, variance), (2, variance, fourth), (3, 0, sixth), (4, fourth, eighth)):
        bound = 4.5 * math.sqrt(max(second - mean**2, 0) / count) + 1e-7
        assert abs((centred**power).mean() - mean) < bound, power


@pytest.mark.parametrize(
    ("alpha", "cdf"),
    [
        (0.5, lambda x: 2 / np.pi * np.arcsin(np.sqrt(x))),
        (1.0, lambda x: x),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
        (3.0, lambda x: 10 * x**3 - 15 * x**4 + 6 * x**5),
    ],
)
def test_beta_distribution_function(alpha, cdf):
    count = 100_000
    draws = L._symmetric_beta(alpha, torch.rand(2, count, generator=seeded(9), dtype=torch.float64))
    distance = np.abs(cdf(np.sort(draws.numpy())) - (np.arange(count) + 0.5) / count).max()
    assert distance < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov at 0.1 %


def test_beta_is_finite_at_the_ends_of_the_uniforms():
    ends = torch.tensor([0.0, 2.0**-53, 0.25, 0.5, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    grid = torch.cartesian_prod(ends, ends).T
    for alpha in (5e-324, 1e-30, 1e-3, 1.0, 1e300):
        draws = L._symmetric_beta(alpha, grid)
        assert ((draws >= 0) & (draws <= 1)).all(), alpha


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_draws_its_lambda_from_beta(alpha):
    generator, shares = seeded(1), []
    while len(shares) < 3000:
        soft = L.mixup(torch.zeros(4, 1), torch.eye(4), alpha=alpha, generator=generator)[1]
        moved = soft.diagonal()[(soft > 0).sum(1) > 1]
        shares += moved[:1].tolist()
    variance, fourth = 1 / (4 * (2 * alpha + 1)), 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
    centred = np.array(shares) - 0.5
    assert abs(centred.mean()) < 4.5 * math.sqrt(variance / 3000)
    assert abs((centred**2).mean() - variance) < 4.5 * math.sqrt((fourth - variance**2) / 3000)


@pytest.mark.parametrize("switch_prob", [0.0, 0.25, 0.5, 1.0])
def test_mixup_cutmix_chooses_with_the_given_probability(switch_prob):
    images, generator, boxes, moved = indexed(5, 7, 8), seeded(2), 0, 0
    for _ in range(800):
        mixed, soft = L.mixup_cutmix(images, torch.eye(5), alpha=2.0, switch_prob=switch_prob, generator=generator)
        expected = soft.double() @ torch.arange(5.0, dtype=torch.float64)
        np.testing.assert_allclose(mixed.mean((1, 2)), expected, atol=1e-5)
        if not torch.equal(mixed, images):
            moved += 1
            boxes += bool((mixed == mixed.round()).all())
    assert moved > 700
    assert abs(boxes / moved - switch_prob) <= 4.5 * math.sqrt(switch_prob * (1 - switch_prob) / moved)


def test_mixup_cutmix_hands_each_branch_its_alpha():
    def changes(**options: float) -> int:
        results = (L.mixup_cutmix(IMAGES, INTS, 3, generator=seeded(seed), **options)[0] for seed in range(20))
        return sum(not torch.equal(mixed, IMAGES) for mixed in results)

    assert changes(switch_prob=0, alpha=0, cutmix_alpha=1) == 0
    assert changes(switch_prob=1, alpha=1, cutmix_alpha=0) == 0
    assert changes(switch_prob=1, alpha=0) == 0
    assert changes(switch_prob=1, alpha=0, cutmix_alpha=1) > 5
    assert changes(switch_prob=0, alpha=1, cutmix_alpha=0) > 5
    assert changes(switch_prob=1, alpha=1) > 5


# --- dtypes, layouts, devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("image_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("label_dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
    ],
)
def test_dtypes(mixer, image_dtype, label_dtype, expected):
    rows = torch.eye(4, dtype=label_dtype)
    for seed in range(4):
        mixed, soft = mixer(indexed(4, 6, 7, dtype=image_dtype), rows, generator=seeded(seed))
        reference, reference_soft = mixer(indexed(4, 6, 7), rows.double(), generator=seeded(seed))
        assert mixed.dtype == image_dtype and soft.dtype == expected
        tolerance = 3 * torch.finfo(image_dtype).eps
        np.testing.assert_allclose(mixed.double(), reference, atol=tolerance)
        np.testing.assert_allclose(soft.double(), reference_soft, atol=1e-7)
    assert L.smooth_labels(rows).dtype == expected


@pytest.mark.parametrize("mixer", MIXERS)
def test_memory_format_gradient_and_strided_images(mixer):
    images = torch.rand(4, 3, 5, 6).to(memory_format=torch.channels_last)
    assert mixer(images, INTS, 3)[0].is_contiguous(memory_format=torch.channels_last)
    expanded = torch.rand(1, 3, 5, 6).expand(4, 3, 5, 6)
    torch.testing.assert_close(mixer(expanded, INTS, 3)[0], expanded)
    leaf = torch.rand(4, 3, 5, 6, requires_grad=True)
    mixed, _ = mixer(leaf, INTS, 3, generator=seeded(0))
    mixed.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.ones_like(leaf))  # a permutation passes every pixel on once


def test_a_share_that_stays_a_tensor_blends_like_a_number():
    order = torch.tensor([1, 2, 3, 0])
    for dtype in (torch.float32, torch.float64):
        values = IMAGES.to(dtype)
        torch.testing.assert_close(L._blend(values, order, torch.tensor(0.3)), L._blend(values, order, 0.3))
    assert torch.equal(L._blend(IMAGES, order, torch.tensor(1.0)), IMAGES)
    assert torch.equal(L._blend(IMAGES, order, 0.0), IMAGES[order])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mixer", MIXERS)
def test_cuda_images_with_either_generator(mixer):
    images, labels = IMAGES.cuda(), INTS.cuda()
    mixed, soft = mixer(IMAGES, INTS, 3, generator=seeded(4))
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda_mixed, cuda_soft = mixer(images, labels, 3, generator=seeded(4))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(cuda_mixed.cpu(), mixed)
    torch.testing.assert_close(cuda_soft.cpu(), soft)
    for target in (images, IMAGES):
        generator = torch.Generator("cuda").manual_seed(4)
        mixed, soft = mixer(target, labels.to(target.device), 3, generator=generator)
        assert mixed.device == soft.device == target.device
        np.testing.assert_allclose(soft.sum(1).cpu().numpy(), 1, atol=1e-6)


# --- errors ------------------------------------------------------------------------------------------------------

FLOAT_ROWS = torch.full((4, 3), 1 / 3)
LABEL_ERRORS = [
    (ValueError, "num_classes", INTS, None),
    (ValueError, "num_classes", INTS, 0),
    (TypeError, "num_classes", INTS, 3.0),
    (ValueError, "num_classes", FLOAT_ROWS, 4),
    (ValueError, "num_classes", torch.zeros(4, 0), None),
    (ValueError, "labels", INTS, 2),
    (ValueError, "labels", INTS - 1, 3),
    (ValueError, "labels", FLOAT_ROWS[:, None], 3),
    (ValueError, "labels", torch.tensor(1), 3),
    (TypeError, "labels", INTS.float(), 3),
    (TypeError, "labels", FLOAT_ROWS.to(torch.complex64), 3),
    (TypeError, "labels", [0, 2, 1, 2], 3),
]


@pytest.mark.parametrize(("error", "name", "labels", "num_classes"), LABEL_ERRORS)
def test_bad_labels_are_refused_everywhere(error, name, labels, num_classes):
    with pytest.raises(error, match=f"^{name} (must .*got|is missing)"):
        L.smooth_labels(labels, num_classes)
    for mixer in MIXERS:
        with pytest.raises(error, match=f"^{name} (must .*got|is missing)"):
            mixer(IMAGES, labels, num_classes)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_smoothing_and_switch_prob_are_probabilities(value):
    with pytest.raises(ValueError, match="^smoothing must be finite and >= 0 and <= 1; got"):
        L.smooth_labels(INTS, 3, value)
    with pytest.raises(ValueError, match="^switch_prob must be finite and >= 0 and <= 1; got"):
        L.mixup_cutmix(IMAGES, INTS, 3, switch_prob=value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf])
def test_teacher_temperature_is_positive(value):
    with pytest.raises(ValueError, match="^temperature must be finite and > 0; got"):
        L.teacher_labels(FLOAT_ROWS, value)


@pytest.mark.parametrize(
    ("error", "arguments", "match"),
    [
        (TypeError, (INTS,), "^logits must be floating"),
        (TypeError, ([0.5],), "^logits must be a tensor"),
        (ValueError, (torch.tensor(0.5),), "^logits must have shape"),
        (TypeError, (FLOAT_ROWS, torch.tensor(1.0)), "^temperature must be a number"),
    ],
)
def test_teacher_refuses(error, arguments, match):
    with pytest.raises(error, match=match):
        L.teacher_labels(*arguments)


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers_refuse(mixer):
    for value in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="^alpha must be finite and >= 0; got"):
            mixer(IMAGES, INTS, 3, value)
    with pytest.raises(TypeError, match="^alpha must be a number; got str"):
        mixer(IMAGES, INTS, 3, "1")
    with pytest.raises(TypeError, match="^images must be a tensor; got ndarray"):
        mixer(IMAGES.numpy(), INTS, 3)
    with pytest.raises(TypeError, match="^generator must be a torch.Generator or None; got int"):
        mixer(IMAGES, INTS, 3, generator=0)
    with pytest.raises(ValueError, match="^labels must have one row per sample of images; got 4 for 3"):
        mixer(IMAGES[:3], INTS, 3)
    with pytest.raises(ValueError, match="^labels must be on the device of images, meta; got cpu"):
        mixer(IMAGES.to("meta"), INTS, 3)


def test_images_of_the_wrong_kind():
    with pytest.raises(ValueError, match=r"^images must have shape \(N, \.\.\.\); got \(\)"):
        L.mixup(torch.tensor(0.5), INTS, 3)
    with pytest.raises(TypeError, match=r"^images must be floating-point; got torch.uint8"):
        L.mixup(IMAGES.to(torch.uint8), INTS, 3)
    with pytest.raises(ValueError, match=r"^images must have shape \(N, \.\.\., H, W\); got \(4, 3\)"):
        L.cutmix(FLOAT_ROWS, INTS, 3)


@pytest.mark.parametrize("switch_prob", [0.0, 1.0])
def test_mixup_cutmix_refuses_whatever_the_draw(switch_prob):
    with pytest.raises(TypeError, match="^images must be floating"):
        L.mixup_cutmix(IMAGES.to(torch.uint8), INTS, 3, switch_prob=switch_prob)
    with pytest.raises(ValueError, match="^images must have shape"):
        L.mixup_cutmix(FLOAT_ROWS, INTS, 3, switch_prob=switch_prob)
    with pytest.raises(ValueError, match="^cutmix_alpha must be"):
        L.mixup_cutmix(IMAGES, INTS, 3, cutmix_alpha=-1.0, switch_prob=switch_prob)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_probabilities_are_no_logits(classes, dtype):
    logits = torch.randn(5, classes, generator=seeded(0)).to(dtype)
    with pytest.raises(ValueError, match=r"^logits has rows that sum to one.* logits.log\(\)"):
        L.teacher_labels(logits.softmax(-1))
    with pytest.raises(ValueError, match="^logits"):
        L.teacher_labels(torch.eye(classes, dtype=dtype)[None])
    assert L.teacher_labels(logits.abs()).isfinite().all()  # logits behind a ReLU
    assert L.teacher_labels(torch.zeros(5, classes, dtype=dtype)).isfinite().all()
    assert L.teacher_labels(torch.ones(5, 1, dtype=dtype)).eq(1).all()  # of one class: nothing to tell them apart by


def test_an_ignored_class_gets_a_hint():
    with pytest.raises(ValueError, match="^labels must be class numbers.*-100.*row of zeros"):
        L.smooth_labels(torch.tensor([0, -100, 2]), num_classes=3)


def test_class_numbers_that_cannot_be_looked_at_are_taken():
    numbers = torch.tensor([0, 2, 1])
    expected = L.smooth_labels(numbers, 3)
    in_vmap = torch.func.vmap(lambda shift: L.smooth_labels((numbers + shift) % 3, 3))(torch.arange(2))
    assert in_vmap[0].equal(expected)
    assert in_vmap[1].equal(L.smooth_labels((numbers + 1) % 3, 3))
    with FakeTensorMode() as fake:
        assert L.smooth_labels(fake.from_tensor(numbers), 3).shape == (3, 3)
