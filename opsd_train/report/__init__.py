"""The report: one page that shows what runs did, and needs nothing beside itself.

page.py takes what is shown from run folders, and puts it together with page.html, page.css and
page.js. It is written at the end of a run, by run/, and by `python -m
opsd_train.report`. Nothing here computes what it shows: figures are those of metrics.jsonl,
tokens.jsonl and evaluation/.
"""

from opsd_train.report.page import write_report

__all__ = ["write_report"]
