"""Time per code of a transformer that samples 256 codes, with a cache of keys and values or not.

    python -m benchmarks.transformer_sampling [--pictures 64] [--codes 256] [--plain 4]

The cached form is the program of ``ldm-sample``: one scan, a code costs one position. Its time for
half of the codes is measured too: per code it is that of all. The plain form runs the whole
sequence again for every code, as the original's `sample`; it is timed at ``--plain`` codes of
every quarter, since it would take minutes.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.kernels import for_platform
from ldm_jax.models.gpt import GPT, Choice, generate

VOCABULARY = 1024


def seconds(run: Callable[..., Any], *args: Any) -> float:
    """Returns the seconds of a second call, without compiling."""
    jax.block_until_ready(run(*args))
    began = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - began


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--plain", type=int, default=4, help="codes of the plain form per quarter")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    args = parser.parse_args()
    b, n = args.pictures, args.codes
    kernels = for_platform(jax.default_backend(), differentiable=False)
    gpt = GPT(VOCABULARY, n, args.layers, args.width // 32, args.width, kernels=kernels)
    params = jax.jit(lambda key: gpt.init(key, jnp.zeros((1, 1), jnp.int32))["params"])(
        jax.random.key(0)
    )
    start, choice = jnp.zeros((b, 1), jnp.int32), Choice(1.0, 100)
    u = jax.random.uniform(jax.random.key(1), (b, n))
    result: dict[str, Any] = {"pictures": b, "codes": n, "device": jax.devices()[0].device_kind}
    for count in (n // 2, n):

        @jax.jit
        def cached(params: Any, u: jax.Array, count: int = count) -> jax.Array:
            return generate(gpt, params, start, count, uniforms=u[:, :count], choice=choice).tokens

        result[f"cached, ms per code of {count}"] = 1e3 * seconds(cached, params, u) / count

    @jax.jit
    def plain(params: Any, tokens: jax.Array, u: jax.Array) -> jax.Array:
        logits = gpt.apply({"params": params}, tokens, at=jnp.int32(tokens.shape[1] - 1))
        return choice(logits[:, 0], u)  # type: ignore[index]

    for quarter in range(1, 5):
        length = n * quarter // 4
        tokens = jnp.zeros((b, length), jnp.int32)
        total = sum(seconds(plain, params, tokens, u[:, i]) for i in range(args.plain))
        result[f"plain, ms for code {length}"] = 1e3 * total / args.plain
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
