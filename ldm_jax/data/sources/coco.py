"""COCO's annotations: captions, boxes, maps of things and stuff."""

import json
import os
import posixpath
from collections import defaultdict
from pathlib import Path
from typing import Any

from ldm_jax.data.sources.files import FileRows, Files, stem
from ldm_jax.errors import DataError


class COCO(FileRows):
    """Pictures described by COCO's JSON files. Columns: "text", the first caption, "captions", all; "boxes" as `ldm_jax.data.Layout` reads them;
    "map", a label map's bytes, where ``maps`` is given.

    Args:
      path: the folder or archive of the pictures, val2017 say.
      annotations: the JSON of captions, or of instances (or stuff), or several, joined by commas; pictures are those of the first.
      maps: the folder of label maps in ``path``, PNGs named as the pictures are (stuffthingmaps).
      min_area: boxes smaller than this part of the picture are left out (the original's 1e-5), and so are crowds.
      min_boxes, max_boxes: pictures with fewer or more boxes are left out where there are annotations of boxes (the original: 2 and 30).

    Raises:
      DataError: a file is missing or is not of this kind, or no picture is left.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        annotations: str,
        maps: str = "",
        min_area: float = 1e-5,
        min_boxes: int = 0,
        max_boxes: int = 10**9,
    ):
        self.path, self._files = os.fspath(path), Files(path)
        tables = [(name.strip(), _read(name.strip())) for name in annotations.split(",")]
        captions, boxes, with_boxes = defaultdict(list), defaultdict(list), False
        images = {image["id"]: image for image in tables[0][1]["images"]}
        for name, table in tables:
            labels = {category["id"]: category["name"] for category in table.get("categories", [])}
            with_boxes = with_boxes or bool(labels)
            for note in table["annotations"]:
                image = images.get(note["image_id"])
                if image is None:
                    continue
                if "caption" in note:
                    captions[image["id"]].append(" ".join(note["caption"].split()))
                elif "bbox" in note and not note.get("iscrowd"):
                    w, h = image["width"], image["height"]
                    x, y, bw, bh = note["bbox"]
                    box = [x / w, y / h, bw / w, bh / h]
                    if note["category_id"] not in labels:
                        raise DataError(
                            f"{name}: category {note['category_id']} of a box is not in its list of categories"
                        )
                    if box[2] * box[3] >= min_area and min(box[2:]) > 0:
                        boxes[image["id"]].append(
                            {"label": labels[note["category_id"]], "box": box}
                        )
        in_maps = self._files.pictures(maps) if maps else []
        by_name = {
            posixpath.basename(name): name
            for name in sorted({*self._files.pictures()} - {*in_maps})
        }
        found = {stem(posixpath.basename(name)): name for name in in_maps}
        self._columns = ("map",) if maps else ()
        self.rows = []
        for key, image in images.items():
            if with_boxes and not min_boxes <= len(boxes[key]) <= max_boxes:
                continue
            name = posixpath.basename(image["file_name"])
            row = {"file_name": by_name.get(name, name), "text": next(iter(captions[key]), "")}
            row |= {"captions": captions[key]} if captions[key] else {}
            row |= {"boxes": boxes[key]} if with_boxes else {}
            self.rows.append(
                row | ({"map": found.get(stem(name), f"{maps}/{stem(name)}.png")} if maps else {})
            )
        if not self.rows:
            raise DataError(
                f"{self.path}: no picture is left: check data.min_boxes and data.max_boxes"
            )
        self._check_there(posixpath.basename(tables[0][0]))


def _read(path: str) -> dict[str, Any]:
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"data.annotations {path} does not exist: give COCO's captions_*.json or instances_*.json"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"data.annotations {path} cannot be read: {error}") from None
    if not isinstance(table, dict) or not {"images", "annotations"} <= table.keys():
        raise DataError(
            f"data.annotations {path} has no 'images' and 'annotations': give COCO's own JSON files"
        )
    return table
