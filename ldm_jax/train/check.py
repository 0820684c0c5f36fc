"""Inspection of a config's data before a training: counts, problems, a contact sheet."""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm_jax.conditioning.base import CONDITIONERS
from ldm_jax.conditioning.drawing import contact_sheet, draw_conditions
from ldm_jax.conditioning.training import load_frozen
from ldm_jax.data import Loader, caption_template
from ldm_jax.data.loader import UNREADABLE, fit_row, read_row
from ldm_jax.errors import DataError
from ldm_jax.io import png
from ldm_jax.models.ldm import DTYPES, construct
from ldm_jax.train.config import complete
from ldm_jax.train.loaders import make_loader
from ldm_jax.train.tasks.base import plain

LOG = logging.getLogger(__name__)
FEW = 10  # a training class with fewer pictures is a problem
SHEET = 16  # pictures on the contact sheet


def check(config: Any, out: str | Path, *, sample: int = 2000) -> list[str]:
    """Inspects the data of a config.

    Args:
      config: A training config.
      out: File of the contact sheet, a PNG.
      sample: Pictures of each part, spread over it, that are decoded; 0 decodes all. Captions and
        classes of all rows are inspected.

    Returns:
      The problems, one line each.
    """
    problems: list[str] = []
    config = complete(config)
    uncached = config.copy_and_resolve_references()
    uncached.data.cache, uncached.batch_size = "", SHEET
    for part in ["train", *(["validation"] if config.data.get("holdout") else [])]:
        loader: Any = make_loader(uncached, part)
        count, training = len(loader.source), part == "train"
        LOG.info("%s: %d pictures in %s", part, count, loader.source.path)
        found = list(check_rows(loader, config, FEW if training else 1))
        if training and count < config.batch_size:
            size = config.batch_size
            found.insert(0, f"a batch of {size} has pictures twice: there are {count}")
        places = range(count)
        if 0 < sample < count:
            places = np.linspace(0, count - 1, sample).astype(int).tolist()
        found += check_pictures(loader, places, tuple(config.data.size))
        problems += [f"{part}: {line}" for line in found]
        if training:
            write_sheet(loader, out)
    for line in problems:
        LOG.warning("problem: %s", line)
    if not problems:
        LOG.info("no problem was found")
    return problems


def check_rows(loader: Loader, config: Any, few: int) -> Iterator[str]:
    """Finds problems of captions and classes; a class of fewer than ``few`` pictures is one."""
    rows, conditioner = loader.source.rows, plain(config.model).get("conditioner", {"kind": "none"})
    load_frozen(conditioner)  # may complete it by the config of the model that it comes from
    if conditioner.get("kind") == "hybrid":
        conditioner = conditioner["text"]
    kind = conditioner.get("kind")
    if kind in ("bert", "clip"):
        captions = [caption_template(config.data.caption, row) for row in rows]
        yield from check_captions(loader, captions, conditioner)
    if kind == "class":
        column = plain(config.data)["condition"]["column"]
        counts = Counter(row.get(column) for row in rows)
        common = [f"{name} {n}" for name, n in counts.most_common(20)]
        LOG.info("%d classes: %s", len(counts), some(common, 20, len(counts)))
        if rare := [str(name) for name, n in counts.items() if n < few]:
            share = f"{len(rare)} of {len(counts)} classes"
            yield f"{share} have fewer than {few} pictures ({some(rare)})"
    if boxes := getattr(loader.condition, "column", "") if kind == "tokens" else "":
        empty = [loader.source.name(i) for i, row in enumerate(rows) if not row.get(boxes)]
        LOG.info("%.1f boxes in a picture", np.mean([len(row.get(boxes) or ()) for row in rows]))
        if empty:
            yield f"{len(empty)} of {len(rows)} pictures have no box ({some(empty)})"


def check_captions(
    loader: Loader, captions: list[str], conditioner: dict[str, Any]
) -> Iterator[str]:
    """Finds captions that are empty, too long, or not in the vocabulary."""
    fields = {k: v for k, v in conditioner.items() if k != "kind"}
    kind = CONDITIONERS[conditioner["kind"]]
    reader = construct(kind, "conditioner", fields, dtype=DTYPES["float32"])
    n, source, known = len(captions), loader.source, sorted(set(captions))
    LOG.info("%d different captions", len(known))
    if empty := [source.name(i) for i, caption in enumerate(captions) if not caption.strip()]:
        yield f"{len(empty)} of {n} captions are empty ({some(empty)})"
    room = reader.max_length - 2
    # One id per word or part of a word, without special tokens.
    encoded = reader.tokenizer(known, add_special_tokens=False)["input_ids"] if known else []
    ids = dict(zip(known, encoded, strict=True))
    if long := [repr(c) for c in captions if len(ids[c]) > room]:
        limit = f"{room} tokens, model.conditioner.max_seq_len - 2"
        yield f"{len(long)} of {n} captions are cut after {limit} ({some(long)})"
    unknown = reader.tokenizer.unk_token_id
    end = getattr(reader.module, "vocab_size", 0) or 1 << 31
    if strange := [repr(c) for c in captions if any(i == unknown or i >= end for i in ids[c])]:
        share = f"{len(strange)} of {n} captions"
        yield f"{share} have tokens that the model does not know ({some(strange)})"


def check_pictures(loader: Loader, places: Sequence[int], size: tuple[int, int]) -> Iterator[str]:
    """Finds pictures at ``places`` that are broken, too small, or without their condition."""
    broken: list[str] = []
    small: list[str] = []
    wrong: list[str] = []
    for i in tqdm(places, desc="decoding", unit=" pictures", leave=False, disable=None):
        name = loader.source.name(i)
        try:
            row = read_row(loader.source, i, loader.condition)
        except UNREADABLE as error:
            broken.append(f"{name}: {' '.join(str(error).split())}")
            continue
        h, w = row["image"].shape[:2]
        if h < size[0] or w < size[1]:
            small.append(f"{name} {h}x{w}")
        try:
            fit_row(row, loader.transform, loader.condition, np.random.default_rng(i))
        except DataError as error:
            wrong.append(f"{name}: {error}")
    for found, problem in (
        (broken, "cannot be read and are skipped"),
        (small, f"are smaller than {size[0]}x{size[1]} and are enlarged"),
        (wrong, "stop a training"),
    ):
        if found:
            yield f"{len(found)} of {len(places)} pictures {problem} ({some(found)})"


def some(names: Sequence[str], most: int = 3, count: int | None = None) -> str:
    """Returns the first names as "a, b, c ..."; ``count`` is the number of all."""
    return ", ".join(names[:most]) + (" ..." if (count or len(names)) > most else "")


def write_sheet(loader: Any, out: str | Path) -> None:
    """Writes pictures as training sees them, their conditions beside, their captions below."""
    try:
        with contextlib.closing(loader.iterate()) as batches:
            batch = next(batches)
    except DataError as error:
        LOG.warning("no contact sheet: %s", error)
        return
    texts, names = batch["caption"], getattr(loader.condition, "names", ())
    if (classes := batch.get("condition", np.zeros(()))).ndim == 1:
        pairs = zip(classes, texts, strict=True)
        texts = [f"{names[c] if names else c}: {text}" for c, text in pairs]
    n = min(len(loader.source), SHEET)
    shown = draw_conditions(loader.condition, batch)
    sheet = contact_sheet(batch["image"][:n], texts[:n], None if shown is None else shown[:n])
    png.save_png(out, sheet)
    LOG.info("the contact sheet is %s", out)
