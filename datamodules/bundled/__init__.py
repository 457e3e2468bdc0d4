"""Data sets that ship with litzoo; `furniture_LICENSE.txt` is the licence of `furniture.h5`."""
