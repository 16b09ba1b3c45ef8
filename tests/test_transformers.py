"""Models of transformers with our attention against their eager attention: tiny configs, random weights, float32."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from splatc import patterns as P  # noqa: E402
from splatc.errors import InvalidInput, Unsupported  # noqa: E402
from splatc.integrations.transformers import register, set_patterns  # noqa: E402
from splatc.integrations.transformers.tail import tail  # noqa: E402

register()
SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": None}  # fmt: skip
HYBRID = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
DECODERS = {
    "Mistral": {"sliding_window": 9},
    "Gemma2": {**HYBRID, "attn_logit_softcapping": 5.0},
    "Gemma3Text": HYBRID,
    "GptOss": {**HYBRID, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Llama": {},
    "Qwen3": {},
    "Olmo2": {},
}
LENGTH, PAD = 23, 7


def decoder(name: str):
    config = getattr(transformers, f"{name}Config")(**SIZES, **DECODERS[name])
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


def close(ours, eager):
    assert torch.linalg.norm(ours - eager) <= 1e-4 * torch.linalg.norm(eager) + 1e-7


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_the_same_model(name):
    model, ids = decoder(name), tokens()

    def run():
        with torch.no_grad():
            padded = [model(ids, attention_mask=m).logits[m.bool()] for m in map(padding, ("left", "right"))]
            generated = model.generate(ids, attention_mask=padding("left"), max_new_tokens=64, do_sample=False)
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return [out.logits.detach(), *padded], generated, gradients

    (logits, generated, gradients), (our_logits, our_generated, our_gradients) = both(model, run)
    for ours, eager in zip(our_logits, logits):
        close(ours, eager)
    assert torch.equal(our_generated, generated) and generated.shape[1] == LENGTH + 64
    assert our_gradients.keys() == gradients.keys() and gradients
    for n in gradients:
        close(our_gradients[n], gradients[n])


@pytest.mark.parametrize("side", ["left", "right"])
def test_bert(side):
    config = transformers.BertConfig(**{k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")})
    torch.manual_seed(0)
    model, mask = transformers.BertModel._from_config(config, attn_implementation="eager").eval(), padding(side)
    eager, ours = both(model, lambda: model(tokens(), attention_mask=mask).last_hidden_state[mask.bool()])
    close(ours, eager)


def test_vit_and_a_neighbourhood():
    config = transformers.ViTConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                    image_size=32, patch_size=8)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTModel._from_config(config, attn_implementation="eager").eval()
    pixels = torch.randn(2, 3, 32, 32)
    eager, ours = both(model, lambda: model(pixels).last_hidden_state)
    close(ours, eager)
    set_patterns(model, {0: P.global_cols(1) | P.window(4, 4)})
    assert torch.linalg.norm(model(pixels).last_hidden_state - eager) > 1e-3 * torch.linalg.norm(eager)


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
                out.append(model(chunk, past_key_values=cache).logits)
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
