"""What guards a read from a damaged HDF5 file."""

import math

from h5py import h5d

DEFLATE = 1032  # the most that zlib can shrink bytes by


def room(dataset: h5d.DatasetID) -> tuple[int, ...]:
    """The shape of a dataset, if its file can hold that much.

    HDF5 would give fill values for what was never written, and a damaged length would fill the memory.

    Raises:
        OSError: the file holds far too little for this shape.
    """
    shape, stored = dataset.shape or (), dataset.get_storage_size()
    if 8 * math.prod(shape) > 16 * stored:  # in float64; no more than a quick look for most
        layout, needed = dataset.get_create_plist(), math.prod(shape) * dataset.get_type().get_size()
        if needed > stored * (DEFLATE if layout.get_nfilters() else 1) and layout.get_layout() != h5d.VIRTUAL:
            raise OSError(f"a dataset of shape {shape} would take {needed} bytes, but only {stored} were ever written")
    return shape
