"""Build the report of a run: headline, model comparison, error analysis, alarms, calibration, data and reproducibility.

Input: the files of a finished or unfinished run. Output: `report.html`, one file that makes no network requests.
A *block* is a figure with its description, its numbers as a table and the command that reproduces them.
"""

from __future__ import annotations
