"""Pictures are read as a viewer shows them; expected pixels are written out by hand. Broken files end in a sentence."""

import errno
import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from focusdpo_lib import pictures
from focusdpo_lib.pictures import PictureError, read, read_mask

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def stored(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def corners(picture: Image.Image) -> list:
    """Colours of the corners, clockwise from the top left."""
    right, low = picture.width - 1, picture.height - 1
    return [picture.getpixel(at) for at in ((0, 0), (right, 0), (right, low), (0, low))]


def four_colours() -> Image.Image:
    """Two rows of three pixels whose corners are red, green, blue and white."""
    picture = Image.new("RGB", (3, 2))
    for at, colour in zip(((0, 0), (2, 0), (2, 1), (0, 1)), (RED, GREEN, BLUE, WHITE), strict=True):
        picture.putpixel(at, colour)
    return picture


# What EXIF 2.3 says of each value of its tag Orientation, as the corners that a viewer shows.
UPRIGHT = {
    1: [RED, GREEN, BLUE, WHITE],
    2: [GREEN, RED, WHITE, BLUE],  # mirrored
    3: [BLUE, WHITE, RED, GREEN],  # upside down
    4: [WHITE, BLUE, GREEN, RED],  # upside down and mirrored
    5: [RED, WHITE, BLUE, GREEN],  # transposed
    6: [WHITE, RED, GREEN, BLUE],  # to be turned right
    7: [BLUE, GREEN, RED, WHITE],  # transposed along the other diagonal
    8: [GREEN, BLUE, WHITE, RED],  # to be turned left
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_photo_stands_as_its_exif_tag_says(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if form == "WEBP" else {}
    seen = read(stored(four_colours(), form, exif=exif, **lossless))
    assert corners(seen) == UPRIGHT[orientation]
    assert corners(read(seen)) == corners(seen)  # reading what was read turns nothing again


@pytest.mark.parametrize("hidden", [RED, (0, 0, 0)])
def test_what_is_transparent_is_white_whatever_colour_hides_below(hidden):
    cut_out = Image.new("RGBA", (3, 1), (*hidden, 0))
    cut_out.putpixel((1, 0), (10, 20, 30, 255))
    cut_out.putpixel((2, 0), (0, 0, 0, 51))  # a fifth of black on white
    for form, options in {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True, "exact": True}}.items():
        seen = read(stored(cut_out, form, **options))
        assert [seen.getpixel((x, 0)) for x in range(3)] == [WHITE, (10, 20, 30), (204, 204, 204)]


def test_transparency_of_palettes_of_one_colour_and_of_grey_is_white_too():
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    assert [
        read(stored(palette, form, transparency=0)).getpixel((x, 0)) for form in ("PNG", "GIF") for x in (0, 1)
    ] == [
        *(WHITE, BLUE),
        *(WHITE, BLUE),
    ]
    assert read(stored(palette, transparency=b"\xff\x00")).getpixel((1, 0)) == WHITE
    assert read(stored(Image.new("RGB", (1, 1), RED), transparency=RED)).getpixel((0, 0)) == WHITE
    assert read(stored(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == WHITE
    assert read(stored(Image.fromarray(np.uint16([[9]])), transparency=9)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize(("level", "expected"), [(0, 0), (257 * 70, 70), (300, 1), (65535, 255)])
def test_sixteen_bits_become_eight_and_not_white(form, level, expected):
    assert read(stored(Image.fromarray(np.uint16([[level]])), form)).getpixel((0, 0)) == (expected,) * 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes_become_rgb(mode):
    assert read(stored(Image.new("RGB", (2, 2), "black").convert(mode), "TIFF")).getpixel((0, 0)) == (0, 0, 0)


def test_a_cameras_previews_do_not_make_a_photo_two():
    photo = stored(Image.new("RGB", (8, 8), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (2, 2))])
    assert Image.open(io.BytesIO(photo)).n_frames == 2 and read(photo).size == (8, 8)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_a_file_of_several_frames_is_refused(form):
    film = stored(Image.new("RGB", (8, 8), RED), form, save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)])
    with pytest.raises(PictureError, match="2 frames, and which one counts is unknown: save that one alone"):
        read(film)


@pytest.mark.parametrize("magic", [b"P5", b"P2"])
@pytest.mark.parametrize(
    ("highest", "levels", "expected"),
    [
        (65535, [0, 257 * 70, 300, 65535], [0, 70, 1, 255]),
        (1023, [0, 1023, 341, 682], [0, 255, 85, 170]),  # thirds
        (255, [0, 70, 1, 255], [0, 70, 1, 255]),
    ],
)
def test_a_pgm_has_as_many_levels_as_it_says(magic, highest, levels, expected):
    kind = ">u2" if highest > 255 else "u1"
    pixels = np.array(levels, kind).tobytes() if magic == b"P5" else " ".join(map(str, levels)).encode()
    seen = read(magic + b"\n4 1\n%d\n" % highest + pixels)
    assert [seen.getpixel((x, 0)) for x in range(4)] == [(level,) * 3 for level in expected]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, bits: int = 8, kind: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))


def png(bits: int, kind: int, row: bytes, key: bytes, width: int) -> bytes:
    """One row of pixels (kind 0: grey, 2: RGB) with a transparent colour."""
    body = chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return png_header(width, 1, bits, kind) + body


@pytest.mark.parametrize(
    ("bits", "row", "key", "expected"),
    [
        (1, b"\x40", 0, [255, 255]),  # 0 and 1
        (2, b"\x1b", 1, [0, 255, 170, 255]),  # 0, 1, 2 and 3 of 3
        (2, b"\x1b", 2, [0, 85, 255, 255]),
        (4, b"\x07\xf0", 7, [0, 255, 255, 0]),  # 0, 7 and 15 of 15
        (4, b"\x07\xf0", 0x100, [255, 119, 255, 255]),  # of a key the lower four bits count
        (8, b"\x07\x77", 7, [255, 119]),
        (16, b"\x10\x00\x10\x01", 0x1000, [255, 16]),
    ],
)
def test_a_transparent_grey_is_white_whatever_the_depth(bits, row, key, expected):
    seen = read(png(bits, 0, row, struct.pack(">H", key), len(expected)))
    assert [seen.getpixel((x, 0)) for x in range(len(expected))] == [(level,) * 3 for level in expected]


@pytest.mark.parametrize("colour", [(10_000, 20_000, 30_000), (0, 0, 0)])
def test_a_transparent_colour_that_eight_bits_cannot_tell_is_refused(colour):
    key = struct.pack(">HHH", *colour)
    with pytest.raises(
        PictureError, match="has a transparent colour of 16 bits: save it with 8, or with an alpha chan"
    ):
        read(png(16, 2, key, key, 1))


@pytest.mark.parametrize("size", [(10_000, 9_500), (60_000, 60_000)])  # Pillow warns of the one and refuses the other
def test_a_decompression_bomb_is_named(size, tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(*size) + chunk(b"IDAT", zlib.compress(b"\0" * 99)))
    with pytest.raises(PictureError, match=r"bomb.png has more than 89 megapixels: scale it down"):
        read(tmp_path / "bomb.png")


def test_what_is_no_picture_is_named_with_what_is_read(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>Not found</html>")
    with pytest.raises(PictureError, match=r"page.jpg cannot be read: it is damaged or no AVIF, BMP, GIF, JPEG"):
        read(tmp_path / "page.jpg")
    with pytest.raises(PictureError, match=r"away.png is missing"):
        read(tmp_path / "away.png")
    with pytest.raises(PictureError, match="32 bits a channel"):
        read(stored(Image.fromarray(np.float32([[0.5]])), "TIFF"))


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "I/O error")])
def test_what_cannot_be_opened_is_not_to_be_deleted(tmp_path, monkeypatch, error):
    def refuse(path):
        raise error

    (tmp_path / "a.png").write_bytes(stored(four_colours()))
    with monkeypatch.context() as patched, pytest.raises(PictureError) as caught:
        patched.setattr("pathlib.Path.read_bytes", refuse)
        read(tmp_path / "a.png")
    why = f"{type(error).__name__}: {error.strerror}"
    assert str(caught.value) == f"the image {tmp_path}/a.png cannot be opened ({why}): make it a file that can be read"
    assert read(tmp_path / "a.png").size == (3, 2)


def test_a_folder_and_a_name_that_no_file_can_have_are_named(tmp_path):
    with pytest.raises(
        PictureError, match=r"cannot be opened \(IsADirectoryError: .*: make it a file that can be read"
    ):
        read(tmp_path)
    with pytest.raises(PictureError, match=r"cannot be opened \(ValueError: "):
        read("a\0b.png")


def test_encapsulated_postscript_is_not_run(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert Image.open(tmp_path / "photo.png").format == "EPS"
    with pytest.raises(PictureError, match="cannot be read"):
        read(tmp_path / "photo.png")


def test_masks_are_black_and_white():
    black_white = np.uint8([[0, 255], [255, 0]])
    expected = black_white > 0
    for picture in (Image.fromarray(black_white), Image.fromarray(black_white).convert("1")):
        assert (read_mask(stored(picture)) == expected).all()
    assert (read_mask(stored(Image.fromarray(black_white.astype(np.uint16) * 257))) == expected).all()
    for wrong in (Image.new("L", (2, 2), 1), Image.new("RGB", (2, 2), RED)):
        with pytest.raises(PictureError, match="values other than 0 and 255"):
            read_mask(stored(wrong))
    for clear in (Image.new("LA", (2, 2), (255, 0)), Image.new("RGBA", (2, 2), (0, 0, 0, 0))):
        with pytest.raises(PictureError, match="transparent parts"):
            read_mask(stored(clear))


def test_photos_of_a_folder_are_whatever_can_be_read(tmp_path):
    for name in ("b.WEBP", "a.jpeg", "c.tif", "d.heic", "notes.txt", ".hidden.png", "._a.jpeg"):
        (tmp_path / name).touch()
    (tmp_path / "e.png").mkdir()
    found, others = pictures.photos(tmp_path)
    assert [p.name for p in found] == ["a.jpeg", "b.WEBP", "c.tif"] and others == ["d.heic", "e.png", "notes.txt"]


def damaged(data: bytes, dice: random.Random) -> bytes:
    """One of: bytes changed, cut short, a piece taken out, doubled, or filled with noise."""
    data = bytearray(data)
    start, length = dice.randrange(len(data)), dice.choice((1, 2, 4, 16, 64))
    match dice.randrange(5):
        case 0:
            for _ in range(dice.choice((1, 3, 10))):
                data[dice.randrange(len(data))] = dice.randrange(256)
        case 1:
            del data[start:]
        case 2:
            del data[start : start + length]
        case 3:
            data[start:start] = data[start : start + length]
        case 4:
            data[start : start + length] = dice.randbytes(length)
    return bytes(data)


FORMS = {
    **{form: ("RGB", {}) for form in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")},
    **{"png in grey": ("L", {}), "png with alpha": ("RGBA", {}), "tiff in cmyk": ("CMYK", {"compression": "tiff_lzw"})},
}


@pytest.mark.parametrize("form", FORMS)
def test_damaged_files_are_pictures_or_a_sentence(form):
    mode, options = FORMS[form]
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    options |= {"exif": exif} if form in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF") else {}
    whole = stored(Image.fromarray(pixels).convert(mode), form.split()[0].upper(), **options)
    dice, refused = random.Random(form), 0
    for _ in range(150):
        try:
            assert read(damaged(whole, dice)).mode == "RGB"
        except PictureError as error:
            refused += 1
            assert str(error).startswith("the image ") and ": " in str(error) and "\n" not in str(error)
    assert refused > 0
