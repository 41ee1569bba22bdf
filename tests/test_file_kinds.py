"""Files of the fields: numbers, scale and place in space come back."""

from __future__ import annotations

import gzip
import re
import sys
import warnings

import numpy as np
import pytest
import tifffile
import torch
from deepinv.physics import DynamicMRI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepinv_deal import DEAL
from deepinv_deal.cli import main
from deepinv_deal.files import (
    check_target,
    forgets_place,
    is_series,
    read_array,
    read_k_space,
    read_picture,
    suffix_of,
    write_picture,
)
from deepinv_deal.files.pictures import KINDS

REASON = "needs the readers of the extra `files`"
FAST = ["--sigma", "10", "--rtol", "0.3"]
hypothesis_settings = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def nibabel():
    return pytest.importorskip("nibabel", reason=REASON)


@pytest.fixture
def pydicom():
    return pytest.importorskip("pydicom", reason=REASON)


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py", reason=REASON)


def numbers(dtype, shape, seed=0):
    """Numbers that use the range of the dtype up to what float32 holds."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(500, 300, shape).astype(dtype)
    limits = np.iinfo(dtype)
    low, high = max(limits.min, -(2**23)), min(limits.max, 2**23)
    return rng.integers(low, high, shape, np.int64, endpoint=True).astype(dtype)


def copied(source, target, white="max", **options):
    picture = read_picture(source, white, **options)
    write_picture(target, picture.x, picture)
    return target


# -- NIfTI --------------------------------------------------------------------------

AFFINE = np.array(
    [[-0.9, 0.1, 0, 90], [0.1, 0.9, 0.2, -126], [0, -0.2, 2.5, -72], [0, 0, 0, 1]]
)


def save_nifti(nibabel, path, stored, scale=(1.0, 0.0), kind="Nifti1Image"):
    image = getattr(nibabel, kind)(stored, AFFINE)
    header = image.header
    header.set_data_dtype(stored.dtype)
    header.set_slope_inter(*scale)
    header.set_qform(np.diag([1.5, 1.5, 3, 1]), "scanner")
    header.set_sform(AFFINE, "mni")
    header.set_xyzt_units("mm", "sec")
    header["descrip"] = b"T1 of nobody"
    header["cal_max"] = 1000
    if len(stored.shape) > 3:
        header["pixdim"][4] = 2.2  # seconds between volumes
    comment = nibabel.nifti1.Nifti1Extension("comment", b"kept")
    header.extensions.append(comment)
    image.to_filename(path)
    return path


def assert_like_nifti(nibabel, found, source, atol=0.0):
    found, source = nibabel.load(found), nibabel.load(source)
    assert type(found) is type(source)
    for key in source.header:
        np.testing.assert_array_equal(found.header[key], source.header[key], key)
    assert found.header.extensions == source.header.extensions
    np.testing.assert_array_equal(found.affine, source.affine)
    scale = [(i.dataobj.slope, i.dataobj.inter) for i in (found, source)]
    assert scale[0] == scale[1]
    np.testing.assert_allclose(
        found.dataobj.get_unscaled(),
        source.dataobj.get_unscaled(),
        rtol=1e-6,
        atol=atol,
    )


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", ["Nifti1Image", "Nifti2Image"])
@pytest.mark.parametrize("scale", [(1.0, 0.0), (0.25, -1024.0)])
@pytest.mark.parametrize("shape", [(7, 6), (7, 6, 5), (7, 6, 5, 2), (7, 6, 5, 1, 3)])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "<i4", ">i2", "f4", "f8"])
def test_nifti_files_come_back(tmp_path, nibabel, dtype, shape, scale, kind, suffix):
    source = tmp_path / f"in{suffix}"
    save_nifti(nibabel, source, numbers(dtype, shape), scale, kind)
    unit = {"white": "max", "black": -1024.0 * (scale != (1.0, 0.0))}
    target = copied(source, tmp_path / f"out{suffix}", **unit)
    assert_like_nifti(nibabel, target, source, atol=4.0 if dtype == "<i4" else 1e-3)
    assert (target.read_bytes()[:2] == b"\x1f\x8b") == (suffix == ".nii.gz")
    again = copied(source, tmp_path / f"again{suffix}", **unit)
    assert again.read_bytes() == target.read_bytes()  # no time of writing


@hypothesis_settings
@given(
    slope=st.floats(1e-3, 1e3).map(np.float32).map(float),
    intercept=st.floats(-1e3, 1e3).map(np.float32).map(float),
    white=st.floats(1, 1e6),
    black=st.floats(-1e6, 0),
    seed=st.integers(0, 100),
)
def test_no_scale_moves_a_number(
    tmp_path, nibabel, slope, intercept, white, black, seed
):
    """Whatever counts as black and white, stored integers come back."""
    stored = np.random.default_rng(seed).integers(-2000, 2000, (4, 5, 3), np.int16)
    source = save_nifti(nibabel, tmp_path / "in.nii", stored, (slope, intercept))
    picture = read_picture(source, white, black=black)
    write_picture(tmp_path / "out.nii", picture.x, picture)
    found = nibabel.load(tmp_path / "out.nii").dataobj.get_unscaled()
    # Images are float32: 24 bit of the largest of what is added up.
    size = max(2000 * slope, abs(intercept), white - black)
    assert np.abs(found - stored).max() <= max(0, np.ceil(2**-22 * size / slope - 0.5))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_other_stacks_become_volumes_of_their_numbers(tmp_path, nibabel, dtype):
    x = numbers(dtype, (3, 6, 7))
    tifffile.imwrite(tmp_path / "a.tif", x, photometric="minisblack")
    copied(tmp_path / "a.tif", tmp_path / "a.nii.gz")
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert image.get_data_dtype() == dtype
    np.testing.assert_allclose(image.get_fdata().T, x, rtol=1e-6)
    np.save(tmp_path / "a.npy", x)
    copied(tmp_path / "a.npy", tmp_path / "b.nii", volume=True)
    image = nibabel.load(tmp_path / "b.nii")  # of arrays nothing is rounded
    assert image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.get_fdata().T, x, rtol=1e-5)


def test_a_page_is_a_slice_whose_rows_are_the_second_index(tmp_path, nibabel):
    stored = numbers(np.float32, (7, 6, 5, 2))
    source = save_nifti(nibabel, tmp_path / "a.nii.gz", stored)
    picture = read_picture(source, 1.0)
    assert picture.x.shape == (10, 1, 6, 7)
    expected = stored[2, 3, 4, 1]
    assert float(picture.x[5 + 4, 0, 3, 2]) == expected
    assert float(picture.volumes()[1, 0, 4, 3, 2]) == expected
    assert torch.equal(picture.pages(picture.volumes()), picture.x)
    save_nifti(nibabel, tmp_path / "b.nii", stored[..., 0])
    np.testing.assert_array_equal(
        read_array(tmp_path / "b.nii")[4, 3, 2], stored[2, 3, 4, 0]
    )


def test_nifti_files_that_are_none_are_named(tmp_path, nibabel):
    (tmp_path / "a.nii").write_bytes(b"no volume")
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"none"))
    for name in ("a.nii", "a.nii.gz"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as NIfTI"):
            read_picture(tmp_path / name)
    rgb = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.Nifti1Image(rgb, np.eye(4)).to_filename(tmp_path / "b.nii")
    with pytest.raises(ValueError, match=r"b\.nii holds colours"):
        read_picture(tmp_path / "b.nii")
    nibabel.Nifti1Image(np.zeros((4, 4, 4), "c8"), None).to_filename(tmp_path / "c.nii")
    with pytest.raises(ValueError, match=r"c\.nii holds complex64 numbers"):
        read_picture(tmp_path / "c.nii")
    save_nifti(nibabel, tmp_path / "d.nii", numbers("u2", (4, 4, 4)))
    with pytest.raises(ValueError, match=r"d\.nii holds uint16 numbers: say which"):
        read_picture(tmp_path / "d.nii")
    picture = read_picture(tmp_path / "d.nii", "max")
    picture.x = picture.x.expand(-1, 3, -1, -1)
    with pytest.raises(ValueError, match=r"cannot hold colours"):
        check_target(tmp_path / "e.nii", picture)


# -- DICOM --------------------------------------------------------------------------


def dicom_slice(
    pydicom, stored, bits=12, scale=(1.0, 0.0), number=1, place=0.0, **tags
):
    uid = pydicom.uid
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = uid.CTImageStorage
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.SOPInstanceUID = f"1.2.3.4.{number}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    dataset.FrameOfReferenceUID = "1.2.3.9"
    dataset.PatientName, dataset.PatientID = "Phantom^Test", "0"
    dataset.Modality, dataset.SeriesNumber = "CT", 4
    dataset.SeriesDescription = "thin"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.InstanceNumber = number
    dataset.ImagePositionPatient = [-100.0, -120.0, place]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing, dataset.SliceThickness = [0.7, 0.8], 2.5
    dataset.RescaleSlope, dataset.RescaleIntercept = scale
    dataset.WindowCenter, dataset.WindowWidth = 40, 400
    dataset.LargestImagePixelValue = 7
    dataset["LargestImagePixelValue"].VR = "SS" if stored.dtype.kind == "i" else "US"
    dataset.add_new((0x0011, 0x0010), "LO", "MAKER")  # private
    dataset.set_pixel_data(stored, "MONOCHROME2", bits, generate_instance_uid=False)
    for key, value in tags.items():
        setattr(dataset, key, value)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def save_series(
    pydicom, folder, count=4, dtype=np.int16, bits=12, shape=(6, 7), **tags
):
    """Slices whose files are not in the order of their places."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    low = -(2 ** (bits - 1)) if np.dtype(dtype).kind == "i" else 0
    volume = rng.integers(low, low + 2**bits, (count, *shape)).astype(dtype)
    for i, stored in enumerate(volume):
        dataset = dicom_slice(
            pydicom, stored, bits, number=count - i, place=2.5 * i, **tags
        )
        dataset.save_as(
            folder / f"IM{(i * 7 + 3) % 11:02d}.dcm", enforce_file_format=True
        )
    return volume


#: What every file of a derived series has anew.
NEW = {
    *("SOPInstanceUID", "SeriesInstanceUID", "ImageType", "SeriesDescription"),
    *("SourceImageSequence", "DerivationDescription", "PixelData"),
    *("InstanceCreationDate", "InstanceCreationTime", "LargestImagePixelValue"),
}


def assert_derived(pydicom, found, source, atol=0):
    found, source = pydicom.dcmread(found), pydicom.dcmread(source)
    np.testing.assert_allclose(
        found.pixel_array.astype(int), source.pixel_array.astype(int), atol=atol
    )
    assert found.pixel_array.dtype == source.pixel_array.dtype
    for element in source:
        if element.keyword not in NEW:
            assert found[element.tag] == element
    assert found.SOPInstanceUID != source.SOPInstanceUID
    assert found.file_meta.MediaStorageSOPInstanceUID == found.SOPInstanceUID
    assert found.SeriesInstanceUID != source.SeriesInstanceUID
    assert found.ImageType == ["DERIVED", *source.ImageType[1:]]
    reference = found.SourceImageSequence[0]
    assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert "LargestImagePixelValue" not in found
    return found


@pytest.mark.parametrize(
    ("dtype", "bits", "scale"),
    [
        (np.uint8, 8, (1.0, 0.0)),
        (np.uint16, 12, (1.0, -1024.0)),
        (np.uint16, 16, (1.0, 0.0)),
        (np.int16, 16, (1.0, 0.0)),
        (np.int16, 12, (0.5, 3.0)),
    ],
)
def test_a_series_comes_back_as_a_derived_one(tmp_path, pydicom, dtype, bits, scale):
    volume = save_series(pydicom, tmp_path / "in", 4, dtype, bits, scale=scale)
    picture = read_picture(tmp_path / "in", "max")
    expected = scale[0] * volume + scale[1]
    np.testing.assert_allclose(picture.values(picture.x)[:, 0], expected, atol=0.02)
    assert not picture.notes
    # Left, back, top of the patient become right, front, top.
    axes = np.diag([-0.8, -0.7, 2.5, 1.0])
    axes[:3, 3] = 100, 120, 0
    np.testing.assert_allclose(picture.affine, axes)
    write_picture(tmp_path / "out", picture.x, picture)
    names = sorted(p.name for p in (tmp_path / "in").iterdir())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    found = [
        assert_derived(pydicom, tmp_path / "out" / n, tmp_path / "in" / n)
        for n in names
    ]
    assert len({d.SeriesInstanceUID for d in found}) == 1
    assert len({d.SOPInstanceUID for d in found}) == len(found)


@hypothesis_settings
@given(
    bits=st.integers(2, 16),
    signed=st.booleans(),
    slope=st.floats(1e-3, 1e3).map(lambda v: float(f"{v:.6g}")),
    intercept=st.integers(-2000, 2000).map(float),
)
def test_numbers_stay_within_their_bits(
    tmp_path, pydicom, bits, signed, slope, intercept
):
    dtype = np.int16 if signed else np.uint16
    low = -(2 ** (bits - 1)) if signed else 0
    stored = np.random.default_rng(0).integers(low, low + 2**bits, (5, 6)).astype(dtype)
    stored[0, :2] = low, low + 2**bits - 1
    dataset = dicom_slice(pydicom, stored, bits, (slope, intercept))
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    picture = read_picture(tmp_path / "a.dcm", 2e6, black=-2e6)
    # 24 bit of the range from black to white.
    tolerance = 4e6 / 2**23 / slope
    write_picture(tmp_path / "b.dcm", picture.x, picture)
    assert_derived(pydicom, tmp_path / "b.dcm", tmp_path / "a.dcm", np.ceil(tolerance))
    write_picture(tmp_path / "b.dcm", 100 * (picture.x - 0.5), picture)
    found = pydicom.dcmread(tmp_path / "b.dcm").pixel_array
    assert found.min() >= low and found.max() < low + 2**bits


def test_every_slice_has_a_slope_of_its_own(tmp_path, pydicom):
    """As in positron emission tomography."""
    (tmp_path / "in").mkdir()
    stored = numbers(np.int16, (3, 5, 6)) // 2
    for i in range(3):
        dataset = dicom_slice(pydicom, stored[i], 16, (0.5 + i, 0.0), i, 3.0 * i)
        dataset.save_as(tmp_path / "in" / f"{i}.dcm", enforce_file_format=True)
    picture = read_picture(tmp_path / "in", "max")
    slopes = np.array([0.5, 1.5, 2.5])[:, None, None]
    np.testing.assert_allclose(
        picture.values(picture.x)[:, 0], slopes * stored, atol=0.01
    )
    write_picture(tmp_path / "out", picture.x, picture)
    for i in range(3):
        assert_derived(
            pydicom, tmp_path / "out" / f"{i}.dcm", tmp_path / "in" / f"{i}.dcm"
        )


def test_a_series_becomes_a_volume_with_its_place(tmp_path, pydicom, nibabel):
    volume = save_series(pydicom, tmp_path / "in", scale=(1.0, -1024.0))
    picture = read_picture(tmp_path / "in", 2000.0, black=-1024.0)
    assert not forgets_place(tmp_path / "a.nii", picture)
    assert forgets_place(tmp_path / "a.npy", picture)
    for name in ("a.nii.gz", "a.npy", "a.tif"):
        write_picture(tmp_path / name, picture.x, picture)
    image = nibabel.load(tmp_path / "a.nii.gz")
    expected = volume - 1024.0
    np.testing.assert_allclose(image.get_fdata().T, expected, atol=1e-2)
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-2)
    np.testing.assert_allclose(tifffile.imread(tmp_path / "a.tif"), expected, atol=1e-2)
    np.testing.assert_allclose(image.affine, picture.affine, atol=1e-5)
    np.testing.assert_allclose(image.header.get_zooms(), (0.8, 0.7, 2.5), atol=1e-6)


def test_padding_stays_as_it_is(tmp_path, pydicom):
    stored = numbers(np.int16, (5, 6)) // 20
    stored[0] = -2000
    dataset = dicom_slice(pydicom, stored, 16, PixelPaddingValue=-2000)
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    picture = read_picture(tmp_path / "a.dcm", 1000.0)
    write_picture(tmp_path / "b.dcm", picture.x * 0.5, picture)
    found = pydicom.dcmread(tmp_path / "b.dcm").pixel_array
    assert (found[0] == -2000).all()
    np.testing.assert_allclose(found[1:], 0.5 * stored[1:], atol=0.51)


def test_frames_of_a_file_are_pages(tmp_path, pydicom):
    stored = numbers(np.uint8, (3, 5, 6))
    dataset = dicom_slice(pydicom, stored, 8)
    dataset.save_as(tmp_path / "a", enforce_file_format=True)  # no suffix is usual
    picture = read_picture(tmp_path / "a")
    np.testing.assert_allclose(255 * picture.x[:, 0], stored, atol=1e-4)
    write_picture(tmp_path / "b.dcm", picture.x, picture)
    assert_derived(pydicom, tmp_path / "b.dcm", tmp_path / "a")


def test_compressed_files_are_read_and_written_without_compression(tmp_path, pydicom):
    stored = numbers(np.uint8, (5, 6))
    dataset = dicom_slice(pydicom, stored, 8)
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    copied(tmp_path / "a.dcm", tmp_path / "b.dcm", None)
    found = pydicom.dcmread(tmp_path / "b.dcm")
    assert not found.file_meta.TransferSyntaxUID.is_compressed
    np.testing.assert_array_equal(found.pixel_array, stored)


def damaged(pydicom, dataset, what):
    """Makes a dataset one that is not read."""
    if what == "colour":
        dataset.set_pixel_data(np.zeros((5, 6, 3), np.uint8), "RGB", 8)
    elif what == "compressed":
        uid = pydicom.uid.JPEG2000Lossless
        dataset.file_meta.TransferSyntaxUID = uid
        dataset.PixelData = pydicom.encaps.encapsulate([b"no stream"])
        dataset["PixelData"].is_undefined_length = True
    elif what == "enhanced":
        dataset.PerFrameFunctionalGroupsSequence = [pydicom.Dataset()]
    elif what == "table":
        dataset.ModalityLUTSequence = [pydicom.Dataset()]
    elif what == "empty":
        del dataset.PixelData
    elif what == "short":
        dataset.PixelData = dataset.PixelData[:8]
    elif what == "slope":
        dataset.RescaleSlope = 0
    elif what == "big":
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    return dataset


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("colour", r"is in colour \(RGB\)"),
        ("compressed", "is compressed as JPEG 2000.*Install pylibjpeg"),
        ("enhanced", "is an enhanced file"),
        ("table", "lookup table"),
        ("empty", "no pixels"),
        ("short", "cannot be read as DICOM"),
        ("slope", "rescale slope of 0"),
        ("big", "big end first"),
    ],
)
def test_dicom_files_that_are_not_read_are_named(
    tmp_path, pydicom, what, words, capsys
):
    dataset = dicom_slice(pydicom, numbers(np.uint16, (5, 6)) % 4096)
    damaged(pydicom, dataset, what).save_as(
        tmp_path / "a.dcm", enforce_file_format=True
    )
    with pytest.raises(ValueError, match=rf"a\.dcm .*{words}"):
        read_picture(tmp_path / "a.dcm", "max")
    (tmp_path / "b.dcm").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"b\.dcm cannot be read as DICOM"):
        read_picture(tmp_path / "b.dcm")


def test_series_that_are_no_volume_say_why(tmp_path, pydicom):
    folder = tmp_path / "in"
    save_series(pydicom, folder)
    files = {
        float(pydicom.dcmread(p).ImagePositionPatient[2]): p for p in folder.iterdir()
    }
    # A missing slice is remarked, and what remains is in order.
    third = files[5.0].read_bytes()
    files[5.0].unlink()
    picture = read_picture(folder, "max")
    assert "not equally spaced: 5 mm between" in picture.notes[0]
    assert len(picture.volumes()[0, 0]) == 3
    files[5.0].write_bytes(third)
    # Slices of several times.
    twice = pydicom.dcmread(files[0.0])
    twice.SOPInstanceUID, twice.InstanceNumber = "1.2.3.4.99", 99
    twice.save_as(folder / "twice.dcm")
    picture = read_picture(folder, "max")
    assert "several slices have one place" in picture.notes[0]
    assert picture.affine is None
    with pytest.raises(ValueError, match="is no volume .*one place"):
        picture.volumes()
    # Sizes, and series.
    (folder / "twice.dcm").unlink()
    other = dicom_slice(
        pydicom, numbers(np.uint16, (4, 7)) % 4096, number=9, place=10.0
    )
    other.save_as(folder / "other.dcm", enforce_file_format=True)
    with pytest.raises(ValueError, match=r"different sizes \(rows: \[4, 6\]\)"):
        read_picture(folder, "max")
    other.SeriesInstanceUID, other.SeriesNumber = "1.2.3.5", 5
    other.save_as(folder / "other.dcm", enforce_file_format=True)
    with pytest.raises(
        ValueError, match=r"several series. Give .*:SERIES.*4 \(4 files"
    ):
        read_picture(folder, "max")
    assert len(read_picture(f"{folder}:4", "max").x) == 4
    assert len(read_picture(f"{folder}:1.2.3.5", "max").x) == 1
    with pytest.raises(ValueError, match="no one series '6'"):
        read_picture(f"{folder}:6", "max")


@pytest.mark.parametrize(
    "syntax", ["ImplicitVRLittleEndian", "DeflatedExplicitVRLittleEndian"]
)
def test_other_ways_to_store_are_read(tmp_path, pydicom, syntax):
    dataset = dicom_slice(pydicom, numbers(np.int16, (5, 6)), 16, (1.0, -24.0))
    dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    copied(tmp_path / "a.dcm", tmp_path / "b.dcm")
    assert_derived(pydicom, tmp_path / "b.dcm", tmp_path / "a.dcm")


def test_pictures_beside_a_series_are_said(tmp_path, pydicom, capsys):
    save_series(pydicom, tmp_path / "in")
    (tmp_path / "in" / "preview.jpg").touch()
    command = ["denoise", str(tmp_path / "in"), str(tmp_path / "out"), *FAST]
    assert main([*command, "--white", "max"]) == 2
    assert "DICOM files and pictures, as preview.jpg" in capsys.readouterr().err


def test_a_derived_series_has_a_folder_of_its_own(tmp_path, pydicom):
    save_series(pydicom, tmp_path / "in")
    picture = read_picture(tmp_path / "in", "max")
    with pytest.raises(ValueError, match="a series of 4 files is written to a folder"):
        check_target(tmp_path / "out.dcm", picture)
    save_series(pydicom, tmp_path / "other", 5)
    with pytest.raises(ValueError, match="holds 1 DICOM files already"):
        check_target(tmp_path / "other", picture)
    np.save(tmp_path / "a.npy", np.ones((4, 4)))
    with pytest.raises(ValueError, match="is written from one only"):
        check_target(tmp_path / "a.dcm", read_picture(tmp_path / "a.npy"))
    assert is_series(tmp_path / "in") and not is_series(tmp_path)


def test_files_without_what_is_needed_are_named(tmp_path, pydicom):
    dataset = dicom_slice(pydicom, numbers(np.uint16, (5, 6)), 16)
    del dataset.BitsStored, dataset.SOPInstanceUID
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    with pytest.raises(ValueError, match=r"a\.dcm .*no SOPInstanceUID, BitsStored"):
        read_picture(tmp_path / "a.dcm", "max")


@pytest.mark.parametrize("name", ["a.dcm", "a.nii", "a.nii.gz", "a.h5", "a.tif"])
def test_files_that_are_cut_are_errors_that_name_them(tmp_path, name):
    stored = numbers(np.uint16, (5, 6))
    path = tmp_path / name
    if name == "a.dcm":
        pydicom = pytest.importorskip("pydicom", reason=REASON)
        dataset = dicom_slice(pydicom, stored, 16)
        dataset.save_as(path, enforce_file_format=True)
    elif name == "a.tif":
        tifffile.imwrite(path, stored[None].repeat(2, 0))
    elif name == "a.h5":
        with pytest.importorskip("h5py", reason=REASON).File(path, "w") as file:
            file["x"] = stored
    else:
        save_nifti(pytest.importorskip("nibabel", reason=REASON), path, stored)
    whole = path.read_bytes()
    # A TIFF file ends in its resolution.
    for end in range(0, len(whole) - 24, max(1, len(whole) // 40)):
        path.write_bytes(whole[:end])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the readers remark
            with pytest.raises(ValueError, match=re.escape(name)):
                read_picture(path, "max")


# -- TIFF stacks --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("axes", ["ZYX", "TYX", "TZCYX", "TZYX"])
def test_stacks_of_imagej_keep_axes_and_voxels(tmp_path, dtype, axes):
    shape = tuple({"T": 2, "Z": 3, "C": 2, "Y": 6, "X": 7}[a] for a in axes)
    x = numbers(dtype, shape)
    metadata = {"spacing": 0.5, "unit": "um", "finterval": 0.1, "axes": axes}
    tifffile.imwrite(
        tmp_path / "in.tif",
        x,
        imagej=True,
        resolution=(4.0, 4.0),
        resolutionunit="NONE",
        metadata={**metadata, "Info": "from nowhere"},
    )
    picture = read_picture(tmp_path / "in.tif", "max")
    volumes = picture.volumes()
    slices = axes.index("Z") if "Z" in axes else 0
    others = np.prod(shape[:-2]) // shape[slices]
    assert volumes.shape == (others, 1, shape[slices], 6, 7)
    assert torch.equal(picture.pages(volumes), picture.x)
    copied(tmp_path / "in.tif", tmp_path / "out.tif")
    with (
        tifffile.TiffFile(tmp_path / "in.tif") as source,
        tifffile.TiffFile(tmp_path / "out.tif") as found,
    ):
        np.testing.assert_allclose(found.asarray(), x, rtol=1e-6)
        assert found.asarray().dtype == dtype
        assert found.imagej_metadata == source.imagej_metadata
        assert found.series[0].axes == source.series[0].axes
        for tag in ("XResolution", "YResolution", "ResolutionUnit"):
            assert found.pages[0].tags[tag].value == source.pages[0].tags[tag].value


def test_stacks_of_several_axes_keep_their_shape(tmp_path):
    x = numbers(np.float32, (2, 3, 6, 7))
    tifffile.imwrite(tmp_path / "in.tif", x, photometric="minisblack")
    picture = read_picture(tmp_path / "in.tif", "max")
    assert picture.volumes().shape == (2, 1, 3, 6, 7)
    copied(tmp_path / "in.tif", tmp_path / "out.tif")
    np.testing.assert_allclose(tifffile.imread(tmp_path / "out.tif"), x, rtol=1e-5)


def test_a_stack_of_imagej_beyond_the_limit_of_tiff_has_all_its_pages(tmp_path):
    """ImageJ describes only the first page of stacks above 4 GB."""
    x = numbers(np.uint16, (3, 6, 7))
    tifffile.imwrite(tmp_path / "a.tif", x, imagej=True, metadata={"axes": "ZYX"})
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        offset = file.pages[0].offset
        count = len(file.pages[0].tags)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    end = offset + 2 + 12 * count
    content[end : end + 4] = bytes(4)  # no next page
    (tmp_path / "a.tif").write_bytes(content)
    picture = read_picture(tmp_path / "a.tif")
    np.testing.assert_allclose(65535 * picture.x[:, 0], x, atol=0.01)


def test_stacks_of_ome_keep_their_description(tmp_path):
    x = numbers(np.uint16, (4, 6, 7))
    tifffile.imwrite(
        tmp_path / "in.ome.tif",
        x,
        ome=True,
        metadata={"axes": "ZYX", "PhysicalSizeX": 0.3, "PhysicalSizeZ": 1.2},
    )
    copied(tmp_path / "in.ome.tif", tmp_path / "out.ome.tif")
    with tifffile.TiffFile(tmp_path / "out.ome.tif") as found:
        assert found.is_ome and 'PhysicalSizeZ="1.2"' in found.ome_metadata
        assert found.series[0].axes == "ZYX"
        np.testing.assert_array_equal(found.asarray(), x)


# -- arrays -------------------------------------------------------------------------


def test_arrays_of_matlab_have_pages_last(tmp_path):
    from scipy.io import savemat

    x = numbers(np.float32, (6, 7, 2))
    savemat(tmp_path / "a.mat", {"volume": x, "other": 1})
    picture = read_picture(f"{tmp_path}/a.mat:volume", "max")
    assert "2 pages of 6 x 7" in picture.notes[0]
    np.testing.assert_allclose(picture.values(picture.x)[1, 0], x[..., 1], rtol=1e-5)
    copied(f"{tmp_path}/a.mat:volume", tmp_path / "b.mat")
    np.testing.assert_allclose(read_array(tmp_path / "b.mat"), x, rtol=1e-5)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".h5", ".hdf5", ".mat"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16, np.int16])
@pytest.mark.parametrize("shape", [(6, 7), (5, 6, 7), (6, 7, 3), (2, 3, 6, 7)])
def test_arrays_keep_name_and_layout(tmp_path, suffix, dtype, shape):
    if suffix in (".h5", ".hdf5"):
        pytest.importorskip("h5py", reason=REASON)
    x = numbers(dtype, shape)
    np.savez(tmp_path / "in.npz", volume=x, other=np.zeros(3))
    copied(f"{tmp_path / 'in.npz'}:volume", tmp_path / f"out{suffix}")
    named = suffix not in (".npy", ".pt")
    found = read_array(f"{tmp_path / 'out'}{suffix}{':volume' if named else ''}")
    assert found.shape == x.shape
    assert found.dtype == (np.float64 if dtype is np.float64 else np.float32)
    np.testing.assert_allclose(found, x, rtol=1e-5, atol=0.01)


def test_attributes_of_hdf5_are_kept(tmp_path, h5py):
    x = numbers(np.uint16, (4, 6, 7))
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.attrs["source"] = "nowhere"
        group = file.create_group("entry")
        group.attrs["count"] = 3
        group["volume"] = x
        group["volume"].attrs["element_size_um"] = [2.0, 0.5, 0.5]
        group["volume"].attrs["reference"] = group.ref
        group["z"] = np.arange(4)
        group["z"].make_scale("z")
        group["volume"].dims[0].attach_scale(group["z"])
    copied(f"{tmp_path / 'in.h5'}:entry/volume", tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        assert file.attrs["source"] == "nowhere"
        assert file["entry"].attrs["count"] == 3
        found = file["entry/volume"]
        np.testing.assert_array_equal(found.attrs["element_size_um"], [2.0, 0.5, 0.5])
        assert "reference" not in found.attrs and "DIMENSION_LIST" not in found.attrs
        np.testing.assert_allclose(found, x, atol=0.01)


def test_files_of_matlab_7_3_have_columns_first(tmp_path, h5py):
    x = numbers(np.float64, (6, 7))
    z = np.zeros((7, 6), [("real", "f8"), ("imag", "f8")])
    z["real"], z["imag"] = x.T, 2 * x.T
    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
        file["x"], file["z"] = x.T, z
    head = b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM"
    with open(tmp_path / "a.mat", "r+b") as stream:
        stream.write(head)
    np.testing.assert_array_equal(read_array(f"{tmp_path}/a.mat:x"), x)
    np.testing.assert_array_equal(read_array(f"{tmp_path}/a.mat:z"), x + 2j * x)
    with pytest.raises(ValueError, match=r"a\.mat has no 'y'"):
        read_array(f"{tmp_path}/a.mat:y")


def test_three_axes_are_a_volume_if_asked(tmp_path):
    x = numbers(np.float32, (3, 6, 7))
    np.save(tmp_path / "a.npy", x)
    assert read_picture(tmp_path / "a.npy", "max").x.shape == (1, 3, 6, 7)
    picture = read_picture(tmp_path / "a.npy", "max", volume=True)
    assert picture.volumes().shape == (1, 1, 3, 6, 7)
    np.testing.assert_allclose(picture.values(picture.x)[:, 0], x, rtol=1e-5)
    np.save(tmp_path / "b.npy", numbers(np.float32, (9, 6, 4)))  # with opacity?
    with pytest.raises(ValueError, match="has shape"):
        read_picture(tmp_path / "b.npy", "max")


# -- units --------------------------------------------------------------------------


def test_black_and_white_are_values_of_the_file(tmp_path):
    x = numbers(np.float32, (6, 7))
    np.save(tmp_path / "a.npy", x)
    picture = read_picture(tmp_path / "a.npy", "max", black=-1000.0)
    np.testing.assert_allclose(
        picture.x[0, 0], (x + 1000) / (x.max() + 1000), rtol=1e-5
    )
    np.testing.assert_allclose(picture.values(picture.x)[0, 0], x, rtol=1e-4)
    write_picture(tmp_path / "a.png", picture.x, picture)
    expected = np.rint(255 * picture.x[0, 0].double().numpy())
    assert np.abs(read_array(tmp_path / "a.png") - expected).max() <= 1
    with pytest.raises(ValueError, match="greater than black, 5"):
        read_picture(tmp_path / "a.npy", 4.0, black=5.0)
    np.save(tmp_path / "a.npy", np.zeros((4, 4)))
    with pytest.raises(ValueError, match="no value above black"):
        read_picture(tmp_path / "a.npy", "max")


def test_kinds_have_suffixes_of_their_own():
    suffixes = [suffix for kind in KINDS for suffix in kind.suffixes]
    assert len(set(suffixes)) == len(suffixes)
    assert all(suffix == suffix_of(f"a{suffix}") for suffix in suffixes)


def test_suffixes_have_two_parts_if_compressed():
    assert suffix_of("a.b/c.NII.GZ") == ".nii.gz"
    assert suffix_of("c.nii") == ".nii" and suffix_of("c") == ""
    assert suffix_of("c.v2.tif") == ".tif"


@pytest.mark.parametrize(
    ("module", "name"), [("nibabel", "a.nii"), ("pydicom", "a.dcm"), ("h5py", "a.h5")]
)
def test_a_missing_reader_names_the_extra(tmp_path, monkeypatch, module, name, capsys):
    (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, module, None)
    command = ["denoise", str(tmp_path / name), str(tmp_path / "b.npy"), *FAST]
    assert main(command) == 2
    words = f"{name} needs the package {module}: pip install deepinv-deal[files]"
    assert words in capsys.readouterr().err


# -- commands -----------------------------------------------------------------------


def smooth(depth=3, size=(16, 18), seed=0):
    """A noisy volume in [0, 1]."""
    z, rows, columns = np.meshgrid(
        np.linspace(0, 1, depth), *(np.linspace(0, 1, n) for n in size), indexing="ij"
    )
    x = 0.3 + 0.2 * z + 0.3 * rows + 0.1 * (columns > 0.5)
    return x + np.random.default_rng(seed).normal(0, 10 / 255, x.shape)


def test_the_command_keeps_everything_of_a_nifti_file(tmp_path, nibabel, capsys):
    stored = np.rint(1000 * smooth()).astype(np.int16).T
    source = save_nifti(nibabel, tmp_path / "in.nii.gz", stored, (2.0, -100.0))
    target = tmp_path / "out.nii.gz"
    units = ["--white", "2000", "--black", "-100"]
    assert main(["denoise", str(source), str(target), *FAST, *units]) == 0
    assert "in.nii.gz[2] -> " in capsys.readouterr().out
    found, given = nibabel.load(target), nibabel.load(source)
    for key in given.header:
        np.testing.assert_array_equal(found.header[key], given.header[key], key)
    change = found.get_fdata() - given.get_fdata()
    assert 10 < np.abs(change).mean() < 100 and abs(change.mean()) < 10
    # The same numbers in another file give the same result.
    np.save(tmp_path / "in.npy", given.get_fdata(dtype=np.float32).T[0])
    plain = ["denoise", str(tmp_path / "in.npy"), str(tmp_path / "out.npy"), *FAST]
    assert main([*plain, *units]) == 0
    first = found.get_fdata().T[0]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), first, atol=1.01)


def test_the_command_takes_a_series_to_a_series(tmp_path, pydicom, capsys):
    (tmp_path / "in").mkdir()
    stored = np.rint(1000 * smooth()).astype(np.uint16)
    for i in range(3):
        dataset = dicom_slice(pydicom, stored[i], 12, (1.0, -500.0), i + 1, 2.0 * i)
        dataset.save_as(tmp_path / "in" / f"{i}.dcm", enforce_file_format=True)
    command = ["denoise", str(tmp_path / "in"), str(tmp_path / "out"), *FAST]
    assert main([*command, "--white", "-600"]) == 2
    assert "white must be positive" in capsys.readouterr().err
    command += ["--white", "500", "--black", "-500"]
    assert main(command) == 0
    for i in range(3):
        names = (tmp_path / "out" / f"{i}.dcm", tmp_path / "in" / f"{i}.dcm")
        found = assert_derived(pydicom, *names, atol=200)
        change = found.pixel_array.astype(float) - stored[i]
        assert 5 < np.abs(change).mean() < 100
    command[2] = str(tmp_path / "out.npy")
    assert main(command) == 0
    assert "does not keep where the voxels" in capsys.readouterr().err
    assert np.load(tmp_path / "out.npy").shape == (3, 16, 18)


def test_reconstructions_keep_the_header_if_it_fits(tmp_path, nibabel, capsys):
    x = smooth(1).astype(np.float32)
    source = save_nifti(nibabel, tmp_path / "y.nii", x.T)
    weight = ["--lambda-reg", "0.1", "--rtol", "0.3"]
    blur = ["reconstruct", "blur", str(source), str(tmp_path / "x.nii")]
    assert main([*blur, "--kernel", "gaussian:0.5", *weight]) == 0
    found, given = nibabel.load(tmp_path / "x.nii"), nibabel.load(source)
    for key in given.header:
        np.testing.assert_array_equal(found.header[key], given.header[key], key)
    twice = ["reconstruct", "downsampling", str(source), str(tmp_path / "z.nii")]
    assert main([*twice, "--factor", "2", *weight]) == 2
    said = capsys.readouterr().err
    assert "has (32, 36) pixels and its source (16, 18)" in said
    assert not (tmp_path / "z.nii").exists()
    twice[-1] = str(tmp_path / "z.tif")
    assert main([*twice, "--factor", "2", *weight]) == 0
    assert "does not keep where" in capsys.readouterr().err
    assert tifffile.imread(tmp_path / "z.tif").shape == (32, 36)


def test_folders_hold_volumes_too(tmp_path, nibabel):
    (tmp_path / "in").mkdir()
    for name in ("a.nii.gz", "b.nii"):
        stored = smooth(1).astype(np.float32).T
        save_nifti(nibabel, tmp_path / "in" / name, stored)
    command = ["denoise", str(tmp_path / "in"), str(tmp_path / "out"), *FAST]
    assert main(command) == 0
    found = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert found == ["a.nii.gz", "b.nii"]


def test_the_truth_has_the_unit_of_what_was_measured(tmp_path, capsys):
    x = 1000 * smooth(1)[0]
    np.save(tmp_path / "y.npy", x)
    np.save(tmp_path / "half.npy", 0.5 * x)
    np.save(tmp_path / "mask.npy", np.ones(x.shape))
    names = [str(tmp_path / f"{name}.npy") for name in ("y", "x_hat", "mask", "half")]
    command = ["reconstruct", "inpainting", *names[:2], "--mask", names[2], "--truth"]
    psnr = []
    for truth in (names[3], names[0]):
        options = ["--white", "max", "--rtol", "0.3", "--lambda-reg", "0.1"]
        assert main([*command, truth, *options]) == 0
        psnr.append(float(capsys.readouterr().out.split("PSNR ")[1].split(" dB")[0]))
    assert psnr[0] < 15 < 30 < psnr[1]


def test_black_is_not_for_counts(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.ones((8, 8)))
    command = ["denoise", str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]
    command += ["--likelihood", "poisson:1"]
    assert main([*command, "--black", "1"]) == 2
    assert "--black is not for --likelihood poisson" in capsys.readouterr().err
    assert main([*command, "--white", "max"]) == 2
    assert "--white max is not for --likelihood poisson" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--white", "most"])
    assert "a number, or 'max'" in capsys.readouterr().err


# -- k-space ------------------------------------------------------------------------


def k_space(x):
    """Centred k-space of images."""
    axes = (-2, -1)
    y = np.fft.fft2(np.fft.ifftshift(x, axes), norm="ortho")
    return np.fft.fftshift(y, axes).astype(np.complex64)


def coils(number, size, depth=None):
    """Coil maps whose squares sum to one."""
    rows, columns = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
    places = np.linspace(-1, 1, number)
    maps = np.stack([np.exp(-((rows - p) ** 2) + 1j * p * columns) for p in places])
    maps = maps / np.sqrt((np.abs(maps) ** 2).sum(0))
    maps = maps.astype(np.complex64)
    return (
        maps
        if depth is None
        else np.stack([maps * np.exp(1j * d) for d in range(depth)])
    )


def lines(count, axis):
    """A mask of every second line and those in the middle."""
    mask = np.arange(count) % 2 == 0
    mask[count // 2 - 3 : count // 2 + 3] = True
    return mask[:, None] if axis == 0 else mask


MRI = ["--lambda-reg", "0.01", "--rtol", "0.1"]


def reconstruct(source, target, *options):
    command = ["reconstruct", "mri", str(source), str(target), *MRI]
    return main([*command, *map(str, options)])


@pytest.mark.parametrize("maps_of", ["none", "all", "each"])
def test_a_volume_of_k_space_is_that_of_its_slices(tmp_path, maps_of, capsys):
    x = smooth(2)
    mask = lines(18, 1)
    each = maps_of == "each"
    maps = None if maps_of == "none" else coils(3, (16, 18), 2 if each else None)
    y = mask * k_space(x if maps is None else x[:, None] * maps)
    np.save(tmp_path / "y.npy", y)
    np.save(tmp_path / "x.npy", x)
    options = ["--truth", tmp_path / "x.npy"]
    if maps is not None:
        np.save(tmp_path / "maps.npy", maps)
        options += ["--coil-maps", tmp_path / "maps.npy"]
    target = tmp_path / "x_hat.npy"
    assert reconstruct(tmp_path / "y.npy", target, *options) == 0
    out = capsys.readouterr().out
    assert "2 slices, at most" in out and out.count("lambda") == 1
    assert float(out.split("PSNR ")[1].split(" dB")[0]) > 25
    volume = np.load(target)
    assert volume.shape == x.shape and volume.dtype == np.complex64
    for i in range(2):
        np.save(tmp_path / "y.npy", y[i])
        options = []
        if maps is not None:
            np.save(tmp_path / "maps.npy", maps[i] if each else maps)
            options = ["--coil-maps", tmp_path / "maps.npy"]
        assert reconstruct(tmp_path / "y.npy", target, *options) == 0
        np.testing.assert_allclose(np.load(target), volume[i], atol=2e-3)


@pytest.mark.parametrize("number", [1, 3])
def test_slices_of_k_space_are_one_volume(tmp_path, number, capsys):
    x = np.stack([np.roll(smooth(1)[0], k, 0) for k in range(3)])  # equally bright
    maps = coils(number, (16, 18), 3)
    y = lines(18, 1) * k_space(x[:, None] * maps if number > 1 else x)
    np.save(tmp_path / "y.npy", y)
    np.save(tmp_path / "maps.npy", maps)
    rtol = 1e-2 if number == 1 else 1e-4
    options = ["--rtol", rtol]
    options += ["--coil-maps", tmp_path / "maps.npy"] if number > 1 else []
    found = {}
    for slices in (None, "depth", "mean"):
        target = tmp_path / f"{slices}.npy"
        more = [] if slices is None else ["--slices", slices]
        assert reconstruct(tmp_path / "y.npy", target, *options, *more) == 0
        found[slices] = np.load(target)
    assert "3 slices" in capsys.readouterr().out.split("\n")[0]
    assert np.abs(found["mean"] - found[None]).max() > 3e-4
    if number > 1:  # slices of the depth know nothing of each other, here
        np.testing.assert_allclose(found["depth"], found[None], atol=1e-3)
    else:  # with deepinv's physics
        mask = torch.from_numpy(lines(18, 1)).float().expand(1, 1, 3, 16, 18)
        physics = DynamicMRI(mask=mask, img_size=(3, 16, 18))
        measured = torch.view_as_real(torch.from_numpy(y)).movedim(-1, 0)[None]
        for slices in ("depth", "mean"):
            model = DEAL(slices=slices, rtol=rtol, max_iter=100)
            with torch.no_grad():
                expected = model(measured, physics, lambda_reg=0.01)[0]
            expected = torch.complex(*expected).numpy()
            np.testing.assert_allclose(found[slices], expected, atol=1e-3)
    with pytest.raises(SystemExit):
        reconstruct(tmp_path / "y.npy", target, "--slices", "time")


def test_all_slices_have_one_intensity(tmp_path):
    """A dark slice is not made as bright as the others for the model."""
    x = 1e-3 * smooth(2) * np.array([1.0, 0.05])[:, None, None]
    np.save(tmp_path / "y.npy", lines(18, 1) * k_space(x))
    assert reconstruct(tmp_path / "y.npy", tmp_path / "x.npy") == 0
    volume = np.load(tmp_path / "x.npy")
    np.save(tmp_path / "y.npy", lines(18, 1) * k_space(x[::-1]))
    assert reconstruct(tmp_path / "y.npy", tmp_path / "x.npy") == 0
    np.testing.assert_allclose(np.load(tmp_path / "x.npy")[::-1], volume, atol=1e-8)
    np.save(tmp_path / "y.npy", lines(18, 1) * k_space(x[1]))
    assert reconstruct(tmp_path / "y.npy", tmp_path / "x.npy") == 0
    assert np.abs(np.load(tmp_path / "x.npy") - volume[1]).max() > 1e-7


def test_masks_of_lines_of_one_slice_or_of_all(tmp_path, capsys):
    x = smooth(2)
    masks = np.stack([lines(18, 1), np.roll(lines(18, 1), 1)])[:, None] & np.ones(
        (16, 1), bool
    )
    np.save(tmp_path / "y.npy", k_space(x) * masks)
    assert reconstruct(tmp_path / "y.npy", tmp_path / "a.npy") == 0
    np.save(tmp_path / "y.npy", k_space(x))
    np.save(tmp_path / "mask.npy", masks)
    given = "--mask", tmp_path / "mask.npy"
    assert reconstruct(tmp_path / "y.npy", tmp_path / "b.npy", *given) == 0
    np.testing.assert_array_equal(
        np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    )
    results = []
    for mask in (lines(18, 1), masks[0], masks[:1].repeat(2, 0)):
        np.save(tmp_path / "mask.npy", mask)
        assert reconstruct(tmp_path / "y.npy", tmp_path / "b.npy", *given) == 0
        results.append(np.load(tmp_path / "b.npy"))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    y = k_space(x)
    y[1] = 0
    np.save(tmp_path / "y.npy", y)
    assert reconstruct(tmp_path / "y.npy", tmp_path / "b.npy") == 2
    assert "Nothing was measured in slices [1]" in capsys.readouterr().err


HEADER = """<?xml version="1.0"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
 <experimentalConditions><H1resonanceFrequency_Hz>1</H1resonanceFrequency_Hz></experimentalConditions>
 <encoding>
  <encodedSpace><matrixSize><x>{x}</x><y>{y}</y><z>1</z></matrixSize>
   <fieldOfView_mm><x>{fx}</x><y>{fy}</y><z>5</z></fieldOfView_mm></encodedSpace>
  <reconSpace><matrixSize><x>{rx}</x><y>{ry}</y><z>1</z></matrixSize>
   <fieldOfView_mm><x>{rfx}</x><y>{rfy}</y><z>5</z></fieldOfView_mm></reconSpace>
  <encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum>
   <center>{center}</center></kspace_encoding_step_1></encodingLimits>
  <trajectory>{trajectory}</trajectory>
 </encoding>
</ismrmrdHeader>"""


def header(x, y, rx, ry, center=None, last=None, trajectory="cartesian"):
    """Voxels are 2 mm along x and 3 mm along y."""
    center = y // 2 if center is None else center
    return HEADER.format(
        **{"x": x, "y": y, "fx": 2 * x, "fy": 3 * y},
        **{"rx": rx, "ry": ry, "rfx": 2 * rx, "rfy": 3 * ry},
        **{"center": center, "last": y - 1 if last is None else last},
        trajectory=trajectory,
    )


@pytest.mark.parametrize("number", [1, 3])
def test_k_space_of_fastmri(tmp_path, h5py, nibabel, number, capsys):
    x, mask = smooth(2, (20, 18)), lines(18, 1)
    maps = coils(number, (20, 18), 2) if number > 1 else None
    y = k_space(x if maps is None else x[:, None] * maps)
    truth = np.abs(x[:, 4:16, 1:17]).astype(np.float32)
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["kspace"], file["mask"] = y * mask, mask
        file["ismrmrd_header"] = header(20, 18, 12, 16)
        file["reconstruction_rss"] = truth
        file.attrs["acquisition"] = "AXT1"
    options = []
    if number > 1:
        np.save(tmp_path / "maps.npy", maps)
        options = ["--coil-maps", tmp_path / "maps.npy"]
        assert reconstruct(tmp_path / "scan.h5", tmp_path / "x.npy") == 2
        assert "coils need --coil-maps" in capsys.readouterr().err
    assert reconstruct(tmp_path / "scan.h5", tmp_path / "x.npy", *options) == 0
    said = capsys.readouterr().err
    assert "size of k-space, 20x18" in said and "12x16: --crop header" in said
    whole = np.load(tmp_path / "x.npy")
    assert whole.shape == (2, 20, 18)
    options += [
        "--crop",
        "header",
        "--truth",
        f"{tmp_path / 'scan.h5'}:reconstruction_rss",
    ]
    assert reconstruct(tmp_path / "scan.h5", tmp_path / "x.nii.gz", *options) == 0
    said = capsys.readouterr()
    assert float(said.out.split("PSNR ")[1].split(" dB")[0]) > 25
    assert "holds magnitudes" in said.out and "--crop" not in said.err
    image = nibabel.load(tmp_path / "x.nii.gz")
    assert image.shape == (16, 12, 2) and image.get_data_dtype() == np.float32
    # Rows are along x, whose voxels are 2 mm.
    np.testing.assert_allclose(image.header.get_zooms(), (3, 2, 5))
    np.testing.assert_allclose(
        image.get_fdata().T, np.abs(whole[:, 4:16, 1:17]), rtol=1e-5
    )
    options[options.index("header")] = "30x10"
    assert reconstruct(tmp_path / "scan.h5", tmp_path / "x.npy", *options) == 2
    assert "--crop 30x10 is more than the image, 20x18" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        reconstruct(tmp_path / "scan.h5", tmp_path / "x.npy", "--crop", "30")


def save_ismrmrd(path, y, rows, text, **tags):
    """Lines of ``(D, N, H, W)`` in a mixed order, by the library of the format."""
    ismrmrd = pytest.importorskip("ismrmrd", reason=REASON)
    places = [(d, r) for d in range(len(y)) for r in rows]
    places = [places[i] for i in np.random.default_rng(0).permutation(len(places))]
    with ismrmrd.Dataset(path, mode="w") as dataset:
        dataset.write_xml_header(text.encode())
        noise = ismrmrd.Acquisition.from_array(np.ones((y.shape[1], 8), np.complex64))
        noise.set_flag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
        dataset.append_acquisition(noise)
        for d, row in places:
            dataset.append_acquisition(line(ismrmrd, y[d, :, row], d, row, **tags))
    return path


def line(ismrmrd, data, d, row, flag=None, skip=0, repeat=0, **counters):
    acquisition = ismrmrd.Acquisition.from_array(np.ascontiguousarray(data[:, skip:]))
    acquisition.idx.slice, acquisition.idx.kspace_encode_step_1 = d, row
    acquisition.center_sample = data.shape[1] // 2 - skip
    for key, value in counters.items():
        setattr(acquisition.idx, key, value)
    if flag is not None:
        acquisition.set_flag(flag)
    return acquisition


@pytest.mark.parametrize("number", [1, 3])
def test_k_space_of_ismrmrd(tmp_path, h5py, number, capsys):
    x, rows = smooth(2, (18, 20)), np.flatnonzero(lines(18, 1))
    maps = coils(number, (18, 20)) if number > 1 else np.ones((1, 18, 20))
    y = k_space(x[:, None] * maps)
    path = save_ismrmrd(tmp_path / "scan.h5", y, rows, header(20, 18, 10, 18))
    found = read_k_space(path)
    expected = np.zeros_like(y)
    expected[:, :, rows] = y[:, :, rows]
    np.testing.assert_array_equal(found.y, expected)
    assert found.image_size == (18, 10)
    np.testing.assert_array_equal(np.diag(found.affine), (2, 3, 5, 1))
    assert "1 lines are no part of the image" in found.notes[0]
    np.save(tmp_path / "y.npy", expected if number > 1 else expected[:, 0])
    np.save(tmp_path / "maps.npy", maps)
    options = ["--coil-maps", tmp_path / "maps.npy"] if number > 1 else []
    for source in ("scan.h5", "y.npy"):
        target = tmp_path / f"{source}.npy"
        assert reconstruct(tmp_path / source, target, *options) == 0
    assert "18x10: --crop header" in capsys.readouterr().err
    np.testing.assert_array_equal(
        np.load(tmp_path / "scan.h5.npy"), np.load(tmp_path / "y.npy.npy")
    )


def test_lines_of_ismrmrd_go_where_they_belong(tmp_path, h5py):
    y = k_space(smooth(1, (18, 20)))[:, None]
    # The first samples and rows were not measured: the centre says where the others go.
    text = header(20, 18, 20, 18, center=5, last=13)
    path = save_ismrmrd(tmp_path / "a.h5", y[:, :, 4:], range(14), text, skip=3)
    expected = y.copy()
    expected[:, :, :4] = expected[..., :3] = 0
    np.testing.assert_array_equal(read_k_space(path).y, expected)
    # Lines that were measured twice are averaged.
    twice = save_ismrmrd(tmp_path / "b.h5", y, [*range(18), 7], header(20, 18, 20, 18))
    np.testing.assert_allclose(read_k_space(twice).y, y, rtol=1e-6)


@pytest.mark.parametrize(
    ("tags", "change", "words"),
    [
        ({"flag": 22}, {}, "reversed lines"),
        ({"kspace_encode_step_2": 1}, {}, "three dimensions"),
        ({}, {"trajectory": "spiral"}, "spiral trajectory"),
        ({}, {"center": 40}, "outside of its k-space of 18 x 20"),
        ({"flag": 20}, {}, "holds no line"),
    ],
)
def test_ismrmrd_files_that_are_not_read_are_named(tmp_path, h5py, tags, change, words):
    y = k_space(smooth(1, (18, 20)))[:, None]
    text = header(20, 18, 20, 18, **change)
    path = save_ismrmrd(tmp_path / "a.h5", y, range(18), text, **tags)
    with pytest.raises(ValueError, match=rf"a\.h5.* {words}"):
        read_k_space(path)


def test_damaged_headers_are_named(tmp_path, h5py):
    y = k_space(smooth(1, (18, 20)))[:, None]
    save_ismrmrd(tmp_path / "a.h5", y, range(18), header(20, 18, 20, 18)[:-40])
    with pytest.raises(ValueError, match=r"a\.h5: its header is no XML"):
        read_k_space(tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["dataset/xml"] = [header(20, 18, 20, 18).encode()]
        file["dataset/data"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"b\.h5 cannot be read"):
        read_k_space(tmp_path / "b.h5")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["kspace"] = np.zeros((2, 3), complex)
    with pytest.raises(ValueError, match=r"c\.h5: 'kspace' is complex128 of shape"):
        read_k_space(tmp_path / "c.h5")


def test_one_of_several_repetitions_is_chosen(tmp_path, h5py):
    ismrmrd = pytest.importorskip("ismrmrd", reason=REASON)
    y = k_space(smooth(2, (18, 20)))[:, None]
    path = tmp_path / "a.h5"
    save_ismrmrd(path, y[:1], range(18), header(20, 18, 20, 18))
    with ismrmrd.Dataset(path, mode="r+") as dataset:
        for row in range(18):
            dataset.append_acquisition(
                line(ismrmrd, y[1, :, row], 0, row, repetition=1)
            )
    with pytest.raises(ValueError, match=r"several of 'repetition'.*\[0, 1\]"):
        read_k_space(path)
    for i in range(2):
        np.testing.assert_array_equal(read_k_space(f"{path}:repetition={i}").y[0], y[i])
    for bad in ("repetition=x", "average=0"):
        with pytest.raises(ValueError, match=r"a\.h5"):
            read_k_space(f"{path}:{bad}")


def test_k_space_is_complex(tmp_path, capsys):
    np.save(tmp_path / "y.npy", np.ones((8, 8)))
    assert reconstruct(tmp_path / "y.npy", tmp_path / "x.npy") == 2
    assert "must hold complex numbers, got float64" in capsys.readouterr().err


# -- volumes ------------------------------------------------------------------------


@pytest.mark.parametrize("slices", ["depth", "height", "width", "mean"])
def test_a_volume_is_denoised_as_a_whole(tmp_path, slices, capsys):
    x = smooth(4, (9, 8)).astype(np.float32)
    np.save(tmp_path / "in.npy", x)
    target = tmp_path / "out.npy"
    command = ["denoise", str(tmp_path / "in.npy"), str(target), *FAST]
    assert main([*command, "--slices", slices]) == 0
    assert capsys.readouterr().out.count("converged") == 1
    with torch.no_grad():
        model = DEAL(slices=slices, rtol=0.3)
        expected = model(torch.from_numpy(x)[None, None], sigma=10 / 255)
    np.testing.assert_allclose(np.load(target), expected[0, 0], atol=1e-6)


def test_a_volume_shows_its_iterations_on_terminals(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "in.npy", smooth(3, (9, 8)).astype(np.float32))
    results = []
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=terminal: answer)
        target = str(tmp_path / f"{terminal}.npy")
        command = ["denoise", str(tmp_path / "in.npy"), target, *FAST]
        assert main([*command, "--slices", "mean"]) == 0
        said = capsys.readouterr()
        n_iter = said.out.split(": ")[1].split(" iterations")[0]
        assert (f"DEAL: {n_iter}it" in said.err) == terminal
        results.append(np.load(target))
    np.testing.assert_array_equal(*results)


def test_every_time_of_a_nifti_file_is_a_volume(tmp_path, nibabel):
    x = np.stack([smooth(3, (9, 8), seed) for seed in (0, 1)]).astype(np.float32)
    save_nifti(nibabel, tmp_path / "in.nii", x.T)
    command = ["denoise", str(tmp_path / "in.nii"), str(tmp_path / "out.nii"), *FAST]
    assert main([*command, "--slices", "mean"]) == 0
    both = nibabel.load(tmp_path / "out.nii").get_fdata().T
    save_nifti(nibabel, tmp_path / "in.nii", x[1].T)
    assert main([*command, "--slices", "mean"]) == 0
    one = nibabel.load(tmp_path / "out.nii").get_fdata().T
    np.testing.assert_allclose(both[1], one, atol=1e-6)


def test_volumes_of_colour_have_their_channels(tmp_path):
    """By weights for gray: one by one."""
    x = np.stack([smooth(3, (9, 8), seed) for seed in range(3)], 1).astype(np.float32)
    np.save(tmp_path / "in.npy", x)  # (D, 3, H, W)
    options = ["--pretrained", "deal_gray", "--slices", "mean", *FAST]
    for name, volume in (("in.npy", x), ("one.npy", x[:, 1])):
        np.save(tmp_path / name, volume)
        files = str(tmp_path / name), str(tmp_path / f"out_{name}")
        assert main(["denoise", *files, *options]) == 0
    found = np.load(tmp_path / "out_in.npy")
    assert found.shape == x.shape
    one = np.load(tmp_path / "out_one.npy")
    np.testing.assert_allclose(found[:, 1], one, atol=1e-5)


def test_what_is_no_volume_is_said(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.ones((8, 8)))
    files = str(tmp_path / "a.npy"), str(tmp_path / "b.npy")
    assert main(["denoise", *files, *FAST, "--slices", "depth"]) == 2
    assert "a.npy is no volume (one page)" in capsys.readouterr().err
    np.save(tmp_path / "a.npy", np.ones((3, 8, 8)))
    figure = ["--figure", str(tmp_path / "f.png"), "--slices", "depth"]
    assert main(["denoise", *files, *FAST, *figure]) == 2
    assert "has 3 pages" in capsys.readouterr().err
