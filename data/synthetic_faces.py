"""The embedded default data set: drawn identities, any number and size, the same from the same seed, no download.

An identity is a face geometry with skin and hair; everything else is drawn anew for every image. The ranges are chosen so
that pixels and colours alone do not tell the identities apart, and a small Face Transformer does.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.cache import cached_images
from data.face_renderer import BACKGROUND_GRID, HAIR_TONES, IRIS_TONES, SKIN_TONES, palette, render
from data.image_set import ImageSet

VERSION = 3  # raised with every change of the pictures, so that cached ones are drawn again

# Lengths in half image widths, angles in radians; each is uniform over its range. Left and right are always alike, so
# that a mirrored face is the same identity.
# fmt: off
IDENTITY = {
    "face_width": (0.49, 0.66), "face_height": (0.68, 0.86), "jaw_taper": (0.0, 0.36), "jaw_square": (0.0, 0.9),
    "head_depth": (0.5, 0.6), "ear_size": (0.09, 0.17),
    "eye_x": (0.19, 0.31), "eye_y": (-0.16, 0.04), "eye_width": (0.075, 0.15), "eye_height": (0.04, 0.105),
    "eye_tilt": (-0.3, 0.4), "eye_socket": (0.0, 0.7), "iris_size": (0.04, 0.06), "iris_tone": (0.0, 1.0),
    "lash": (0.004, 0.018),
    "brow_gap": (0.11, 0.21), "brow_length": (0.10, 0.18), "brow_thickness": (0.01, 0.065), "brow_tilt": (-0.07, 0.08),
    "brow_arch": (-0.02, 0.08),
    "nose_length": (0.22, 0.40), "nose_width": (0.07, 0.16), "nose_bridge": (0.03, 0.075), "nose_height": (0.25, 0.8),
    "nostril": (0.012, 0.032),
    "mouth_gap": (0.12, 0.21), "mouth_width": (0.14, 0.27), "upper_lip": (0.015, 0.065), "lower_lip": (0.025, 0.085),
    "lip_tone": (0.0, 1.0),
    "cheek_flush": (0.0, 0.6), "beard": (-1.1, 0.9), "beard_low": (-0.03, 0.12), "beard_arch": (-0.05, 0.5),
    "moustache": (-1.1, 0.9),
    "hair_line": (0.35, 0.85), "hair_arch": (-0.25, 0.6), "hair_peak": (-0.1, 0.15), "hair_top": (0.02, 0.18),
    "hair_side": (-0.04, 0.16), "hair_length": (-0.3, 1.3), "strands": (22.0, 75.0), "curl": (0.0, 3.5), "gloss": (0.3, 1.3),
    "hair_tone": (0.0, 1.0),
    "skin_tone": (0.0, 1.0),
}
VARIATION = {
    "shift_x": (-0.05, 0.05), "shift_y": (-0.05, 0.05), "scale": (0.94, 1.06), "roll": (-0.11, 0.11), "yaw": (-0.36, 0.36),
    "pitch": (-0.15, 0.15),
    "smile": (-0.04, 0.08), "mouth_open": (-0.09, 0.07), "eye_open": (0.45, 1.15), "gaze_x": (-0.03, 0.03),
    "gaze_y": (-0.012, 0.012), "brow_raise": (-0.015, 0.03), "frown": (-0.02, 0.012),
    "strand_phase": (0.0, 2 * math.pi),
    "light_x": (-0.75, 0.75), "light_y": (-0.6, 0.3), "light": (0.35, 1.1), "ambient": (0.22, 0.5), "exposure": (0.65, 1.3),
    "patchiness": (0.05, 0.35),
    "blur": (-0.6, 0.45), "noise": (0.004, 0.02),
    "glasses": (0.0, 1.0), "lens_width": (0.15, 0.21), "lens_height": (0.10, 0.16), "lens_square": (0.0, 1.0),
    "lens_tint": (-1.4, 0.6), "frame": (0.010, 0.022), "frame_tone": (0.02, 0.5),
    "occluder": (0.0, 1.0), "occluder_x": (-0.8, 0.8), "occluder_y": (-0.8, 0.9), "occluder_angle": (0.0, math.pi),
    "occluder_width": (0.1, 0.35), "occluder_height": (0.06, 0.18),
}
VARIATION_COLOURS = {
    "cast": (0.82, 1.16), "backdrop_colour": (0.1, 0.9), "clothes_colour": (0.1, 0.8), "occluder_colour": (0.0, 1.0),
}
# fmt: on
# The random numbers of an image: its parameters, the colours of its background, its place in the noise.
WIDTH = len(VARIATION) + 3 * len(VARIATION_COLOURS) + 3 * BACKGROUND_GRID**2 + 2
GLASSES_SHARE, OCCLUDED_SHARE = 0.18, 0.12
TRAIN, TEST, IDENTITIES, NOISE = 1, 2, 3, 4  # the streams of random numbers of one seed
# Pixels drawn at once: on a CPU what its caches hold; on a GPU enough to fill it, in about 1 GB.
CHUNK_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 22}


def synthetic_faces(
    identities: int = 100,
    train_per_identity: int = 24,
    test_per_identity: int = 6,
    image_size: int = 56,
    seed: int = 0,
    device: torch.device | str = "cpu",
    cache_dir: Path | None = None,
    first: int = 0,
) -> tuple[ImageSet, ImageSet]:
    """Draw a training and a test set with the same identities and different variations, on `device`.

    Image k of identity i depends on (seed, i, k, train or test) alone, up to the rounding of the device's arithmetic.

    first: the number of the first identity, for people that another set does not have.
    cache_dir: where the faces are kept once drawn; then they are mapped from there, on the CPU.
    """
    device, cut, people = torch.device(device), identities * train_per_identity, range(first, first + identities)
    splits = [("train", TRAIN, train_per_identity), ("test", TEST, test_per_identity)]
    shape = (identities * (train_per_identity + test_per_identity), 3, image_size, image_size)

    def draw(images: Tensor) -> None:
        faces = _uniform(people, IDENTITIES, 1, len(IDENTITY), seed)
        for part, (_, stream, count) in zip(images.tensor_split([cut]), splits, strict=True):
            variation = _uniform(people, stream, count, WIDTH, seed)
            part.copy_(_draw(faces.repeat(count, axis=0), variation, image_size, seed, device))

    if cache_dir is None:
        images = torch.empty(shape, dtype=torch.uint8, device=device)
        draw(images)
    else:
        # Devices differ in the rounding of their arithmetic, so each has its own file.
        numbers = (identities, train_per_identity, test_per_identity, image_size, seed, first)
        digest = hashlib.sha256(repr((VERSION, numbers, device.type)).encode()).hexdigest()[:32]
        key = f"synthetic_faces-{image_size}-{digest}"
        images = cached_images(key, shape, lambda array: draw(torch.from_numpy(array)), cache_dir)
    ids = torch.arange(identities, device=images.device)
    labels = torch.cat([ids.repeat_interleave(count) for _, _, count in splits])
    classes = tuple(f"id{identity:03d}" for identity in people)
    drawn = [(split, stream, i, k) for split, stream, count in splits for i in people for k in range(count)]
    files = tuple(f"{split}/id{i:03d}/{k}" for split, _, i, k in drawn)
    digests = tuple(hashlib.sha256(repr((VERSION, seed, *one)).encode()).hexdigest() for _, *one in drawn)
    whole = ImageSet("synthetic_faces", images, labels, classes, files, digests)
    return whole.subset(slice(cut)), whole.subset(slice(cut, None))


def _uniform(people: range, stream: int, count: int, width: int, seed: int) -> np.ndarray:
    """Rows for `count` images of every identity; an identity's are filled in order, the same for every count."""
    generators = [np.random.default_rng([seed, identity, stream]) for identity in people]
    return np.concatenate([generator.random((count, width), dtype=np.float32) for generator in generators])


def _draw(identity: np.ndarray, variation: np.ndarray, image_size: int, seed: int, device: torch.device) -> Tensor:
    images = torch.empty(len(identity), 3, image_size, image_size, dtype=torch.uint8, device=device)
    bank = np.random.default_rng([seed, 0, NOISE]).standard_normal((3, 2 * image_size, 2 * image_size), np.float32)
    # Every window of the bank is one image's noise: a view, copied only for the windows taken.
    windows = torch.from_numpy(bank).to(device).unfold(1, image_size, 1).unfold(2, image_size, 1)
    chunk = max(1, CHUNK_PIXELS[device.type] // (2 * image_size) ** 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # how many share an operation moves its rounding, and with it a grey level here and there
    try:
        for start in range(0, len(identity), chunk):
            part = slice(start, start + chunk)
            face, corner = _parameters(*(torch.from_numpy(numbers[part]).to(device) for numbers in (identity, variation)))
            corner = (corner * image_size).long()
            noise = windows[:, corner[:, 0], corner[:, 1]].transpose(0, 1)
            images[part] = render(face, image_size, noise)
    finally:
        torch.set_num_threads(threads)
    return images


def _parameters(identity: Tensor, variation: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Uniform numbers → the renderer's parameters, and each image's place in the noise bank (B, 2) in [0, 1)."""
    face = _scale(identity, IDENTITY) | _scale(variation[:, : len(VARIATION)], VARIATION)
    rest = variation[:, len(VARIATION) :]
    for name, (low, high) in VARIATION_COLOURS.items():
        face[name], rest = low + (high - low) * rest[:, :3, None, None], rest[:, 3:]
    patches, corner = rest[:, :-2].reshape(-1, 3, BACKGROUND_GRID, BACKGROUND_GRID), rest[:, -2:]
    face["background"] = torch.lerp(face["backdrop_colour"], patches, face["patchiness"]).contiguous()
    for part, tones in {"skin": SKIN_TONES, "hair": HAIR_TONES, "iris": IRIS_TONES}.items():
        face[f"{part}_colour"] = palette(tones, face[f"{part}_tone"])
    red = identity.new_tensor([0.72, 0.25, 0.27]).view(1, 3, 1, 1)
    face["lip_colour"] = torch.lerp(face["skin_colour"] * 0.72, red, 0.25 + 0.55 * face["lip_tone"])
    face["frame_colour"] = face["frame_tone"].expand(-1, 3, 1, 1)
    face["cast"] = face["cast"] * face["exposure"]
    face |= {name: face[name].clamp(min=0) for name in ("lens_tint", "mouth_open", "blur", "beard", "moustache")}
    face["glasses"] = (face["glasses"] < GLASSES_SHARE).float()
    face["lens_tint"] = face["lens_tint"] * face["glasses"]
    face["occluder"] = (face["occluder"] < OCCLUDED_SHARE).float()
    return face, corner


def _scale(uniform: Tensor, ranges: dict[str, tuple[float, float]]) -> dict[str, Tensor]:
    columns = uniform[:, :, None, None, None].unbind(1)
    return {name: low + (high - low) * column for (name, (low, high)), column in zip(ranges.items(), columns, strict=True)}
