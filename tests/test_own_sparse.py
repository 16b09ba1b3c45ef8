"""Longformer and BigBird by our kernels against themselves: tiny configs, random weights, float32."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from splatc.errors import InvalidInput, Unsupported  # noqa: E402
from splatc.integrations.transformers import replace_attention  # noqa: E402
from splatc.integrations.transformers.keys import keys_at  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES: dict[str, object] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def pair(config, kind):
    torch.manual_seed(0)
    theirs = kind(config).eval()
    return replace_attention(copy.deepcopy(theirs)), theirs


def same(ours, theirs, ids, mask, **given):
    """The real tokens, and the gradients of what comes of them."""
    results = []
    for model in (ours, theirs):
        out = model(ids, attention_mask=mask, **given).last_hidden_state[mask.bool()]
        model.zero_grad()
        out[:, :3].pow(3).sum().backward()
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (out, gradients), (expected, expected_gradients) = results
    assert torch.linalg.norm(out - expected) <= 1e-4 * torch.linalg.norm(expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, g in expected_gradients.items():
        assert torch.linalg.norm(gradients[name] - g) <= 1e-4 * torch.linalg.norm(g) + 3e-5, name


def tokens(length, batch=3):
    """Ids and padding: none, at the end, in the middle."""
    ids = torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:2, length - 13 :] = 0
    mask[2:, 9:12] = 0
    return ids, mask


@pytest.mark.parametrize("tokens_everywhere", [(), (0,), (0, 5, 6, 20), tuple(range(12))], ids=len)
def test_longformer(tokens_everywhere):
    config = transformers.LongformerConfig(**SIZES, attention_window=[8, 16], sep_token_id=2)
    ours, theirs = pair(config, transformers.LongformerModel)
    ids, mask = tokens(45)
    everywhere = torch.zeros_like(mask)
    everywhere[:, list(tokens_everywhere)] = 1
    everywhere[1, 3:] = 0  # not the same for all
    same(ours, theirs, ids, mask, global_attention_mask=everywhere * mask)
    with pytest.raises(Unsupported, match="output_attentions"):
        ours(ids, output_attentions=True)


def test_longformer_without_a_mask():
    ours, theirs = pair(transformers.LongformerConfig(**SIZES, attention_window=8, sep_token_id=2),
                        transformers.LongformerModel)  # fmt: skip
    ids, _ = tokens(32)
    with torch.no_grad():
        assert torch.allclose(ours(ids).last_hidden_state, theirs(ids).last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length, random", [(104, 3), (61, 1), (1024, 1)], ids=["plan", "cut block", "of the paper"])
def test_big_bird(length, random, training):
    """In evaluation block 0 is drawn again and again; in training blocks are drawn from a seed."""
    size = 64 if length == 1024 else 8
    sizes = SIZES | {"max_position_embeddings": 1024}
    config = transformers.BigBirdConfig(**sizes, block_size=size, num_random_blocks=random)
    ours, theirs = pair(config, transformers.BigBirdModel)
    ids, mask = tokens(length, batch=1 if length == 1024 else 3)
    same(ours.train(training), theirs.train(training), ids, mask)
    assert type(ours.encoder.layer[0].attention.self).__name__ == "SparseBigBirdAttention"


def test_models_without():
    with pytest.raises(InvalidInput, match="no block-sparse BigBird"):
        replace_attention(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("chosen", [[1, 1, 1], [0, 1, 1], [1, 0, 0, 1, 1, 0, 1], [0, 0, 1]], ids=str)
def test_keys_at(chosen):
    mask = np.array(chosen, bool)
    assert np.array_equal(keys_at(mask).dense(2, len(mask)), np.tile(mask, (2, 1)))
