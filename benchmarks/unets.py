"""The UNets that are compared, ours and PyTorch's, with non-zero random weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from benchmarks.models import SD, random_like
from benchmarks.side_by_side import as_torch
from benchmarks.torch_twin import TorchUNet, fill
from ldm_jax.kernels import for_platform
from ldm_jax.models.unet import UNet

EMOJI = {
    "in_channels": 8,
    "out_channels": 8,
    "model_channels": 48,
    "channel_mult": (1, 3, 3),
    "num_res_blocks": 1,
    "conv_resample": False,
    "attention_resolutions": (2, 4),
    "num_head_channels": 48,
    "use_spatial_transformer": True,
    "context_dim": 128,
    "legacy": False,
    "norm_groups": 16,
}


class Case(NamedTuple):
    """A UNet's fields, the side of its latents, the length of its context."""

    fields: dict[str, Any]
    side: int
    tokens: int


CASES = {
    "emoji": Case(EMOJI, 16, 24),
    "sd_v1_quarter": Case({**SD, "model_channels": 80, "norm_groups": 16}, 64, 77),
    "sd_v1": Case(SD, 64, 77),
}


class Pair(NamedTuple):
    """Ours with its parameters, PyTorch's with the same, and the inputs of both: x, t, context."""

    unet: UNet
    params: Any
    twin: TorchUNet
    inputs: tuple[Any, ...]
    torch_inputs: tuple[torch.Tensor, ...]


def pair(name: str, batch: int, dtype: str) -> Pair:
    """Returns both sides of a case; float32 weights, cast for PyTorch if ``dtype`` is bfloat16."""
    case, rng = CASES[name], np.random.default_rng(0)
    kernels = for_platform(jax.default_backend())
    unet = UNet(**case.fields, dtype=jnp.dtype(dtype), kernels=kernels)
    x = rng.standard_normal((batch, case.side, case.side, case.fields["in_channels"])).astype(
        np.float32
    )
    t = rng.integers(0, 1000, batch).astype(np.int32)
    context = rng.standard_normal((batch, case.tokens, case.fields["context_dim"])).astype(
        np.float32
    )
    params = random_like(
        jax.eval_shape(unet.init, jax.random.key(0), x, t, context)["params"], "float32"
    )
    twin = TorchUNet(unet)
    fill(twin, params)
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    twin = twin.to(memory_format=torch.channels_last, dtype=kind)
    if torch.cuda.is_available():
        twin = twin.cuda()
    inputs = tuple(jax.device_put(a) for a in (x, t, context))
    torch_inputs = (as_torch(x, kind), as_torch(t), as_torch(context, kind))
    return Pair(unet, jax.device_put(params), twin, inputs, torch_inputs)
