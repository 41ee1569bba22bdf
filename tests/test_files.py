"""Files: what goes in comes out, or nothing is written and the error names the file."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from deepinv_deal._atomic import replacing
from deepinv_deal.cli import main
from deepinv_deal.evaluation import make_kernel
from deepinv_deal.files import (
    as_float,
    load_image,
    read_array,
    read_mask,
    read_picture,
    write_picture,
)
from deepinv_deal.weights.files import read_checkpoint

SIZE = (9, 8)
DEPTHS = [np.uint8, np.uint16, np.int16, np.int32, np.float32]


def pixels(dtype, shape, seed=0):
    """Numbers that use the range of the dtype."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    info = np.iinfo(dtype)
    low, high = max(info.min, -(2**23)) // 2, min(info.max, 2**23) // 2
    return rng.integers(low, high, shape, dtype, endpoint=True)


def white_of(dtype):
    return 1000.0 if np.dtype(dtype).kind == "i" else None


def copied(source: Path, target: Path, white=None) -> Path:
    picture = read_picture(source, white)
    write_picture(target, picture.x, picture)
    return target


# -- round trips ----------------------------------------------------------------


@pytest.mark.parametrize("pages", [1, 3])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DEPTHS)
@pytest.mark.parametrize("suffix", [".tif", ".tiff"])
def test_tiff_files_come_back(tmp_path, suffix, dtype, channels, pages):
    shape = (pages, *SIZE) if channels == 1 else (pages, *SIZE, channels)
    x = pixels(dtype, shape)
    source = tmp_path / f"in{suffix}"
    colour = channels > 2
    tifffile.imwrite(
        source,
        x[0] if pages == 1 else x,
        photometric="rgb" if colour else "minisblack",
        extrasamples=["UNASSALPHA"] if channels in (2, 4) else None,
        planarconfig=None if channels == 1 else "CONTIG",
        resolution=(100, 200),
        resolutionunit="INCH",
        iccprofile=b"profile",
    )
    result = copied(source, tmp_path / f"out{suffix}", white_of(dtype))
    with tifffile.TiffFile(result) as file:
        assert len(file.pages) == pages
        found = np.stack([page.asarray() for page in file.pages])
        assert found.dtype == dtype
        assert file.pages[0].tags["InterColorProfile"].value == b"profile"
        assert file.pages[0].tags["XResolution"].value == (100, 1)
    # Computed in float32, which holds 24 bit: more than any camera.
    tolerance = {np.float32: 1e-6, np.int32: 1}.get(dtype, 0)
    np.testing.assert_allclose(found.reshape(x.shape), x, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("suffix", "mode", "dtype", "shape"),
    [
        (".png", "L", np.uint8, SIZE),
        (".png", "LA", np.uint8, (*SIZE, 2)),
        (".png", "RGB", np.uint8, (*SIZE, 3)),
        (".png", "RGBA", np.uint8, (*SIZE, 4)),
        (".png", "I;16", np.uint16, SIZE),
        (".bmp", "L", np.uint8, SIZE),
        (".bmp", "RGB", np.uint8, (*SIZE, 3)),
        (".webp", "RGB", np.uint8, (*SIZE, 3)),
        (".webp", "RGBA", np.uint8, (*SIZE, 4)),
    ],
)
def test_other_pictures_come_back(tmp_path, suffix, mode, dtype, shape):
    x = pixels(dtype, shape) + 1  # no pixel is fully transparent
    image = Image.fromarray(x)
    assert image.mode == mode
    image.save(
        tmp_path / f"in{suffix}", **({"lossless": True} if "webp" in suffix else {})
    )
    result = copied(tmp_path / f"in{suffix}", tmp_path / f"out{suffix}")
    with Image.open(result) as found:
        assert found.mode == mode
        np.testing.assert_array_equal(np.asarray(found), x)


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16])
@pytest.mark.parametrize(
    "shape", [SIZE, (1, *SIZE), (3, *SIZE), (*SIZE, 3), (1, 1, *SIZE), (2, 3, *SIZE)]
)
def test_arrays_come_back_in_their_layout_and_unit(tmp_path, suffix, dtype, shape):
    x = pixels(dtype, shape)
    np.save(tmp_path / "in.npy", x)
    result = read_array(copied(tmp_path / "in.npy", tmp_path / f"out{suffix}"))
    assert result.dtype == (np.float64 if dtype is np.float64 else np.float32)
    assert result.shape == x.shape
    np.testing.assert_allclose(result, x, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_pictures_are_turned_upright_and_keep_profile_and_resolution(tmp_path, suffix):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12] = 200  # bright at the top left
    turned = Image.fromarray(np.rot90(upright).copy())  # 6: to be turned clockwise
    exif = Image.Exif()
    exif[274], exif[271] = 6, "maker"
    source = tmp_path / f"in{suffix}"
    settings = {} if suffix == ".tif" else {"exif": exif}
    if suffix == ".tif":
        tifffile.imwrite(
            source,
            np.asarray(turned),
            photometric="rgb",
            extratags=[(274, 3, 1, 6, True)],
            resolution=(300, 300),
            resolutionunit="INCH",
            iccprofile=b"profile",
        )
    else:
        turned.save(source, icc_profile=b"profile", dpi=(300, 300), **settings)
    result = copied(source, tmp_path / f"out{suffix}")
    with Image.open(result) as image:
        found = np.asarray(image)
        assert image.getexif().get(274, 1) == 1
        assert image.info["icc_profile"] == b"profile"
        assert tuple(round(float(v)) for v in image.info["dpi"]) == (300, 300)
        if suffix != ".tif":
            assert image.getexif()[271] == "maker"
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_orientations_are_those_of_exif(tmp_path, orientation):
    x = pixels(np.uint8, (5, 7, 3))
    tifffile.imwrite(
        tmp_path / "a.tif",
        x,
        photometric="rgb",
        extratags=[(274, 3, 1, orientation, True)],
    )
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(x).save(tmp_path / "a.png", exif=exif)
    tiff, png = (read_picture(tmp_path / f"a.{kind}").x for kind in ("tif", "png"))
    assert torch.equal(tiff, png)


def test_a_unit_of_the_users_stays_in_its_range(tmp_path):
    """12 bit in files of 16: white was stretched to 65535."""
    x = pixels(np.uint16, SIZE) % 4096
    x[0, 0] = 60000  # a hot pixel
    tifffile.imwrite(tmp_path / "in.tif", x)
    result = copied(tmp_path / "in.tif", tmp_path / "out.png", 4095.0)
    np.testing.assert_array_equal(np.asarray(Image.open(result)), x)


def test_results_are_clipped_to_what_integers_hold(tmp_path):
    x = pixels(np.uint8, SIZE)
    Image.fromarray(x).save(tmp_path / "in.png")
    picture = read_picture(tmp_path / "in.png")
    write_picture(tmp_path / "out.png", 3 * picture.x - 1, picture)
    expected = np.rint(3.0 * x - 255).clip(0, 255)
    np.testing.assert_array_equal(read_array(tmp_path / "out.png"), expected)


def test_white_is_zero_in_some_tiff_files(tmp_path):
    x = pixels(np.uint8, SIZE)
    tifffile.imwrite(tmp_path / "a.tif", x, photometric="miniswhite")
    np.testing.assert_array_equal(read_array(tmp_path / "a.tif"), 255 - x)


# -- what would be lost is refused, before anything is computed -------------------


@pytest.mark.parametrize(
    ("dtype", "shape", "target", "words"),
    [
        (np.uint16, (*SIZE, 3), "out.png", "cannot hold uint16 in colour"),
        (np.uint16, SIZE, "out.jpg", "cannot hold uint16"),
        (np.int16, SIZE, "out.png", "cannot hold int16"),
        (np.uint8, (2, *SIZE), "out.png", "cannot hold 2 pages"),
        (np.uint8, (*SIZE, 4), "out.jpg", "cannot hold transparency"),
        (np.uint8, SIZE, "out.gif", "can be written as"),
    ],
)
def test_a_target_that_would_lose_something_is_refused_first(
    tmp_path, capsys, monkeypatch, dtype, shape, target, words
):
    colour = shape[-1] in (3, 4)
    tifffile.imwrite(
        tmp_path / "in.tif",
        pixels(dtype, shape),
        photometric="rgb" if colour else "minisblack",
        planarconfig="CONTIG" if colour else None,
        metadata=None,
    )
    monkeypatch.setattr("deepinv_deal.DEAL.forward", None)  # must not be asked
    command = ["denoise", str(tmp_path / "in.tif"), str(tmp_path / target)]
    options = ["--sigma", "20", *(["--white", "999"] if dtype is np.int16 else [])]
    assert main([*command, *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / target).exists()


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint32])
def test_signed_and_wide_integers_need_to_know_white(tmp_path, dtype):
    """They wrapped modulo 65536."""
    tifffile.imwrite(tmp_path / "a.tif", pixels(dtype, SIZE))
    with pytest.raises(ValueError, match=r"a\.tif holds .*int\d\d numbers: say which"):
        read_picture(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif holds"):
        load_image(tmp_path / "a.tif", 1)


def png_of_16_bit(path, colour_type):
    """The head of such a file is enough: Pillow has no writer for it."""
    header = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + b"\0\0\0\2\0\0\0\2"
    import zlib

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return len(data).to_bytes(4, "big") + kind + data + crc.to_bytes(4, "big")

    ihdr = header[16:] + bytes([16, colour_type, 0, 0, 0])
    samples = {2: 3, 4: 2, 6: 4}[colour_type]
    rows = (b"\0" + bytes(range(4 * samples))) * 2
    path.write_bytes(
        header[:8]
        + chunk(b"IHDR", ihdr)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("colour_type", [2, 4, 6])
def test_pngs_that_pillow_would_cut_are_refused(tmp_path, colour_type):
    png_of_16_bit(tmp_path / "a.png", colour_type)
    with pytest.raises(ValueError, match=r"a\.png has 16 bit and several channels"):
        read_picture(tmp_path / "a.png")


def test_frames_that_differ_and_animations_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(pixels(np.uint8, (8, 8)))
        file.write(pixels(np.uint8, (4, 4)))
    with pytest.raises(ValueError, match=r"a\.tif holds pages of different kinds"):
        read_picture(tmp_path / "a.tif")
    frames = [Image.fromarray(pixels(np.uint8, (8, 8, 3), seed)) for seed in (0, 1)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"a\.webp holds 2 frames"):
        read_picture(tmp_path / "a.webp")
    Image.fromarray(pixels(np.uint8, (8, 8, 4)), "CMYK").save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg has the colour mode CMYK"):
        read_picture(tmp_path / "a.jpg")


def test_more_pixels_than_pillow_reads_are_an_error_that_says_so(tmp_path, monkeypatch):
    Image.fromarray(pixels(np.uint8, SIZE)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"a\.png has more pixels than Pillow reads"):
        read_picture(tmp_path / "a.png")


# -- training and evaluation read the same ----------------------------------------


def test_deep_images_are_trained_on_as_they_are(tmp_path):
    """16-bit pictures were white, floating-point ones black."""
    x = pixels(np.uint16, SIZE)
    Image.fromarray(x).save(tmp_path / "a.png")
    y = pixels(np.float32, SIZE)
    tifffile.imwrite(tmp_path / "b.tif", y)
    z = pixels(np.uint8, (*SIZE, 3))
    Image.fromarray(z).save(tmp_path / "c.png")
    for name, values in (("a.png", x / 65535), ("b.tif", y)):
        for channels in (1, 3):
            image = as_float(load_image(tmp_path / name, channels))
            assert image.shape == (channels, *SIZE)
            np.testing.assert_allclose(image[0], values, rtol=1e-6)
    assert load_image(tmp_path / "c.png", 3).dtype == torch.uint8
    np.testing.assert_allclose(
        as_float(load_image(tmp_path / "c.png", 3)).permute(1, 2, 0), z / 255, rtol=1e-6
    )


# -- masks --------------------------------------------------------------------------


def save_mask(path, mask, **settings):
    Image.fromarray((255 * mask).astype(np.uint8)).save(path, **settings)
    return path


def test_masks_have_two_values(tmp_path):
    mask = np.random.default_rng(0).random((16, 16)) < 0.5
    for name in ("a.png", "a.tif"):
        assert np.array_equal(read_mask(save_mask(tmp_path / name, mask)), mask)
    for dtype in (bool, np.uint8, np.float64):
        np.save(tmp_path / "a.npy", mask.astype(dtype))
        assert np.array_equal(read_mask(tmp_path / "a.npy"), mask)
    # A JPEG of large areas is within rounding of two values; one of pixels is not.
    areas = np.kron([[1, 0], [0, 1]], np.ones((8, 8))).astype(bool)
    file = save_mask(tmp_path / "a.jpg", areas, quality=75)
    assert np.array_equal(read_mask(file), areas)
    file = save_mask(tmp_path / "b.jpg", mask, quality=30)
    with pytest.raises(ValueError, match=r"b\.jpg has \d+ entries between"):
        read_mask(file)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_entries_of_masks_that_mean_nothing_are_refused(tmp_path, bad):
    mask = np.ones((4, 4))
    mask[0, 0] = bad
    np.save(tmp_path / "m.npy", mask)
    with pytest.raises(ValueError, match=r"m\.npy has 1 entries that are negative"):
        read_mask(tmp_path / "m.npy")


def test_what_the_mask_excludes_may_be_nan(tmp_path):
    x = np.random.default_rng(0).random((12, 12)).astype(np.float32)
    mask = np.random.default_rng(1).random((12, 12)) < 0.7
    np.save(tmp_path / "m.npy", mask)
    results = []
    for missing in (0.0, np.nan):
        np.save(tmp_path / "y.npy", np.where(mask, x, np.float32(missing)))
        files = [str(tmp_path / name) for name in ("y.npy", "out.npy")]
        command = ["reconstruct", "inpainting", *files, "--mask"]
        assert main([*command, str(tmp_path / "m.npy")]) == 0
        results.append(np.load(tmp_path / "out.npy"))
    np.testing.assert_array_equal(*results)


# -- folders ------------------------------------------------------------------------


def test_a_folder_with_damaged_files_is_done_but_for_them(tmp_path, capsys):
    source, target = tmp_path / "in", tmp_path / "out.v2"
    source.mkdir()
    image = Image.fromarray(pixels(np.uint8, (12, 12)))
    for name in ("a.png", "a.jpg", "b.png"):
        image.save(source / name)
    (source / "empty.png").touch()
    (source / "._b.png").write_bytes(b"what macOS leaves")
    target.mkdir()
    command = ["denoise", str(source), str(target), "--sigma", "20", "--rtol", "0.1"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "1 of 4 files were not denoised" in error
    assert "empty.png" in error
    assert sorted(p.name for p in target.iterdir()) == ["a.jpg.png", "a.png", "b.png"]


def test_results_within_the_folder_are_no_input(tmp_path, capsys):
    Image.fromarray(pixels(np.uint8, (12, 12))).save(tmp_path / "a.png")
    command = ["denoise", str(tmp_path), str(tmp_path / "out"), "--sigma", "20"]
    for _ in range(2):
        assert main([*command, "--rtol", "0.1"]) == 0
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["a.png"]


def test_pages_are_denoised_one_by_one(tmp_path, capsys):
    x = pixels(np.float32, (2, 12, 12))
    tifffile.imwrite(tmp_path / "in.tif", x, metadata=None)
    command = ["denoise", str(tmp_path / "in.tif"), str(tmp_path / "out.tif")]
    assert main([*command, "--sigma", "20"]) == 0
    assert "in.tif[1]" in capsys.readouterr().out
    both = tifffile.imread(tmp_path / "out.tif")
    tifffile.imwrite(tmp_path / "in.tif", x[1])
    assert main([*command, "--sigma", "20"]) == 0
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), both[1])


# -- failures -----------------------------------------------------------------------


def test_a_failed_write_leaves_the_earlier_result(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(pixels(np.uint8, SIZE)).save(file)
    before = file.read_bytes()

    def full(*_args, **_settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    picture = read_picture(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match=r"a\.png cannot be written.*No space left"):
            write_picture(file, picture.x, picture)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_links_stay_links(tmp_path):
    (tmp_path / "data").mkdir()
    real, link = tmp_path / "data" / "a.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and real.read_text() == "new"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npz", b"PK\3\4 truncated"),
        ("a.npy", b"\x93NUMPY\1\0"),
        ("a.pt", b"no tensor"),
        ("a.pt", b"\x80\4foreign pickle"),
        ("a.mat", b""),
        ("a.mat", b"MATLAB 5.0 MAT-file" + 200 * b"\1"),
        ("a.png", b""),
        ("a.tif", b"II*\0\xff\xff\xff\xff"),
        ("a.tif", b"nonsense"),
        ("a.tif", b""),
        ("a.jpg", b"\xff\xd8\xff\xe0"),
    ],
)
def test_damaged_files_are_errors_that_name_them(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the readers remark
        with pytest.raises(ValueError, match=rf"{name[:-3]}.* (cannot|is not)"):
            read_array(tmp_path / name)
        command = ["denoise", str(tmp_path / name), str(tmp_path / "o.npy")]
        assert main([*command, "--sigma", "9"]) == 2
    assert name in capsys.readouterr().err


def test_a_foreign_checkpoint_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"a\.pth cannot be read"):
        read_checkpoint(tmp_path / "a.pth")


def test_control_c_ends_without_a_traceback(tmp_path, capsys, monkeypatch):
    Image.fromarray(pixels(np.uint8, SIZE)).save(tmp_path / "a.png")

    def stop(*_args, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("deepinv_deal.DEAL.forward", stop)
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    assert main(["denoise", *files, "--sigma", "20"]) == 130
    assert capsys.readouterr().err == "deepinv-deal: interrupted\n"
    assert os.listdir(tmp_path) == ["a.png"]


# -- kernels ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.uint8])
def test_kernels_are_floating_point_and_sum_to_one(tmp_path, dtype):
    np.save(tmp_path / "k.npy", np.arange(1, 10).reshape(3, 3).astype(dtype))
    _, kernel = make_kernel(str(tmp_path / "k.npy"))
    assert kernel.dtype == torch.float32 and float(kernel.sum()) == pytest.approx(1)
