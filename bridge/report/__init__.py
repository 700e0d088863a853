"""Reports of a diagnosis: terminal and JSON."""

from bridge.files import check_writable as check_writable
from bridge.files import write_atomically as write_atomically
from bridge.report.schema import Report as Report
from bridge.report.terminal import print_diagnosis as print_diagnosis
