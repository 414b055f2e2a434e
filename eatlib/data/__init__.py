"""A name -> images in memory, in their splits, and augmented batches of them.

`eatlib.sources` says where a data set lies and what is in it, `images` decodes it once and parts it, `augment` makes
batches. Which files each data set needs, and how to add one's own: data/README.md.
"""
# ruff: noqa: F401

from eatlib.data.augment import augment, count_batches, training_batches
from eatlib.data.images import Data, Split, load_data
from eatlib.sources import SOURCES, DataError, Listing, Source, source
