"""A name -> images in memory, in their splits, and augmented batches of them.

`sources` says where a data set lies and what is in it, `cache` decodes it once, `splits` parts it, `augment` makes
batches. Which files each data set needs, and how to add one's own: data/README.md.
"""
# ruff: noqa: F401

from eatlib.data.augment import augment, batches, image_grid, training_batches
from eatlib.data.sources import DataError, Listing, source
from eatlib.data.splits import Data, Split, data_root, load_data
