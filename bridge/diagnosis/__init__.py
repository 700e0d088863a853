"""Comparison of two outputs, and what it proves."""

from bridge.diagnosis.comparison import Comparison as Comparison
from bridge.diagnosis.comparison import compare as compare
from bridge.diagnosis.finding import Finding as Finding
from bridge.diagnosis.integers import IntegerTest as IntegerTest
from bridge.diagnosis.integers import integer_case as integer_case
from bridge.diagnosis.integers import integer_test as integer_test
from bridge.diagnosis.integers import integers_agree as integers_agree
from bridge.diagnosis.parity import Diagnosis as Diagnosis
from bridge.diagnosis.parity import parity as parity
from bridge.diagnosis.side import Side as Side
from bridge.diagnosis.target import Target as Target
from bridge.diagnosis.verdict import Verdict as Verdict
from bridge.numerics import same_bits as same_bits
