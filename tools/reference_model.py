"""The benchmark's yardstick: the same mathematics in plain JAX, einsums as one would write them down, no tricks."""

import jax
import jax.numpy as jnp

V, L, D, H, N, F = 8192, 6, 384, 6, 64, 1024  # 16.9 M parameters


def init(seed):
    shapes = dict(q=(D, H, N), k=(D, H, N), v=(D, H, N), o=(H, N, D), gate=(D, F), up=(D, F), down=(F, D))
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    normal = lambda *shape: jax.random.normal(next(keys), shape) * D**-0.5
    layers = [{n: normal(*s) for n, s in shapes.items()} | dict(n1=jnp.ones(D), n2=jnp.ones(D)) for _ in range(L)]
    return dict(embed=normal(V, D), layers=layers, norm=jnp.ones(D), head=normal(D, V))


def norm(x, scale):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


def rope(x, positions):
    angles = positions[:, :, None, None] * 10000.0 ** (-jnp.arange(0, N, 2) / N)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def forward(params, ids, positions, cache=None, slot=0):
    p = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    x, new = p["embed"][ids], []
    for i, w in enumerate(p["layers"]):
        h = norm(x, w["n1"])
        q = rope(jnp.einsum("bsd,dhn->bshn", h, w["q"]), positions)
        k, v = rope(jnp.einsum("bsd,dhn->bshn", h, w["k"]), positions), jnp.einsum("bsd,dhn->bshn", h, w["v"])
        if cache is not None:
            k, v = (jax.lax.dynamic_update_slice_in_dim(c, y, slot, 1) for c, y in zip(cache[i], (k, v), strict=True))
            new.append((k, v))
        mask = jnp.arange(k.shape[1])[None, None, :] <= positions[:, :, None]
        scores = jnp.einsum("bshn,bthn->bhst", q, k).astype(jnp.float32) * N**-0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30)).astype(x.dtype)
        x = x + jnp.einsum("bhst,bthn,hnd->bsd", weights, v, w["o"])
        gate, up = (jnp.einsum("bsd,df->bsf", norm(x, w["n2"]), w[name]) for name in ("gate", "up"))
        x = x + jnp.einsum("bsf,fd->bsd", jax.nn.silu(gate) * up, w["down"])
    return jnp.einsum("bsd,dv->bsv", norm(x, p["norm"]), p["head"]).astype(jnp.float32), new


def train_step(params, mu, nu, count, ids):
    def loss(params):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        logp = jax.nn.log_softmax(forward(params, ids, positions)[0][:, :-1])
        return -jnp.take_along_axis(logp, ids[:, 1:, None], -1).mean()

    value, g = jax.value_and_grad(loss)(params)
    scale = jnp.minimum(1, 1 / jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(g))))
    mu = jax.tree.map(lambda m, x: 0.9 * m + 0.1 * x * scale, mu, g)
    nu = jax.tree.map(lambda n, x: 0.95 * n + 0.05 * (x * scale) ** 2, nu, g)
    direction = lambda m, n: (m / (1 - 0.9**count)) / (jnp.sqrt(n / (1 - 0.95**count)) + 1e-8)
    params = jax.tree.map(lambda p, m, n: p - 3e-4 * (direction(m, n) + 0.1 * p), params, mu, nu)
    return params, mu, nu, count + 1, value
