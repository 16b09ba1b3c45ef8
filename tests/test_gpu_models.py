"""Models on a Hopper GPU in bfloat16, by our attention and by their own, both against their own in float32.

The tests of the integrations (test_transformers.py, test_own_sparse.py, test_patch.py) say that the functions are
equal; here it is that devices, dtypes and layouts of models suit our kernels.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import splatc  # noqa: E402
from splatc import patterns as P  # noqa: E402
from splatc.integrations.transformers import few, replace_attention  # noqa: E402
from tests import few_queries  # noqa: E402
from tests import test_own_sparse as own  # noqa: E402
from tests import test_transformers as hugging  # noqa: E402
from tests.gpu_gradients import DEVICE, MARKS  # noqa: E402

pytestmark = MARKS
BOUND = 1e-2  # of the relative error, or of what bfloat16 costs the model with its own attention


def check(ours, theirs, exact):
    """Lists of tensors."""
    for a, b, c in zip(ours, theirs, exact, strict=True):
        error, usual = (torch.linalg.norm(x.float() - c) / torch.linalg.norm(c) for x in (a, b))
        assert error < max(BOUND, 1.3 * usual)


def half(model):
    return copy.deepcopy(model).to(torch.bfloat16)


@pytest.mark.parametrize("name", hugging.DECODERS)
def test_a_decoder(name):
    """Prefill, padding on both sides, gradients, and decode steps of the same tokens."""
    exact = hugging.decoder(name).to(DEVICE)
    ids, masks = hugging.tokens().to(DEVICE), [hugging.padding(side).to(DEVICE) for side in ("left", "right")]

    def run(model):
        out = model(ids, labels=ids)
        out.loss.backward()
        with torch.no_grad():
            padded = [model(ids, attention_mask=m).logits[m.bool()] for m in masks]
            cache = transformers.DynamicCache(config=model.config)
            steps = [model(part, past_key_values=cache).logits for part in ids.split([20, 1, 1, 1], dim=1)]
        return [out.logits.detach(), *padded, torch.cat(steps, 1), model.get_input_embeddings().weight.grad]

    theirs, ours = half(exact), half(exact)
    ours.set_attn_implementation("splatc")
    check(run(ours), run(theirs), run(exact))


@pytest.mark.parametrize("pattern", [P.causal(), P.causal() & P.strided(7), P.global_cols(2) | P.window(2, 0),
                                     ~P.causal()])  # fmt: skip
@pytest.mark.parametrize("q_len, kv_len", [(1, 300), (3, 200)])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (20, 20), (64, 128)])
@pytest.mark.parametrize("softcap, sinks", [(None, False), (3.0, True)])
@pytest.mark.parametrize("dtype", few_queries.BOUNDS)
def test_few_queries(pattern, q_len, kv_len, dims, softcap, sinks, dtype):
    few_queries.check(pattern, dtype, DEVICE, q_len, kv_len, dims, softcap, sinks)


def test_a_new_length_is_not_planned():
    """No kernel of cuDNN's, which would take 40 ms and more for a length that it has not seen."""
    q, k = (torch.randn(1, heads, n, 64, dtype=torch.bfloat16, device=DEVICE) for heads, n in ((8, 1), (2, 777)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile, torch.no_grad():
        few.attend(P.full(), q, k, k, None, None, None)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert any("flash" in name for name in names) and not any("cudnn" in name for name in names)


@pytest.mark.parametrize("kind", ["Longformer", "BigBird"])
def test_own_sparse_attention(kind):
    options: dict[str, Any] = {"attention_window": 16, "sep_token_id": 2}
    if kind == "BigBird":
        options = {"block_size": 16, "num_random_blocks": 1}
    config = getattr(transformers, f"{kind}Config")(**own.SIZES, **options)
    torch.manual_seed(0)
    exact = getattr(transformers, f"{kind}Model")(config).eval().to(DEVICE)
    ids, mask = (x.to(DEVICE) for x in own.tokens(160))
    given = {"global_attention_mask": torch.zeros_like(mask).index_fill(1, torch.arange(2, device=DEVICE), 1)}

    def run(model):
        out = model(ids, attention_mask=mask, **(given if kind == "Longformer" else {})).last_hidden_state[mask.bool()]
        out.pow(3).sum().backward()
        return out.detach(), model.embeddings.word_embeddings.weight.grad

    check(run(replace_attention(half(exact))), run(half(exact)), run(exact))


def test_patched_modules():
    """An encoder with padding in different places, and a function in a context."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
    exact = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(DEVICE)
    x, pattern = torch.randn(3, 200, 128, device=DEVICE), P.window(30, 30) | P.strided(16)
    pad = torch.zeros(3, 200, dtype=torch.bool, device=DEVICE)
    pad[1, 150:] = pad[2, 30:41] = True
    mask = ~torch.from_numpy(pattern.dense(200)).to(DEVICE)

    def run(model, *masks):
        out = model(x.to(next(model.parameters()).dtype), *masks, src_key_padding_mask=pad)
        out.pow(3).sum().backward()
        return [out.detach(), *(p.grad for p in model.parameters())]

    check(run(splatc.patch(half(exact), pattern)), run(half(exact), mask), run(exact, mask))
    q, k, v = (torch.randn(3, 4, 200, 64, device=DEVICE) for _ in "qkv")
    attend = torch.nn.functional.scaled_dot_product_attention
    mask = ~mask & ~pad[:, None, None]
    with splatc.patch_sdpa(pattern):
        ours = attend(*(y.bfloat16() for y in (q, k, v)), attn_mask=~pad[:, None, None])
    theirs = attend(*(y.bfloat16() for y in (q, k, v)), attn_mask=mask)
    check([ours], [theirs], [attend(q, k, v, attn_mask=mask)])


def test_timm():
    timm = pytest.importorskip("timm")
    exact = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=3).eval().to(DEVICE)
    images = torch.randn(2, 3, 224, 224, device=DEVICE)
    pattern = P.after(1, P.neighborhood((14, 14), 7, border="clamp")) | P.global_rows(1) | P.global_cols(1)
    mask = torch.from_numpy(pattern.dense(197)).to(DEVICE)
    attend = torch.nn.functional.scaled_dot_product_attention

    class Masked(torch.overrides.TorchFunctionMode):  # type: ignore[name-defined,misc]
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **{**(kwargs or {}), **({"attn_mask": mask} if function is attend else {})})

    def run(model, context):
        with torch.no_grad(), context:
            return [model(images.to(next(model.parameters()).dtype))]

    check(run(half(exact), splatc.patch_sdpa(pattern)), run(half(exact), Masked()), run(exact, Masked()))
