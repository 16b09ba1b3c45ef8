"""splatc as an operator of PyTorch: opcheck, torch.compile, export, checkpoint, autocast, vmap, torch.func."""

import gc
from typing import Any

import numpy as np
import pytest

import splatc
from splatc import patterns as P
from splatc.errors import InvalidInput, Unsupported
from tests.test_attention import tensors

torch = pytest.importorskip("torch")

from splatc.nn.functional import sparse_attention  # noqa: E402

D = 16
PATTERN = P.causal() & (P.window(30, 0) | P.strided(16))


def compiled(mask: Any = PATTERN, length: int = 150, **options: Any) -> Any:
    chosen = {"head_dim": D, "dtype": "float32", "target": "cpu", **options}
    return splatc.compile(mask, seq_len=length, **chosen)


def learnable(length: int = 150, **options: Any) -> list[Any]:
    return [x.requires_grad_() for x in tensors(length, length, **options)]


def gradients(f: Any, qkv: Any) -> tuple[Any, ...]:
    return torch.autograd.grad(f(*qkv).square().sum(), qkv)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck(layout):
    from splatc.runtime import torch_ops

    attend = compiled(length=40, layout=layout)
    heads = {"heads": 2, "kv_heads": 1} if layout == "bhsd" else {"heads": 2}
    qkv = [x if layout == "bhsd" else x.detach().transpose(1, 2).contiguous().requires_grad_()
           for x in learnable(40, **heads)]  # fmt: skip
    options = attend._handle, None, True
    torch.library.opcheck(torch_ops.attention, (*qkv, *options))
    plain = [x.detach() for x in qkv]
    torch.library.opcheck(torch_ops.attention, (*plain, *options))
    o, lse = attend(*plain, return_lse=True, enable_gqa=True)
    torch.library.opcheck(torch_ops.attention_backward, (*plain, o, lse, torch.ones_like(o), lse * 0, *options),
                          test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))  # fmt: skip


class Block(torch.nn.Module):  # type: ignore[name-defined,misc]
    """A layer as people write it."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.attend, self.project = attend, torch.nn.Linear(2 * D, 6 * D)

    def forward(self, x: Any) -> Any:
        batch, length, _ = x.shape
        q, k, v = self.project(x).view(batch, length, 3, 2, D).permute(2, 0, 3, 1, 4)
        o, lse = self.attend(q, k, v, return_lse=True, scale=0.25)
        return o.transpose(1, 2).reshape(batch, length, 2 * D) + lse.mean()


def test_compile_without_a_break_and_without_a_recompilation():
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = Block(compiled())
    traced = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = [torch.randn(2, n, 2 * D) for n in (150, 64, 201, 700)]

    def both(x: Any) -> None:
        results = []
        for f in (block, traced):
            block.zero_grad()
            y = f(x)
            y.square().sum().backward()
            results.append([y.detach(), block.project.weight.grad.clone()])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    both(inputs[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in inputs[1:]:
            both(x)


def test_compile_without_gradients():
    torch._dynamo.reset()
    attend, qkv = compiled(), tensors(150, 150)
    f = torch.compile(lambda *x: attend(*x) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(*qkv), attend(*qkv) * 2)


def test_export():
    block = Block(compiled())
    x = torch.randn(2, 150, 2 * D)
    program = torch.export.export(block, (x,), dynamic_shapes={"x": {1: torch.export.Dim("length", min=2, max=4096)}})
    for n in (150, 90):
        x = torch.randn(2, n, 2 * D)
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    from torch.utils.checkpoint import checkpoint

    attend, qkv = compiled(), learnable()
    wanted = gradients(attend, qkv)
    out = checkpoint(lambda *x: attend(*x), *qkv, use_reentrant=reentrant)
    out.square().sum().backward()
    assert same([x.grad for x in qkv], wanted)


def test_autocast_takes_tensors_in_the_dtype_that_was_compiled():
    attend, (q, k, v) = compiled(dtype="bfloat16"), learnable()
    with pytest.raises(InvalidInput, match="different dtypes"):
        attend(q.bfloat16(), k, v)
    with torch.autocast("cpu", torch.bfloat16):
        o = attend(q.bfloat16(), k, v)
    assert o.dtype == torch.bfloat16
    grads = torch.autograd.grad(o.float().sum(), (q, k, v))
    assert all(x.dtype == torch.float32 for x in grads)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(attend(*rounded).float().sum(), rounded)
    assert same(grads, [x.float() for x in wanted])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(splatc.attention(q.bfloat16(), k, v, PATTERN), o)
        assert splatc.attention(q.detach().numpy(), k.detach().numpy(), v.detach().numpy(), PATTERN).dtype == np.float32


def test_transforms_are_refused_in_words():
    from splatc.runtime import torch_ops

    attend = compiled()
    q, k, v = (torch.stack([x, x]) for x in tensors(150, 150))
    with pytest.raises(Unsupported, match="fold a mapped dimension into batch"):
        torch.vmap(attend)(q, k, v)
    with pytest.raises(Unsupported, match="fold a mapped dimension into batch"):
        torch.vmap(lambda *x: torch_ops.attention(*x, attend._handle, None, False))(q, k, v)
    with pytest.raises(Unsupported, match=r"torch.autograd for gradients"):
        torch.func.grad(lambda x: attend(x, k[0], v[0]).sum())(q[0])


def test_second_derivatives_are_refused():
    q, k, v = learnable()
    (dq,) = torch.autograd.grad(compiled()(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(Unsupported, match="first derivatives only"):
        dq.sum().backward()


def test_gradients_in_batches_are_refused():
    q, k, v = learnable()
    o = compiled()(q, k, v)
    with pytest.raises(Unsupported, match="one by one, without is_grads_batched=True"):
        torch.autograd.grad(o, q, torch.stack([o, o]).detach(), is_grads_batched=True)
    with pytest.raises(Unsupported, match="vectorize=True"):
        torch.autograd.functional.jacobian(lambda x: compiled()(x, k, v).sum((0, 1, 2)), q, vectorize=True)


def test_a_part_of_the_inputs_may_learn():
    attend = compiled()
    for i in range(3):
        qkv = tensors(150, 150)
        qkv[i].requires_grad_()
        o = attend(*qkv)
        o.sum().backward()
        assert o.requires_grad and [x.grad is not None for x in qkv] == [j == i for j in range(3)]
    with torch.no_grad():
        assert not attend(*qkv).requires_grad


def test_splatc_attention_is_differentiable():
    qkv = learnable()
    got = gradients(lambda q, k, v: splatc.attention(q, k, v, PATTERN), qkv)
    assert same(got, gradients(compiled(), qkv))


def test_the_graph_keeps_what_it_needs():
    qkv = learnable()
    o = compiled()(*qkv)
    gc.collect()
    o.sum().backward()
    assert np.isfinite(qkv[0].grad.numpy()).all()
    handle = splatc.compile("window(13, 0)", seq_len=50, head_dim=16, dtype="float32")._handle  # no other means that
    gc.collect()
    from splatc.runtime import torch_ops

    with pytest.raises(InvalidInput, match=r"no compiled mask has the handle 'attention_cpu_d16.*keep it"):
        torch_ops.attention(*(x.detach() for x in qkv), handle, None, False)


def test_copies_of_a_module_share_the_mask():
    import copy

    block = Block(compiled())
    twin = copy.deepcopy(block)
    x = torch.randn(1, 150, 2 * D)
    assert twin.attend is block.attend and torch.equal(twin(x), block(x))


def test_what_has_no_gradients_on_a_gpu_says_so():
    attend = splatc.compile(PATTERN, seq_len=150, target="sm_90a", dtype="float32", head_dim=64, alibi=True)
    with pytest.raises(Unsupported, match=r"gradients in float32 .* has no alibi"):
        attend(*learnable(d=64), alibi_slopes=torch.zeros(2))


# -- with biases, sinks and dropout ------------------------------------------------------------------------------------

PARTS = {name: True for name in ("alibi", "relative_bias", "block_bias", "sinks", "dropout")}


def every_term(length: int, heads: int = 2) -> dict[str, Any]:
    """Learnable tensors of all terms, and the options beside them."""
    blocks = -(-length // 16)
    shapes = {"alibi_slopes": (heads,), "relative_bias": (heads, 15), "block_bias": (heads, blocks, blocks),
              "sinks": (heads,)}  # fmt: skip
    rng = torch.Generator().manual_seed(1)
    return {name: (torch.randn(shape, generator=rng) / 10).requires_grad_() for name, shape in shapes.items()}


TENSORS = "alibi_slopes", "relative_bias", "block_bias", "sinks", "seed"


@pytest.mark.parametrize("wanted", [*((name,) for name in TENSORS), TENSORS], ids=str)  # kernels of test_terms
def test_opcheck_with_terms(wanted):
    from splatc.runtime import torch_ops

    chosen = {"alibi_slopes": "alibi", "seed": "dropout"}
    attend = compiled(length=40, **{chosen.get(name, name): True for name in wanted})
    qkv, terms = learnable(40, heads=2, kv_heads=1), {**every_term(40), "seed": torch.tensor([5])}
    tensors = [terms[name] if name in wanted else None for name in TENSORS]
    numbers = 16, 3, 0.3 if "seed" in wanted else 0.0
    torch.library.opcheck(torch_ops.attention, (*qkv, attend._handle, None, True, *tensors, *numbers))
    plain = [None if x is None else x.detach() for x in (*qkv, *tensors)]
    o, lse = torch_ops.attention(*plain[:3], attend._handle, None, True, *plain[3:], *numbers)
    grads = torch.ones_like(o), lse * 0
    torch.library.opcheck(torch_ops.attention_backward,
                          (*plain[:3], o, lse, *grads, attend._handle, None, True, *plain[3:], *numbers),
                          test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))  # fmt: skip
    flags = [True, False, True, False]
    *_, dterms = torch_ops.attention_backward(*plain[:3], o, lse, *grads, attend._handle, None, True, *plain[3:],
                                              *numbers, learning=flags)  # fmt: skip
    assert [x.shape for x in dterms] == [x.shape for x, flag in zip(plain[3:7], flags) if flag and x is not None]


class Biased(torch.nn.Module):  # type: ignore[name-defined,misc]
    """A layer that learns all that a score has; blocks are taken from a larger table."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.attend, self.project = attend, torch.nn.Linear(2 * D, 6 * D)
        self.terms = torch.nn.ParameterDict({name: x.detach() for name, x in every_term(1024).items()})

    def forward(self, x: Any, seed: Any = None) -> Any:
        batch, length, _ = x.shape
        q, k, v = self.project(x).view(batch, length, 3, 2, D).permute(2, 0, 3, 1, 4)
        blocks = (length + 15) // 16
        terms = {**self.terms, "block_bias": self.terms["block_bias"][:, :blocks, :blocks], "block_size": 16}
        o, lse = self.attend(q, k, v, return_lse=True, dropout_p=0.2, seed=seed, bias_align="bottom_right", **terms)
        return o.transpose(1, 2).reshape(batch, length, 2 * D) + lse.mean()


def nn_function(q: Any, k: Any, v: Any, **options: Any) -> Any:
    from splatc.nn.functional import sparse_attention

    return sparse_attention(q, k, v, PATTERN, **options)


@pytest.mark.parametrize("function", [False, True])
def test_compile_with_terms_without_a_break_and_without_a_recompilation(function):
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = Biased(nn_function if function else compiled(**PARTS))
    traced = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")

    def both(length: int) -> None:
        x, seed, results = torch.randn(2, length, 2 * D), torch.tensor([length]), []
        for f in (block, traced):
            block.zero_grad()
            y = f(x, seed)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad.clone() for p in block.parameters())])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    both(150)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (64, 201, 700):
            both(length)


def test_a_seed_is_drawn_in_a_compiled_graph():
    torch._dynamo.reset()
    attend, qkv = compiled(dropout=True), tensors(150, 150)
    traced = torch.compile(lambda *x: attend(*x, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    first, second = traced(*qkv), traced(*qkv)
    torch.manual_seed(3)
    third = traced(*qkv)
    torch.manual_seed(3)
    assert torch.equal(traced(*qkv), third) and not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_drops_the_same(reentrant):
    from torch.utils.checkpoint import checkpoint

    attend, results = compiled(dropout=True), []
    for again in (False, True):
        qkv = learnable()
        torch.manual_seed(5)
        out = (checkpoint(lambda *x: attend(*x, dropout_p=0.4), *qkv, use_reentrant=reentrant) if again
               else attend(*qkv, dropout_p=0.4))  # fmt: skip
        torch.rand(7)  # the generator moves on before the backward pass
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in qkv)])
    assert same(*results)


def test_a_part_of_the_terms_may_learn():
    attend, qkv = compiled(**PARTS), tensors(150, 150)
    for name in every_term(150):
        terms = {key: x.detach().requires_grad_(key == name) for key, x in every_term(150).items()}
        o = attend(*qkv, **terms, block_size=16)
        o.sum().backward()
        assert [x.grad is not None for x in terms.values()] == [key == name for key in terms]


def test_terms_of_another_dtype():
    """They are computed with in float32, and their gradients are of their own dtype."""
    attend, qkv = compiled(**PARTS), tensors(150, 150)
    terms = {name: x.detach().bfloat16().requires_grad_() for name, x in every_term(150).items()}
    exact = {name: x.detach().float() for name, x in terms.items()}
    o = attend(*qkv, **terms, block_size=16)
    o.sum().backward()
    assert torch.equal(o, attend(*qkv, **exact, block_size=16))
    assert all(x.grad.dtype == torch.bfloat16 for x in terms.values())
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = qkv
        o = splatc.attention(q, k, v, PATTERN, **terms, block_size=16)
    assert o.dtype == torch.bfloat16


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("call", [splatc.attention, sparse_attention])
def test_a_first_call_may_be_of_no_positions(call, lengths):
    q, k, v = tensors(*lengths)
    for x in (q, k, v):
        x.requires_grad_()
    o, lse = call(q, k, v, "causal & window(97, 0)", return_lse=True)
    assert not o.any() and torch.isneginf(lse).all() and lse.shape == q.shape[:3]
    o.sum().backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in (q, k, v))
    q, k, v = (x.detach().numpy() for x in (q, k, v))
    assert splatc.attention(q, k, v, "causal").shape == o.shape
