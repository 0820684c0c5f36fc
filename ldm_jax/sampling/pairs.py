"""Inpainting of a folder of pictures and masks at their own sizes, as the original's script does.

Rombach et al. 2022, arXiv:2112.10752, section 4.5: NAME.png and NAME_mask.png are a pair.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.conditioning.pictures import read_mask, read_picture
from ldm_jax.errors import RequestError
from ldm_jax.sampling.request import Request

_MASK = "_mask"


class Pair(NamedTuple):
    """A picture and its mask, files of one folder."""

    image: Path
    mask: Path


def find_pairs(folder: str | Path) -> list[Pair]:
    """Returns the pairs of a folder by name; RequestError where a mask has no picture."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RequestError(f"--pairs {folder} is no folder: give one of NAME.png, NAME_mask.png")
    masks = sorted(path for path in folder.iterdir() if path.stem.endswith(_MASK))
    pairs = []
    for mask in masks:
        name = mask.stem.removesuffix(_MASK)
        images = sorted(path for path in folder.glob(f"{_escaped(name)}.*") if path.is_file())
        if len(images) != 1:
            found = "several pictures" if images else "no picture"
            raise RequestError(f"--pairs {folder}: there is {found} {name}.* for {mask.name}")
        pairs.append(Pair(images[0], mask))
    if not pairs:
        raise RequestError(f"--pairs {folder}: there is no mask: name the files NAME_mask.png")
    return pairs


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def inpaint(pipe: Any, request: Request, pairs: list[Pair]) -> Iterator[np.ndarray]:
    """Paints the masked parts of pictures at their own sizes.

    Sides are padded to what the model's levels need, by the pixels at the edges, and cut off again.
    Each size compiles a program of its own.

    Args:
      pipe: A `Pipeline` whose model takes an image and a mask.
      request: All but image, mask and size.
      pairs: The pictures.

    Yields:
      uint8 [h, w, 3] of each pair; what is not masked stays as it was.
    """
    multiple = pipe.model.first_stage.downsampling * pipe.model.multiple
    for pair in pairs:
        image, mask = read_picture(pair.image), read_mask(pair.mask)
        h, w = image.shape[:2]
        if mask.shape != (h, w):
            size = "{}x{}".format(*mask.shape)
            raise RequestError(f"{pair.mask} is {size}, and its picture {h}x{w}: give one size")
        border = ((0, -h % multiple), (0, -w % multiple))
        whole = dataclasses.replace(
            request,
            image=np.pad(image, (*border, (0, 0)), mode="edge"),
            mask=np.pad(mask, border),  # the border is not painted
            size=(h + border[0][1], w + border[1][1]),
        )
        (made,) = (done.images[0] for done in pipe.batches(whole))
        yield made[:h, :w]
