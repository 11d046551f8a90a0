from typing import Any

# The module, in whose place the package puts one of its own.
multiprocessing: Any
