"""Scripts are run as `python algorithms/iql.py`; tests import them as modules."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
