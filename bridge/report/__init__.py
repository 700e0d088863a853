"""Reports of a diagnosis: terminal and JSON."""

from bridge.report.schema import Report as Report
from bridge.report.terminal import print_diagnosis as print_diagnosis
