"""The results of long runs: their reports, and the folder from which they are resumed."""

from jaxq.ptq._results._journal import Entry, Journal, folder_of, journal_of
from jaxq.ptq._results._reports import LearnedBlock, Report, RoundingReport, SolvedProduct

__all__ = [
    "Entry",
    "Journal",
    "LearnedBlock",
    "Report",
    "RoundingReport",
    "SolvedProduct",
    "folder_of",
    "journal_of",
]
