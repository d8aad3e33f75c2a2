"""A run becomes one page: the claim, how sure it is, where it fails, what it rests on, how to repeat it.

In: the files of a finished or half-finished run. Out: `report.html`, one file that asks nothing of any network.
A *block* is a picture with its sentence, its numbers as a table and the command that makes them again.
"""

from __future__ import annotations
