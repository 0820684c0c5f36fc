"""Looks through a config's data before a training: what there is, what is wrong with it, and a contact sheet."""

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
from ldm_jax.io import png as pictures
from ldm_jax.models.ldm import DTYPES, construct
from ldm_jax.train.loaders import make_loader
from ldm_jax.train.tasks.base import plain

LOG = logging.getLogger(__name__)
FEW = 10  # pictures of a class to train on
SHEET = 16  # pictures on the contact sheet


def check(config: Any, out: str | Path, *, sample: int = 2000) -> list[str]:
    """Says what a config's data hold, writes a contact sheet as PNG to ``out``, and returns what is wrong, a line each.

    Captions and classes are looked at in all rows; ``sample`` pictures of a part, spread over it, are decoded with their conditions (0: all).
    """
    problems: list[str] = []
    uncached = config.copy_and_resolve_references()
    uncached.data.cache, uncached.batch_size = "", SHEET  # the pictures themselves are looked at
    parts = ["train", *(["validation"] if config.data.get("holdout") else [])]
    for part in parts:
        loader: Any = make_loader(uncached, part)
        count = len(loader.source)
        LOG.info("%s: %d pictures in %s", part, count, loader.source.path)
        if part == "train" and count < config.batch_size:
            problems.append(
                f"{part}: a batch of {config.batch_size} has pictures twice: there are {count}"
            )
        problems += [
            f"{part}: {line}" for line in check_rows(loader, config, FEW if part == "train" else 1)
        ]
        places = (
            range(count)
            if not sample or sample >= count
            else np.linspace(0, count - 1, sample).astype(int).tolist()
        )
        problems += [
            f"{part}: {line}" for line in check_pictures(loader, places, tuple(config.data.size))
        ]
        if part == "train":
            write_sheet(loader, out)
    for line in problems:
        LOG.warning("problem: %s", line)
    if not problems:
        LOG.info("nothing wrong was found")
    return problems


def check_rows(loader: Loader, config: Any, few: int) -> Iterator[str]:
    """What is wrong with captions and classes, from the rows alone; classes of fewer than ``few`` pictures are."""
    rows, conditioner = loader.source.rows, plain(config.model).get("conditioner", {"kind": "none"})
    load_frozen(conditioner)  # a frozen one may be described by the model that it comes from alone
    if conditioner.get("kind") == "hybrid":
        conditioner = conditioner["text"]
    kind = conditioner.get("kind")
    if kind in ("bert", "clip"):
        captions = [caption_template(config.data.caption, row) for row in rows]
        yield from check_captions(loader, captions, conditioner)
    if kind == "class":
        column = plain(config.data)["condition"]["column"]
        counts = Counter(row.get(column) for row in rows)
        told = ", ".join(f"{name} {n}" for name, n in counts.most_common(20)) + (
            " ..." if len(counts) > 20 else ""
        )
        LOG.info("%d classes: %s", len(counts), told)
        if rare := [str(name) for name, n in counts.items() if n < few]:
            yield f"{len(rare)} of {len(counts)} classes have fewer than {few} pictures ({some(rare)})"
    if boxes := getattr(loader.condition, "column", "") if kind == "tokens" else "":
        empty = [loader.source.name(i) for i, row in enumerate(rows) if not row.get(boxes)]
        LOG.info("%.1f boxes in a picture", np.mean([len(row.get(boxes) or ()) for row in rows]))
        if empty:
            yield f"{len(empty)} of {len(rows)} pictures have no box ({some(empty)})"


def check_captions(
    loader: Loader, captions: list[str], conditioner: dict[str, Any]
) -> Iterator[str]:
    """What is empty, too long, or not in the vocabulary."""
    fields = {k: v for k, v in conditioner.items() if k != "kind"}
    reader = construct(
        CONDITIONERS[conditioner["kind"]], "conditioner", fields, dtype=DTYPES["float32"]
    )
    n, source = len(captions), loader.source
    LOG.info("%d different captions", len(set(captions)))
    if empty := [source.name(i) for i, caption in enumerate(captions) if not caption.strip()]:
        yield f"{len(empty)} of {n} captions are empty ({some(empty)})"
    room = reader.max_length - 2
    known = sorted(set(captions))
    # One id for each word or part of one; special tokens are not among them.
    ids = (
        dict(
            zip(known, reader.tokenizer(known, add_special_tokens=False)["input_ids"], strict=True)
        )
        if known
        else {}
    )
    if long := [repr(c) for c in captions if len(ids[c]) > room]:
        yield f"{len(long)} of {n} captions are cut after {room} tokens, model.conditioner.max_seq_len - 2 ({some(long)})"
    vocabulary = getattr(reader.module, "vocab_size", 0)
    unknown, outside = reader.tokenizer.unk_token_id, vocabulary or 1 << 31
    if strange := [repr(c) for c in captions if any(i == unknown or i >= outside for i in ids[c])]:
        yield f"{len(strange)} of {n} captions have tokens that the model does not know ({some(strange)})"


def check_pictures(loader: Loader, places: Sequence[int], size: tuple[int, int]) -> Iterator[str]:
    """What cannot be decoded, is too small, or has no condition, among the pictures at ``places``."""
    broken: list[str] = []
    small: list[str] = []
    wrong: dict[str, str] = {}
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
            wrong[name] = str(error)
    n = len(places)
    if broken:
        yield f"{len(broken)} of {n} pictures cannot be read and are skipped ({some(broken)})"
    if small:
        yield f"{len(small)} of {n} pictures are smaller than {size[0]}x{size[1]} and are enlarged ({some(small)})"
    if wrong:
        yield f"{len(wrong)} of {n} pictures stop a training ({some([f'{k}: {v}' for k, v in wrong.items()])})"


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of many, as "a, b, c ..."."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def write_sheet(loader: Any, out: str | Path) -> None:
    """Pictures as training sees them, with their conditions beside and captions or classes below; none where nothing can be read."""
    try:
        with contextlib.closing(loader.iterate()) as batches:
            batch = next(batches)
    except DataError as error:
        LOG.warning("no contact sheet: %s", error)
        return
    texts = batch["caption"]
    names = getattr(loader.condition, "names", ())
    if batch.get("condition", np.zeros(())).ndim == 1:
        texts = [
            f"{names[c] if names else c}: {text}"
            for c, text in zip(batch["condition"], texts, strict=True)
        ]
    n = min(len(loader.source), SHEET)
    shown = draw_conditions(loader.condition, batch)
    pictures.save_png(
        out, contact_sheet(batch["image"][:n], texts[:n], None if shown is None else shown[:n])
    )
    LOG.info("the contact sheet is %s", out)
