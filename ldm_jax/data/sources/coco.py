"""COCO's annotations: captions, boxes, and maps of things and stuff."""

import math
import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.data.decode import picture_size
from ldm_jax.data.sources.files import FileRows, Files, stem
from ldm_jax.data.sources.tables import caption_text, parse_json, read_bytes
from ldm_jax.errors import DataError, UnreadablePicture
from ldm_jax.io.paths import exists


class COCO(FileRows):
    """Pictures described by COCO's JSON files, also as other labelling tools write them.

    Columns: "text", the first caption; "captions", all of them; "boxes", [{"label", "box": [left,
    top, width, height] as fractions of the picture}]; "map", a label map's bytes.

    Args:
      path: The folder or archive of the pictures, such as val2017.
      annotations: The JSON file of captions, of instances or of stuff, or several, joined by
        commas; the pictures are those of the first.
      maps: The folder of label maps in ``path``, PNGs named as the pictures are (stuffthingmaps);
        "" for none.
      min_area: Boxes of a smaller fraction of the picture are left out, and so are crowds.
      min_boxes: Pictures with fewer boxes are left out where there are boxes (LDM's layouts: 2).
      max_boxes: Pictures with more boxes are left out (LDM's layouts: 30).

    Raises:
      DataError: A file is missing or is not of this format, or no picture is left.
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
        self._columns = ("map",) if maps else ()
        tables = [(name.strip(), _read(name.strip())) for name in annotations.split(",")]
        # Some tools write ids as text in one list and as numbers in another.
        images = {str(image["id"]): image for image in tables[0][1]["images"]}
        captions, boxes = defaultdict(list), defaultdict(list)
        with_boxes = any(table.get("categories") for _, table in tables)
        in_maps = self._files.pictures(maps) if maps else []
        by_stem = {stem(posixpath.basename(name)): name for name in in_maps}
        names = self._match({*self._files.pictures()} - {*in_maps}, images)
        for name, table in tables:
            labels = {str(c["id"]): str(c["name"]) for c in table.get("categories") or ()}
            for number, note in enumerate(table["annotations"]):
                key, where = str(note["image_id"]), f"{name}: annotation {number}"
                if key not in images:
                    continue
                if "caption" in note:
                    if text := " ".join(caption_text(note["caption"], where).split()):
                        captions[key].append(text)
                elif note.get("bbox") is not None and str(note.get("iscrowd") or 0) == "0":
                    label = labels.get(str(note.get("category_id")))
                    if label is None:
                        raise DataError(
                            f"{where}: category {note.get('category_id')} of a box is not in its "
                            "list of categories"
                        )
                    box = self._box(note["bbox"], images[key], names[key], where)
                    if box[2] * box[3] >= min_area and min(box[2:]) > 0:
                        boxes[key].append({"label": label, "box": box})
        self.rows = []
        for key, image in images.items():
            if with_boxes and not min_boxes <= len(boxes[key]) <= max_boxes:
                continue
            row = {"file_name": names[key], "text": next(iter(captions[key]), "")}
            row |= {"captions": captions[key]} if captions else {}
            row |= {"boxes": boxes[key]} if with_boxes else {}
            base = stem(posixpath.basename(image["file_name"]))
            row |= {"map": by_stem.get(base, f"{maps}/{base}.png")} if maps else {}
            self.rows.append(row)
        if not self.rows:
            raise DataError(
                f"{self.path}: no picture is left: check data.min_boxes and data.max_boxes"
            )
        self._resolve(posixpath.basename(tables[0][0]))

    def _match(self, pictures: set[str], images: Mapping[str, Any]) -> dict[str, str]:
        """Finds each image's file: of its whole name, else the only one of its base name."""
        bases = Counter(posixpath.basename(name) for name in pictures)
        by_base = {posixpath.basename(n): n for n in pictures if bases[posixpath.basename(n)] == 1}
        names: dict[str, str] = {key: image["file_name"] for key, image in images.items()}
        return {
            key: self._files.find(name)
            or by_base.get(posixpath.basename(name.replace("\\", "/")), name)
            for key, name in names.items()
        }

    def _box(self, box: Any, image: dict[str, Any], file: str, where: str) -> list[float]:
        """Returns [left, top, width, height] as fractions of the picture."""
        if not image.get("width") or not image.get("height"):
            try:
                image["height"], image["width"] = picture_size(self._files.read(file))
            except (OSError, UnreadablePicture) as error:
                reason = f"the image {file} has no width and height, nor can it be read: {error}"
                raise DataError(f"{where}: {reason}") from None
        values = box if isinstance(box, Sequence) and len(box) == 4 else ()
        try:
            x, y, w, h = (float(value) for value in values)
            width, height = float(image["width"]), float(image["height"])
        except (TypeError, ValueError):
            x = y = w = h = width = height = math.nan
        if not all(map(math.isfinite, (x, y, w, h, width, height))) or min(width, height) <= 0:
            raise DataError(f"{where}: the box {box!r} is not four numbers in an image with a size")
        return [x / width, y / height, w / width, h / height]


def _read(path: str) -> dict[str, Any]:
    where = f"data.annotations {path}"
    if not exists(path):
        raise DataError(f"{where} does not exist: give COCO's captions_*.json or instances_*.json")
    table = parse_json(read_bytes(path), where)
    if not isinstance(table, dict) or not {"images", "annotations"} <= table.keys():
        raise DataError(f"{where} has no 'images' and 'annotations': give COCO's own JSON files")
    fields = {
        "images": ("id", "file_name"),
        "annotations": ("image_id",),
        "categories": ("id", "name"),
    }
    for kind, needed in fields.items():
        items = table.get(kind) or []
        for number, item in enumerate(items if isinstance(items, list) else [None]):
            found = item if isinstance(item, dict) else {}
            lost = [f for f in needed if found.get(f) is None]
            if lost or (kind == "images" and not isinstance(found["file_name"], str)):
                raise DataError(
                    f"{where}: number {number} of its {kind} has no {(lost or needed)[-1]}"
                )
    return table
