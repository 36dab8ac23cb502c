"""The tests import the examples and the helpers of `test_dinoreg.py`, also in a clone that is not installed."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES.parent)]
