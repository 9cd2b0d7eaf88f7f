"""Decoding and resizing against goldens and straightforward numpy."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
import pytest

from diffit_jax.data import transforms


def _encode(image: Image.Image, file_format: str, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, format=file_format, **options)
  return file.getvalue()


def _pattern(height: int, width: int, dx: int, dy: int) -> Image.Image:
  """(dx x + dy y + 40 c) mod 256."""
  y, x, c = np.ogrid[:height, :width, :3]
  return Image.fromarray(((dx * x + dy * y + 40 * c) % 256).astype(np.uint8))


def test_lanczos_resize_has_the_golden_values():
  # image files in GOLDENS.md, EDM's FFHQ route, 128 -> 64.
  image = np.asarray(transforms.fit(_pattern(128, 128, 3, 2), 64, "edm"))
  assert image.shape == (64, 64, 3)
  assert image[0, 0].tolist() == [3, 43, 83]
  assert image[10, 20].tolist() == [162, 202, 240]
  assert image[63, 63].tolist() == [120, 160, 200]
  assert image.sum(dtype=np.int64) == 1_561_774


def test_adm_crop_has_the_golden_values():
  # GOLDENS.md: one BOX halving, BICUBIC to 16 wide, middle 16 rows.
  image = np.asarray(transforms.fit(_pattern(50, 37, 7, 5), 16, "adm"))
  assert image.shape == (16, 16, 3)
  assert image[0, 0].tolist() == [43, 83, 123]
  assert image[5, 9].tolist() == [208, 31, 72]
  assert image[15, 15].tolist() == [200, 248, 23]
  assert image.sum(dtype=np.int64) == 99_180


@pytest.mark.parametrize("crop", transforms.CROPS)
@pytest.mark.parametrize("size", [(9, 9), (9, 31), (40, 17), (5, 3), (64, 64)])
def test_every_crop_gives_a_square_of_the_size_asked_for(crop, size):
  image = transforms.fit(_pattern(size[1], size[0], 3, 2), 9, crop)
  assert image.size == (9, 9)


@pytest.mark.parametrize("crop", transforms.CROPS)
def test_an_image_of_the_right_size_is_untouched(crop):
  image = _pattern(16, 16, 7, 5)
  fitted = transforms.fit(image, 16, crop)
  np.testing.assert_array_equal(np.asarray(fitted), np.asarray(image))


def test_center_crop_takes_the_middle_and_edm_stretches():
  columns = np.repeat(np.arange(12, dtype=np.uint8) * 20, 3).reshape(1, 12, 3)
  wide = Image.fromarray(np.repeat(columns, 4, axis=0))  # 4 high, 12 wide
  middle = np.asarray(transforms.fit(wide, 4, "center-crop"))
  np.testing.assert_array_equal(middle, np.asarray(wide)[:, 4:8])
  stretched = np.asarray(transforms.fit(wide, 4, "edm"))
  assert stretched[0, 0, 0] < middle[0, 0, 0]
  assert stretched[0, -1, 0] > middle[0, -1, 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip_is_exact(channels):
  image = np.random.default_rng(0).integers(
    0, 256, (5, 7, channels), dtype=np.uint8
  )
  png = transforms.encode_png(image)
  np.testing.assert_array_equal(transforms.decode(png, channels), image)


def test_colour_modes_become_rgb():
  rgb = _pattern(6, 6, 3, 2)
  for mode, file_format in [
    ("RGBA", "PNG"),
    ("RGB", "WEBP"),
    ("CMYK", "JPEG"),
  ]:
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = _encode(rgb.convert(mode), file_format, **options)
    image = transforms.open_image(data)
    assert image.mode == "RGB" and image.size == (6, 6)
    if file_format != "JPEG":  # which is lossy
      np.testing.assert_array_equal(np.asarray(image), np.asarray(rgb))


def test_palette_and_gray_become_rgb():
  gray = np.asarray(_pattern(6, 6, 3, 2))[..., 0]
  expected = np.repeat(gray[..., None], 3, axis=-1)
  palette = Image.fromarray(gray)
  palette.putpalette([value for i in range(256) for value in (i, i, i)])
  for image in (Image.fromarray(gray), palette):
    data = _encode(image, "PNG")
    np.testing.assert_array_equal(transforms.open_image(data), expected)


def test_sixteen_bits_are_scaled_not_clipped():
  deep = np.array([[0, 255, 256], [32768, 40000, 65535]], np.uint16)
  data = _encode(Image.fromarray(deep), "PNG")
  image = np.asarray(transforms.open_image(data))
  np.testing.assert_array_equal(image[..., 0], deep // 256)


def test_exif_rotation_is_ignored_but_told():
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  image = transforms.open_image(
    _encode(_pattern(4, 8, 3, 2), "JPEG", exif=exif.tobytes())
  )
  assert image.size == (8, 4)
  assert image.info["exif_orientation"] == 6


def _chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
  crc = zlib.crc32(kind + data) if crc is None else crc
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


_RANDOM = np.random.default_rng(0).bytes(3 * 2**19)  # more than 1 MiB
_DAMAGED_EXIF = (  # the only entry is an orientation of 0 / 0
  struct.pack("<2sHIH", b"II", 42, 8, 1)
  + struct.pack("<HHII12x", 0x0112, 5, 1, 26)
)
_DAMAGED_CHUNKS = {
  "no hex": _chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 10\nzz"),
  "too long": _chunk(b"zTXt", b"parameters\0\0" + zlib.compress(_RANDOM)),
  "a wrong check sum": _chunk(b"tEXt", b"Comment\0by hand", crc=1),
  "half a gamma": _chunk(b"gAMA", b"\0\0"),
  "no EXIF": _chunk(b"eXIf", _DAMAGED_EXIF),
}


@pytest.mark.parametrize("chunk", _DAMAGED_CHUNKS)
@pytest.mark.parametrize("at", ["front", "end"])
def test_a_sound_png_with_damaged_metadata_keeps_its_pixels(chunk, at):
  image = _noise()
  data = _encode(image, "PNG")
  place = 33 if at == "front" else len(data) - 12  # behind IHDR; before IEND
  data = data[:place] + _DAMAGED_CHUNKS[chunk] + data[place:]
  found = transforms.open_image(data)
  np.testing.assert_array_equal(np.asarray(found), np.asarray(image))
  if at == "front":  # Pillow passes over some of it at the end
    assert transforms.notes(found) == [
      "have metadata that cannot be read and is passed over"
    ]
  assert transforms.read_size(data) == image.size
  at = data.index(b"IDAT") + 100
  with pytest.raises(transforms.UNREADABLE):  # it excuses no damaged pixels
    transforms.open_image(data[:at] + bytes(20) + data[at + 20 :])


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_the_first_of_several_frames_is_taken_and_told(file_format):
  frames = [_noise(), _noise().rotate(90), _noise().rotate(180)]
  options = {"save_all": True, "append_images": frames[1:]}
  if file_format == "WEBP":
    options["lossless"] = True
  found = transforms.open_image(_encode(frames[0], file_format, **options))
  np.testing.assert_array_equal(np.asarray(found), np.asarray(frames[0]))
  assert transforms.notes(found) == [
    "hold several frames, of which the first is taken"
  ]


def _noise() -> Image.Image:
  """Incompressible, so that a cut or a changed byte hits pixels."""
  noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  return Image.fromarray(noise)


@pytest.mark.parametrize("file_format", transforms.FORMATS)
def test_a_truncated_image_is_unreadable(file_format):
  data = _encode(_noise(), file_format)
  for cut in (data[: len(data) // 2], data[:-40]):
    with pytest.raises(transforms.UNREADABLE):
      transforms.open_image(cut)


def test_a_damaged_png_is_unreadable():
  data = _encode(_noise(), "PNG")
  with pytest.raises(transforms.UNREADABLE):
    transforms.open_image(data[:500] + bytes(20) + data[520:])


def test_what_is_no_image_is_unreadable():
  for data in (b"", b"text", _encode(_noise(), "GIF")):
    with pytest.raises(ValueError, match="no PNG, JPEG or WebP image"):
      transforms.open_image(data)


def test_a_decompression_bomb_is_unreadable(monkeypatch):
  monkeypatch.setattr(transforms, "MAX_PIXELS", 1023)
  with pytest.raises(ValueError, match="32x32 pixels are too many"):
    transforms.open_image(_encode(_noise(), "PNG"))


def test_flip_mirrors_left_and_right():
  image = np.arange(2 * 3 * 1).reshape(2, 3, 1)
  assert transforms.flip(image)[0, :, 0].tolist() == [2, 1, 0]
