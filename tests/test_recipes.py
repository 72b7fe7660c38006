"""The recipes of `docs/recipes.md` compute what the page says of them: each beside a plain formula, and all are short.

That they run is for `test_docs.py`; here the namespace that a recipe leaves behind is looked at.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, one_hot

from genscl_loss import contrastive_accuracy, gen_supcon_loss

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

RECIPES = {
    text.partition("\n")[0]: BLOCK.findall(text) for text in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
}


def run(title: str) -> dict:
    """What the code under this heading leaves behind."""
    (source,) = RECIPES[title]
    namespace = {"__name__": "__main__"}
    torch.manual_seed(0)
    exec(compile(source, title, "exec"), namespace)
    return namespace


def same(ours, plain):
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_is_short_and_says_what_is_worse(title):
    assert len(RECIPES[title]) == 1
    assert 0 < sum(bool(line.strip()) for line in RECIPES[title][0].splitlines()) <= 15
    text = PAGE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert text.count("**Worse:**") == 1


def test_sentence_transformers_call_the_loss_as_the_recipe_has_it():
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate("?abcd")}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    texts, labels = [["a b", "c", "d d"], ["b", "c a", "d"]], torch.tensor([0, 1, 0])
    loss = run("Sentence embeddings: sentence-transformers")["OfClasses"](model, temperature=0.1)
    found = loss([model.preprocess(column) for column in texts], labels)
    rows = [model.encode(column, convert_to_tensor=True) for column in texts]
    same(found, gen_supcon_loss(rows, labels, temperature=0.1))
    found.backward()
    assert model[0].embedding.weight.grad.abs().sum() > 0


def test_simcse_is_a_cross_entropy_between_two_draws_of_dropout():
    got = run("Sentence embeddings without labels: SimCSE")
    queries, keys = map(normalize, got["views"])
    assert 0.5 < (queries * keys).sum(1).mean() < 0.999
    same(got["loss"], cross_entropy(queries @ keys.T / 0.05, torch.arange(32)))
    got["layer"].eval()
    got["tokens"][:, 8:] = 7  # behind the mask
    of_other_padding = got["embed"]()
    got["tokens"][:, 8:] = 0
    same(got["embed"](), of_other_padding)


def test_clip_is_two_cross_entropies_at_the_scale_of_the_checkpoint():
    got = run("CLIP: both directions, logit_scale")
    logits = got["logit_scale"].exp() * normalize(got["image"]) @ normalize(got["text"]).T
    assert got["criterion"].temperature.item() == pytest.approx(0.05)
    pairs = torch.arange(8)
    same(got["loss"], (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2)


def test_cross_batch_memory_contrasts_with_the_batch_and_older_rows():
    got = run("Cross-batch memory (XBM)")
    older = got["queue"].features[:128]  # two batches, and behind them the last one
    everything = normalize(torch.cat([got["features"], older]))
    of_all = torch.cat([got["labels"], got["queue"].labels[:128]])
    logits = (normalize(got["features"]) @ everything.T / 0.07).fill_diagonal_(-torch.inf)
    positive = (got["labels"][:, None] == of_all).fill_diagonal_(False)
    log_q = logits.log_softmax(1).masked_fill(~positive, 0)
    same(got["loss"], (-log_q.sum(1) / positive.sum(1)).mean())


def test_moco_has_the_key_as_the_positive_and_the_queue_behind():
    got = run("MoCo: momentum encoder and queue")
    assert got["contrasts"].shape == (64 + 128, 128)
    same(got["contrasts"][:64], got["keys"])
    same(got["contrasts"][64:], got["queue"].features[:128])  # enqueued before, without these keys
    logits = normalize(got["encoder"](got["view0"])) @ normalize(got["contrasts"]).T / 0.07
    same(got["loss"], cross_entropy(logits, torch.arange(64)))


def test_columns_of_several_labels_weigh_by_the_inverse_frequency():
    got = run("Multi-label")
    products = (got["labels"] * got["rare"]) @ (got["labels"] * got["rare"]).T
    frequency = got["labels"].float().mean(0)  # 1/2, 1/2, 1/4
    same(products[0, 1], 1 / frequency[0])
    same(products[2, 2], 1 / frequency[1] + 1 / frequency[2])
    plain = normalize(got["labels"].float())
    assert (plain @ plain.T)[0, 1].item() == pytest.approx(0.71, abs=5e-3)  # as the page says


@pytest.mark.parametrize(
    ("title", "rows", "classes", "ignored"),
    [
        ("Segmentation: pixels with an ignored class", "rows", "targets", 255),
        ("Token labels (NER): padding is ignored", "hidden", "tags", -100),
    ],
)
def test_rows_of_an_ignored_class_are_not_there(title, rows, classes, ignored):
    got = run(title)
    rows, classes = got[rows].reshape(-1, 32), got[classes].reshape(-1)
    if "drawn" in got:
        rows, classes = rows[got["drawn"]], classes[got["drawn"]]
        first = got["maps"][0, :, 9, 3]
        same(got["rows"][9 * 64 + 3], first)  # a row is a pixel
    there = classes != ignored
    assert 0 < there.sum() < len(rows)
    same(got["loss"], gen_supcon_loss(rows[there], classes[there]))


def test_the_long_tail_has_the_mean_of_each_class_in_the_denominator():
    got = run("Long tail and class imbalance")
    z = normalize(torch.cat([got["features"], got["prototypes"]]))
    y = torch.cat([got["labels"], got["classes"]])
    sizes = one_hot(y, 10).sum(0)
    similar = (z[:64] @ z.T / 0.07).fill_diagonal_(-torch.inf)
    means = similar.exp() @ (one_hot(y, 10) / sizes)
    positive = (y[:64, None] == y).fill_diagonal_(False)
    log_q = (similar - means.sum(1, keepdim=True).log()).masked_fill(~positive, 0)
    same(got["loss"], (-log_q.sum(1) / positive.sum(1)).mean())


def test_levels_of_a_hierarchy_add_up_to_a_similarity():
    got = run("Hierarchy of classes")
    plain = torch.zeros(64, 64)
    for level, _, share in got["levels"]:
        plain += share * (level[:, None] == level)
    y = normalize(got["labels"])
    same(y @ y.T, plain)
    assert plain.unique().tolist() == pytest.approx([0.0, 0.3, 1.0])
    torch.manual_seed(1)
    features = torch.randn(64, 2, 128)
    same(gen_supcon_loss(features, got["labels"]), gen_supcon_loss(features, label_similarity=plain))


def test_soft_bins_are_a_gaussian_of_the_difference():
    got = run("Regression targets and ages")
    y, age = normalize(got["labels"]), got["age"]
    plain = torch.exp(-((age[:, None] - age) ** 2) / (2 * got["width"] ** 2))
    torch.testing.assert_close(y @ y.T, plain, rtol=0, atol=1e-3)
    ends = torch.tensor([0.0, 2.5, 80.0, 76.0])
    y = normalize(torch.exp(-(((ends[:, None] - got["bins"]) / 5) ** 2)))
    torch.testing.assert_close(y @ y.T, torch.exp(-((ends[:, None] - ends) ** 2) / 50), rtol=0, atol=1e-3)


def test_samples_without_labels_are_negatives_or_have_their_other_view():
    got = run("Semi-supervised: some samples without labels")
    y = normalize(got["vectors"].float())
    assert ((y @ y.T)[3:] == 0).all()
    each = gen_supcon_loss(got["features"], got["vectors"], reduction="none").view(2, 5)
    assert (each[:, 3:] == 0).all()
    assert (each[:, :3] > 0).all()
    assert got["own"].tolist() == [3, 3, 7, -4, -5]
    positive = (got["own"][:, None] == got["own"]).repeat(2, 2)
    same(got["loss"], gen_supcon_loss(got["features"], label_similarity=positive.float()))


def test_each_query_has_its_own_negatives():
    got = run("Hard negatives for each query")
    q, p, n = (normalize(got[name], dim=-1) for name in ("queries", "positives", "negatives"))
    logits = torch.cat([(q * p).sum(1, keepdim=True), (q[:, None] * n).sum(2)], dim=1) / 0.07
    same(got["loss"], cross_entropy(logits, torch.zeros(8, dtype=torch.long)))


def test_the_linear_cross_entropy_is_the_cross_entropy():
    got = run("Linear cross-entropy with ignore_index")
    logits = got["classifier"](got["hidden"])
    plain = cross_entropy(logits, got["targets"], ignore_index=-100)
    same(got["loss"], plain)
    weight = got["classifier"].weight
    same(*(torch.autograd.grad(loss, weight)[0] for loss in (got["loss"], plain)))

    options = {"normalize": False, "temperature": 1.0, "base_temperature": None}
    soft, few = torch.rand(512, 50).softmax(1), weight[:50]
    loss = gen_supcon_loss(got["hidden"], soft, contrast_features=few, contrast_labels=torch.eye(50), **options)
    same(loss, cross_entropy(got["hidden"] @ few.T, soft))


def test_chunks_under_amp_and_ddp_have_the_gradient_of_the_whole_batch(monkeypatch):
    monkeypatch.setattr(torch.nn, "Dropout", lambda p: torch.nn.Identity())  # whose draws could not be repeated
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    got = run("Out of memory: large batches, AMP, DDP")
    encoder = got["encoder"].module
    with torch.autocast("cpu"):
        whole = gen_supcon_loss([encoder(view) for view in got["views"]], got["labels"], temperature=0.1)
    same(got["loss"], whole.detach())
    (plain,) = torch.autograd.grad(whole, encoder[0].weight)
    found = encoder[0].weight.grad
    assert (found - plain).norm() < 0.01 * plain.norm()  # bfloat16 adds up chunks, or everything


def test_early_stopping_returns_the_best_weights():
    got = run("Early stopping")
    again = contrastive_accuracy(got["encoder"](got["x"][128:]), got["y"][128:]).item()
    assert again == got["best"]
    assert got["waited"] == 5


def test_the_factor_keeps_the_size_of_gradients():
    criterion = run("Learning rate after a change of temperature")["criterion"]
    features, labels = torch.randn(256, 32, requires_grad=True), torch.arange(256) % 8

    def size(loss):
        return torch.autograd.grad(loss, features)[0].norm()

    tuned = size(gen_supcon_loss(features, labels, temperature=0.5, base_temperature=None))
    in_nats = size(gen_supcon_loss(features, labels, temperature=0.1, base_temperature=None))
    kept = size(criterion(features, labels))
    same(kept, in_nats * 0.1 / 0.5)
    assert 0.5 < kept / tuned < 2 < in_nats / tuned


def test_weights_take_back_how_often_negatives_are_drawn():
    got = run("Sampled negatives: logQ correction")
    z = normalize(got["queries"])
    positives, drawn = normalize(got["positives"]), normalize(got["items"][got["drawn"]])
    own, sampled = z @ positives.T / 0.07, z @ drawn.T / 0.07
    corrected = sampled - (256 * got["q"][got["drawn"]]).log()
    same(got["loss"], cross_entropy(torch.cat([own, corrected], dim=1), torch.arange(8)))
