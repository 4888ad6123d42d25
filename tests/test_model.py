"""The decoder against plain definitions: rows, caches, masks and padding change nothing."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch.nn import functional as F

from dataset import CaptionRows, make_batch
from decoder import DecoderConfig, Dropout, KeyValueCache, attention
from generation import generate
from model import CaptionModel, LinearCrossEntropy
from options import GenerationOptions
from tokenizer import END_ID, SPECIAL_TOKENS, START_ID

VOCAB = 50


def build_model() -> CaptionModel:
    torch.manual_seed(0)
    config = DecoderConfig(VOCAB, width=32, layers=3, heads=4, ff_dim=64, max_length=16, dropout=0)
    model = CaptionModel(24, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)  # far from uniform, so that a mistake shows
    return model.eval()


@pytest.fixture
def model() -> CaptionModel:
    return build_model()


def features(images: int) -> torch.Tensor:
    return torch.randn(images, 9, 24, generator=torch.Generator().manual_seed(3))


def captions(lengths: list[int]) -> list[list[int]]:
    dice = torch.Generator().manual_seed(4)
    first = len(SPECIAL_TOKENS)
    return [
        [START_ID, *torch.randint(first, VOCAB, (n,), generator=dice).tolist(), END_ID]
        for n in lengths
    ]


def plain_logits(model: CaptionModel, feature: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Logits (length, vocab) of one caption of one photo, by itself: no row, no cache."""
    tokens = torch.tensor([ids])
    positions = torch.arange(len(ids))[None]
    hidden = model.hidden(feature[None], tokens, positions, torch.zeros_like(tokens))
    return model.decoder.logits(hidden)[0]


def test_a_row_of_captions_equals_each_caption_alone(model):
    groups = [captions([3, 7, 5]), captions([2, 4])]
    feature = features(2)
    batch = make_batch(["a", "b"], groups)
    hidden = model.hidden(feature, batch.tokens, batch.positions, batch.segments)
    logits = model.decoder.logits(hidden)
    flat = batch.tokens.flatten()[batch.places]
    assert flat.tolist() == [i for group in groups for ids in group for i in ids[:-1]]
    assert batch.targets.tolist() == [i for group in groups for ids in group for i in ids[1:]]
    for row, group in enumerate(groups):
        for number, ids in enumerate(group):
            place = batch.segments[row] == number
            expected = plain_logits(model, feature[row], ids[:-1])
            torch.testing.assert_close(logits[row][place], expected, atol=1e-4, rtol=1e-4)
            assert batch.tokens[row][place].tolist() == ids[:-1]


def test_loss_and_gradients_equal_the_plain_ones(model):
    groups, feature = [captions([3, 7, 5]), captions([2, 4])], features(2)
    batch = make_batch(["a", "b"], groups)
    fast = model.loss(feature, batch, 0.1)
    gradients = torch.autograd.grad(fast, list(model.parameters()))
    plain = sum(
        F.cross_entropy(
            plain_logits(model, feature[row], ids[:-1]),
            torch.tensor(ids[1:]),
            label_smoothing=0.1,
            reduction="sum",
        )
        for row, group in enumerate(groups)
        for ids in group
    )
    torch.testing.assert_close(fast, plain, atol=1e-3, rtol=1e-5)
    expected = torch.autograd.grad(plain, list(model.parameters()))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [1, 100])  # of logits: beyond 88 a power is infinite
def test_scaled_loss_and_gradients_equal_the_plain_ones(model, size, monkeypatch):
    monkeypatch.setattr(LinearCrossEntropy, "GROUP", 8)  # several, as of thousands of tokens
    model.decoder.token_embedding.weight.data.mul_(size)
    groups, feature = [captions([3, 7, 5]), captions([2, 4])], features(2)
    batch = make_batch(["a", "b"], groups)
    scales = torch.randn(len(batch.targets), generator=torch.Generator().manual_seed(0))
    fast = model.loss(feature, batch, 0.1, scales)
    hidden = model.hidden(feature, batch.tokens, batch.positions, batch.segments)
    logits = model.decoder.logits(hidden.flatten(0, 1)[batch.places])
    losses = F.cross_entropy(logits, batch.targets, label_smoothing=0.1, reduction="none")
    plain = (losses * scales).sum()
    torch.testing.assert_close(fast, plain, atol=1e-3, rtol=1e-5)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(fast, parameters), torch.autograd.grad(plain, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_equals_plain(monkeypatch, tmp_path):
    # Without vectors: to find out which ones the CPU has takes as long as all the rest.
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # which holds none with them
    torch.manual_seed(0)
    config = DecoderConfig(VOCAB, width=32, layers=1, heads=4, ff_dim=64, max_length=16, dropout=0)
    plain = CaptionModel(24, config)
    compiled = copy.deepcopy(plain)
    compiled.hidden = torch.compile(compiled.hidden, dynamic=True)
    for lengths in ([3, 7, 5], [9, 9, 9, 9]):
        batch, feature = make_batch(["a"], [captions(lengths)]), features(1)
        ours, theirs = (model.loss(feature, batch, 0.1) for model in (plain, compiled))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-5)
        pairs = (
            torch.autograd.grad(loss, list(model.parameters()))
            for loss, model in ((ours, plain), (theirs, compiled))
        )
        for one, two in zip(*pairs, strict=True):
            torch.testing.assert_close(one, two, atol=2e-3, rtol=1e-3)


def test_what_was_trained_before_says_the_same(model):
    """Weights mean something in these very steps alone: others want another FORMAT."""
    with torch.no_grad():
        for parameter in model.parameters():
            numbers = torch.arange(1, parameter.numel() + 1).double()
            parameter.copy_(numbers.square().sin().view_as(parameter) / 2)
    feature = torch.arange(9 * 24.0).square().sin().view(9, 24)
    logits = plain_logits(model, feature, [START_ID, 7, 8, 9, 10])[-1, :4]
    known = torch.tensor([3.8652985, 0.9014125, 0.1080843, -0.4891416])
    torch.testing.assert_close(logits, known, atol=1e-5, rtol=0)


def test_padding_changes_nothing(model):
    short, long = captions([3]), captions([12])
    feature = features(2)
    together = make_batch(["a", "b"], [short, long])
    assert (together.segments == -1).sum() == 9 + 2 * 3  # and each row to a multiple of 4
    alone = make_batch(["a"], [short])
    first = model.loss(feature[:1], alone)
    second = model.loss(feature[1:], make_batch(["b"], [long]))
    torch.testing.assert_close(model.loss(feature, together), first + second, atol=1e-3, rtol=1e-5)


def test_a_later_word_never_reaches_an_earlier_one(model):
    ids, feature = captions([8])[0], features(1)[0]
    before = plain_logits(model, feature, ids)
    changed = [*ids[:5], ids[5] % (VOCAB - 10) + 5, *ids[6:]]
    after = plain_logits(model, feature, changed)
    torch.testing.assert_close(before[:5], after[:5])
    assert not torch.allclose(before[5:], after[5:])


def test_the_cache_equals_the_full_forward(model):
    ids, feature = captions([10])[0], features(1)
    full = plain_logits(model, feature[0], ids)
    memory, cache = model.memory(feature), KeyValueCache(model.config.layers, len(ids))
    for place, token in enumerate(ids):
        tokens = torch.tensor([[token]])
        mask = torch.ones(1, 1, place + 1, dtype=torch.bool)
        hidden = model.decoder(tokens, torch.full_like(tokens, place), mask, memory, cache)
        logits = model.decoder.logits(hidden)[0, 0]
        torch.testing.assert_close(logits, full[place], atol=1e-4, rtol=1e-4)


def test_the_picture_matters(model):
    ids = captions([6])[0]
    first, second = (plain_logits(model, feature, ids) for feature in features(2))
    assert not torch.allclose(first, second, atol=1e-2)


def test_every_patch_matters(model):
    ids, feature = captions([6])[0], features(1)[0]
    before = plain_logits(model, feature, ids)
    for patch in range(feature.shape[0]):
        changed = feature.clone()
        changed[patch] = -changed[patch]
        assert not torch.allclose(plain_logits(model, changed, ids), before, atol=1e-4)


def test_four_captions_are_learned_to_the_letter():
    torch.manual_seed(0)
    config = DecoderConfig(VOCAB, width=64, layers=2, heads=4, ff_dim=128, max_length=16, dropout=0)
    model, feature = CaptionModel(24, config), features(4)
    groups = [[ids] for ids in captions([5, 9, 3, 7])]
    batch = make_batch(list("abcd"), groups)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    for _ in range(120):
        loss = model.loss(feature, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = generate(model, feature, GenerationOptions())
    assert [group[0].tokens for group in found] == [ids[1:-1] for [ids] in groups]
    assert all(group[0].ended for group in found)


def test_batches_hold_each_photo_once_with_little_padding():
    dice = torch.Generator().manual_seed(5)
    lengths = torch.randint(6, 20, (700, 5), generator=dice).tolist()
    rows = CaptionRows({f"{i}": captions(group) for i, group in enumerate(lengths)}, None)
    batches = list(rows.batches(32, seed=1, epoch=2))
    assert len(batches) == rows.count(32)
    names = [name for batch in batches for name in batch.names]
    assert sorted(names) == sorted(rows.names)
    padding = sum(int((batch.segments == -1).sum()) for batch in batches)
    assert padding / sum(batch.segments.numel() for batch in batches) < 0.05
    again = [batch.names for batch in rows.batches(32, seed=1, epoch=2, skip=3)]
    assert again == [batch.names for batch in batches][3:]
    other = [name for batch in rows.batches(32, seed=1, epoch=3) for name in batch.names]
    assert other != names


def test_attention_in_bf16_on_a_cpu_equals_the_library_s():
    """Plain products there, the fused kernel everywhere else."""
    dice = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(2, 4, 9, 16, generator=dice) for _ in range(3))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    for chosen in (None, mask):
        expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=chosen)
        low = attention(*(x.bfloat16() for x in (query, keys, values)), chosen)
        torch.testing.assert_close(low.float(), expected, atol=3e-2, rtol=3e-2)
        torch.testing.assert_close(attention(query, keys, values, chosen), expected)


class OnMac(torch.Tensor):
    device = torch.device("mps")


def test_on_a_mac_attention_is_plain_as_the_fused_kernel_may_be_wrong(monkeypatch):
    torch.manual_seed(0)
    query, keys, values = (torch.randn(2, n, 4, 8).transpose(1, 2) for n in (3, 5, 5))
    mask = torch.rand(2, 1, 3, 5) < 0.7
    mask[..., 0] = True
    expected = attention(query, keys, values, mask)
    monkeypatch.delattr("torch.nn.functional.scaled_dot_product_attention")
    got = attention(query.as_subclass(OnMac), keys, values, mask).as_subclass(torch.Tensor)
    assert torch.allclose(got, expected, atol=1e-6)


def test_dropout_keeps_its_rate_and_its_mean():
    torch.manual_seed(0)
    layer, x = Dropout(0.2), torch.ones(400, 1003, requires_grad=True)
    y = layer.train()(x)
    dropped = float((y == 0).double().mean())
    assert dropped == pytest.approx(51 / 256, abs=2e-3)  # the rate in steps of 1/256
    assert float(y.detach().double().mean()) == pytest.approx(1, abs=5e-3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)
    assert layer.eval()(x) is x


def test_a_new_decoder_begins_small_and_drops_out_on_each_branch():
    layers = 3
    config = DecoderConfig(VOCAB, width=64, layers=layers, heads=4, ff_dim=64, max_length=16)
    model, calls = CaptionModel(24, config).train(), []
    block = model.decoder.blocks[0]
    assert float(block.ff_in.weight.data.std()) == pytest.approx(0.02, rel=0.1)
    for end in (block.self_out, block.cross_out, block.ff_out):
        assert float(end.weight.data.std()) == pytest.approx(0.02 / (3 * layers) ** 0.5, rel=0.1)
    for part in model.modules():
        if isinstance(part, Dropout):
            part.register_forward_hook(lambda *_: calls.append(1))
    model.loss(features(1), make_batch(["a"], [captions([3])]))
    assert len(calls) == 2 + 3 * layers  # of the memory, the tokens, and each block's branches


def test_scores_that_would_fill_the_memory_are_not_made_at_once(monkeypatch):
    query, keys, values = (torch.randn(2, 2, 40, 8, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    plain = attention(query, keys, values, mask)
    monkeypatch.setattr("decoder.MOST_SCORES", 1000)
    fused, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    torch.testing.assert_close(attention(query, keys, values, mask), plain, atol=0.03, rtol=0.03)
    assert calls
