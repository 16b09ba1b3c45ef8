"""Models of transformers with our attention against their eager attention: tiny configs, random weights, float32."""

from __future__ import annotations

import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import splatc  # noqa: E402
from splatc import patterns as P  # noqa: E402
from splatc.errors import InvalidInput, Unsupported  # noqa: E402
from splatc.integrations.transformers import few, register, set_patterns  # noqa: E402
from splatc.integrations.transformers.tail import tail  # noqa: E402
from tests import few_queries  # noqa: E402

register()
SIZES: dict[str, object] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
HYBRID = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
DECODERS: dict[str, dict[str, object]] = {
    "Mistral": {"sliding_window": 9},
    "Gemma2": {**HYBRID, "attn_logit_softcapping": 5.0},
    "Gemma3Text": HYBRID,
    "GptOss": {**HYBRID, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Llama": {},
    "Qwen3": {},
    "Olmo2": {},
    "Llama4Text": {"attention_chunk_size": 8, "num_hidden_layers": 4, "num_local_experts": 2, "num_experts_per_tok": 1,
                   "intermediate_size_mlp": 96},
}
LENGTH, PAD = 23, 7
pytestmark = pytest.mark.usefixtures("one_thread")


def decoder(name: str):
    config = getattr(transformers, f"{name}Config")(**(SIZES | DECODERS[name]))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def tokens(length: int = LENGTH, batch: int = 2):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(side: str):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, slice(0, PAD) if side == "left" else slice(LENGTH - PAD, LENGTH)] = 0
    return mask


def both(model, run):
    """What run() gives by eager attention and by ours."""
    eager = run()
    model.set_attn_implementation("splatc")
    return eager, run()


def close(ours, eager, floor=1e-7):
    assert torch.linalg.norm(ours - eager) <= 1e-4 * torch.linalg.norm(eager) + floor


def gradients_of(model, loss):
    """Of all parameters, by name."""
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def all_close(ours, eager, floor=1e-7):
    assert ours.keys() == eager.keys() and eager
    for name in eager:
        close(ours[name], eager[name], floor)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_the_same_model(name):
    model, ids = decoder(name), tokens()

    def run():
        with torch.no_grad():
            padded = [model(ids, attention_mask=m).logits[m.bool()] for m in map(padding, ("left", "right"))]
            generated = model.generate(ids, attention_mask=padding("left"), max_new_tokens=64, do_sample=False)
        left = padding("left")
        labels = ids.masked_fill(left.cumsum(1) <= 1, -100)  # not the first real token: padding would predict it
        out = model(ids, labels=ids)
        gradients = gradients_of(model, out.loss + model(ids, attention_mask=left, labels=labels).loss)
        return [out.logits.detach(), *padded], generated, gradients

    (logits, generated, gradients), (our_logits, our_generated, our_gradients) = both(model, run)
    for ours, eager in zip(our_logits, logits):
        close(ours, eager)
    assert torch.equal(our_generated, generated) and generated.shape[1] == LENGTH + 64
    all_close(our_gradients, gradients)


def bert(**options):
    without = ("head_dim", "num_key_value_heads")
    config = transformers.BertConfig(**{k: v for k, v in SIZES.items() if k not in without}, **options)
    torch.manual_seed(0)
    return transformers.BertModel._from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("side", ["left", "right"])
def test_bert(side):
    model, mask = bert().eval(), padding(side)

    def run():
        out = model(tokens(), attention_mask=mask).last_hidden_state[mask.bool()]
        return out.detach(), gradients_of(model, out[:, :3].pow(3).sum())

    (eager, gradients), (ours, our_gradients) = both(model, run)
    close(ours, eager)
    all_close(our_gradients, gradients, floor=1e-6)  # those of biases of keys are rounding: softmax has none


def test_dropout():
    """Weights are dropped by torch's seed, in training only, and their mean is what is without."""
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.25).train()
    model.set_attn_implementation("splatc")
    layer, x = model.encoder.layer[0].attention.self, torch.randn(2, LENGTH, 64)

    def run(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return layer(x)[0]

    runs = torch.stack([run(seed) for seed in range(100)])
    assert torch.equal(run(3), runs[3])
    plain = layer.eval()(x)[0].detach()
    errors = (runs - plain).flatten(1).norm(dim=1) / torch.linalg.norm(plain)
    assert errors.min() > 0.3 and torch.linalg.norm(runs.mean(0) - plain) < 0.1 * torch.linalg.norm(plain)


def test_vit_and_a_neighbourhood():
    config = transformers.ViTConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                    image_size=32, patch_size=8)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTModel._from_config(config, attn_implementation="eager").eval()
    pixels = torch.randn(2, 3, 32, 32)

    def run():
        out = model(pixels).last_hidden_state
        return out.detach(), gradients_of(model, out[:, :3].pow(3).sum())

    (eager, gradients), (ours, our_gradients) = both(model, run)
    close(ours, eager)
    all_close(our_gradients, gradients, floor=1e-6)  # those of biases of keys are rounding: softmax has none
    set_patterns(model, {0: P.global_cols(1) | P.window(4, 4)})
    assert torch.linalg.norm(model(pixels).last_hidden_state - eager) > 1e-3 * torch.linalg.norm(eager)


@pytest.mark.parametrize("pattern", [
    P.causal() & (P.window(3, 0) | P.strided(5)),
    [P.causal() & P.window(w, 0) for w in (1, 4, 9, 30)],  # of each head
], ids=["one", "per head"])  # fmt: skip
def test_a_pattern_is_its_dense_mask(pattern):
    model, ids = decoder("Llama"), tokens()
    dense = torch.from_numpy(np.atleast_3d(P.as_pattern(pattern, heads=4).dense(LENGTH)).reshape(-1, LENGTH, LENGTH))
    additive = torch.zeros(dense.shape).masked_fill(~dense, -float("inf"))[None]

    def run(**given):
        out = model(ids, labels=ids, **given)
        return out.logits.detach(), gradients_of(model, out.loss)

    eager, gradients = run(attention_mask=additive)
    model.set_attn_implementation("splatc")
    set_patterns(model, {0: pattern, 1: pattern})
    ours, our_gradients = run()
    close(ours, eager)
    all_close(our_gradients, gradients)


@pytest.mark.parametrize("pattern", [P.full(), P.causal(), P.window(5, 2), P.causal() & P.strided(7), ~P.causal(),
                                     P.global_cols(2) | P.window(2, 0),
                                     P.per_head([P.causal(), P.window(3, 0), P.strided(4), P.full()])])  # fmt: skip
@pytest.mark.parametrize("q_len, kv_len", [(1, 17), (3, 23)])
@pytest.mark.parametrize("softcap, sinks", [(None, False), (3.0, True)])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_few_queries(pattern, q_len, kv_len, softcap, sinks, dtype):
    few_queries.check(pattern, dtype, q_len=q_len, kv_len=kv_len, softcap=softcap, sinks=sinks)


def test_few_queries_in_float16():
    """Products that float16 cannot hold before they are scaled."""
    q, k, v = (100 * torch.randn(1, heads, n, 64).half() for heads, n in ((4, 3), (2, 40), (2, 40)))
    pattern = tail(P.causal() & (P.window(3, 0) | P.strided(5)))
    ours = few.attend(pattern, q, k, v, None, None, None)
    expected = few.attend(pattern, q.float(), k.float(), v.float(), None, None, None)
    assert torch.linalg.norm(ours - expected) <= 2e-2 * torch.linalg.norm(expected)


def test_few_queries_without_gradients_and_then_with():
    q, k, v = (torch.randn(1, heads, n, 16) for heads, n in ((4, 1), (2, 31), (2, 31)))
    pattern = tail(P.causal() & (P.window(3, 0) | P.strided(5)))
    with torch.inference_mode():
        expected = few.attend(pattern, q, k, v, None, None, None)
    ours = few.attend(pattern, q, k.requires_grad_(), v, None, None, None)
    ours.sum().backward()
    assert torch.equal(ours, expected) and k.grad.any()


def test_few_queries_within_the_context_of_others():
    q, k, v = (torch.randn(1, 4, n, 16) for n in (1, 31, 31))
    expected = few.attend(P.full(), q, k, v, None, None, None)
    with splatc.patch_sdpa("global_cols(3)"):
        assert torch.equal(few.attend(P.full(), q, k, v, None, None, None), expected)
        torch.nn.functional.scaled_dot_product_attention(q, k, v)  # a context without a call is an error


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("length", [4, LENGTH])
def test_another_number_of_heads_is_told(heads, length):
    model = decoder("Llama")
    model.set_attn_implementation("splatc")
    set_patterns(model, {0: P.per_head([P.causal()] * heads)})
    with pytest.raises(InvalidInput, match=f"the pattern is for {heads} heads"):
        model(tokens(length))


def test_decode_steps_plan_nothing(monkeypatch):
    model, ids = decoder("Mistral"), tokens()
    model.set_attn_implementation("splatc")
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, cache=cache)
        monkeypatch.setattr(sys.modules["splatc.compile"], "make_plan", None)
        for _ in range(3):
            assert model(ids[:, :1], cache=cache).logits.isfinite().all()


@pytest.mark.parametrize("name", ["Mistral", "GptOss"])
def test_packed_sequences(name):
    model, ids = decoder(name), tokens(batch=1)
    positions = torch.cat([torch.arange(5), torch.arange(17), torch.arange(1)])[None]
    eager, ours = both(model, lambda: model(ids, position_ids=positions, use_cache=False).logits.detach())
    close(ours, eager)


@pytest.mark.parametrize("name", ["Mistral", "Gemma2"])
def test_chunks_after_a_cache(name):
    model, ids = decoder(name), tokens(31)

    def run():
        cache, out = transformers.DynamicCache(config=model.config), []
        with torch.no_grad():
            for chunk in ids.split(8, dim=1):
                out.append(model(chunk, cache=cache).logits)
        return torch.cat(out, 1)

    eager, ours = both(model, run)
    close(ours, eager)


def test_a_static_cache_is_refused():
    model = decoder("Llama")
    model.set_attn_implementation("splatc")
    with pytest.raises(Unsupported, match="cannot generate with a static cache"):
        model.generate(tokens(), max_new_tokens=8, do_sample=False, disable_compile=True, cache_implementation="static")


def test_holes_in_the_padding_are_told():
    model, mask = decoder("Llama"), padding("left")
    mask[1, 5:8] = 0
    eager = model(tokens(), attention_mask=mask).logits[mask.bool()]
    model.set_attn_implementation("splatc")
    from splatc.integrations.transformers.masks import _warn

    _warn.cache_clear()
    with pytest.warns(UserWarning, match="element by element"):
        close(model(tokens(), attention_mask=mask).logits[mask.bool()].detach(), eager.detach())


def test_gradient_checkpointing():
    model, ids = decoder("Mistral").train(), tokens()

    def run():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    plain = run()
    model.gradient_checkpointing_enable()
    model.set_attn_implementation("splatc")
    close(run(), plain)


def test_a_pattern_of_a_layer_with_cache_and_padding():
    """All layers by the pattern that the model's window is: the same model; its tokens too."""
    model, ids, mask = decoder("Llama"), tokens(), padding("left")
    windowed = decoder("Mistral")  # the same modules
    windowed.load_state_dict(model.state_dict())
    model.set_attn_implementation("splatc")
    set_patterns(model, {0: "causal & window(8, 0)", "model.layers.1": P.causal() & P.window(8, 0)})

    def run(m):
        return m.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)

    assert torch.equal(run(model), run(windowed))
    set_patterns(model, {0: None, 1: None})
    plain = decoder("Llama")
    close(model(ids).logits.detach(), plain(ids).logits.detach())


@pytest.mark.parametrize("shape, cached, told", [
    ((1, LENGTH), True, r"must be \(2, 23\)"),
    ((3, LENGTH), True, r"must be \(2, 23\)"),
    ((2, LENGTH - 1), True, r"must be \(2, 23\)"),
    ((2, LENGTH - 1), False, "for 23 queries and 22 keys, but the layer has 23 and 23"),
    ((2, LENGTH + 1), False, "for 23 queries and 24 keys, but the layer has 23 and 23"),
])  # fmt: skip
def test_masks_of_another_size_are_told(shape, cached, told):
    model = decoder("Llama")
    model.set_attn_implementation("splatc")
    with pytest.raises(InvalidInput, match=told):
        model(tokens(), attention_mask=torch.ones(shape, dtype=torch.long), use_cache=cached)


def test_what_is_refused():
    model = decoder("Llama")
    model.set_attn_implementation("splatc")
    with pytest.raises(InvalidInput, match="no layer 7"):
        set_patterns(model, {7: "causal"})
    with pytest.raises(Unsupported, match="is a tensor of shape"):
        model(tokens(), attention_mask=torch.zeros(2, 1, LENGTH, LENGTH))


@pytest.mark.parametrize("pattern", [P.causal(), P.window(5, 2), P.causal() & P.strided(7),
                                     P.dilated(20, 20, 3), P.global_cols(2) | P.window(2, 0),
                                     P.longformer(4, 2), P.fixed(8, 2)])  # fmt: skip
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 17), (5, 23), (17, 129), (127, 129)])
def test_a_tail_is_the_last_rows(pattern, q_len, kv_len):
    from splatc import analyze

    expected = pattern.dense(kv_len, kv_len)[kv_len - q_len :]
    assert np.array_equal(tail(pattern).dense(q_len, kv_len), expected)
    assert np.array_equal(analyze(tail(pattern), q_len, kv_len).to_dense(), expected)
    turned = tail(pattern).transposed()
    assert turned.lines(kv_len, q_len) is not None  # gradients need no matrix either
    assert np.array_equal(analyze(turned, kv_len, q_len).to_dense(), expected.T)
