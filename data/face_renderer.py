"""Faces drawn from parameters: B faces are one batch of soft masks on a pixel grid.

The head is an ellipsoid with a jaw. Every pixel is carried back through the pose to a point (u, v) on the frontal face, so
that features painted in (u, v) turn with the head. Lengths are in half image widths; (0, 0) is the middle of the head.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

SUPERSAMPLING = 2
BACKGROUND_GRID = 4
SKIN_TONES = ((0.98, 0.82, 0.72), (0.89, 0.68, 0.54), (0.70, 0.48, 0.35), (0.40, 0.26, 0.19))
HAIR_TONES = ((0.05, 0.04, 0.05), (0.25, 0.15, 0.09), (0.52, 0.27, 0.13), (0.84, 0.68, 0.40), (0.72, 0.71, 0.70))
IRIS_TONES = ((0.13, 0.07, 0.04), (0.36, 0.22, 0.10), (0.30, 0.42, 0.25), (0.35, 0.52, 0.68))
BLUR = (1 / 9, 2 / 9, 3 / 9, 2 / 9, 1 / 9)


class _Face(SimpleNamespace):
    """The parameters of B faces, by name, and their pixels.

    x, y: coordinates on the head in the image plane; u, v: on the frontal face; normal: the normals there, in three parts.
    canvas: what is painted so far; edge: the width of an antialiased edge.
    head, hair, body: how much of each pixel is head, hair behind it, other parts of the body.
    """

    def cover(self, distance: Tensor, softness: float = 1.0) -> Tensor:
        """Signed distance (negative inside) → coverage in [0, 1], antialiased over the edge width."""
        return distance.mul(-1 / (self.edge * softness)).add_(0.5).clamp_(0, 1)

    def paint(self, mask: Tensor, colour: Tensor) -> None:
        self.canvas.lerp_(colour, mask)

    def paint_head(self, mask: Tensor, colour: Tensor, opacity: float | Tensor = 1.0) -> None:
        """Paint on the head alone; `mask` is changed."""
        self.paint(mask.mul_(self.head).mul_(opacity), colour)


def palette(tones: tuple[tuple[float, float, float], ...], position: Tensor) -> Tensor:
    """Positions in [0, 1], shape (B, 1, 1, 1) → the colours there, linear between the tones, (B, 3, 1, 1)."""
    table = torch.tensor(tones, dtype=position.dtype, device=position.device)
    scaled = position.flatten() * (len(tones) - 1)
    lower = scaled.floor().clamp_(0, len(tones) - 2).long()
    return torch.lerp(table[lower], table[lower + 1], (scaled - lower).unsqueeze(1))[:, :, None, None]


def render(parameters: dict[str, Tensor], image_size: int, noise: Tensor) -> Tensor:
    """Draw B faces, uint8 (B, 3, image_size, image_size).

    parameters: those named in `data.synthetic_faces`, each (B, 1, 1, 1); colours (B, 3, 1, 1), and "background"
                (B, 3, BACKGROUND_GRID, BACKGROUND_GRID).
    noise:      (B, 3, image_size, image_size), standard normal.
    """
    face = _Face(**parameters)
    _place(face, image_size * SUPERSAMPLING)
    on_head = (_paint_skin, _paint_eyes, _paint_brows, _paint_nose, _paint_beard, _paint_mouth, _paint_hair)
    for paint in (_paint_behind, *on_head, _paint_glasses, _light, _paint_occluder):
        paint(face)
    return _develop(face, noise)


def _bump(squared: Tensor) -> Tensor:
    """Close to exp(-squared), zero from 4 on: several times faster on a CPU than exp, whose tails are denormal."""
    return squared.mul(-0.25).add_(1).clamp_(min=0).square_().square_()


def _length(x: Tensor, y: Tensor) -> Tensor:
    return (x.square() + y.square()).sqrt_()


def _place(face: _Face, size: int) -> None:
    """Carry the pixels back through the pose, and begin with the background."""
    axis = (torch.arange(size, device=face.yaw.device, dtype=torch.float32) + 0.5) * (2 / size) - 1
    column, row = axis.view(1, 1, 1, -1) - face.shift_x, axis.view(1, 1, -1, 1) - face.shift_y
    cos, sin = face.roll.cos() / face.scale, face.roll.sin() / face.scale
    x, y = column * cos + row * sin, row * cos - column * sin
    height = y / face.face_height
    below = height.clamp(min=0).square_()
    normal_x = x / (face.face_width * (1 - face.jaw_taper * below))
    # The chin's square term blends an ellipse (t²) into a flatter curve (t⁴).
    squared = height.square()
    squared = torch.lerp(squared, squared * below, face.jaw_square * (height > 0)).add_(normal_x.square())
    depth = (1 - squared).clamp_(min=0).sqrt_()
    face.x, face.y, face.normal = x, y, [normal_x, height, depth]
    face.u = x * face.yaw.cos() + depth * (face.head_depth * face.yaw.sin())
    face.v = y * face.pitch.cos() + depth * (face.head_depth * face.pitch.sin())
    face.canvas = F.interpolate(face.background, size=(size, size), mode="bilinear", align_corners=True)
    face.edge = 1.5 * 2 / size
    face.head = face.cover((squared.sqrt_() - 1) * 0.6)


def _paint_behind(face: _Face) -> None:
    """Long or short hair behind the head, clothes, neck and ears."""
    side = face.x / (face.face_width + face.hair_side)
    top = face.y.clamp(max=0) / (face.face_height + face.hair_top)
    hair = face.cover(torch.maximum((_length(side, top) - 1) * 0.6, face.y - face.hair_length), 2.0)
    face.paint(hair, face.hair_colour)
    across = face.x.abs()
    shoulders = face.cover(0.92 * face.face_height + 0.35 * across.square() - face.y)
    face.paint(shoulders, face.clothes_colour)
    neck = face.cover(torch.maximum(across - 0.62 * face.face_width, face.y - 1.05 * face.face_height))
    neck *= face.y > 0
    face.paint(neck, face.skin_colour * 0.7)
    beside = (face.x + 0.4 * face.yaw.sin()).abs_() - face.face_width * 0.99
    ears = face.cover(_length(beside / 0.6, face.y - face.eye_y - 0.08) - face.ear_size)
    ears = ears * face.cover(face.hair_length - 0.25)
    face.paint(ears, face.skin_colour * 0.88)
    face.hair = hair * (1 - torch.maximum(shoulders, neck))
    face.body = torch.maximum(torch.maximum(hair, ears), torch.maximum(shoulders, neck))


def _paint_skin(face: _Face) -> None:
    face.paint(face.head, face.skin_colour)
    cheek = (face.u.abs() - 0.62 * face.face_width).square_() + (face.v - 0.25).square_()
    flush = _bump(cheek * 22).mul_(face.cheek_flush).mul_(face.head)
    face.paint(flush, face.skin_colour * face.skin_colour.new_tensor([1.0, 0.62, 0.6]).view(1, 3, 1, 1))


def _paint_eyes(face: _Face) -> None:
    across = face.u.abs() - face.eye_x
    down = face.v - face.eye_y
    socket = _bump((across / 0.17).square_() + ((down + 0.02) / 0.12).square_())
    face.paint(socket.mul_(face.eye_socket).mul_(face.head), face.skin_colour * 0.45)
    down = down + across * face.eye_tilt
    lid = 1 - (across / face.eye_width).square_()
    upper, lower = -down - face.eye_height * face.eye_open * lid, down - 0.55 * face.eye_height * lid
    opening = face.cover(torch.maximum(upper, lower)) * face.head
    face.paint(opening, 0.9 - 0.1 * (1 - face.skin_colour))
    gaze = across - face.gaze_x * face.u.sign()
    iris = _length(gaze, down + 0.2 * face.eye_height - face.gaze_y) - face.iris_size
    face.paint(face.cover(iris) * opening, face.iris_colour)
    face.paint(face.cover(iris + 0.55 * face.iris_size) * opening, torch.zeros_like(face.iris_colour))
    lash = torch.maximum(upper.abs_() - face.lash, -lid * face.eye_width)
    face.paint_head(face.cover(lash), face.hair_colour * 0.3, 0.85)


def _paint_brows(face: _Face) -> None:
    along = (face.u.abs() - face.eye_x * 1.02) / face.brow_length
    line = face.eye_y - face.brow_gap - face.brow_raise
    line = line + face.brow_arch * along.square() - (face.brow_tilt + face.frown) * along
    thickness = face.brow_thickness * (1.1 - 0.5 * along)
    brow = torch.maximum((face.v - line).abs_() - thickness, (along.abs() - 1) * face.brow_length)
    face.paint_head(face.cover(brow), face.hair_colour * 0.75, 0.9)


def _paint_nose(face: _Face) -> None:
    """A ridge that bends the normals, wings, nostrils and the shadow under the tip."""
    tip = face.eye_y + face.nose_length
    along = ((face.v - face.eye_y + 0.08) / (face.nose_length + 0.08)).clamp_(0, 1)
    beyond = (face.v - tip).clamp_(min=0) / 0.05
    across = face.u / torch.lerp(face.nose_bridge, face.nose_width * 0.75, along.square())
    ridge = _bump(across.square() + beyond.square()).mul_(along.sqrt_()).mul_(face.head)
    face.normal[0] = face.normal[0] + 1.5 * face.nose_height * across * ridge
    face.normal[1] = face.normal[1] + face.nose_height * beyond * ridge
    outward = face.u.abs()
    wing = _length(outward - face.nose_width, face.v - tip + 0.01)
    crease = ((wing - 0.03).abs_() - 0.008).masked_fill_(outward < face.nose_width, 1.0)
    face.paint_head(face.cover(crease), face.skin_colour * 0.4, 0.45)
    nostril = _length((outward - 0.55 * face.nose_width) / 1.5, face.v - tip - 0.015) - face.nostril
    face.paint_head(face.cover(nostril), face.skin_colour * 0.25, 0.8)
    shadow = _bump((face.u / face.nose_width).square_() + ((face.v - tip - 0.05) / 0.03).square_())
    face.paint_head(shadow, face.skin_colour * 0.45, 0.35)


def _paint_beard(face: _Face) -> None:
    tip = face.eye_y + face.nose_length
    across = (face.u / face.face_width).square_()
    jaw = face.cover(tip + face.mouth_gap + face.beard_low - face.beard_arch * across - face.v, 2.0)
    face.paint_head(jaw, face.hair_colour * 0.85, face.beard)
    line = face.v - tip - 0.6 * face.mouth_gap - 0.5 * across
    moustache = torch.maximum(line.abs_() - 0.032, face.u.abs() - 0.85 * face.mouth_width)
    face.paint_head(face.cover(moustache, 1.5), face.hair_colour * 0.8, face.moustache)


def _paint_mouth(face: _Face) -> None:
    width = face.mouth_width * (1 + 1.2 * face.smile)
    along = (face.u / width).square_()
    middle = face.eye_y + face.nose_length + face.mouth_gap
    down = face.v - middle + face.smile * (along - 0.4)
    bulge = (1 - along).clamp_(min=0)
    gap = face.mouth_open * bulge
    upper = -down - face.upper_lip * bulge * (0.7 + 0.3 * (along * 8).clamp_(max=1)) - gap
    lower = down - face.lower_lip * bulge - gap
    ends = (along.sqrt() - 1) * width
    face.paint_head(face.cover(torch.maximum(torch.maximum(upper, lower), ends)), face.lip_colour)
    inside = torch.maximum(down.abs() - gap - 0.008, ends)
    face.paint_head(face.cover(inside), face.lip_colour * 0.25, 0.85)
    teeth = torch.maximum(down.abs() - gap * 0.6 + 0.012, ends + 0.03)
    face.paint_head(face.cover(teeth), torch.full_like(face.lip_colour, 0.88))
    chin = _bump(face.u.square() * 30 + ((face.v - middle - face.lower_lip - 0.07) / 0.035).square_())
    face.paint_head(chin, face.skin_colour * 0.5, 0.25)


def _paint_hair(face: _Face) -> None:
    across = face.u / face.face_width
    line = -face.hair_line * face.face_height + face.hair_arch * across.square()
    line = line + face.hair_peak * _bump(across.square() * 9)
    hair = face.cover(face.v - line, 2.0) * face.head
    face.paint(hair, face.hair_colour * 0.92)
    strands = face.x.abs() * face.strands + face.curl * (face.y * 22).sin_() + face.strand_phase
    everywhere = torch.maximum(hair, face.hair * (1 - face.head))
    face.canvas.addcmul_(strands.sin_().mul_(everywhere), face.gloss * (0.45 * face.hair_colour + 0.12))


def _paint_glasses(face: _Face) -> None:
    across = face.u.abs() - face.eye_x
    square_x = (across / face.lens_width).square_()
    square_y = ((face.v - face.eye_y - 0.01) / face.lens_height).square_()
    rounded = torch.lerp(square_x + square_y, _length(square_x, square_y), face.lens_square)
    lens = rounded.sqrt_().sub_(1).mul_(face.lens_height)
    face.paint(face.cover(lens) * face.lens_tint * face.head, face.frame_colour * 0.4)
    bridge = torch.maximum((face.v - face.eye_y).abs_() - 0.5 * face.frame, -lens)
    frame = torch.minimum(lens.abs() - face.frame, bridge)
    face.paint(face.cover(frame) * face.glasses * face.head, face.frame_colour)


def _light(face: _Face) -> None:
    """Lambert's cosine law with an ambient floor, lower where the head turns away; cast and exposure on everything."""
    direction = [face.light_x, face.light_y, (1 - face.light_x.square() - face.light_y.square()).sqrt()]
    cosine = sum(normal * part for normal, part in zip(face.normal, direction, strict=True))
    shade = cosine.clamp_(0, 1.3).mul_(face.light).add_(face.ambient)
    flat = face.ambient + 0.45 * face.light
    shade = torch.lerp(flat, shade, face.head)
    shade = torch.lerp(torch.ones_like(flat), shade, torch.maximum(face.head, face.body))
    face.canvas.mul_(shade).mul_(face.cast)


def _paint_occluder(face: _Face) -> None:
    cos, sin = face.occluder_angle.cos(), face.occluder_angle.sin()
    x, y = face.x - face.occluder_x, face.y - face.occluder_y
    along, across = (x * cos + y * sin).abs_() - face.occluder_width, (y * cos - x * sin).abs_() - face.occluder_height
    face.paint(face.cover(torch.maximum(along, across)) * face.occluder, face.occluder_colour)


def _develop(face: _Face, noise: Tensor) -> Tensor:
    """The camera: area average, blur, noise, quantization. Sums of slices: faster on a CPU than pooling is."""
    rows = sum(face.canvas[..., offset::SUPERSAMPLING, :] for offset in range(SUPERSAMPLING))
    image = sum(rows[..., offset::SUPERSAMPLING] for offset in range(SUPERSAMPLING)) / SUPERSAMPLING**2
    size = image.shape[-1]
    soft = F.pad(image, (2, 2, 2, 2), mode="replicate")
    for axis in (2, 3):
        soft = sum(soft.narrow(axis, offset, size) * weight for offset, weight in enumerate(BLUR))
    image = torch.lerp(image, soft, face.blur).addcmul_(noise, face.noise)
    return image.mul_(255).round_().clamp_(0, 255).to(torch.uint8)
