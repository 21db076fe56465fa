"""The report: one page that shows what runs did, and needs nothing beside itself.

reading.py takes what is shown from run folders; page.html, page.css and page.js are the page, which
page.py puts together. It is written at the end of a run, by run/, and by `python -m
opsd_train.report`. Nothing here computes what it shows: figures are those of metrics.jsonl,
tokens.jsonl and evaluation/.
"""

from opsd_train.report.page import write_report

__all__ = ["write_report"]
