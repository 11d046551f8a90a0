"""How much of what is random to try, and from which seed: environment variables, for longer runs than make reliability.

RELIABILITY_TIMES=20 RELIABILITY_SEED=7 make reliability

"""

from __future__ import annotations

import os

TIMES = int(os.environ.get("RELIABILITY_TIMES", "1"))
SEED = int(os.environ.get("RELIABILITY_SEED", "0"))
