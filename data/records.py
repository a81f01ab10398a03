"""insightface's training sets: MXNet's RecordIO, FILE.rec, with the places of its records in FILE.idx; read without MXNet.

A record: magic, 3 bits of what part of a record it is and 29 of its length (uint32), content, padding to 4 bytes. Content:
uint32 flag, float32 label, two uint64 ids, `flag` more float32 labels, an encoded image. Records without an image, where
insightface says which records are an identity's, are left out: every image has its label.
"""

import mmap
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import torch

from data.image_files import ImageFiles
from data.tasks import split_validation
from util.runtime.files import readable

MAGIC = 0xCED7230A
HEADER = 24  # bytes of a content before its further labels
WHOLE, LAST = 0, 3  # parts of a record: it is cut where the content has the magic in it, which is left out there


def is_record_file(data: str | os.PathLike) -> bool:
    return os.fspath(data).endswith(".rec") and not os.path.isdir(data)


def list_records(path: Path, val_fraction: float | None = None) -> ImageFiles:
    """The images of a .rec, of classes named by their labels: those to train on first, then the share held out.

    Raises UsageError for a file that is not there, RunError for one that is damaged.
    """
    index, message = path.with_suffix(".idx"), "no readable records of images"
    with readable(index, message), readable(path, message), open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's, of what is no number
        keys, offsets = np.fromfile(index, np.int64, sep=" ").reshape(-1, 2).T
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        labels, starts = _heads(content, offsets)
    chosen = np.flatnonzero(~np.isnan(labels))
    values, labels = np.unique(labels[chosen].astype(np.int64), return_inverse=True)
    classes = np.sort(values.astype(str))  # as those of a folder are
    labels, count = classes.searchsorted(values.astype(str))[labels], len(labels)
    if val_fraction is not None:
        split = split_validation(torch.from_numpy(labels), len(classes), val_fraction)
        count, order = len(split[0]), torch.cat(split).numpy()
        chosen, labels = chosen[order], labels[order]
    files = tuple(f"{classes[c]}/{key}" for c, key in zip(labels, keys[chosen], strict=True))
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in (path, index)]

    def read(position: int) -> bytes:
        return _content(content, int(offsets[chosen[position]]))[starts[chosen[position]] :]

    return ImageFiles(path, tuple(classes.tolist()), files, tuple(labels.tolist()), count, [*states, val_fraction], read)


def _heads(content: mmap.mmap, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the records at `offsets`, the label, NaN where there is no image, and where in the content the image starts."""
    words = np.frombuffer(content, "<u4", len(content) // 4)
    heads = words[np.clip(offsets[:, None] // 4 + np.arange(9), 0, len(words) - 1)]
    lengths, flags = (column.astype(np.int64) for column in (heads[:, 1] & (1 << 29) - 1, heads[:, 2]))
    if not ((heads[:, 0] == MAGIC) & (offsets % 4 == 0) & (offsets + 8 + lengths <= len(content))).all():
        raise ValueError("truncated, or not the one that its .idx is of")
    starts = HEADER + 4 * flags
    labels = np.where(lengths > starts, np.where(flags > 0, heads[:, 8], heads[:, 3]).view("<f4"), np.nan)
    known = np.unique(labels[~np.isnan(labels)])
    if len(known) < 2 or (known % 1 != 0).any() or known[0] < 0:
        raise ValueError("its labels are not the numbers of two classes or more")
    return labels, starts


def _content(content: mmap.mmap, offset: int) -> bytes:
    parts, kind = [], None
    while kind not in (WHOLE, LAST):
        magic, length = struct.unpack_from("<II", content, offset)
        kind, length = length >> 29, length & (1 << 29) - 1
        if magic != MAGIC or offset + 8 + length > len(content):
            raise ValueError("truncated record")
        parts.append(content[offset + 8 : offset + 8 + length])
        offset += 8 + length + -length % 4
    return struct.pack("<I", MAGIC).join(parts)
