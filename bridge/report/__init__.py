"""Reports of a diagnosis: terminal and JSON."""

from bridge.report.files import check_writable as check_writable
from bridge.report.files import write_atomically as write_atomically
from bridge.report.schema import Report as Report
from bridge.report.terminal import print_diagnosis as print_diagnosis
