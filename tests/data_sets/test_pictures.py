"""The reader of pictures: every format, mode and orientation becomes the same bytes, and every error names the file."""

import struct

import numpy as np
import pytest
from PIL import Image

from diffdistill.data import load_data
from diffdistill.data.finding import find_pictures
from diffdistill.data.pictures import PictureError, PictureReader, colour, is_grey, is_picture, picture_suffixes

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = np.random.default_rng(1).integers(0, 256, (5, 7), dtype=np.uint8)
SAVED = sorted(
    suffix
    for suffix, name in Image.registered_extensions().items()
    if suffix in picture_suffixes() and name in Image.SAVE and name != "SPIDER"
)


def read(path, **options):
    return PictureReader(**options).read(path)


@pytest.mark.parametrize("suffix", SAVED)
def test_every_suffix_that_pillow_reads_is_a_picture(suffix, tmp_path):
    mode = {".msp": "1", ".xbm": "1", ".pbm": "1", ".blp": "P", ".pfm": "F"}.get(suffix, "RGB")
    image = Image.fromarray(COLOURS).convert(mode) if mode != "F" else Image.fromarray(GREY.astype(np.float32) / 255)
    for name in (f"a{suffix}", f"b{suffix.upper()}"):
        try:
            image.save(tmp_path / name, Image.registered_extensions()[suffix])
        except (OSError, KeyError):
            pytest.skip(f"this Pillow writes no {suffix}")
    found = find_pictures(tmp_path)
    assert [name for name, _ in found.items] == [f"a{suffix}", f"b{suffix.upper()}"]
    if suffix in (".ico", ".icns", ".palm", ".avif", ".avifs"):
        return  # of other sizes, or lossy
    with Image.open(tmp_path / f"a{suffix}") as opened:
        expected = np.array(opened.convert("RGB")) if mode != "F" else np.stack([GREY] * 3, -1)
    assert np.array_equal(read(tmp_path / f"a{suffix}"), expected.transpose(2, 0, 1))


def test_formats_that_run_other_programs_are_no_pictures(tmp_path):
    assert not {".eps", ".ps", ".wmf", ".emf", ".h5", ".grib", ".bufr", ".mpg"} & picture_suffixes()
    assert {".png", ".jpg", ".jpeg", ".jfif", ".tif", ".ppm", ".gif", ".avif", ".webp", ".bmp"} <= picture_suffixes()
    (tmp_path / "a.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(%pipe%touch hacked) (w) file\n"
    )
    with pytest.raises(PictureError, match="a.png.*no picture"):
        read(tmp_path / "a.png")
    assert not is_picture("._a.png") and not is_picture("Thumbs.db") and is_picture("x/A.PNG")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_pictures_stand_upright(orientation, suffix, tmp_path):
    shown = np.zeros((16, 32, 3), np.uint8)
    shown[:8, :16] = 255  # light in the upper left alone
    turned = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if suffix == ".jpg" else {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(np.ascontiguousarray(turned(shown))).save(tmp_path / f"a{suffix}", exif=exif, **options)
    np.testing.assert_allclose(read(tmp_path / f"a{suffix}"), shown.transpose(2, 0, 1), atol=4)


def test_modes_become_bytes_of_the_same_look(tmp_path):
    flat = np.empty((4, 6, 3), np.uint8)
    flat[:] = (200, 100, 50)
    image = Image.fromarray(flat)
    for mode, name, off in [("CMYK", "a.tif", 1), ("YCbCr", "a.jpg", 4), ("LAB", "b.tif", 3), ("P", "a.gif", 4)]:
        if mode == "LAB":
            from PIL import ImageCms

            srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
            made = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
        else:
            made = image.convert(mode)
        made.save(tmp_path / name, **({"quality": 100} if name.endswith("jpg") else {}))
        np.testing.assert_allclose(read(tmp_path / name), flat.transpose(2, 0, 1), atol=off, err_msg=mode)
    grey = read(tmp_path / "a.gif", channels=1)
    assert grey.shape == (1, 4, 6) and abs(int(grey[0, 0, 0]) - 124) <= 4  # ITU-R 601: 0.299 R + 0.587 G + 0.114 B


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bits_keep_their_range(name, tmp_path):
    values = np.linspace(0, 65535, 42).reshape(6, 7).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    expected = np.round(values / 257.0)
    assert np.array_equal(read(tmp_path / name, channels=1)[0], expected)
    assert np.array_equal(read(tmp_path / name)[2], expected)


def test_values_of_an_unknown_range_are_refused_by_name(tmp_path):
    Image.fromarray(np.full((3, 4), 70_000, np.int32)).save(tmp_path / "a.tif")
    Image.fromarray(np.full((3, 4), 255, np.float32)).save(tmp_path / "b.tif")
    for name, span in (("a.tif", "70000"), ("b.tif", "255")):
        with pytest.raises(PictureError, match=f"{name}.*values from {span}"):
            read(tmp_path / name)


BACKGROUNDS = [("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ([1, 2, 3], (1, 2, 3))]


@pytest.mark.parametrize(("background", "values"), BACKGROUNDS)
def test_transparent_places_show_the_background(background, values, tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0], rgba[0, ..., 3] = 200, 255  # red above, and red that is not seen below
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.paste(0, (0, 1, 3, 2))
    palette.save(tmp_path / "p.png", transparency=0)
    palette.save(tmp_path / "p.gif", transparency=0)
    shown = Image.fromarray(rgba[..., :3].copy())
    shown.paste((1, 1, 1), (0, 1, 3, 2))
    shown.save(tmp_path / "rgb.png", transparency=(1, 1, 1))
    for name in ("rgba.png", "p.png", "p.gif", "rgb.png"):
        pixels = read(tmp_path / name, background=background)
        assert pixels[:, 0, 0].tolist() == [200, 0, 0] and pixels[:, 1, 2].tolist() == list(values), name
    half = np.full((1, 1, 4), (100, 100, 100, 51), np.uint8)
    Image.fromarray(half).save(tmp_path / "half.png")
    expected = np.round(100 * 0.2 + np.array(values) * 0.8)
    np.testing.assert_allclose(read(tmp_path / "half.png", background=background)[:, 0, 0], expected, atol=1)
    la = np.array([[[90, 255], [90, 0]]], np.uint8)
    Image.fromarray(la, "LA").save(tmp_path / "la.png")
    wide = np.array([[0, 25_700]], np.uint16)
    Image.fromarray(wide).save(tmp_path / "wide.png", transparency=0)
    light = read(tmp_path / "la.png", channels=1, background=background)[0, 0]
    assert light[0] == 90 and light[1] == int(Image.new("RGB", (1, 1), values).convert("L").getpixel((0, 0)))
    assert read(tmp_path / "wide.png", background=background)[:, 0].T.tolist() == [list(values), [100, 100, 100]]


@pytest.mark.parametrize("background", ["nope", [1, 2], [1, 2, 300], 5, "#12345"])
def test_what_is_no_colour_is_refused(background):
    with pytest.raises(ValueError, match="background is a colour"):
        colour(background)


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def huge(path):
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, huge, lambda path: path.write_bytes(b"")])
def test_a_damaged_picture_is_named_and_can_be_left_out(damage, tmp_path):
    for i in range(3):
        Image.fromarray(COLOURS).save(tmp_path / f"{i}.png")
    damage(tmp_path / "1.png")
    with pytest.raises(PictureError, match=r"1.png'.*data.skip_damaged=true"):
        load_data("images", root=tmp_path).tensors()
    data = load_data("images", root=tmp_path, skip_damaged=True)
    assert len(data.tensors()["x"]) == 2 and "2 images; skipped: 1 damaged (1.png)" in data.found


def test_grey_is_told_by_the_header(tmp_path):
    for mode, grey in [("1", True), ("L", True), ("LA", True), ("RGB", False), ("P", False), ("RGBA", False)]:
        Image.fromarray(COLOURS).convert(mode).save(tmp_path / "a.png")
        assert is_grey(tmp_path / "a.png") is grey
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "a.png")
    assert is_grey((tmp_path / "a.png").read_bytes()) is True
    (tmp_path / "a.png").write_bytes(b"no")
    assert is_grey(tmp_path / "a.png") is None
