"""Times decoding, ours and PyTorch's.

    python -m benchmarks.decode [--case emoji sd_v1] [--batch 1 8] [--json out.json]

The demo's decoder (64x64 images) or Stable Diffusion's KL-f8 (512x512), with the same random
weights on both sides; the results are compared before anything is timed. Needs PyTorch:
pip install -e ".[parity]".
"""

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from benchmarks.models import F8
from benchmarks.side_by_side import (
    as_numpy,
    as_torch,
    check_same,
    common_arguments,
    compare,
    in_torch,
    jitted,
    set_up,
    show,
    summary,
)
from benchmarks.torch_twin import TorchDecoder, decoder_params, fill
from benchmarks.unets import random_like
from ldm_jax.kernels import for_platform
from ldm_jax.models.autoencoder import AutoencoderKL, init_autoencoder

SHARED = {"in_channels": 3, "out_ch": 3, "attn_resolutions": ()}
EMOJI = {
    "embed_dim": 8,
    "z_channels": 8,
    "ch": 32,
    "ch_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "norm_groups": 8,
}
CASES = {
    "emoji": ({**SHARED, **EMOJI, "attn_type": "none", "resolution": 64}, 16),
    "sd_v1": ({**SHARED, **F8, "resolution": 256}, 64),
}


def main() -> None:
    """Runs the command."""
    parser = common_arguments(__doc__)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=["emoji"])
    args = parser.parse_args()
    set_up(args)
    kind, results = getattr(torch, args.dtype), []
    for name in args.case:
        fields, side = CASES[name]
        kernels = for_platform(jax.default_backend(), differentiable=False)
        module = AutoencoderKL(**fields, dtype=args.dtype, kernels=kernels)
        params = random_like(
            jax.eval_shape(lambda key, m=module: init_autoencoder(m, key), jax.random.key(0)),
            "float32",
        )
        twin = TorchDecoder(module)
        fill(twin, decoder_params(params))
        twin = twin.eval().requires_grad_(False).to(memory_format=torch.channels_last, dtype=kind)
        twin = twin.cuda() if torch.cuda.is_available() else twin
        for batch in args.batch:
            z = (
                np.random.default_rng(0)
                .standard_normal((batch, side, side, fields["embed_dim"]))
                .astype(np.float32)
            )
            ours, flops, out = jitted(
                lambda p, z, m=module: m.apply({"params": p}, z, method="decode"),
                jax.device_put(params),
                z,
                by_rows=True,
            )
            theirs = as_torch(z, kind)
            check_same(out, as_numpy(twin(theirs)), 1e-3 if args.dtype == "float32" else 1e-1)
            sides = {"ours": ours, "eager": in_torch(lambda theirs=theirs, twin=twin: twin(theirs))}
            if args.compile:
                faster = torch.compile(twin)
                sides["torch.compile"] = in_torch(
                    lambda theirs=theirs, faster=faster: faster(theirs)
                )
            results.append(
                summary(
                    f"{name} decode, batch {batch}, {args.dtype}",
                    sides,
                    compare(sides, args.repeats),
                    flops,
                )
            )
    show(results, args.json)


if __name__ == "__main__":
    main()
