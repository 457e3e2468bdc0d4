"""The error of data that cannot be used."""


class DataError(ValueError):
    """A data file is missing, broken or of another layout; the message says which, where, and what to do.

    Example:
        >>> HDF5PointsDataModule("nowhere.h5").num_classes
        Traceback (most recent call last):
        litzoo.datamodules.errors.DataError: there is no file nowhere.h5: give the HDF5 file of the clouds with --data.path
    """
