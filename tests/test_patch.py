"""Models in plain PyTorch, patched, against themselves with the dense mask: forward and gradients, float32."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import splatc  # noqa: E402
from splatc import patterns as P  # noqa: E402
from splatc.errors import InvalidInput, Unsupported  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
F = torch.nn.functional
LENGTH, WIDTH, HEADS = 29, 64, 4
PATTERN = P.window(4, 6) | P.global_cols(2)
PER_HEAD = [P.causal(), P.window(3, 3), P.strided(5), P.full()]


def dense(pattern, length=LENGTH):
    """True: attend; bool (length, length), or (HEADS, length, length) of a list."""
    return torch.from_numpy(P.as_pattern(pattern, heads=HEADS).dense(length))


def close(ours, theirs):
    assert torch.linalg.norm(ours - theirs) <= 1e-4 * torch.linalg.norm(theirs) + 1e-6


def same(ours, theirs, x, run_ours, run_theirs):
    """Results and gradients of two modules with the same parameters."""
    results: list[list[Any]] = []
    for module, run in ((ours, run_ours), (theirs, run_theirs)):
        given = x.clone().requires_grad_()
        out = run(module, given)
        out.pow(3).sum().backward()
        results.append([out.detach(), given.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        close(a, b)


def multihead(**options):
    torch.manual_seed(0)
    return torch.nn.MultiheadAttention(WIDTH, HEADS, **options)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("pattern", [PATTERN, PER_HEAD], ids=["one", "per head"])
def test_multihead_attention(pattern, batch_first):
    theirs = multihead(batch_first=batch_first)
    ours = splatc.patch(copy.deepcopy(theirs), pattern)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, LENGTH, WIDTH) if batch_first else torch.randn(LENGTH, 2, WIDTH)
    mask = ~dense(pattern)
    mask = mask.repeat(2, 1, 1) if mask.ndim == 3 else mask
    same(ours, theirs, x, lambda m, x: m(x, x, x, need_weights=False)[0],
         lambda m, x: m(x, x, x, attn_mask=mask, need_weights=False)[0])  # fmt: skip
    again = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert torch.equal(again(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])
    y = splatc.patch(ours, None)(x, x, x)[0]
    close(y, theirs(x, x, x)[0])
    assert type(ours) is torch.nn.MultiheadAttention


@pytest.mark.parametrize("options", [{"kdim": 24, "vdim": 40}, {"bias": False}], ids=str)
def test_keys_of_another_sequence(options):
    theirs = multihead(batch_first=True, **options)
    ours = splatc.patch(copy.deepcopy(theirs), PATTERN)
    k, v = torch.randn(2, 17, options.get("kdim", WIDTH)), torch.randn(2, 17, options.get("vdim", WIDTH))
    mask = ~torch.from_numpy(PATTERN.dense(LENGTH, 17))
    same(ours, theirs, torch.randn(2, LENGTH, WIDTH), lambda m, x: m(x, k, v, need_weights=False)[0],
         lambda m, x: m(x, k, v, attn_mask=mask, need_weights=False)[0])  # fmt: skip


def padding():
    """True: padding, as of nn.MultiheadAttention; at the end, at the beginning, in between, nowhere."""
    mask = torch.zeros(4, LENGTH, dtype=torch.bool)
    mask[0, 20:] = mask[1, 2:7] = mask[2, [3, 11, 12]] = True
    return mask


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("causally", [False, True])
def test_padding(causally, numbers):
    theirs = multihead(batch_first=True)
    ours = splatc.patch(copy.deepcopy(theirs), PATTERN)
    pad = torch.zeros(4, LENGTH).masked_fill(padding(), -float("inf")) if numbers else padding()
    triangle = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    given: dict[str, object] = {"attn_mask": triangle, "is_causal": True} if causally else {}
    mask = ~dense(PATTERN) | triangle if causally else ~dense(PATTERN)
    mask = torch.zeros(mask.shape).masked_fill(mask, -float("inf")) if numbers else mask
    same(ours, theirs, torch.randn(4, LENGTH, WIDTH),
         lambda m, x: m(x, x, x, key_padding_mask=pad, need_weights=False, **given)[0],
         lambda m, x: m(x, x, x, key_padding_mask=pad, attn_mask=mask, need_weights=False)[0])  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_encoder_layers(training, padded):
    """Also in evaluation, where torch's fused layers and ragged tensors would pass the pattern by."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 96, dropout=0.0, batch_first=True)
    theirs = torch.nn.TransformerEncoder(layer, 2).train(training)
    ours = splatc.patch(copy.deepcopy(theirs), {0: PATTERN, "layers.1": PATTERN})
    pad = padding() if padded else None
    if pad is not None:
        pad[1:3] = False  # torch wants padding at the end
    x, mask = torch.randn(4, LENGTH, WIDTH), ~dense(PATTERN)
    same(ours, theirs, x, lambda m, x: m(x, src_key_padding_mask=pad),
         lambda m, x: m(x, mask, src_key_padding_mask=pad))  # fmt: skip
    with torch.no_grad():
        close(ours(x, src_key_padding_mask=pad), theirs(x, mask, src_key_padding_mask=pad))


def test_a_decoder_with_a_causal_mask():
    torch.manual_seed(0)
    theirs = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(WIDTH, HEADS, 96, 0.0, batch_first=True), 1)
    ours = splatc.patch(copy.deepcopy(theirs), {"layers.0.self_attn": PATTERN})
    causal = torch.nn.Transformer.generate_square_subsequent_mask(LENGTH)
    memory = torch.randn(2, 11, WIDTH)
    same(ours, theirs, torch.randn(2, LENGTH, WIDTH), lambda m, x: m(x, memory, causal),
         lambda m, x: m(x, memory, causal.masked_fill(~dense(PATTERN), -float("inf"))))  # fmt: skip


def test_dropout_of_a_patched_module():
    ours, x = splatc.patch(multihead(dropout=0.25, batch_first=True), PATTERN), torch.randn(2, LENGTH, WIDTH)

    def run(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return ours(x, x, x, need_weights=False)[0]

    runs = torch.stack([run(seed) for seed in range(100)])
    assert torch.equal(run(3), runs[3])
    plain = ours.eval()(x, x, x, need_weights=False)[0].detach()
    errors = (runs - plain).flatten(1).norm(dim=1) / torch.linalg.norm(plain)
    assert errors.min() > 0.2 and torch.linalg.norm(runs.mean(0) - plain) < 0.1 * torch.linalg.norm(plain)


def test_what_a_patched_module_refuses():
    ours, x = splatc.patch(multihead(batch_first=True), PATTERN), torch.randn(2, LENGTH, WIDTH)
    with pytest.raises(Unsupported, match=r"need_weights=True: .* drop_weights"):
        ours(x, x, x)
    assert splatc.patch(ours, PATTERN, drop_weights=True)(x, x, x)[1] is None
    with pytest.raises(Unsupported, match="attn_mask is given"):
        ours(x, x, x, attn_mask=torch.zeros(LENGTH, LENGTH))
    with pytest.raises(Unsupported, match="numbers other than 0 and -inf"):
        ours(x, x, x, key_padding_mask=torch.ones(2, LENGTH), need_weights=False)
    with pytest.raises(InvalidInput, match="key_padding_mask has shape"):
        ours(x, x, x, key_padding_mask=padding(), need_weights=False)
    with pytest.raises(InvalidInput, match=r"key_padding_mask has dtype torch\.int64: give bool, False for keys"):
        ours(x, x, x, key_padding_mask=torch.zeros(2, LENGTH, dtype=torch.long), need_weights=False)
    ragged = torch.nested.nested_tensor(list(x))
    with pytest.raises(Unsupported, match="a nested tensor: pad it"):
        ours(ragged, ragged, ragged, need_weights=False)
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(Unsupported, match=next(iter(options))):
            splatc.patch(multihead(**options), PATTERN)
    with pytest.raises(InvalidInput, match=r"no nn\.MultiheadAttention"):
        splatc.patch(torch.nn.Linear(2, 2), PATTERN)
    with pytest.raises(InvalidInput, match="no layer 3"):
        splatc.patch(ours, {3: PATTERN})


# -- F.scaled_dot_product_attention ------------------------------------------------------------------------------------


class Block(torch.nn.Module):  # type: ignore[name-defined]
    """A block as timm's and diffusers' are: projections, and a call of the function."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x, **options):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("pattern", [PATTERN, PER_HEAD], ids=["one", "per head"])
def test_sdpa(pattern):
    torch.manual_seed(0)
    theirs = Block()

    def ours(m, x):
        with splatc.patch_sdpa(pattern) as context:
            y = m(x)
        assert context.replaced == 1
        return y

    x = torch.randn(2, LENGTH, WIDTH)
    same(copy.deepcopy(theirs), theirs, x, ours, lambda m, x: m(x, attn_mask=dense(pattern)))


@pytest.mark.parametrize("options", [
    {"is_causal": True}, {"scale": 0.5}, {"attn_mask": ~padding()[:, None, None]}, {"attn_mask": ~padding()[0]},
], ids=["causal", "scale", "padding", "1-D"])  # fmt: skip
def test_sdpa_with_options(options):
    q, k, v = (torch.randn(4, HEADS, LENGTH, 16) for _ in "qkv")
    with splatc.patch_sdpa(PATTERN):
        ours = F.scaled_dot_product_attention(q, k, v, **options)
    mask = dense(PATTERN).expand(4, 1, LENGTH, LENGTH)
    if "attn_mask" in options:
        mask = mask & options["attn_mask"]
    if options.get("is_causal"):
        mask = mask.tril()
    close(ours, F.scaled_dot_product_attention(q, k, v, mask, scale=options.get("scale")))


@pytest.mark.parametrize("sizes", [(4, HEADS, 1, LENGTH), (4, 1, LENGTH, LENGTH), (4, HEADS, LENGTH, LENGTH)], ids=str)
@pytest.mark.parametrize("least", [None, -float("inf"), torch.finfo(torch.float32).min])
def test_padding_as_models_expand_it(least, sizes):
    q, k, v = (torch.randn(4, HEADS, LENGTH, 16) for _ in "qkv")
    real = ~padding()[:, None, None]
    mask = (real if least is None else torch.zeros(real.shape).masked_fill(~real, least)).expand(sizes)
    with splatc.patch_sdpa(PATTERN):
        ours = F.scaled_dot_product_attention(q, k, v, mask)
    close(ours, F.scaled_dot_product_attention(q, k, v, dense(PATTERN) & real))
    with splatc.patch_sdpa(PATTERN), pytest.raises(Unsupported, match="takes padding"):
        F.scaled_dot_product_attention(q, k, v, mask.expand(4, HEADS, LENGTH, LENGTH).clone())


def test_sdpa_of_other_shapes():
    """Grouped heads; one head without its axis; more leading axes."""
    q, k, v = (torch.randn(2, heads, LENGTH, 16) for heads in (4, 2, 2))
    for a, b, c, grouped in ((q, k, v, True), (q[:, 0], k[:, 0], v[:, 0], False), (q[None], q[None], q[None], False)):
        with splatc.patch_sdpa(PATTERN):
            ours = F.scaled_dot_product_attention(a, b, c, enable_gqa=grouped)
        close(ours, F.scaled_dot_product_attention(a, b, c, dense(PATTERN), enable_gqa=grouped))


def test_where_leaves_cross_attention_as_it_is():
    q, k, v = (torch.randn(1, HEADS, length, 16) for length in (LENGTH, 7, 7))
    with splatc.patch_sdpa(P.window(1, 1), where=lambda q, k: q.shape[-2] == k.shape[-2]) as context:
        cross, own = F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, q, q)
    assert torch.equal(cross, F.scaled_dot_product_attention(q, k, v)) and context.replaced == 1
    close(own, F.scaled_dot_product_attention(q, q, q, dense(P.window(1, 1))))


def test_modules_that_call_sdpa():
    """A pattern for each, also where checkpoints run the forward pass again in the backward pass."""
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(Block(), Block(), Block())
    ours = splatc.patch(copy.deepcopy(theirs), {0: PATTERN, "1": P.window(2, 0)})
    masks = dense(PATTERN), dense(P.window(2, 0)), None

    def checkpointed(m, x):
        for block in m:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x

    def masked(m, x):
        for block, mask in zip(m, masks, strict=True):
            x = block(x, attn_mask=mask)
        return x

    same(ours, theirs, torch.randn(2, LENGTH, WIDTH), checkpointed, masked)
    again = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    x = torch.randn(2, LENGTH, WIDTH)
    assert torch.equal(again(x), ours(x))
    plain = splatc.patch(again, {0: None, 1: None})
    assert torch.equal(plain(x), theirs(x))


def test_modules_that_run_in_two_threads():
    """The second enters while the first is within, and the first leaves before the second attends."""
    inside, left, y = threading.Event(), threading.Event(), torch.randn(2, LENGTH, WIDTH)

    class Waiting(Block):
        def forward(self, x, **options):
            if x is y:
                inside.set()
                left.wait(60)
                return super().forward(x)
            out = super().forward(x)
            inside.wait(60)
            return out

    block = splatc.patch(torch.nn.Sequential(Waiting()), {0: PATTERN})
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(block, x) for x in (torch.randn(2, LENGTH, WIDTH), y)]
        runs[0].add_done_callback(lambda _: left.set())
        outs = [run.result() for run in runs]
    close(outs[1], Block.forward(block[0], y, attn_mask=dense(PATTERN)))


def test_what_the_context_refuses():
    q = torch.randn(1, HEADS, LENGTH, 16)
    with pytest.raises(Unsupported, match="attn_mask has shape"), splatc.patch_sdpa(PATTERN):
        F.scaled_dot_product_attention(q, q, q, dense(PATTERN))
    with pytest.raises(InvalidInput, match=r"attn_mask has dtype torch\.int64"), splatc.patch_sdpa(PATTERN):
        F.scaled_dot_product_attention(q, q, q, torch.zeros(LENGTH, dtype=torch.long))
    ragged = torch.nested.nested_tensor([q[0], q[0]], layout=torch.jagged)
    with pytest.raises(Unsupported, match="query is a nested tensor: pad it"), splatc.patch_sdpa(PATTERN):
        F.scaled_dot_product_attention(ragged, ragged, ragged)
    with pytest.raises(InvalidInput, match="scores have"), splatc.patch_sdpa(PATTERN):
        F.scaled_dot_product_attention(q, q, q, ~padding()[:, None, None])
    with pytest.raises(InvalidInput, match=r"0 calls .* none replaced"), splatc.patch_sdpa(PATTERN):
        torch.softmax(q @ q.mT, -1) @ q
    x = torch.randn(2, LENGTH, WIDTH)
    for module in (multihead(batch_first=True), multihead(batch_first=True).eval()):
        with pytest.raises(Unsupported, match=r"splatc\.patch\(model"), splatc.patch_sdpa(PATTERN), torch.no_grad():
            module(x, x, x, need_weights=False)


@pytest.mark.parametrize("causally", [False, True])
def test_under_a_compiler(causally):
    """In one graph, for both ways; outside of the context the same compiled module attends to all."""
    torch._dynamo.reset()
    block, attention, x = Block(), splatc.patch(multihead(batch_first=True), PATTERN), torch.randn(2, LENGTH, WIDTH)
    triangle = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    given: dict[str, Any] = {"is_causal": True, "attn_mask": triangle} if causally else {}

    def attend(x):
        return attention(x, x, x, need_weights=False, **given)[0]

    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with splatc.patch_sdpa(PATTERN):
        close(compiled(x, is_causal=causally), block(x, is_causal=causally))
    close(compiled(x), block(x))
    close(torch.compile(attend, backend="eager", fullgraph=True)(x), attend(x))


def test_timm():
    """A vision transformer of timm, class token and all, as if its attention had the mask."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=2, img_size=96).eval()
    pattern = P.after(1, P.neighborhood((6, 6), 3)) | P.global_rows(1) | P.global_cols(1)
    ours = splatc.patch(copy.deepcopy(theirs), {0: pattern, 1: pattern})

    def masked(m, x):
        for block in m.blocks:
            block.attn.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {**kwargs, "attn_mask": dense(pattern, 37)}), with_kwargs=True
            )
        return m(x)

    same(ours, theirs, torch.randn(2, 3, 96, 96), lambda m, x: m(x), masked)
