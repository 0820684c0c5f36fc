"""Inspection of a config's data before a training: counts, problems, a contact sheet."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from ldm_jax.conditioning import make_conditioner
from ldm_jax.conditioning.base import RowCondition, Rows, some
from ldm_jax.conditioning.config import complete_model, frozen_conditioner
from ldm_jax.data import Captions, Loader
from ldm_jax.data.loader import UNREADABLE, fit_row, read_row
from ldm_jax.data.pixels import as_rgb
from ldm_jax.errors import DataError
from ldm_jax.io import png
from ldm_jax.models.build import DTYPES
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
        for line in loader.notes:
            LOG.info(line)
        found += check_pictures(loader, places)
        problems += [f"{part}: {line}" for line in found]
        if training:
            write_sheet(loader, out)
    for line in problems:
        LOG.warning("problem: %s", line)
    if not problems:
        LOG.info("no problem was found")
    return problems


def check_rows(loader: Loader, config: Any, few: int) -> Iterator[str]:
    """Finds problems of captions and conditions; a class of fewer than ``few`` pictures is one."""
    source, condition = loader.source, cast(RowCondition | None, loader.condition)
    model = plain(config.model)
    fields, _ = frozen_conditioner(model.get("conditioner", {"kind": "none"}))
    model = complete_model({**model, "conditioner": fields}, condition, 0.0)
    conditioner = make_conditioner(model["conditioner"], DTYPES["float32"])
    caption = loader.captions or Captions(("",))
    captions = [caption(row) for row in source.rows]
    rows = Rows(source.rows, captions, source.name)
    yield from conditioner.row_problems(rows, getattr(condition, "column", ""), few)


def check_pictures(loader: Loader, places: Sequence[int]) -> Iterator[str]:
    """Finds pictures at ``places`` that are broken, too small, or without their condition."""
    broken: list[str] = []
    small: list[str] = []
    wrong: list[str] = []
    least: set[str] = set()
    for i in tqdm(places, desc="decoding", unit=" pictures", leave=False, disable=None):
        name = loader.source.name(i)
        try:
            row = read_row(loader.source, i, loader.condition, loader.pixels)
        except UNREADABLE as error:
            broken.append(f"{name}: {' '.join(str(error).split())}")
            continue
        h, w = row["image"].shape[:2]
        transform: Any = loader.transform_of(i)
        if h < transform.size[0] or w < transform.size[1]:
            small.append(f"{name} {h}x{w}")
            least.add("{}x{}".format(*transform.size))
        try:
            fit_row(row, transform, loader.condition, np.random.default_rng(i))
        except DataError as error:
            wrong.append(f"{name}: {error}")
    for found, problem in (
        (broken, "cannot be read and are skipped"),
        (small, f"are smaller than {some(sorted(least))} and are enlarged"),
        (wrong, "stop a training"),
    ):
        if found:
            yield f"{len(found)} of {len(places)} pictures {problem} ({some(found)})"


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
    shown = None
    if loader.condition is not None:
        shown = loader.condition.draw(batch["image"], batch["condition"])
    sheet = png.contact_sheet(
        as_rgb(batch["image"][:n]), texts[:n], None if shown is None else shown[:n]
    )
    png.save_png(out, sheet)
    LOG.info("the contact sheet is %s", out)
