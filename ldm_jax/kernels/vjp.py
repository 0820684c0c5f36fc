"""Functions whose gradients are written by hand, and programs that need none."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax

_FORWARD_ONLY: ContextVar[bool] = ContextVar("forward_only", default=False)


def is_forward_only() -> bool:
    """Whether nobody will differentiate the program that is being traced."""
    return _FORWARD_ONLY.get()


@contextlib.contextmanager
def forward_only() -> Iterator[None]:
    """While a program is traced inside, gradients of our own are left out of it: they take a quarter of the time of tracing a network."""
    token = _FORWARD_ONLY.set(True)
    try:
        yield
    finally:
        _FORWARD_ONLY.reset(token)


def own_gradient(
    forward: Callable[..., tuple[Any, Any]],
    backward: Callable[..., tuple[Any, ...]],
    nondiff_argnums: tuple[int, ...] = (),
    *,
    primal: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """A function with the ``forward`` and ``backward`` of `jax.custom_vjp`. Where nothing is differentiated it is ``primal``, by default what forward
    gives first.
    """
    plain = primal or (lambda *args: forward(*args)[0])
    differentiable = jax.custom_vjp(plain, nondiff_argnums=nondiff_argnums)
    differentiable.defvjp(forward, backward)
    return lambda *args: (plain if is_forward_only() else differentiable)(*args)
