"""Without PyTorch the tests that compare with its networks are not collected."""

import importlib.util

if importlib.util.find_spec("torch") is None:
    collect_ignore = ["originals.py", "propagated.py", "test_originals.py"]
