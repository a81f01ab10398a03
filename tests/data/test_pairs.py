"""Verification benchmarks as files: insightface's .bin by Python 2 and 3, LFW's pairs.txt, and what is none."""

import io
import os
import pickle
import struct

import numpy as np
import pytest

from data.image_folder import decode_image
from data.pairs import load_pairs
from tests.data.conftest import noise
from util.runtime.errors import RunError, UsageError

SIZE = 16
SAME = [True, False] * 10


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    noise(seed, (20, 24)).save(file, "JPEG")
    return file.getvalue()


IMAGES = [jpeg(seed % 30) for seed in range(40)]  # the last ten are the first ten


def text(string: bytes) -> bytes:
    """A str of Python 2, pickled."""
    return b"T" + struct.pack("<i", len(string)) + string


def old_array(content: bytes) -> bytes:
    """A uint8 array, as numpy under Python 2 pickled it."""
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\0K\1tR(K\3" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85" + text(b"b") + b"tR"
    return made + b"(K\1J" + struct.pack("<i", len(content)) + b"\x85" + dtype + b"\x89" + text(content) + b"tb"


def python2(write) -> bytes:
    truths = b"".join(b"\x88" if same else b"\x89" for same in SAME)
    return b"\x80\2](" + b"".join(map(write, IMAGES)) + b"e](" + truths + b"e\x86."


ARRAYS = [np.frombuffer(image, np.uint8) for image in IMAGES]
WRITTEN = {
    "python 2": python2(text),
    "python 2, arrays": python2(old_array),
    "bytes 3": pickle.dumps((IMAGES, SAME), protocol=3),
    "bytes 5": pickle.dumps([IMAGES, SAME], protocol=5),
    "arrays 4": pickle.dumps((ARRAYS, np.array(SAME)), protocol=4),
    "arrays 5": pickle.dumps((ARRAYS, [np.bool_(same) for same in SAME]), protocol=5),
    "writable arrays": pickle.dumps(([array.copy() for array in ARRAYS], SAME), protocol=5),
    "numbers": pickle.dumps((IMAGES, [int(same) for same in SAME]), protocol=4),
}


@pytest.mark.parametrize("content", WRITTEN.values(), ids=WRITTEN)
def test_a_bin_however_it_was_written(content, tmp_path):
    (tmp_path / "lfw.bin").write_bytes(content)
    (found,) = load_pairs([str(tmp_path / "lfw.bin")], SIZE, tmp_path).values()
    assert found.same.tolist() == SAME
    assert found.folds.tolist() == [number // 2 for number in range(20)]
    assert len(found.images) == 30  # each once
    for pair, (first, second) in enumerate(found.pairs.tolist()):
        for place, image in ((first, IMAGES[2 * pair]), (second, IMAGES[2 * pair + 1])):
            assert np.array_equal(found.images.images[place], decode_image(io.BytesIO(image), SIZE))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("run",)


class Buried:
    """Of numpy, and able to run code."""

    def __reduce__(self):
        return np.load, ("run", None, True)


BAD = {
    "code": (pickle.dumps((IMAGES, [Evil()])), "refused: it asks for posix.mkdir"),
    "numpy's code": (pickle.dumps(Buried()), "refused: it asks for numpy.load"),
    "truncated": (WRITTEN["bytes 5"][:-2000], "pickle"),
    "no pickle": (b"hello", "no readable pairs of faces"),
    "empty": (b"", "no readable pairs of faces"),
    "one value": (pickle.dumps(5), "no readable pairs of faces"),
    "too few images": (pickle.dumps((IMAGES[:-1], SAME)), "39 images for 20 pairs"),
    "one kind": (pickle.dumps((IMAGES, [True] * 20)), "pairs of one person and of two people are needed"),
    "no images": (pickle.dumps(([b"x"] * 40, SAME)), "1 of 1 images cannot be decoded: image 0 (not an image)"),
    "texts": (pickle.dumps((["x"] * 40, SAME)), "no readable pairs of faces"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_a_bin_that_is_none_is_refused_in_one_line(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lfw.bin").write_bytes(content)
    with pytest.raises(RunError) as error:
        load_pairs(["lfw.bin"], SIZE, tmp_path)
    assert str(error.value).startswith("lfw.bin: ") or "lfw.bin: 1 of 1" in str(error.value)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def people(tmp_path):
    """Four people of three images each, the last of Dan's a PNG."""
    for number, name in enumerate(("Ann", "Bob", "Cy.O", "Dan")):
        (tmp_path / "lfw" / name).mkdir(parents=True)
        for image in (1, 2, 3):
            suffix = "png" if (name, image) == ("Dan", 3) else "jpg"
            noise(10 * number + image).save(tmp_path / "lfw" / name / f"{name}_{image:04}.{suffix}")
    return tmp_path / "lfw"


LIST = (
    "2\t2\nAnn\t1\t2\nCy.O\t1\t3\nAnn\t1\tBob\t2\nBob\t1\tDan\t3\n"
    + "Dan\t1\t3\nBob\t1\t2\nAnn\t3\tDan\t1\nBob\t3\tCy.O\t2\n"
)


def test_lfws_list(people, tmp_path):
    (tmp_path / "pairs.txt").write_text(LIST)
    (name, found), *none = load_pairs([f"{tmp_path}/pairs.txt:{people}"], SIZE, tmp_path).items()
    assert name == "lfw" and not none
    (cropped,) = load_pairs([f"{tmp_path}/pairs.txt:{people}"], SIZE, tmp_path, 0.5).values()
    assert np.array_equal(cropped.images.images[0], decode_image(people / "Ann/Ann_0001.jpg", SIZE, 0.5))
    assert found.same.tolist() == [True, True, False, False] * 2
    assert found.folds.tolist() == [0] * 4 + [1] * 4
    first, second = found.pairs[3].tolist()
    for place, file in ((first, "Bob/Bob_0001.jpg"), (second, "Dan/Dan_0003.png")):
        assert np.array_equal(found.images.images[place], decode_image(people / file, SIZE))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LIST.replace("2\t2", "2\t3", 1), "8 pairs, not 2 × 2 × 3"),
        (LIST.replace("Bob\t1\t2", "Bob\t1\t4"), r"1 of 12 images cannot be decoded: .*Bob_0004.jpg \(.*No such file"),
        (LIST.replace("Bob\t1\t2", "Bob\tone\t2"), "no readable pairs of faces: ValueError"),
        (LIST.replace("Bob\t1\t2", "Bob"), "no readable pairs of faces: "),
        (LIST.replace("Bob\t1\t2", "Bob\t1\tCy.O\t2\t3"), "no readable pairs of faces: "),
        ("", "no readable pairs of faces: "),
        ("1\t1\nAnn\t1\t2\nAnn\t1\tBob\t2\n", "at least two folds"),
    ],
)
def test_a_list_that_is_none(content, message, people, tmp_path):
    (tmp_path / "pairs.txt").write_text(content)
    with pytest.raises(RunError, match=message):
        load_pairs([f"{tmp_path}/pairs.txt:{people}"], SIZE, tmp_path)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["absent.bin"], "no file absent.bin"),
        (["absent.txt:."], "no file absent.txt"),
        (["20000"], "--pairs 20000: neither FILE.bin nor"),
        (["lfw.bin", "./lfw.bin"], "--pairs: two of the name lfw"),
    ],
)
def test_words_that_name_no_pairs(texts, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lfw.bin").write_bytes(WRITTEN["bytes 5"])
    with pytest.raises(UsageError, match=message):
        load_pairs(texts, SIZE, tmp_path)
