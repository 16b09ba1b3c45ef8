"""set_patterns: which attention a layer means, packed documents, cross-attention, and models that want a tensor."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from splatc import patterns as P  # noqa: E402
from splatc.errors import InvalidInput, Unsupported  # noqa: E402
from splatc.integrations.transformers import register, set_patterns  # noqa: E402
from splatc.integrations.transformers.masks import Mask, splatc_mask  # noqa: E402
from tests.test_transformers import LENGTH, SIZES, all_close, close, decoder, gradients_of, padding, tokens  # noqa: E402

register()
pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = [[5, 17, 1], [9, 2, 12]]  # of the documents in each row
HYBRID = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}


def packed(rows):
    """Position ids, and what of (batch, LENGTH, LENGTH) is in one document."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    together = torch.stack([torch.block_diag(*(torch.ones(n, n) for n in row)).bool() for row in rows])
    return positions, together


def additive(dense):
    return torch.zeros(dense.shape).masked_fill(~dense, -float("inf"))


@pytest.mark.parametrize("rows", [LENGTHS[:1], LENGTHS], ids=["one row", "two rows"])
@pytest.mark.parametrize("name, pattern", [
    ("Llama", P.causal() & (P.window(7, 0) | P.strided(4))),
    ("Llama", P.causal()),
    ("Llama", P.full()),
    ("Llama", [P.causal() & P.window(w, 0) for w in (1, 4, 9, 30)]),  # of each head
    ("Mistral", P.causal() & P.window(14, 0)),  # wider than the model's window, in place of it
    ("Gemma2", P.causal() & P.window(14, 0)),
])  # fmt: skip
def test_documents_stay_apart(name, pattern, rows):
    """Forward and gradients against eager attention with the dense mask, pattern and documents."""
    model, ids, (positions, together) = decoder(name), tokens(batch=len(rows)), packed(rows)
    of_heads = np.atleast_3d(P.as_pattern(pattern, heads=4).dense(LENGTH)).reshape(-1, LENGTH, LENGTH)
    mask = torch.from_numpy(of_heads)[None] & together[:, None]
    given = {"position_ids": positions, "use_cache": False}

    def run(**more):
        out = model(ids, labels=ids, **given, **more)
        return out.logits.detach(), gradients_of(model, out.loss)

    kinds = dict.fromkeys(["full_attention", "sliding_attention"], additive(mask))
    eager, gradients = run(attention_mask=kinds if name == "Gemma2" else additive(mask))
    model.set_attn_implementation("splatc")
    set_patterns(model, {0: pattern, 1: pattern})
    ours, our_gradients = run()
    close(ours, eager)
    all_close(our_gradients, gradients)


def test_documents_do_not_leak():
    """Other tokens in the first document change nothing in the second."""
    model, ids, (positions, _) = decoder("Llama"), tokens(batch=1), packed(LENGTHS[:1])
    model.set_attn_implementation("splatc")
    set_patterns(model, {0: "causal & (window(7, 0) | strided(4))", 1: "causal & (global_cols(3) | window(2, 0))"})
    other = ids.clone()
    other[:, :5] = ids[:, :5].flip(1) + 1
    runs = [model(x, position_ids=positions, use_cache=False).logits.detach() for x in (ids, other)]
    assert not torch.allclose(runs[0][:, :5], runs[1][:, :5])
    assert torch.equal(runs[0][:, 5:], runs[1][:, 5:])


@pytest.mark.parametrize("rows", [LENGTHS[:1], LENGTHS, [[3, 20]]])
def test_chunks_begin_with_their_documents(rows):
    model, ids, (positions, _) = decoder("Llama4Text"), tokens(batch=len(rows)), packed(rows)

    def run():
        return model(ids, position_ids=positions, use_cache=False).logits.detach()

    eager = run()
    model.set_attn_implementation("splatc")
    close(run(), eager)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_another_implementation_is_told(implementation):
    model = decoder("Llama")
    model.set_attn_implementation(implementation)
    with pytest.raises(InvalidInput, match=rf"layers\.0\.self_attn has attn_implementation='{implementation}'.*first"):
        set_patterns(model, {0: "causal & window(2, 0)"})
    set_patterns(model, {0: None})
    assert not [m for m in model.modules() if getattr(m, "_splatc_pattern", None) is not None]


def test_names_without_attention_are_told():
    model = decoder("Llama")
    model.set_attn_implementation("splatc")
    for name in ("lm_head", "model.layers.0.mlp", "model.embed_tokens"):
        with pytest.raises(InvalidInput, match=rf"'{name}'.*model\.layers\.0\.self_attn, model\.layers\.1\.self_attn"):
            set_patterns(model, {0: "causal & window(2, 0)", name: "causal"})
    assert not [m for m in model.modules() if hasattr(m, "_splatc_pattern")]  # nor was layer 0 changed


FOREIGN = {
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "GPTNeo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
               "max_position_embeddings": 64},
    "Doge": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    "XGLM": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64},
}  # fmt: skip


def foreign(name, implementation):
    own = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**own, **FOREIGN[name])
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


@pytest.mark.parametrize("name", ["Bloom", "Mpt", "Doge", "XGLM"])  # the others do not load with a foreign name
def test_models_that_want_a_tensor_are_refused(name):
    model = foreign(name, "splatc")
    with pytest.raises(Unsupported, match=rf"the model \({model.config.model_type}\).*implementation='sdpa'"):
        model(tokens(9))


@pytest.mark.parametrize("name", [n for n in FOREIGN if n != "Doge"])
def test_models_with_attention_of_their_own_are_told(name):
    with pytest.raises(InvalidInput, match=f"no attention of {name}ForCausalLM goes through"):
        set_patterns(foreign(name, "eager"), {0: "causal"})


@pytest.mark.parametrize("use", [
    lambda m, x: x + m, lambda m, x: m + x, lambda m, x: 1.0 - m, lambda m, x: ~m, lambda m, x: m[:, :, :, :3],
    lambda m, x: m.dtype, lambda m, x: m.shape[-1], lambda m, x: m.to(x.device), lambda m, x: x.masked_fill(m, 0.0),
    lambda m, x: torch.where(m, x, 0.0), lambda m, x: torch.cat([x, m]), lambda m, x: m < 0,
])  # fmt: skip
def test_a_mask_is_no_tensor(use):
    from transformers.masking_utils import causal_mask_function

    mask = splatc_mask(2, 4, 4, 0, 0, causal_mask_function, config=transformers.LlamaConfig())
    with pytest.raises(Unsupported, match=r"as if that were a tensor.*attn_implementation='sdpa'"):
        use(mask, torch.ones(2, 4))


def test_a_mask_can_be_copied_and_asked():
    mask = Mask(4, 4, 0, False, ((0, 4),), ())
    assert pickle.loads(pickle.dumps(mask)) == copy.deepcopy(mask) == mask
    assert not hasattr(mask, "to") and getattr(mask, "dtype", None) is None


def bart():
    config = transformers.BartConfig(
        vocab_size=97, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, pad_token_id=0,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration._from_config(config, attn_implementation="splatc").eval()


def with_patterns(model):
    return [name for name, m in model.named_modules() if getattr(m, "_splatc_pattern", None) is not None]


def test_an_index_of_two_stacks_is_refused():
    model = bart()
    with pytest.raises(InvalidInput, match=r"model\.encoder\.layers\.0, model\.decoder\.layers\.0$"):
        set_patterns(model, {0: "window(2, 2)"})
    assert not with_patterns(model)
    set_patterns(model, {"model.encoder.layers.0": "window(2, 2)", "model.decoder": "causal & window(2, 0)"})
    own = ["encoder.layers.0", "decoder.layers.0", "decoder.layers.1"]
    assert with_patterns(model) == [f"model.{name}.self_attn" for name in own]
    set_patterns(model, {"model": None})
    assert not with_patterns(model)


def test_a_vision_tower_is_no_layer_of_the_text():
    text = SIZES | HYBRID
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="splatc")
    names = r"model\.vision_tower\.encoder\.layers\.0, model\.language_model\.layers\.0$"
    with pytest.raises(InvalidInput, match=names):
        set_patterns(model, {0: "causal"})
    set_patterns(model, {"model.language_model.layers.0": "causal"})
    assert with_patterns(model) == ["model.language_model.layers.0.self_attn"]


@pytest.mark.parametrize("queries, keys", [(12, 19), (19, 12)])
def test_cross_attention_by_its_name(queries, keys):
    """Rows and columns of the dense mask are the decoder's and the encoder's positions, from its first real token."""
    name = "model.decoder.layers.0.encoder_attn"
    model, pattern = bart(), P.window(3, 4) | P.global_cols(1)
    x, y = tokens(keys), tokens(queries)
    given = torch.ones(2, keys, dtype=torch.long)
    given[1, :4] = 0
    dense = torch.zeros(2, 1, queries, keys, dtype=torch.bool)
    dense[0, 0] = torch.from_numpy(pattern.dense(queries, keys))
    dense[1, 0, :, 4:] = torch.from_numpy(pattern.dense(queries, keys - 4))
    set_patterns(model, {name: pattern})
    assert with_patterns(model) == [name]
    encoded = model.model.encoder(x, attention_mask=given).last_hidden_state.detach()

    def run():
        out = model.model.decoder(y, encoder_hidden_states=encoded, encoder_attention_mask=given, use_cache=False)
        return out.last_hidden_state.detach(), gradients_of(model, out.last_hidden_state[..., :5].pow(3).sum())

    ours, our_gradients = run()
    model.set_attn_implementation("eager")
    assert dense.any(-1).all()  # eager attention gives NaN for queries of no key
    given_mask = {"attention_mask": additive(dense)}
    model.get_submodule(name).register_forward_pre_hook(lambda _, args, kw: (args, kw | given_mask), with_kwargs=True)
    eager, gradients = run()
    close(ours, eager)
    all_close(our_gradients, gradients, floor=1e-6)  # those of biases of keys are rounding: softmax has none


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=str)
@pytest.mark.parametrize("name", ["Mistral", "Gemma2"])
def test_patterns_wider_than_the_window(name, options):
    """A cache of the window drops keys that they want; one that keeps all gives what there is without a cache."""
    model, ids = decoder(name), tokens()
    model.set_attn_implementation("splatc")
    set_patterns(model, {0: "causal & (window(14, 0) | strided(4))"})
    given = {"attention_mask": padding("left"), "max_new_tokens": 9, "do_sample": False}
    with pytest.raises(Unsupported, match=r"dropped keys.* cache=DynamicCache\(\)"):
        model.generate(ids, **given, **options)
    ours = model.generate(ids, cache=transformers.DynamicCache(), **given, **options)
    beams = options.get("num_beams", 1)
    assert torch.equal(ours, model.generate(ids, use_cache=False, num_beams=beams, **given))


def test_queries_of_another_sequence_are_told():
    """Attention that is cross-attention, but has no name of such."""
    from transformers.models.idefics2 import configuration_idefics2, modeling_idefics2

    config = configuration_idefics2.Idefics2PerceiverConfig(
        hidden_size=64, resampler_n_latents=5, resampler_depth=1, resampler_n_heads=4, resampler_head_dim=16,
        num_key_value_heads=2,
    )  # fmt: skip
    model = modeling_idefics2.Idefics2PerceiverResampler._from_config(config, attn_implementation="splatc")
    set_patterns(model, {0: "window(3, 3)"})
    with pytest.raises(Unsupported, match="the 5 queries of this layer do not stand among its 16 keys"):
        model(torch.randn(2, 11, 64), attention_mask=torch.ones(2, 11))


def test_a_decode_step_of_patterned_cross_attention_is_refused():
    model = bart()
    set_patterns(model, {"model.decoder.layers.0.encoder_attn": "window(3, 3)"})
    with pytest.raises(Unsupported, match="cross-attention does not tell its query's position"):
        model.generate(tokens(), max_new_tokens=3, do_sample=False, num_beams=1)
