"""The report: one HTML file about a run or several, which needs no network, no server and no other file."""

from .chapter import Chapter as Chapter
from .chapter import read_chapter as read_chapter
from .page import REPORT as REPORT
from .page import write_report as write_report
from .subject import Subject as Subject
