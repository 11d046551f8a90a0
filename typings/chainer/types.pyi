from typing import Any

from chainer.backend import Device

# NumPy's, CuPy's or ChainerX's, of which only the first has types.
NdArray = Any
Xp = Any
Shape = tuple[int, ...]
DeviceSpec = Device | str | int
