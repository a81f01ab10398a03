"""Damaged copies of files, the same for the same seed."""

import os
import random

MUTANTS = int(os.environ.get("FUZZ_MUTANTS", "400"))


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Flip bits, overwrite, cut, insert, move: one to four times."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        if not data:
            break
        place, length = chance.randrange(len(data)), chance.choice([1, 2, 4, 8, 64, 1000])
        match chance.randrange(7):
            case 0:
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                data[place : place + length] = chance.randbytes(length)
            case 2:
                data[place : place + length] = chance.choice([b"\0", b"\xff", b"\x7f"]) * length
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[chance.randrange(len(data)) :][:length]
            case 5:
                del data[place:]
            case 6:  # near an end, where headers and directories are
                near = chance.randrange(min(len(data), 400))
                data[-near - 1] = chance.randrange(256)
                data[near] = chance.randrange(256)
    return bytes(data)
