"""Chooses the small emoji set that ships with ldm_jax from the full archive.

    python tools/make_emoji_subset.py emoji64.zip --out ldm_jax/assets/emoji_subset.zip

The archive is an image folder with a metadata.jsonl (file_name, text, style, tags, group, subgroup,
hexcode, license). Whole concepts are chosen, each in all its styles, in turn from every group and
subgroup; the choice within a subgroup is a hash, so the same archive always gives the same bytes.
"""

import argparse
import hashlib
import itertools
import json
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

MIN_STYLES = 5  # a concept in fewer styles teaches little about the difference between them

# style: (licence as in the metadata, copyright and source, package it was rasterised from)
STYLES = {
    "fluent": (
        "MIT",
        "Fluent Emoji, Copyright (c) Microsoft Corporation",
        "@iconify-json/fluent-emoji",
    ),
    "fluent flat": (
        "MIT",
        "Fluent Emoji, Copyright (c) Microsoft Corporation",
        "@iconify-json/fluent-emoji-flat",
    ),
    "fluent 3d": (
        "MIT",
        "Fluent Emoji, Copyright (c) Microsoft Corporation",
        "@lobehub/fluent-emoji-3d",
    ),
    "noto": ("Apache-2.0", "Noto Emoji, Copyright Google Inc.", "@iconify-json/noto"),
    "noto blob": (
        "Apache-2.0",
        "Noto Emoji, blob design, Copyright Google Inc.",
        "@iconify-json/noto-v1",
    ),
    "firefox": ("Apache-2.0", "FxEmojis, Copyright Mozilla Foundation", "@iconify-json/fxemoji"),
    "twemoji": (
        "CC-BY-4.0",
        "Twemoji, Copyright Twitter, Inc and other contributors",
        "@iconify-json/twemoji",
    ),
    "emojione": (
        "CC-BY-4.0",
        "EmojiOne version 2, emoji art supplied by EmojiOne",
        "@iconify-json/emojione",
    ),
}

LICENSES = """\
Pictures and captions of this archive
=====================================

The pictures come from free emoji sets. Changes: each was rasterised, from the npm package named here, to 64x64 pixels
on white and saved as lossless WebP. The "license" column of metadata.jsonl repeats the licence.

{styles}

Names, tags, groups and code points in metadata.jsonl come from emojibase-data (MIT, Copyright (c) Miles Johnson).

Licences
--------

CC-BY-4.0: Creative Commons Attribution 4.0 International, https://creativecommons.org/licenses/by/4.0/
Apache-2.0: Apache License, Version 2.0, https://www.apache.org/licenses/LICENSE-2.0 (the text is in
  LICENSE-Apache-2.0.txt)
MIT: the MIT License:

  Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
  documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
  rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
  permit persons to whom the Software is furnished to do so, subject to the following conditions:

  The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
  Software.

  THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
  WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
  COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
  OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def concept_order(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Returns the eligible concepts, each a list of rows; groups and subgroups take turns."""
    concepts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        concepts[row["hexcode"]].append(row)
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for hexcode in sorted(concepts, key=lambda h: hashlib.sha256(h.encode()).digest()):
        members = concepts[hexcode]
        if len({row["style"] for row in members}) >= MIN_STYLES:
            groups[members[0]["group"]][members[0]["subgroup"]].append(hexcode)
    per_group = [
        take_turns([subgroups[name] for name in sorted(subgroups)])
        for _, subgroups in sorted(groups.items())
    ]
    return [concepts[hexcode] for hexcode in take_turns(per_group)]


def take_turns(lists: list[list[str]]) -> list[str]:
    """The first of each list, then the second of each, and so on."""
    return [item for turn in itertools.zip_longest(*lists) for item in turn if item is not None]


def choose(
    rows: list[dict[str, Any]], sizes: dict[str, int], count: int, max_bytes: int
) -> list[dict[str, Any]]:
    """Whole concepts until ``count`` pictures or ``max_bytes`` of archive are reached."""
    chosen: list[dict[str, Any]] = []
    total = 40_000  # room for the licences and the archive's own records
    for members in concept_order(rows):
        # 76 bytes of zip headers per file, which hold the name twice; metadata uncompressed.
        cost = sum(
            sizes[r["file_name"]] + 76 + 2 * len(r["file_name"]) + len(json.dumps(r))
            for r in members
        )
        if len(chosen) + len(members) > count or total + cost > max_bytes:
            break
        chosen += members
        total += cost
    return chosen


def write_archive(source: zipfile.ZipFile, rows: list[dict[str, Any]], out: Path) -> None:
    """Writes images (bytes unchanged, stored), metadata and licences, with fixed dates."""
    counts = Counter(row["style"] for row in rows)
    styles = "\n".join(
        f'style "{style}" ({counts[style]} pictures): {licence}\n  {owner}; from {package}'
        for style, (licence, owner, package) in STYLES.items()
        if counts[style]
    )
    metadata = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    apache = (
        Path(__file__).resolve().parent.parent / "LICENSE"
    ).read_text()  # the project's own licence, word for word
    texts = {
        "LICENSES.txt": LICENSES.format(styles=styles),
        "LICENSE-Apache-2.0.txt": apache,
        "metadata.jsonl": metadata,
    }
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in texts.items():
            archive.writestr(zipfile.ZipInfo(name), text.encode(), zipfile.ZIP_DEFLATED, 9)
        for row in rows:
            archive.writestr(
                zipfile.ZipInfo(row["file_name"]), source.read(row["file_name"]), zipfile.ZIP_STORED
            )


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, help="the full emoji archive")
    parser.add_argument("--out", type=Path, required=True, help="the archive to write")
    parser.add_argument("--count", type=int, default=1000, help="pictures at most")
    parser.add_argument(
        "--max_bytes", type=int, default=3_500_000, help="size of the archive at most"
    )
    args = parser.parse_args()

    with zipfile.ZipFile(args.archive) as source:
        rows = [
            json.loads(line) for line in source.read("metadata.jsonl").splitlines() if line.strip()
        ]
        for row in rows:
            if row["style"] not in STYLES or STYLES[row["style"]][0] != row["license"]:
                parser.error(
                    f"{row['file_name']}: add style {row['style']!r} "
                    f"with licence {row['license']} to STYLES"
                )
        sizes = {info.filename: info.file_size for info in source.infolist()}
        chosen = choose(rows, sizes, args.count, args.max_bytes)
        if not chosen:
            parser.error("no concept fits: raise --count or --max_bytes")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_archive(source, chosen, args.out)
    concepts = len({row["hexcode"] for row in chosen})
    print(
        f"{args.out}: {len(chosen)} images of {concepts} concepts, "
        f"{args.out.stat().st_size:,} bytes"
    )
    for column in ("style", "group"):
        print(
            ", ".join(
                f"{name} {n}" for name, n in sorted(Counter(row[column] for row in chosen).items())
            )
        )


if __name__ == "__main__":
    main()
