"""A CLIP model of OpenAI or of transformers as a model directory here."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ldm_jax.convert.clip.tables import openai_table, transformers_table
from ldm_jax.convert.compvis.original import fields_of
from ldm_jax.convert.compvis.targets import clip_text_from_params, clip_vision_from_params
from ldm_jax.convert.converted import Converted, Taking, describe
from ldm_jax.convert.reader.lazy import LazyTensor
from ldm_jax.convert.reader.reader import open_checkpoint
from ldm_jax.convert.tables import Entry, Table, to_ours
from ldm_jax.errors import ReaderError, TargetError
from ldm_jax.models.clip import CLIP, CLIPText, CLIPVision
from ldm_jax.models.clip_resnet import CLIPResNet

# Names that every file of OpenAI's has.
_OPENAI = ("token_embedding.weight", "text_projection", "visual.conv1.weight")


def is_clip(path: str | Path) -> bool:
    """Whether a path is a transformers folder of a CLIPModel, or a file with OpenAI's names."""
    path = Path(path)
    if path.is_dir():
        return _config_of(path) is not None
    if not path.is_file():
        return False
    try:
        with open_checkpoint(path) as checkpoint:
            return all(name in checkpoint.tensors for name in _OPENAI)
    except ReaderError:
        return False


def from_clip(
    path: str | Path,
    *,
    config: Any = None,
    ema: bool | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    allow_unexpected: bool = False,
) -> Converted:
    """Reads both towers.

    Args:
      path: A file with OpenAI's names, or a folder of transformers.
      config: Must be None: the sizes follow from the shapes, or from the folder's config.json.
      ema: Must not be True: there are no averages.
      dtype: The dtype of floating-point parameters; None: as stored.
      variant: Which variant of a folder's weights to read ("fp16").
      allow_unexpected: Leave out arrays that the model does not have instead of refusing them.

    Raises:
      ReaderError, TargetError or ConversionError: See there.
    """
    path = Path(path)
    if config is not None:
        raise TargetError(f"{path} describes itself: leave the YAML out")
    if ema:
        raise TargetError(f"{path} holds no averages beside its weights: leave ema out")
    given = _config_of(path) if path.is_dir() else None
    taking = Taking(dtype)
    with open_checkpoint(path, variant=variant) as checkpoint:
        tensors: dict[str, LazyTensor] = dict(checkpoint.tensors)
        if given is None:
            model = clip_from_shapes({name: tuple(t.shape) for name, t in tensors.items()})
            table = openai_table(model)
        else:
            model = clip_from_transformers(given)
            table = transformers_table(model)
        known = {entry.source for entry in table}
        left_out = []
        if allow_unexpected:
            for name in sorted(tensors.keys() - known):
                why = {"why": "not expected; --allow_unexpected"}
                left_out.append(describe(name, tensors.pop(name)) | why)
        stored = {name: describe(name, tensor) for name, tensor in tensors.items()}
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        taken = [(name, taking.lazy(name, tensor)) for name, tensor in tensors.items()]
        params = to_ours(table, taken, shapes=shapes, where=path.name)
        taking.check(path.name)
    entries, unused = _report(table, stored, taking.digests)
    return Converted(config_of(model), params, entries, [*left_out, *unused])


def _report(
    table: Table, stored: Mapping[str, dict[str, Any]], digests: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the lines of the parameters and of what no computation needs."""
    entries, left_out = [], []
    for entry in table:
        if entry.source not in stored:
            continue
        about = stored[entry.source]
        if isinstance(entry, Entry):
            place = {"path": "/".join(entry.path), "sha256": digests[entry.source]}
            entries.append(about | place)
        else:
            left_out.append(about | {"why": "no computation needs it"})
    return entries, left_out


def config_of(model: CLIP) -> dict[str, Any]:
    """Returns the ``config.json`` of a CLIP model directory."""
    kind = "resnet" if isinstance(model.vision, CLIPResNet) else "vit"
    return {
        "kind": "clip",
        "conditioner": {"kind": "clip", **fields_of(model.text)},
        "vision": {"kind": kind, **fields_of(model.vision)},
    }


def clip_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> CLIP:
    """Returns the towers that a file with OpenAI's names holds.

    Heads have 64 channels; an "RN" model's attention has one for every 64 of its pooled channels.

    Raises:
      TargetError: The names are of no CLIP model.
    """
    try:
        width, joint = shapes["text_projection"]
        text = CLIPText(
            vocab_size=shapes["token_embedding.weight"][0],
            max_position_embeddings=shapes["positional_embedding"][0],
            projection_dim=joint,
            **_sizes(shapes, width, "transformer.resblocks"),
        )
        if "visual.proj" in shapes:
            width, _, patch, _ = shapes["visual.conv1.weight"]
            grid = _side(shapes["visual.positional_embedding"][0])
            vision: CLIPVision | CLIPResNet = CLIPVision(
                image_size=grid * patch,
                patch_size=patch,
                projection_dim=shapes["visual.proj"][1],
                **_sizes(shapes, width, "visual.transformer.resblocks"),
            )
        else:
            width = shapes["visual.layer1.0.conv1.weight"][0]
            stages = (f"visual.layer{i}" for i in range(1, 5))
            vision = CLIPResNet(
                layers=tuple(_count(shapes, stage) for stage in stages),
                width=width,
                num_attention_heads=width * 32 // 64,
                image_size=32 * _side(shapes["visual.attnpool.positional_embedding"][0]),
                projection_dim=shapes["visual.attnpool.c_proj.weight"][0],
            )
    except (KeyError, IndexError, ValueError) as error:
        raise TargetError(f"names and shapes of no CLIP model of OpenAI: {error}") from None
    return CLIP(text, vision)


def _sizes(shapes: Mapping[str, tuple[int, ...]], width: int, blocks: str) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": shapes[f"{blocks}.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": _count(shapes, blocks),
        "num_attention_heads": max(width // 64, 1),
    }


def _count(shapes: Mapping[str, Any], prefix: str) -> int:
    """The number of layers ``prefix.0``, ``prefix.1`` ..."""
    return len({m[1] for name in shapes if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))})


def _side(positions: int) -> int:
    return round((positions - 1) ** 0.5)


def clip_from_transformers(config: Mapping[str, Any]) -> CLIP:
    """Returns the towers that a CLIPModel's config.json describes; TargetError where it has others.

    Sizes that a section leaves out are those of transformers' defaults, ViT-B/32.
    """
    joint = config.get("projection_dim", 512)
    sections = {
        name: {
            k: v for k, v in dict(config[f"{name}_config"]).items() if k not in _GENERATION.split()
        }
        for name in ("text", "vision")
    }
    defaults = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
    }
    sections["vision"].pop("projection_dim", None)
    text = clip_text_from_params({**defaults, **sections["text"]})
    vision = clip_vision_from_params({**sections["vision"], "projection_dim": joint})
    return CLIP(text.clone(projection_dim=joint), vision)


# What older versions of transformers wrote into every section; none is of the network.
_GENERATION = """
    add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id
    length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class top_k top_p torchscript typical_p use_bfloat16
"""


def _config_of(folder: Path) -> dict[str, Any] | None:
    """Returns the config.json of a CLIPModel's folder; None where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    sections = ("text_config", "vision_config")
    whole = isinstance(config, dict) and all(isinstance(config.get(s), dict) for s in sections)
    return config if whole else None
