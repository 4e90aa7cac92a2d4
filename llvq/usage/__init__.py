"""Which codes occur: counted on the devices, kept in a table of bounded size."""

from llvq.usage.counting import CodeCounts, count_codes
from llvq.usage.table import CodebookUsage

__all__ = ["CodeCounts", "CodebookUsage", "count_codes"]
