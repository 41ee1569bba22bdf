"""What another look at the command line and the files found."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.io import loadmat, savemat

from deepinv_deal.cli import main
from deepinv_deal.evaluation.tasks import make_kernel
from deepinv_deal.files import (
    check_target,
    files_below,
    read_mask,
    read_picture,
    write_picture,
)

FAST = ["--sigma", "20", "--rtol", "0.3"]


def picture(*shape, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    top = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    return (rng.uniform(0.2, 0.8, shape) * top).astype(dtype)


def copied(source, target, white=None):
    read = read_picture(source, white)
    write_picture(target, read.x, read)
    return read


# -- pictures --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "photometric", "kinds", "message"),
    [
        (2, "minisblack", ["UNSPECIFIED"], "gray is known and the rest is no opacity"),
        (4, "rgb", ["UNSPECIFIED"], "RGB is known and the rest is no opacity"),
        (3, "minisblack", None, "gray is known"),
        (4, "minisblack", None, "gray is known"),
        (4, "rgb", ["ASSOCALPHA"], "multiplied by their opacity"),
        (2, "minisblack", ["ASSOCALPHA"], "multiplied by their opacity"),
    ],
)
def test_channels_that_are_no_opacity_are_not_taken_for_one(
    tmp_path, channels, photometric, kinds, message
):
    """They were left as noisy as they were, and called opacity."""
    file = tmp_path / "a.tif"
    tifffile.imwrite(
        file,
        picture(9, 8, channels, dtype=np.uint16),
        photometric=photometric,
        planarconfig="CONTIG",
        extrasamples=kinds,
    )
    with pytest.raises(ValueError, match=message):
        read_picture(file)


@pytest.mark.parametrize("channels", [2, 4])
def test_opacity_is_still_one(tmp_path, channels):
    pixels = picture(9, 8, channels)
    tifffile.imwrite(
        tmp_path / "a.tif",
        pixels,
        photometric="rgb" if channels == 4 else "minisblack",
        planarconfig="CONTIG",
        extrasamples=["UNASSALPHA"],
    )
    Image.fromarray(pixels).save(tmp_path / "b.tif")  # as Pillow has it
    for name in ("a.tif", "b.tif"):
        read = copied(tmp_path / name, tmp_path / "out.tif")
        assert read.alpha is not None
        np.testing.assert_array_equal(read.alpha[0], pixels[..., -1])
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), pixels)


def test_colours_stay_where_an_image_is_transparent(tmp_path):
    pixels = picture(9, 8, 4)
    pixels[..., 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    copied(tmp_path / "a.png", tmp_path / "b.webp")
    with Image.open(tmp_path / "b.webp") as image:
        np.testing.assert_array_equal(np.array(image), pixels)


def test_transparency_of_16_bit_is_not_dropped(tmp_path):
    image = Image.fromarray(picture(9, 8, dtype=np.uint16))
    image.save(tmp_path / "a.png", transparency=30000)
    with pytest.raises(ValueError, match="16 bit and a value that is transparent"):
        read_picture(tmp_path / "a.png")


def test_double_precision_stays_double_precision(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", picture(9, 8, dtype=np.float64))
    copied(tmp_path / "a.tif", tmp_path / "b.tif")
    assert tifffile.imread(tmp_path / "b.tif").dtype == np.float64


@pytest.mark.parametrize("name", ["y.png", "y.tif"])
def test_a_larger_image_has_smaller_pixels(tmp_path, name):
    Image.fromarray(picture(10, 12)).save(tmp_path / name, dpi=(254, 127))
    source, target = str(tmp_path / name), str(tmp_path / f"out{name[1:]}")
    words = [source, target, "--rtol", "0.3"]

    def resolution():
        with Image.open(target) as image:
            return image.size, pytest.approx(image.info["dpi"], rel=1e-3)

    assert main(["reconstruct", "downsampling", *words, "--factor", "3"]) == 0
    assert resolution() == ((36, 30), (762, 381))
    # A margin makes more pixels, of the same size.
    blur = [*words, "--kernel", "square:3", "--padding", "valid"]
    assert main(["reconstruct", "blur", *blur]) == 0
    assert resolution() == ((14, 12), (254, 127))


def test_an_opacity_of_another_size_is_refused_before_it_takes_long(tmp_path, capsys):
    source, target = tmp_path / "a.png", tmp_path / "b.png"
    Image.fromarray(picture(10, 12, 4)).save(source)
    command = ["reconstruct", "downsampling", str(source), str(target)]
    assert main([*command, "--factor", "2"]) == 2
    assert "Save the input without opacity" in capsys.readouterr().err


def test_infinite_numbers_are_named(tmp_path):
    x = picture(9, 8, dtype=np.float32)
    x[3, 3] = np.inf
    np.save(tmp_path / "a.npy", x)
    with pytest.raises(ValueError, match="holds infinite numbers"):
        read_picture(tmp_path / "a.npy")


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("kind", ["ASSOCALPHA", "UNSPECIFIED"])
def test_a_channel_that_is_white_everywhere_is_an_opacity(tmp_path, channels, kind):
    pixels = picture(9, 8, channels)
    pixels[..., -1] = 255
    tifffile.imwrite(
        tmp_path / "a.tif",
        pixels,
        photometric="rgb" if channels == 4 else "minisblack",
        planarconfig="CONTIG",
        extrasamples=[kind],
    )
    copied(tmp_path / "a.tif", tmp_path / "b.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "b.tif"), pixels)


def test_rounding_does_not_spoil_a_mask(tmp_path):
    for values in ([0, 1e-12, 1], [0, 1 - 1e-7, 1], [0, 254, 255]):
        np.save(tmp_path / "a.npy", np.array([values, values]))
        expected = [False, values[1] > 0.5, True]
        assert read_mask(tmp_path / "a.npy")[0].tolist() == expected


@pytest.mark.parametrize("name", ["a.npy", "a.png", "a.jpg"])
def test_values_in_between_are_no_mask_unless_compression_made_them(tmp_path, name):
    """All up to a quarter of the largest counted as zero, without a word."""
    mask = 255 * (picture(16, 16) > 127).astype(np.uint8)
    mask[0, 0] = 50
    if name == "a.npy":
        np.save(tmp_path / name, mask)
    else:
        Image.fromarray(mask).save(tmp_path / name, quality=95)
    if name == "a.jpg":
        assert 0 < read_mask(tmp_path / name).double().mean() < 1
        return
    with pytest.raises(ValueError, match="has 1 entries between zero and its largest"):
        read_mask(tmp_path / name)


# -- arrays ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".mat", ".h5"])
def test_other_arrays_of_a_file_are_not_deleted(tmp_path, suffix, capsys):
    file, image = tmp_path / f"a{suffix}", picture(9, 8, dtype=np.float32)
    if suffix == ".npz":
        np.savez(file, img=image, truth=image)
    elif suffix == ".mat":
        savemat(file, {"img": image, "truth": image})
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(file, "w") as root:
            root["img"], root["group/truth"] = image, image
    before = file.read_bytes()
    assert main(["denoise", f"{file}:img", str(file), *FAST]) == 2
    assert "holds other arrays" in capsys.readouterr().err
    assert file.read_bytes() == before
    other = tmp_path / f"b{suffix}"
    other.write_bytes(before[:100])  # what a killed program left
    for _ in range(2):  # a result may be replaced
        assert main(["denoise", f"{file}:img", str(other), *FAST]) == 0


@pytest.mark.parametrize(
    ("name", "expected"), [("_img", "img"), ("3d", "d"), ("__", "x"), ("a b", "a_b")]
)
def test_names_that_matlab_does_not_have_are_changed(tmp_path, name, expected):
    """An array whose name begins with an underscore was dropped."""
    np.savez(tmp_path / "a.npz", **{name: picture(9, 8, dtype=np.float32)})
    copied(tmp_path / "a.npz", tmp_path / "a.mat")
    found = [key for key in loadmat(tmp_path / "a.mat") if not key.startswith("__")]
    assert found == [expected]


@pytest.mark.parametrize("name", ["file", "args", "x"])
def test_any_name_can_be_that_of_an_array(tmp_path, name):
    image = picture(9, 8, dtype=np.float32)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        with archive.open(f"{name}.npy", "w") as entry:
            np.lib.format.write_array(entry, image)
    copied(tmp_path / "a.npz", tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as arrays:
        assert arrays.files == [name]
        np.testing.assert_array_equal(arrays[name], image)


def test_a_target_that_cannot_be_is_noticed_first(tmp_path, capsys):
    source, file = tmp_path / "a.npy", tmp_path / "file"
    np.save(source, picture(9, 8, dtype=np.float32))
    file.write_text("")
    read = read_picture(source)
    with pytest.raises(OSError, match=r"b\.npy cannot be written"):
        check_target(file / "b.npy", read)
    assert main(["denoise", str(source), str(file / "b.npy"), *FAST]) == 2
    assert "cannot be written" in capsys.readouterr().err


# -- commands --------------------------------------------------------------------------


def run(text, **options):
    """Runs the command in a shell."""
    program = "import sys; from deepinv_deal.cli import main; sys.exit(main())"
    command = text.replace("deepinv-deal", f"{sys.executable} -c '{program}'")
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


@pytest.mark.slow
def test_results_are_written_though_nobody_reads_the_output(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        Image.fromarray(picture(9, 8)).save(tmp_path / "in" / f"{name}.png")
    done = run("deepinv-deal denoise in out --sigma 20 | true", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list((tmp_path / "out").iterdir())) == 3
    np.savez(tmp_path / "in" / "mask.npz", x=1)
    done = run("deepinv-deal denoise in both --sigma 20 2>&1 | true", cwd=tmp_path)
    assert done.returncode == 0 and len(list((tmp_path / "both").iterdir())) == 3
    command = "deepinv-deal evaluate --data in --sigma 20 --csv a.csv | true"
    done = run(command, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (141, "")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 4


def test_files_that_a_folder_is_not_searched_for_are_counted(tmp_path, capsys):
    (tmp_path / "in" / "series").mkdir(parents=True)
    Image.fromarray(picture(9, 8)).save(tmp_path / "in" / "a.png")
    np.savez(tmp_path / "in" / "b.npz", x=picture(9, 8))
    (tmp_path / "in" / "series" / "1.dcm").write_bytes(b"")
    assert main(["denoise", str(tmp_path / "in"), str(tmp_path / "out"), *FAST]) == 0
    assert "2 files of other kinds" in capsys.readouterr().err


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.png").write_bytes(b"")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    assert files_below(tmp_path / "a", [".png"]) == [tmp_path / "a/link/x.png"]
    # Its own name comes first, whatever the order of the names.
    assert files_below(tmp_path, [".png"]) == [tmp_path / "b/x.png"]


def test_a_bad_image_of_a_folder_is_named(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    x = picture(9, 8, dtype=np.float32)
    x[2, 2] = np.nan
    np.save(tmp_path / "in" / "hole.npy", x)
    np.save(tmp_path / "in" / "good.npy", picture(9, 8, dtype=np.float32))
    assert main(["denoise", str(tmp_path / "in"), str(tmp_path / "out"), *FAST]) == 1
    assert "hole.npy: y holds NaN" in capsys.readouterr().err


def test_a_folder_that_is_its_own_result_says_so(tmp_path, capsys):
    Image.fromarray(picture(9, 8)).save(tmp_path / "a.png")
    assert main(["denoise", str(tmp_path), str(tmp_path), *FAST]) == 0
    assert "OUTPUT is INPUT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "white", "truth", "options"),
    [
        (np.uint16, "4095", "x.png", []),  # another kind of numbers
        (np.float32, "100", "x.png", []),
        (np.float32, "100", "x.npy", ["--truth-white", "1"]),
        (np.uint8, None, "x.png", []),  # the same kind
    ],
)
@pytest.mark.parametrize("command", ["denoise", "inpainting"])
def test_the_true_image_may_be_in_another_unit(
    tmp_path, capsys, command, dtype, white, truth, options
):
    """It was divided by what is white in the measurements."""
    clean = np.kron(picture(3, 4, dtype=np.float32), np.ones((6, 6), np.float32))
    unit = 255 if white is None else float(white)
    y = str(tmp_path / ("y.npy" if dtype == np.float32 else "y.tif"))
    if dtype == np.float32:
        np.save(y, unit * clean)
    else:
        tifffile.imwrite(y, np.rint(unit * clean).astype(dtype))
    Image.fromarray(np.rint(255 * clean).astype(np.uint8)).save(tmp_path / "x.png")
    np.save(tmp_path / "x.npy", clean)
    np.save(tmp_path / "mask.npy", np.ones(clean.shape, np.uint8))
    words = [command] if command == "denoise" else ["reconstruct", command]
    words += [y, str(tmp_path / "out.npy"), "--truth", str(tmp_path / truth), *options]
    words += ["--sigma", "1"] if command == "denoise" else []
    words += [] if command == "denoise" else ["--mask", str(tmp_path / "mask.npy")]
    words += [] if command == "denoise" else ["--lambda-reg", "1e-4"]
    words += [] if white is None else ["--white", white]
    assert main(words) == 0
    said = capsys.readouterr()
    assert float(said.out.split("PSNR ")[1].split(" dB")[0]) > 30
    assert "in one unit" not in said.err
    if options:
        at = words.index("--truth-white")
        assert main(words[:at] + words[at + 2 :]) == 0
        assert "Are they in one unit? See --truth-white" in capsys.readouterr().err


@pytest.mark.parametrize("given", [np.float32, np.float64])
def test_true_images_in_floating_point_are_in_one_unit(tmp_path, capsys, given):
    """Whatever their precision; black is black in both."""
    x = 1000 * np.kron(picture(3, 4, dtype=np.float64), np.ones((6, 6))) - 300
    np.save(tmp_path / "y.npy", x.astype(np.float32))
    np.save(tmp_path / "x.npy", x.astype(given))
    np.save(tmp_path / "shown.npy", (x + 1000) / 2000)
    words = ["denoise", str(tmp_path / "y.npy"), str(tmp_path / "out.npy")]
    words += ["--sigma", "1", "--white", "1000", "--black=-1000", "--truth"]

    def psnr(name, *options):
        assert main([*words, str(tmp_path / name), *options]) == 0
        return float(capsys.readouterr().out.split("PSNR ")[1].split(" dB")[0])

    best = psnr("x.npy")
    assert best > 40
    assert psnr("x.npy", "--truth-white", "1000") == best
    assert psnr("shown.npy", "--truth-white", "1", "--truth-black", "0") == best


def test_images_without_noise_can_be_evaluated(tmp_path, capsys):
    Image.fromarray(picture(24, 24)).save(tmp_path / "a.png")
    command = ["evaluate", "--data", str(tmp_path), "--sigma", "0"]
    assert main(command) == 2
    assert "leaves nothing to denoise" in capsys.readouterr().err
    blur = ["--task", "deblurring", "--kernel", "square:3", "--method", "adjoint"]
    assert main([*command, *blur]) == 0


def test_an_evaluation_is_not_lost_with_its_table(tmp_path, capsys):
    Image.fromarray(picture(24, 24)).save(tmp_path / "a.png")
    command = ["evaluate", "--data", str(tmp_path), "--sigma", "20"]
    (tmp_path / "file").write_text("")
    assert main([*command, "--csv", str(tmp_path / "file" / "a.csv")]) == 2
    said = capsys.readouterr()
    assert "cannot be written" in said.err and said.out == ""  # nothing was computed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "--data", "x", "--sigma", "-5"], "is no noise level"),
        (["evaluate", "--data", "x", "--sigma", "nan"], "is no noise level"),
        (["evaluate", "--data", "x", "--sigma", "300"], "is no noise level"),
        (["train", "deal", "--time-budget", "1.2.3"], "is no duration"),
        (["train", "deal", "--threads", "-2"], "give 1 or more"),
    ],
)
def test_numbers_that_cannot_be_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["foo", "cuda:77"])
def test_a_device_that_is_not_there_is_bad_input(tmp_path, device, capsys):
    words = ["train", "deal", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*words, "--steps", "1", "--device", device]) == 2
    assert f"--device {device} cannot be used" in capsys.readouterr().err


def test_kernels_have_whole_numbers_of_pixels():
    for text in ("square:2.4", "motion:0.5"):
        with pytest.raises(ValueError, match="a number of pixels must follow"):
            make_kernel(text)
    assert make_kernel("square:2")[1].shape == (1, 1, 2, 2)
    assert make_kernel("gaussian:1.6")[1].shape[-1] > 3
