"""Print a short name of a data set that changes with its images, for the folders of its runs: lfw100-3f2a9c01.

python scripts/data_tag.py path/to/faces
"""

import argparse
import os
import sys
from pathlib import Path

# A script's own folder, not the repository's root, is where Python looks first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data import SYNTHETIC, data_tag
from data.cache import cache_folder
from data.image_files import file_digests, list_images
from data.image_set import ImageSet
from util.cli.main import run_main
from util.runtime.errors import UsageError


def main(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # the other scripts' would import all methods
    parser.add_argument("data", nargs="?", metavar="DATA", help=f"folder with train/ and test/; {SYNTHETIC} stays as it is")
    parser.add_argument("--cache-dir", type=Path, help="where the hashes are kept (default: the user's cache folder)")
    args, others = parser.parse_known_args(argv)
    if not args.data or others:
        raise UsageError("one data folder is needed: data_tag.py DATA")
    tag = args.data
    if tag != SYNTHETIC:
        listed = list_images(args.data)
        digests = file_digests(listed, args.cache_dir or cache_folder())
        none, labels = torch.empty(0), torch.tensor(listed.labels)
        tag = data_tag((ImageSet(listed.root.name, none, labels, listed.classes, listed.files, digests),))
    sys.stdout.buffer.write(os.fsencode(tag + "\n"))  # a folder's name may be no text


if __name__ == "__main__":
    run_main(main)
