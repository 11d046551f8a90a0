"""The doctor: what is installed, what is wrong with it, and the command that mends it.

Anything may be broken here, NumPy and Chainer included. So the modules of this subpackage import nothing but the
standard library and one another. A check imports what it examines when it runs.
"""

from chainer_accum._doctor.examination import examine
from chainer_accum._doctor.findings import Finding, as_json, as_text, is_well

__all__ = ["Finding", "as_json", "as_text", "examine", "is_well"]
