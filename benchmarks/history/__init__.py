"""What each release takes: a row of releases.csv for each, appended by `record.py`."""
