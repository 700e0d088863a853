"""Comparison of two outputs, and what it proves."""

from bridge.diagnosis.comparison import Comparison as Comparison
from bridge.diagnosis.side import Side as Side
from bridge.diagnosis.comparison import compare as compare
from bridge.diagnosis.comparison import same_bits as same_bits
from bridge.diagnosis.parity import Diagnosis as Diagnosis
from bridge.diagnosis.parity import parity as parity
from bridge.diagnosis.verdict import Verdict as Verdict
