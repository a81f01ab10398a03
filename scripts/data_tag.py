"""Print a short name of a data set that changes with its images, for the folders of its runs: lfw100-3f2a9c01.

python scripts/data_tag.py path/to/faces
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

import torch

from data.cache import cache_folder
from data.image_files import file_digests, list_images, printable
from data.image_set import ImageSet, class_digests
from data.records import is_record_file, list_records
from util.cli.main import run_main
from util.runtime.errors import UsageError


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UsageError("one data folder is needed: data_tag.py DATA")
    listed = list_records(Path(argv[0])) if is_record_file(argv[0]) else list_images(argv[0])
    labels, digests = torch.tensor(listed.labels), file_digests(listed, cache_folder())
    images = ImageSet(printable(listed.root.name), torch.empty(0), labels, listed.classes, listed.files, digests)
    print(replace(images, contents=class_digests(images)).tag)


if __name__ == "__main__":
    run_main(main)
