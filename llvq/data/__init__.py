"""The data set protocol, data sets in memory, and the input order."""

from llvq.data.arrays import ArrayDataset
from llvq.data.dataset import Dataset, Images
from llvq.data.order import IndexBatch

__all__ = ["ArrayDataset", "Dataset", "Images", "IndexBatch"]
