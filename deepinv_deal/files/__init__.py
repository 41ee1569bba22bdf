"""Images, kernels, masks and measurements in files."""

from deepinv_deal.files.arrays import ARRAYS, read_array
from deepinv_deal.files.decode import IMAGES
from deepinv_deal.files.dicom import is_series
from deepinv_deal.files.folders import (
    as_float,
    files_below,
    load_image,
    load_image_folder,
    load_images,
)
from deepinv_deal.files.kinds import Picture, suffix_of
from deepinv_deal.files.kspace import KSpace, read_k_space
from deepinv_deal.files.pictures import (
    IN_FOLDERS,
    NOT_IN_FOLDERS,
    WRITABLE,
    check_target,
    forgets_place,
    read_mask,
    read_picture,
    write_picture,
)

__all__ = [
    "ARRAYS",
    "IMAGES",
    "IN_FOLDERS",
    "NOT_IN_FOLDERS",
    "WRITABLE",
    "KSpace",
    "Picture",
    "as_float",
    "check_target",
    "files_below",
    "forgets_place",
    "is_series",
    "load_image",
    "load_image_folder",
    "load_images",
    "read_array",
    "read_k_space",
    "read_mask",
    "read_picture",
    "suffix_of",
    "write_picture",
]
