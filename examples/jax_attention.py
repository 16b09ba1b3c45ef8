"""A transformer layer in JAX, without other libraries, that learns to say again what it read 16 positions ago.

Attention along strides of 16 sees that position among a few others; a bias for each distance, learned too, finds it.
Needs ``pip install 'splatc[jax]'``; torch is not imported.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from show import check, draw, tensors

import splatc
from splatc import patterns as P
from splatc.jax import attention

SEQ, BATCH, LETTERS = 256, 4, 16
WIDTH, HEADS, HEAD_DIM, REACH = 64, 4, 16, 32
AGO, STEPS, RATE = 16, 60, 1e-2
pattern = P.causal() & P.strided(AGO)


def parameters(key):
    shapes = {"letters": (LETTERS, WIDTH), "qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 2 * WIDTH),
              "down": (2 * WIDTH, WIDTH), "read": (WIDTH, LETTERS)}  # fmt: skip
    keys = jax.random.split(key, len(shapes))
    drawn = {name: jax.random.normal(k, shape) * shape[0] ** -0.5
             for k, (name, shape) in zip(keys, shapes.items(), strict=True)}  # fmt: skip
    return {**drawn, "bias": jnp.zeros((HEADS, 2 * REACH + 1))}


def norm(x):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def model(p, text):
    """Logits (batch, seq, letters) of text (batch, seq)."""
    x = p["letters"][text]
    q, k, v = jnp.split(norm(x) @ p["qkv"], 3, axis=-1)
    q, k, v = (y.reshape(*text.shape, HEADS, HEAD_DIM) for y in (q, k, v))
    o = attention(q, k, v, pattern, layout="bshd", relative_bias=p["bias"])
    x = x + o.reshape(*text.shape, WIDTH) @ p["out"]
    x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
    return norm(x) @ p["read"]


def loss(p, text):
    """Mean cross-entropy against the letter read AGO positions before, where there is one."""
    logs = jax.nn.log_softmax(model(p, text)[:, AGO:])
    return -jnp.take_along_axis(logs, text[:, :-AGO, None], axis=-1).mean()


@jax.jit
def step(p, mean, square, n, text):
    """One step of Adam."""
    value, gradients = jax.value_and_grad(loss)(p, text)
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradients)
    square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, square, gradients)
    p = jax.tree.map(
        lambda x, m, s: x - RATE * (m / (1 - 0.9**n)) / (jnp.sqrt(s / (1 - 0.99**n)) + 1e-8), p, mean, square
    )
    return p, mean, square, value


p = parameters(jax.random.key(0))
mean = square = jax.tree.map(jnp.zeros_like, p)
losses = []
for n in range(1, STEPS + 1):
    text = jax.random.randint(jax.random.key(n), (BATCH, SEQ), 0, LETTERS)
    p, mean, square, value = step(p, mean, square, float(n), text)
    losses.append(float(value))

print(splatc.compile(pattern, seq_len=SEQ, head_dim=HEAD_DIM, dtype="float32", target="cpu").explain())
print(f"loss         {losses[0]:.2f}, after {STEPS} steps {losses[-1]:.2f}")
assert losses[-1] < 0.2 * losses[0], losses
found = int(p["bias"].max(0)[: REACH + 1].argmax()) - REACH
print(f"learned      the largest bias is that of distance {found}")
q, k, v = tensors(heads=2, seq_len=SEQ, head_dim=HEAD_DIM)
check(attention(q, k, v, pattern), q, k, v, pattern.dense(SEQ))
draw(pattern, SEQ)
