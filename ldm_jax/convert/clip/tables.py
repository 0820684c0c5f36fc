"""Name tables of whole CLIP models; their parameters are those of `ldm_jax.models.clip.CLIP`."""

import numpy as np

from ldm_jax.convert.compvis.blocks import Walk
from ldm_jax.convert.compvis.encoders import clip_text_table, clip_vision_table, resblocks
from ldm_jax.convert.tables import Entry, Path, Table, Unused, conv, dense, norm, under
from ldm_jax.models.clip import CLIP, CLIPText, CLIPVision
from ldm_jax.models.clip_resnet import CLIPResNet

_SCALE = Entry("logit_scale", ("logit_scale",))


def openai_table(model: CLIP) -> Table:
    """The names of OpenAI's files (``visual.*``, ``transformer.resblocks.*`` ...)."""
    vision = model.vision
    image = _resnet(vision) if isinstance(vision, CLIPResNet) else _transformer(vision)
    text = model.text
    numbers = {
        "input_resolution": vision.image_size,
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
    }
    return [
        *under(("conditioner",), _text(text)),
        *under(("vision",), image),
        _SCALE,
        # Older files hold these sizes as arrays.
        *(Unused(name, lambda n=n: np.array(n, np.int64), True) for name, n in numbers.items()),
    ]


def transformers_table(model: CLIP) -> Table:
    """The names of transformers' CLIPModel; it has no image tower of the kind "resnet"."""
    assert isinstance(model.vision, CLIPVision)
    return [
        *under(("conditioner",), clip_text_table(model.text, "text_model.")),
        *under(("vision",), clip_vision_table(model.vision)),
        _SCALE,
    ]


def _text(model: CLIPText) -> Table:
    return [
        Entry("token_embedding.weight", ("token_embedding", "embedding")),
        Entry("positional_embedding", ("position_embedding",)),
        *resblocks("", model.num_hidden_layers),
        *norm("ln_final", ("final_norm",)),
        Entry("text_projection", ("projection", "kernel")),
    ]


def _transformer(model: CLIPVision) -> Table:
    return [
        Entry("visual.class_embedding", ("class_embedding",)),
        Entry("visual.positional_embedding", ("position_embedding",)),
        *conv("visual.conv1", ("patch_embedding",), bias=False),
        *norm("visual.ln_pre", ("pre_norm",)),
        *resblocks("visual.", model.num_hidden_layers),
        *norm("visual.ln_post", ("post_norm",)),
        Entry("visual.proj", ("projection", "kernel")),
    ]


def _resnet(model: CLIPResNet) -> Table:
    table: Table = []
    for i in (1, 2, 3):
        table += _conv_norm(f"visual.conv{i}", f"visual.bn{i}", (), str(i))
    for i, count in enumerate(model.layers):
        for j in range(count):
            source, ours = f"visual.layer{i + 1}.{j}", (f"layers_{i}_{j}",)
            for k in (1, 2, 3):
                table += _conv_norm(f"{source}.conv{k}", f"{source}.bn{k}", ours, str(k))
            if not j:  # the first block of each stage changes the channels
                skip = f"{source}.downsample"
                table += _conv_norm(f"{skip}.0", f"{skip}.1", ours, "_skip")
    pool = "visual.attnpool"
    table.append(Entry(f"{pool}.positional_embedding", ("pool", "position_embedding")))
    for name in ("q", "k", "v"):
        table += dense(f"{pool}.{name}_proj", ("pool", name))
    return [*table, *dense(f"{pool}.c_proj", ("pool", "projection"))]


def _conv_norm(source: str, statistics: str, path: Path, name: str) -> Walk:
    """A convolution without bias and its batch normalisation, ``conv`` and ``norm`` + ``name``."""
    yield from conv(source, (*path, f"conv{name}"), bias=False)
    ours = (*path, f"norm{name}")
    yield from norm(statistics, ours)
    for kind in ("mean", "var"):
        yield Entry(f"{statistics}.running_{kind}", (*ours, kind))
    yield Unused(f"{statistics}.num_batches_tracked", lambda: np.zeros((), np.int64))
