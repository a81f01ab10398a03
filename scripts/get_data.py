"""Make the face data sets that the docs measure on, from what their owners publish.

python scripts/get_data.py casia100                          download, into a folder in data/ (--output-dir DIR: another)
python scripts/get_data.py lfw100 lfw-deepfunneled.tgz       from an archive (zip, tar) or an unpacked folder
Every recipe (data/recipes.json) takes the same photos, with the same split, as ours, and compares the files that it wrote
with ours. All sets show real people and were published for research: read the licence that is printed.
"""

import contextlib
import hashlib
import io
import random
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.request import urlretrieve

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from util.cli import options
from util.cli.main import run_main
from util.runtime.errors import RunError, UsageError
from util.runtime.files import read_json
from util.runtime.interrupt import end_on_sigterm

# name → where the archive is, what to cut out, licence; `names` is a digest of the result's paths, `contents` of paths and
# bytes, `lists` has the numbers of the images by person and split where the split follows no rule. `planned` is the digest
# of all paths where test images that are training images as well are left out.
RECIPES = Path(__file__).resolve().parent.parent / "data" / "recipes.json"


def plan_casia(members: list[str]) -> dict[str, str]:
    """Names in the archive → paths in the result."""
    found = ((name, re.search(r"(?:^|/)((?:train|test)/\d+/\d+\.jpg)$", name)) for name in members)
    return {name: match[1] for name, match in found if match}


def plan_yale(members: list[str]) -> dict[str, str]:
    """A fifth of each person's lightings to test, at random; without the ambient ones and the damaged (.bad)."""
    people: dict[str, dict[str, str]] = defaultdict(dict)
    for name in members:
        if match := re.search(r"(?:^|/)((yaleB\d\d)_P00)A([+-]\d{3})E([+-]\d\d)\.pgm$", name):
            light = f"A{match[3]}E{match[4]}".replace("+", "p").replace("-", "m")
            people[match[2]][name] = f"{match[1]}{light}.jpg"
    plan, generator = {}, random.Random(0)
    for person, images in sorted(people.items()):
        order = sorted(images)  # as the archive names them: "+" comes before "-"
        generator.shuffle(order)
        for number, name in enumerate(order):
            plan[name] = f"{'test' if number < round(len(order) / 5) else 'train'}/{person}/{images[name]}"
    return plan


def plan_listed(recipe: dict, members: list[str]) -> dict[str, str]:
    paths = {}
    for person, splits in recipe["lists"].items():
        theirs = re.sub(r"^s0", "s", person)  # of ORL: s1
        for split, numbers in splits.items():
            for number in map(int, numbers.split()):
                path = PurePosixPath(split, person, recipe["image"].format(person, number))
                paths[recipe["source_image"].format(theirs, number)] = str(path)
    ends = ((name, "/".join(PurePosixPath(name).parts[-2:])) for name in members)
    return {name: paths[end] for name, end in ends if end in paths}


def plan_of(name: str, recipe: dict, members: list[str]) -> dict[str, str]:
    plans = {"casia100": plan_casia, "casia100_clean": plan_casia, "yaleb38": plan_yale}
    return plans.get(name, partial(plan_listed, recipe))(members)


def crop(data: bytes, size: list[int], box: list[int], scaled: list[int], top: int) -> bytes:
    """Of an image of `size` cut out `box`, resize it to `scaled`, keep 112 rows from `top` on. Raises ValueError."""
    with Image.open(io.BytesIO(data)) as image:
        if image.size != tuple(size):
            raise ValueError("{} × {} pixels instead of {} × {}".format(*image.size, *size))
        face = image.crop(box).resize(scaled, Image.Resampling.LANCZOS).crop((0, top, 112, top + 112))
    jpeg = io.BytesIO()
    face.save(jpeg, "JPEG", quality=90)
    return jpeg.getvalue()


def download(url: str, folder: Path) -> Path:
    """The file of `url` ("drive:" and an id of Google Drive, too), in `folder`. Raises UsageError or RunError."""
    path = folder / "archive"
    try:
        if url.startswith("drive:"):
            import gdown  # for this alone: not in requirements.txt

            gdown.download(id=url.removeprefix("drive:"), output=str(path))
        else:
            urlretrieve(url, path)
    except ModuleNotFoundError:
        raise UsageError("Google Drive needs gdown: pip install gdown; or give the archive as ARCHIVE") from None
    except Exception as error:  # a network's faults are of many kinds
        raise RunError(f"cannot download {url}: {error}; get it another way, and give it as ARCHIVE") from None
    return path


def files_of(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[dict[str, Callable[[], bytes]]]:
    """The files in an archive or a folder, by name; calling one reads it. Raises UsageError for anything else."""
    with contextlib.ExitStack() as stack:
        try:
            if path.is_dir():
                files = {name: (path / name).read_bytes for name in files_of(path)}
            elif zipfile.is_zipfile(path):
                archive = stack.enter_context(zipfile.ZipFile(path))
                files = {name: partial(archive.read, name) for name in archive.namelist()}
            elif path.is_file() and tarfile.is_tarfile(path):
                archive = stack.enter_context(tarfile.open(path))
                members = [member for member in archive.getmembers() if member.isfile()]
                files = {member.name: lambda member=member: archive.extractfile(member).read() for member in members}
            else:
                raise UsageError(f"{path}: no folder, zip or tar" if path.exists() else f"no file {path}")
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise RunError(f"{path} is damaged: {error}") from None
        yield files


def digest(lines: list[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode()).hexdigest()[:16]


def write(name: str, recipe: dict, archive: Path, folder: Path) -> None:
    """Write what the recipe makes of the archive into `folder`. Raises UsageError, or RunError where it is damaged."""
    with open_archive(archive) as files:
        plan = plan_of(name, recipe, [*files])
        if len(plan) != recipe["files"] or digest([*plan.values()]) != recipe.get("planned", recipe["names"]):
            found = f"{len(plan)} of its {recipe['files']} images are there"
            raise UsageError(f"{archive} is not the archive of {name}: {found}")
        for member, path in plan.items():
            try:
                data = files[member]()
                data = crop(data, **recipe["crop"]) if "crop" in recipe else data
            except Exception as error:  # damage makes the readers raise almost anything
                raise RunError(f"{archive}: {member} is damaged: {error}") from None
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
    if "planned" in recipe:  # less what the test set shares with the training set
        known = {hashlib.sha256(path.read_bytes()).digest() for path in folder.glob("train/*/*")}
        for path in folder.glob("test/*/*"):
            if hashlib.sha256(path.read_bytes()).digest() in known:
                path.unlink()


def make(name: str, recipe: dict, archive: Path | None, output: Path) -> None:
    """The whole set at `output`, or nothing."""
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        (work / "images").mkdir()
        write(name, recipe, archive or download(recipe["url"], work), work / "images")
        (work / "images").rename(output)
    except OSError as error:
        raise RunError(f"cannot write {output}: {error.strerror}; nothing is left of it") from None
    finally:
        shutil.rmtree(work)


def report(recipe: dict, output: Path, paths: list[str]) -> None:
    splits = Counter("/".join(PurePosixPath(path).parts[:-2]) or "in all" for path in paths)
    people = len({PurePosixPath(path).parts[-2] for path in paths})
    counts = ", ".join(f"{count} {split}" for split, count in sorted(splits.items(), reverse=True))
    print(f"{output}: {people} people, images: {counts}")
    found = digest([f"{path}  {hashlib.sha256((output / path).read_bytes()).hexdigest()}" for path in paths])
    if found == recipe["contents"]:
        print(f"checksum {found}: the same files as ours")
    else:
        print(f"checksum {found}, ours {recipe['contents']}: the same photos in other files ({recipe['differs']})")


def main(argv: list[str]) -> None:
    recipes = read_json(RECIPES)
    parser = options.Parser(__doc__, "%(prog)s NAME [ARCHIVE] [options]")
    parser.add_argument("name", choices=recipes, metavar="NAME", help=f"data set: {', '.join(recipes)}")
    help_text = "zip, tar or unpacked folder of what the owners publish (default: download it)"
    parser.add_argument("archive", nargs="?", type=Path, metavar="ARCHIVE", help=help_text)
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="folder to make (default: one in data/)")
    args = parser.parse_args(argv)
    recipe = recipes[args.name]
    output = args.output_dir or Path("data") / recipe["folder"]
    print(f"licence: {recipe['licence']}\ncite: {recipe['citation']}", flush=True)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        with end_on_sigterm():
            make(args.name, recipe, args.archive, output)
    paths = files_of(output)
    if digest(paths) != recipe["names"]:
        raise UsageError(f"{output} exists and is not {args.name}: move it away, or choose another --output-dir")
    report(recipe, output, paths)


if __name__ == "__main__":
    run_main(main)
