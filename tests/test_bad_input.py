"""What a user may get wrong: one line, of the right class, that says what to do. Never a traceback from deep inside."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import splatc
from splatc import patterns as P
from splatc.errors import InvalidInput, PatternSyntaxError, SplatcError, Unsupported
from splatc.patterns import parse_or_load

torch = pytest.importorskip("torch")


def qkv(q=(1, 2, 20, 16), k=(1, 2, 20, 16), v=(1, 2, 20, 16), dtype=torch.float32, **options) -> Any:
    return [torch.zeros(s, dtype=dtype, **options) for s in (q, k, v)]


def attend(tensors, mask=None, **options):
    q, k, v = tensors
    return splatc.attention(q, k, v, P.causal() if mask is None else mask, **options)


def compiled(**options):
    return splatc.compile(P.causal(), **{"seq_len": 20, "head_dim": 16, "dtype": "float32", "target": "cpu", **options})


def refused(make, message, kind=InvalidInput):
    with pytest.raises(SplatcError) as e:
        make()
    assert type(e.value) is kind, repr(e.value)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400
    assert re.search(message, str(e.value)), str(e.value)


META = {"device": "meta"}
Q, K, V = qkv()

CALLS = {
    "three dimensions": (lambda: attend(qkv(q=(2, 20, 16))), r"q has shape \(2, 20, 16\).*\(batch, heads, seq, dim\)"),
    "five dimensions": (lambda: attend(qkv(v=(1, 1, 2, 20, 16))), "v has shape .* 4 dimensions"),
    "three dimensions bshd": (lambda: attend(qkv(q=(2, 20, 16)), layout="bshd"), r"\(batch, seq, heads, dim\)"),
    "batches": (lambda: attend(qkv(k=(3, 2, 20, 16))), "batch sizes 1, 3 and 1.*equal"),
    "lengths of k and v": (lambda: attend(qkv(v=(1, 2, 21, 16))), "must share heads and length"),
    "heads of k and v": (lambda: attend(qkv(v=(1, 1, 20, 16))), "must share heads and length"),
    "head_dim": (lambda: attend(qkv(k=(1, 2, 20, 8))), "q has head_dim 16 but k has 8"),
    "grouped heads": (lambda: attend(qkv(q=(1, 4, 20, 16))), "4 heads but k and v have 2: pass enable_gqa=True"),
    "uneven groups": (lambda: attend(qkv(q=(1, 3, 20, 16)), enable_gqa=True), "3 query heads cannot share 2"),
    "no key heads": (
        lambda: attend(qkv(k=(1, 0, 20, 16), v=(1, 0, 20, 16)), enable_gqa=True),
        "2 query heads cannot share 0",
    ),
    "no batch": (lambda: attend(qkv((0, 2, 20, 16), (0, 2, 20, 16), (0, 2, 20, 16))), "empty dimension"),
    "no head_dim": (lambda: attend(qkv((1, 2, 20, 0), (1, 2, 20, 0))), "empty dimension"),
    "no v_head_dim": (lambda: attend(qkv(v=(1, 2, 20, 0))), "empty dimension"),
    "wide heads": (
        lambda: attend(qkv((1, 1, 4, 300), (1, 1, 4, 300), (1, 1, 4, 300))),
        "head_dim is 300.*from 1 to 256",
    ),
    "lists": (lambda: splatc.attention([[1.0]], K, V, P.causal()), "q is a list: give torch tensors or NumPy arrays"),
    "none": (lambda: splatc.attention(Q, None, V, P.causal()), "k is a NoneType"),
    "a mixture": (lambda: splatc.attention(Q, K.numpy(), V, P.causal()), "q is a Tensor but k is a ndarray"),
    "sparse tensors": (lambda: attend([Q, K, V.to_sparse()]), "v is a sparse tensor: .*, only masks may be sparse"),
    "nested tensors": (lambda: attend([torch.nested.nested_tensor(list(Q))] * 3), "q is a nested tensor: pack"),
    "jagged tensors": (
        lambda: attend([torch.nested.nested_tensor(list(Q.transpose(1, 2)), layout=torch.jagged).transpose(1, 2)] * 3),
        r"q is a nested tensor: .* documents\(lengths\)",
    ),
    "devices": (lambda: attend([Q, K, torch.zeros(1, 2, 20, 16, **META)]), "different devices.*v: meta.*move them"),
    "mixed dtypes": (lambda: attend([Q, K.half(), V]), "different dtypes.*k: float16.*convert"),
    "int64": (lambda: attend(qkv(dtype=torch.int64)), "int64: it must be one of float32, float16, bfloat16, float64"),
    "bool": (lambda: attend(qkv(dtype=torch.bool)), "bool: it must be one of"),
    "complex": (lambda: attend(qkv(dtype=torch.complex64)), "complex64: it must be one of"),
    "big-endian arrays": (lambda: attend([np.zeros((1, 1, 4, 8), ">f4")] * 3), ">f4: it must be one of"),
    "object arrays": (lambda: attend([np.zeros((1, 1, 4, 8), object)] * 3), "object: it must be one of"),
    "layout": (lambda: attend(qkv(), layout="sbhd"), "layout is 'sbhd': it must be one of bhsd, bshd"),
    "NaN scale": (lambda: attend(qkv(), scale=float("nan")), "scale is nan: it must be finite"),
    "infinite scale": (lambda: attend(qkv(), scale=-float("inf")), "scale is -inf: it must be finite"),
    "scale beyond float32": (lambda: attend(qkv(), scale=1e300), "scale is 1e\\+300: it must be finite in float32"),
    "scale beyond float64": (lambda: attend(qkv(), scale=10**400), "it must be a number"),
    "text scale": (lambda: attend(qkv(), scale="large"), "scale is 'large': it must be a number"),
    "list scale": (lambda: attend(qkv(), scale=[1.0, 2.0]), "it must be a number"),
    "complex scale": (lambda: attend(qkv(), scale=1j), "it must be a number"),
}


@pytest.mark.parametrize("name", CALLS)
def test_tensors_and_options_of_a_call(name):
    refused(*CALLS[name])


def test_a_device_that_is_no_computer(monkeypatch):
    f = compiled()
    monkeypatch.setattr(sys.modules["splatc.compile"], "find_kernel", None)  # and nothing is compiled for it
    refused(lambda: attend(qkv(**META)), "on meta.*move them")
    refused(lambda: f(*qkv(**META)), "on meta.*move them")


MASKS = {
    "larger": (lambda: attend(qkv(), np.ones((30, 30), bool)), "30 x 30, but q_len is 20 and kv_len is 20"),
    "smaller": (lambda: attend(qkv(), np.ones((10, 20), bool)), "10 x 20, but q_len is 20"),
    "larger tensor": (lambda: attend(qkv(), torch.ones(30, 30, dtype=torch.bool)), "30 x 30"),
    "documents": (lambda: attend(qkv(), P.documents([10, 20])), "lengths sum to 30, but q_len is 20"),
    "grid": (lambda: attend(qkv(), P.neighborhood((5, 5), 3)), "grid .* has 25 positions, but q_len is 20"),
    "blocks": (lambda: attend(qkv(), P.block_mask(["11", "11"], 20)), "2 x 2 blocks .* need 1 x 1"),
    "inside another": (lambda: attend(qkv(), P.causal() & P.mask(np.ones((9, 9), bool))), "9 x 9"),
    "heads": (lambda: attend(qkv(), [P.causal()] * 3), "3 heads, but there are 2"),
    "heads of a matrix": (lambda: attend(qkv(), np.ones((3, 20, 20), bool)), "3 heads, but there are 2"),
    "no heads": (lambda: attend(qkv(), []), "non-empty list of patterns"),
    "numbers": (lambda: attend(qkv(), np.full((20, 20), 2)), "other than 0 and 1, but it must be boolean"),
    "additive": (lambda: attend(qkv(), np.zeros((20, 20), np.float32)), "float32.*boolean.*pass mask == 0"),
    "additive tensor": (lambda: attend(qkv(), torch.zeros(20, 20)), "float32.*pass mask == 0"),
    "a vector": (lambda: attend(qkv(), np.ones(20, bool)), r"2-D.*documents\(cu_seqlens=\.\.\.\)"),
    "empty": (lambda: splatc.analyze(np.ones((0, 5), bool)), "non-empty"),
    "empty both ways": (lambda: splatc.analyze(np.ones((0, 0), bool)), "non-empty"),
    "another thing": (lambda: attend(qkv(), 3.5), "cannot make a pattern of a builtins.float"),
    "nothing": (lambda: splatc.attention(Q, K, V, None), "cannot make a pattern of a builtins.NoneType"),
    "a class": (lambda: attend(qkv(), dict), "cannot make a pattern of"),
    "nested lists": (lambda: attend(qkv(), [[True, False], [True, True]]), r"numpy\.array"),
    "no length": (lambda: splatc.analyze(P.causal()), "seq_len is missing: the pattern causal"),
    "no length for text": (lambda: compiled(seq_len=None), "seq_len is missing"),
    "length zero": (lambda: splatc.analyze("causal", 0), "q_len is 0"),
    "negative length": (lambda: splatc.analyze("causal", -4), "q_len is -4"),
    "keys negative": (lambda: splatc.analyze("causal", 4, -1), "kv_len is -1"),
    "lengths against a matrix": (lambda: splatc.analyze(np.ones((4, 4), bool), 5), "4 x 4, but q_len is 5"),
    "heads of a call": (
        lambda: splatc.compile([P.causal()] * 3, seq_len=20, head_dim=16, dtype="float32", target="cpu")(*qkv()),
        "for 3 heads but q has 2",
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_do_not_fit(name):
    refused(*MASKS[name])


OPTIONS = {
    "target": ({"target": "tpu"}, "target is 'tpu', but it must be 'cpu', 'cuda' or an arch", InvalidInput),
    "arch": ({"target": "sm_9o"}, "target is 'sm_9o'", InvalidInput),
    "target number": ({"target": 90}, "target is 90", InvalidInput),
    "layout": ({"layout": "bsd"}, "layout is 'bsd': it must be one of bhsd, bshd", InvalidInput),
    "dtype": ({"dtype": "float8"}, "dtype is float8: it must be one of", InvalidInput),
    "float64": (
        {"dtype": torch.float64, "target": "sm_90a"},
        "dtype is torch.float64: it must be one of float32, float16, bfloat16",
        InvalidInput,
    ),
    "no dtype": ({"dtype": None}, "dtype is None: it must be one of", InvalidInput),
    "head_dim": ({"head_dim": 0}, "head_dim is 0: it must be a whole number from 1 to 256", InvalidInput),
    "negative head_dim": ({"head_dim": -1}, "head_dim is -1", InvalidInput),
    "large head_dim": ({"head_dim": 257}, "head_dim is 257", InvalidInput),
    "float head_dim": ({"head_dim": 64.0}, "head_dim is 64.0", InvalidInput),
    "v_head_dim": ({"v_head_dim": 0}, "v_head_dim is 0", InvalidInput),
    "text v_head_dim": ({"v_head_dim": "wide"}, "v_head_dim is 'wide'", InvalidInput),
    "softcap": ({"softcap": 0}, "softcap is 0.0: it must be positive and finite in float32, or None", InvalidInput),
    "negative softcap": ({"softcap": -30.0}, "softcap is -30.0: it must be positive", InvalidInput),
    "NaN softcap": ({"softcap": float("nan")}, "softcap is nan: it must be positive and finite", InvalidInput),
    "infinite softcap": ({"softcap": float("inf")}, "softcap is inf: it must be positive and finite", InvalidInput),
    "large softcap": ({"softcap": 1e39}, "softcap is 1e\\+39: it must be positive and finite in float32", InvalidInput),
    "text softcap": ({"softcap": "hard"}, "softcap is 'hard': it must be a positive number, or None", InvalidInput),
    "sinks at once": ({"sinks": torch.ones(2)}, "sinks is a Tensor: compile takes True or False", InvalidInput),
    "a probability at once": ({"dropout": 0.1}, "dropout is a float: compile takes True or False", InvalidInput),
    "tile": ({"tile": (128, 128)}, r"tile is \(128, 128\): .* it can be \(64, 64\), or None", InvalidInput),
    "tile list": ({"tile": [64, 64]}, r"tile is \[64, 64\]: .* it can be \(64, 64\)", InvalidInput),
    "tile number": ({"tile": 64}, "tile is 64: for these options it can be", InvalidInput),
    "tile of three": ({"tile": (64, 64, 64)}, "tile is .64, 64, 64.: for these options it can be", InvalidInput),
    "tile for Hopper": (
        {"tile": (64, 32), "target": "sm_90a", "dtype": "float16"},
        r"tile is \(64, 32\): .* it can be \(64, 64\), \(64, 128\), .*\(192, 128\),.* or None",
        InvalidInput,
    ),
    "wide tile for Hopper": (
        {"tile": (192, 128), "target": "sm_90a", "dtype": "float16", "head_dim": 256},
        "head dims 256 and 256 with tiles of 192 x 128 fit neither .*: use smaller tiles",
        Unsupported,
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_compile(name):
    options, message, kind = OPTIONS[name]
    refused(lambda: compiled(**options), message, kind)


ONES, BLOCKS = torch.ones(2), torch.ones(2, 2, 2)
TERMS = {
    "slopes of other heads": ({"alibi_slopes": torch.ones(3)}, r"shape \(3,\): q has 2 heads, so.*\(2,\)"),
    "slopes of batches": ({"alibi_slopes": torch.ones(1, 2)}, r"alibi_slopes has shape \(1, 2\)"),
    "a number for slopes": ({"alibi_slopes": 0.5}, "alibi_slopes is a float: give a torch tensor, as q is one"),
    "an array for slopes": ({"alibi_slopes": np.ones(2)}, "alibi_slopes is a ndarray: give a torch tensor"),
    "slopes elsewhere": ({"alibi_slopes": torch.ones(2, **META)}, "alibi_slopes is on meta but q is on cpu: move it"),
    "whole slopes": ({"alibi_slopes": torch.ones(2, dtype=torch.int32)}, "alibi_slopes has dtype int32: give floating"),
    "complex sinks": ({"sinks": torch.ones(2, dtype=torch.complex64)}, "sinks has dtype complex64: give floating"),
    "sinks of other heads": ({"sinks": torch.ones(1)}, r"sinks has shape \(1,\): q has 2 heads"),
    "even table": ({"relative_bias": torch.ones(2, 4)}, r"has shape \(2, 4\): .*\(2, 2 r \+ 1\).*odd"),
    "empty table": ({"relative_bias": torch.ones(2, 0)}, r"relative_bias has shape \(2, 0\)"),
    "table without heads": ({"relative_bias": torch.ones(5)}, r"shape \(5,\): it must be \(2, 2 r \+ 1\)"),
    "no block size": ({"block_bias": BLOCKS}, "block_size is missing"),
    "block size": ({"block_bias": BLOCKS, "block_size": 0}, "block_size is 0: .* positive whole number"),
    "float block size": ({"block_bias": BLOCKS, "block_size": 16.0}, "block_size is 16.0"),
    "blocks": ({"block_bias": torch.ones(2, 2, 1), "block_size": 16}, r"blocks of 16 in 20 x 20.*be \(2, 2, 2\)"),
    "align": ({"alibi_slopes": ONES, "bias_align": "left"}, "bias_align is 'left': it must be one of top_left"),
    "all dropped": ({"dropout_p": 1.0}, "dropout_p is 1.0: it must be at least 0 and below 1"),
    "negative dropout": ({"dropout_p": -0.1}, "dropout_p is -0.1: it must be at least 0"),
    "NaN dropout": ({"dropout_p": float("nan")}, "dropout_p is nan: it must be at least 0"),
    "text dropout": ({"dropout_p": "some"}, "dropout_p is 'some': it must be a number"),
    "float seed": ({"dropout_p": 0.5, "seed": 0.5}, "seed is 0.5: it must be a whole number, or a tensor of one"),
    "large seed": ({"dropout_p": 0.5, "seed": 2**63}, "seed is 9223372036854775808: it must fit 64 bits"),
    "two seeds": ({"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, r"tensor of shape \(2,\).*one whole"),
    "seed of floats": ({"dropout_p": 0.5, "seed": torch.ones(1)}, "seed is a tensor .*float32: give one whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", TERMS)
def test_terms_of_a_call(name):
    options, message = TERMS[name]
    refused(lambda: attend(qkv(), **options), message)
    if not any(isinstance(x, torch.Tensor) and x.is_meta for x in options.values()):
        learning = [x.requires_grad_() for x in qkv()]
        refused(lambda: attend(learning, **options), message)


def test_terms_of_arrays():
    arrays: Any = [x.numpy() for x in qkv()]
    refused(lambda: attend(arrays, sinks=ONES), "sinks is a Tensor: give a NumPy array, as q is one")
    refused(lambda: attend(arrays, sinks=np.ones(2, bool)), "sinks has dtype bool: give floating-point numbers")
    refused(lambda: attend(arrays, dropout_p=0.5), "seed is missing: dropout of NumPy arrays needs")


def test_terms_that_the_kernel_is_not_for():
    plain, full = compiled(), compiled(alibi=True, sinks=True, dropout=True)
    refused(lambda: plain(*qkv(), sinks=ONES), "sinks is given, but this mask was not compiled for it: .*sinks=True")
    refused(lambda: plain(*qkv(), dropout_p=0.5), "dropout_p is given, but this mask was not compiled.*dropout=True")
    refused(lambda: full(*qkv()), "alibi_slopes is missing: this mask was compiled with alibi=True")
    refused(lambda: full(*qkv(), alibi_slopes=ONES), "sinks is missing: this mask was compiled with sinks=True")
    refused(lambda: full(None, Q, Q), "q is a NoneType")
    refused(lambda: full(Q[0], Q[0], Q[0], alibi_slopes=ONES, sinks=ONES, bias_align="bottom_right"), "4 dimensions")
    with pytest.raises(TypeError, match="no option 'alibi_slope': alibi_slopes, relative_bias"):
        full(*qkv(), alibi_slope=ONES)
    with pytest.raises(TypeError, match="no option 'is_causal': it is the pattern"):
        attend(qkv(), is_causal=True)


def test_terms_without_a_kernel():
    for target in ("sm_80", "sm_90a"):
        options: Any = {"target": target, "head_dim": 12, "sinks": True, "dropout": True}
        refused(lambda options=options: compiled(**options), "portable CUDA kernel has no sinks, dropout", Unsupported)


def test_a_tile_that_cuts_blocks_of_bits():
    scattered = np.random.default_rng(0).random((500, 500)) < 0.02
    options = {"head_dim": 64, "dtype": "float16", "target": "sm_90a", "tile": (128, 112)}
    refused(lambda: splatc.compile(scattered, **options), "do not fit tiles of 128 x 112: use multiples", Unsupported)


def test_tensors_that_the_kernel_is_not_for():
    f = compiled()
    refused(lambda: f(*qkv(dtype=torch.float16)), "float16 but this kernel is compiled for float32")
    refused(lambda: f(*qkv(dtype=torch.int64)), "int64 but this kernel.*one of float32, float16, bfloat16, float64")
    refused(lambda: f(*qkv(v=(1, 2, 20, 8))), r"head_dim is 16 \(v: 8\) but.*v_head_dim=8")
    refused(lambda: f(*qkv((1, 2, 20, 8), (1, 2, 20, 8))), r"compile again with head_dim=8")
    matrix = splatc.compile(np.ones((20, 20), bool), head_dim=16, dtype="float32", target="cpu")
    refused(lambda: matrix(*qkv(q=(1, 2, 21, 16))), "20 x 20, but q_len is 21")
    refused(lambda: matrix.plan(40), "20 x 20, but q_len is 40")


@pytest.mark.parametrize(
    "text", ["", "causal &", "window(1", "window(1, 2, 3, 4)", "nonsense(3)", "causal and full", "window(a, b)",
             "1", "()", "__import__('os')", "causal; full", "fixed(4, 9)", "strided(0)", "window(-5, 2)",
             "\x00", "causal " * 300, "é", "lambda: 0", "(" * 4000],
)  # fmt: skip
def test_garbage_text(text):
    for make in (lambda: splatc.analyze(text, 16), lambda: attend(qkv(), text)):
        with pytest.raises(InvalidInput) as e:
            make()
        first, *rest = str(e.value).split("\n")
        assert first and len(rest) <= 2  # a syntax error may quote the text with a caret
        assert not rest or isinstance(e.value, PatternSyntaxError)


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_broken_files(tmp_path):
    good = tmp_path / "good.npy"
    np.save(good, np.ones((8, 8), bool))
    raw = good.read_bytes()
    np.save(tmp_path / "objects.npy", np.array([{}, []], object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=np.ones((2, 2), bool), b=np.ones((2, 2), bool))
    np.save(tmp_path / "floats.npy", np.zeros((4, 4)))
    (tmp_path / "folder.npy").mkdir()
    for name, message in (
        (write(tmp_path / "empty.npy", b""), "not a readable .npy file"),
        (write(tmp_path / "short.npy", raw[:-20]), "not a readable .npy file"),
        (write(tmp_path / "header.npy", raw[:30]), "not a readable .npy file"),
        (write(tmp_path / "noise.npy", bytes(range(256))), "not a readable .npy file"),
        (write(tmp_path / "noise.npz", b"PK\x03\x04 and nothing"), "not a readable .npz file"),
        (write(tmp_path / "noise.mtx", b"%%MatrixMarket what"), "not a readable .mtx file"),
        (write(tmp_path / "pattern.txt", b"window(1,"), "expected|unexpected"),
        (write(tmp_path / "latin.txt", b"caus\xe9l"), "not a readable .txt file"),
        (str(tmp_path / "objects.npy"), "not a readable .npy file: .*[Oo]bject"),
        (str(tmp_path / "two.npz"), "must hold one array, but it holds 2: a, b"),
        (str(tmp_path / "floats.npy"), "float64.*boolean"),
        (str(tmp_path / "folder.npy"), "is not a file"),
        (str(tmp_path / "absent.npy"), "no such file"),
        (write(tmp_path / "mask.pkl", b""), "save the mask by numpy.save as .npy"),
    ):
        with pytest.raises(InvalidInput) as e:
            parse_or_load(name)
        first = str(e.value).split("\n")[0]
        assert re.search(message, str(e.value)) and Path(name).name in first, str(e.value)
    assert parse_or_load(str(good)) == P.mask(np.ones((8, 8), bool))
