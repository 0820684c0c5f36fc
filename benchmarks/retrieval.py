"""Measures the exact search for neighbours against the bare NumPy product.

    python -m benchmarks.retrieval [--vectors 1000000] [--dim 768] [--queries 16] [--k 10]

The product of all scores alone, without choosing the best of them, is the bound of an exact search;
of the two orders of the product the faster one counts.
The recall is the share of the neighbours of that product, sorted by NumPy, that the search finds.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.conditioning.neighbors import Index

CHUNK = 1 << 16


def seconds(call: Callable[[], Any]) -> float:
    """Returns the duration of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def database(n: int, dim: int) -> np.ndarray:
    """Returns random unit vectors float32 [n, dim]."""
    rng, vectors = np.random.default_rng(0), np.empty((n, dim), np.float32)
    for first in range(0, n, CHUNK):
        part = vectors[first : first + CHUNK]
        rng.standard_normal(out=part, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def measure(n: int, dim: int, queries: int, k: int, repeats: int) -> dict[str, Any]:
    """Times of both, in turn, and the recall."""
    vectors = database(n, dim)
    wanted = np.random.default_rng(1).standard_normal((queries, dim), dtype=np.float32)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    index = Index(vectors)
    found = index.search(wanted, k)  # compiles
    scores = wanted @ vectors.T
    best = np.argpartition(-scores, k, axis=1)[:, :k]
    pairs = zip(found.rows, best, strict=True)
    recall = np.mean([len(set(a.tolist()) & set(b.tolist())) / k for a, b in pairs])
    del scores
    calls: dict[str, Callable[[], Any]] = {
        "queries_first": lambda: wanted @ vectors.T,
        "vectors_first": lambda: vectors @ wanted.T,
        "search": lambda: index.search(wanted, k),
    }
    rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(repeats)]
    medians = {name: float(np.median([times[name] for times in rounds])) for name in calls}
    product = min(medians["queries_first"], medians["vectors_first"])
    return {
        **{f"{name}_seconds": value for name, value in medians.items()},
        "product_seconds": product,
        "ratio": medians["search"] / product,
        "recall": float(recall),
        "vectors": n,
        "dim": dim,
        "queries": queries,
        "k": k,
    }


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = measure(args.vectors, args.dim, args.queries, args.k, args.repeats)
    about = "{vectors} vectors of {dim}, {queries} queries, {k} neighbours: ".format(**result)
    times = "search {search_seconds:.3f} s, NumPy product {product_seconds:.3f} s".format(**result)
    print(f"{about}{times}, ratio {result['ratio']:.2f}, recall {result['recall']:.4f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
