"""Times text to image, ours and PyTorch's.

    python -m benchmarks.text_to_image [--case emoji] [--batch 1 8] [--steps 50]

Text, 50 guided DDIM steps, decoding to uint8. Ours is the pipeline's one program; PyTorch's is a
Python loop of the same steps over the same weights, from the same noise. The images are compared
before anything is timed. "emoji" is the demo; "sd_v1" has Stable Diffusion v1's shapes, random
weights, and a given context instead of its text tower. Needs PyTorch: pip install -e ".[parity]".
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from benchmarks.models import pipeline
from benchmarks.side_by_side import (
    Side,
    as_torch,
    common_arguments,
    compare,
    in_torch,
    products,
    set_up,
    show,
    summary,
)
from benchmarks.torch_twin import TorchDecoder, TorchText, TorchUNet, decoder_params, fill
from ldm_jax.conditioning.text import BertText
from ldm_jax.diffusion.samplers import initial_noise
from ldm_jax.sampling.inputs import make_inputs
from ldm_jax.sampling.pipeline import Pipeline
from ldm_jax.sampling.request import Request


class Twin:
    """The same model and loop in PyTorch."""

    def __init__(self, pipe: Pipeline, dtype: torch.dtype, compiled: bool):
        model = pipe.model
        params = jax.device_get(
            jax.tree.map(lambda a: a.astype(jnp.float32), (model.params, model.first_stage.params))
        )

        def ready(module: torch.nn.Module, params: Any) -> Any:
            fill(module, params)
            module = (
                module.eval()
                .requires_grad_(False)
                .to(memory_format=torch.channels_last, dtype=dtype)
            )
            module = module.cuda() if torch.cuda.is_available() else module
            return torch.compile(module) if compiled else module

        self.unet = ready(TorchUNet(model.unet), params[0]["unet"])
        self.decoder = ready(TorchDecoder(model.first_stage.module), decoder_params(params[1]))
        self.text = None
        if isinstance(model.conditioner, BertText):
            made = model.conditioner.module
            sizes = (
                made.dim,
                made.depth,
                made.vocab_size,
                made.max_seq_len,
                made.heads,
                made.head_dim,
            )
            self.text = ready(TorchText(*sizes), params[0]["conditioner"])
        self.scale, self.objective, self.dtype = (
            float(model.first_stage.scale),
            model.objective,
            dtype,
        )
        self.abar = np.asarray(jax.device_get(model.schedule).alphas_cumprod, np.float64)

    @torch.no_grad()
    def __call__(
        self, encoded: Any, null: Any, noise: torch.Tensor, nodes: Any, guidance: float
    ) -> torch.Tensor:
        """Returns the decoded images of one batch."""
        both = torch.cat([null, encoded])
        context = self.text(both) if self.text is not None else both
        x = noise
        for t, root_prev, direction in zip(nodes.t, nodes.x0, nodes.eps, strict=True):
            when = torch.full((2 * len(x),), int(t), device=x.device)
            out_null, out = self.unet(torch.cat([x, x]).to(self.dtype), when, context).chunk(2)
            out = out_null + guidance * (out - out_null)
            a, s = float(np.sqrt(self.abar[int(t)])), float(np.sqrt(1 - self.abar[int(t)]))
            if self.objective == "v":
                x0, eps = a * x - s * out, a * out + s * x
            else:
                x0, eps = (x - s * out) / a, out
            x = float(root_prev) * x0 + float(direction) * eps
        pixels = self.decoder((x / self.scale).to(self.dtype))
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def main() -> None:
    """Runs the command."""
    parser = common_arguments(__doc__)
    parser.add_argument("--case", choices=["emoji", "sd_v1"], default="emoji")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    set_up(args)
    pipe, kind, results = pipeline(args.case, args.dtype), getattr(torch, args.dtype), []
    twin = Twin(pipe, kind, args.compile)
    guidance: Any = pipe.defaults.guidance
    for batch in args.batch:
        rng, seeds = np.random.default_rng(0), list(range(batch))
        if args.case == "emoji":
            asked: dict[str, Any] = {"prompts": ["red apple, noto style"] * batch}
        else:
            asked = {"embeddings": rng.standard_normal((batch, 77, 768)).astype(np.float32)}
        request = Request(**asked, seeds=seeds, steps=args.steps, sampler="ddim")
        chosen = pipe.complete(request)
        canvas, rows = make_inputs(pipe.model, request, chosen)
        plan = pipe.steps(chosen)
        form = pipe.config(chosen, canvas.size, batch)
        stage = pipe.model.first_stage
        shape = (
            canvas.size[0] // stage.downsampling,
            canvas.size[1] // stage.downsampling,
            stage.channels,
        )
        noise = as_torch(initial_noise(jax.vmap(jax.random.key)(jnp.asarray(rows.seeds)), shape))
        words = torch.long if args.case == "emoji" else kind
        twin_inputs = (
            as_torch(rows.encoded, words),
            as_torch(rows.null, words),
            noise,
            plan.nodes,
            guidance,
        )

        def ours(plan: Any = plan, rows: Any = rows, form: Any = form) -> np.ndarray:
            return np.asarray(pipe.compute("ddim", form, plan, rows).images)

        images = ours().astype(int)
        theirs = twin(*twin_inputs).cpu().permute(0, 2, 3, 1).numpy().astype(int)
        off = np.abs(images - theirs)
        print(
            f"batch {batch}: the images differ by {off.mean():.3f} of 255 on average, "
            f"{off.max()} at most",
            flush=True,
        )
        if args.dtype == "float32" and off.mean() > 0.5:
            raise ValueError("the two make different pictures")
        program: Any
        program, model, count = pipe.prepare("ddim", form, rows)
        memory = program.lower(model, plan, rows).compile().memory_analysis()
        unet_flops = flops_of(pipe.model, batch)
        sides = {
            "ours": Side(
                ours, None if memory is None else float(count * memory.temp_size_in_bytes)
            ),
            "torch.compile" if args.compile else "eager": in_torch(
                lambda twin_inputs=twin_inputs: twin(*twin_inputs)
            ),
        }
        what = f"{args.case} text to image, {args.steps} steps, batch {batch}, {args.dtype}"
        results.append(
            summary(what, sides, compare(sides, args.repeats, warmup=1), args.steps * unet_flops)
        )
    show(results, args.json)


def flops_of(model: Any, batch: int) -> float:
    """Returns the FLOPs of one guided step: two UNet calls for each image."""
    side = model.config["sampling"]["size"][0] // model.first_stage.downsampling
    x = jax.ShapeDtypeStruct((2 * batch, side, side, model.unet.in_channels), jnp.float32)
    t = jax.ShapeDtypeStruct((2 * batch,), jnp.int32)
    context = jax.ShapeDtypeStruct((2 * batch, 24, model.unet.context_dim), jnp.float32)
    return products(
        lambda p, *a: model.unet.apply({"params": p}, *a), model.params["unet"], x, t, context
    )


if __name__ == "__main__":
    main()
