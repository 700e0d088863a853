"""Compare outputs, and find out why they differ.

Data (verdict, finding, target, output, comparison, diagnosis) is below the judges (precision, convention, localisation
and the statistical tests), which judgement tries in turn. Comparing, parity, attribution and elimination are above.
"""

from bridge.diagnosis._compare import compare as compare
from bridge.diagnosis._parity import DEFAULT as DEFAULT
from bridge.diagnosis._parity import parity as parity
from bridge.diagnosis.comparison import Comparison as Comparison
from bridge.diagnosis.diagnosis import Diagnosis as Diagnosis
from bridge.diagnosis.integers import integer_case as integer_case
from bridge.diagnosis.integers import integer_test as integer_test
from bridge.diagnosis.output import Output as Output
from bridge.diagnosis.verdict import Verdict as Verdict
