"""Images, kernels, masks and measurements in files."""

from deepinv_deal.files.arrays import ARRAYS, read_array
from deepinv_deal.files.decode import IMAGES
from deepinv_deal.files.folders import (
    as_float,
    files_below,
    load_image,
    load_image_folder,
    load_images,
)
from deepinv_deal.files.pictures import (
    WRITABLE,
    Picture,
    check_target,
    read_mask,
    read_picture,
    write_picture,
)

__all__ = [
    "ARRAYS",
    "IMAGES",
    "WRITABLE",
    "Picture",
    "as_float",
    "check_target",
    "files_below",
    "load_image",
    "load_image_folder",
    "load_images",
    "read_array",
    "read_mask",
    "read_picture",
    "write_picture",
]
