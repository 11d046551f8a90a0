"""GPUs: CuPy, CUDA, its driver, and cuDNN."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from typing import List

from chainer_accum._doctor.findings import NOTE, OK, WRONG, Finding
from chainer_accum._doctor.importing import describe, import_quietly, is_missing
from chainer_accum._remedies import (
    INSTALL_CUDNN,
    INSTALL_CUPY_FOR_CUDA_12,
    INSTALL_CUPY_FOR_CUDA_13,
    SET_LIBRARY_PATH,
    SHOW_DRIVER,
    UNINSTALL_CUPY,
)

_NOT_INSTALLED = "not installed"
_NOT_USED = "not used, because CuPy is not"
_NO_GPU = "On a machine with a GPU and its driver, this command lists it:"


def check_cupy() -> Finding:
    """Returns the version of CuPy, or why it cannot be imported."""
    packages = _cupy_packages()
    if len(packages) > 1:
        advice = "These packages overwrite the files of one another. Uninstall all of them, and install one again."
        return Finding(WRONG, ", ".join(packages), advice, _installing(packages))
    try:
        cupy = import_quietly("cupy")
    except Exception as error:
        if is_missing(error, "cupy") and not packages:
            return Finding(OK, _NOT_INSTALLED)
        name = packages[0] if packages else "cupy"
        advice = "It does not fit the installed Python, NumPy or CUDA."
        return Finding(WRONG, f"{name} cannot be imported: {describe(error)}", advice, _installing(packages))
    return Finding(OK, f"{cupy.__version__} ({packages[0] if packages else 'built from source'})")


def check_cuda() -> Finding:
    """Returns the versions of CUDA and of its driver, and the devices, or what of them is missing."""
    if not _has_cupy():
        return Finding(OK, _NOT_USED)
    cupy, packages = import_quietly("cupy"), _cupy_packages()
    try:
        import_quietly("cupy.cuda").cublas  # noqa: B018 - which CuPy imports when it is looked up
    except Exception as error:
        advice = "Without cuBLAS, Chainer silently reports that there is no GPU."
        command = _installing(packages)
        if int(cupy.__version__.split(".")[0]) < 14 and importlib.util.find_spec("nvidia") is not None:
            advice += " Before version 14, CuPy finds the libraries that pip installs only if the loader is told where:"
            command = SET_LIBRARY_PATH
        return Finding(WRONG, f"cuBLAS cannot be loaded: {describe(error)}", advice, command)
    runtime = cupy.cuda.runtime
    toolkit, driver = runtime.runtimeGetVersion(), runtime.driverGetVersion()
    found = f"{_release(toolkit)}, driver for {_release(driver)}" if driver else f"{_release(toolkit)}, no driver"
    if driver == 0:
        return Finding(NOTE, found, _NO_GPU, SHOW_DRIVER)
    if driver < 12000 and driver < toolkit:
        return Finding(WRONG, found, "Update the driver. This command shows which one there is:", SHOW_DRIVER)
    if driver // 1000 < toolkit // 1000:
        advice = "The driver is older than CUDA. Update the driver, or install CuPy for CUDA 12:"
        return Finding(WRONG, found, advice, f"{UNINSTALL_CUPY} && {INSTALL_CUPY_FOR_CUDA_12}")
    try:
        names = [runtime.getDeviceProperties(i)["name"].decode() for i in range(runtime.getDeviceCount())]
    except Exception as error:
        return Finding(NOTE, f"{found}, no device: {describe(error)}", _NO_GPU, SHOW_DRIVER)
    try:
        float(cupy.ones(2).sum())
    except Exception as error:
        advice = "CuPy compiles kernels when they are called, with other libraries of CUDA."
        return Finding(WRONG, f"{found}, cannot compute: {describe(error)}", advice, _installing(packages))
    return Finding(OK, f"{found}, {', '.join(names)}")


def check_cudnn() -> Finding:
    """Returns whether Chainer uses cuDNN."""
    if not _has_cupy():
        return Finding(OK, _NOT_USED)
    cuda = import_quietly("chainer.backends.cuda")
    if cuda.cudnn_enabled:
        return Finding(OK, str(cuda.libcudnn.getVersion()))
    if os.environ.get("CHAINER_CUDNN") == "0":
        return Finding(OK, "turned off by CHAINER_CUDNN=0")
    advice = (
        "Chainer uses its own kernels for convolution, pooling and normalization, which are slower. CuPy 14 has no "
        "cuDNN. In a clone, this installs CuPy 13 with it:"
    )
    return Finding(NOTE, "not found", advice, INSTALL_CUDNN)


def _cupy_packages() -> List[str]:
    """Returns the names of the installed packages that contain CuPy."""
    names = {str(distribution.metadata["Name"]).lower() for distribution in importlib.metadata.distributions()}
    return sorted(name for name in names if re.fullmatch(r"cupy(-cuda\w+|-rocm\S+)?", name))


def _has_cupy() -> bool:
    try:
        import_quietly("cupy")
    except Exception as error:
        if _cupy_packages() or not is_missing(error, "cupy"):
            raise  # so there is no more to find
        return False
    return True


def _installing(packages: List[str]) -> str:
    """Returns the command that installs CuPy again, or instead of these packages."""
    install = INSTALL_CUPY_FOR_CUDA_13 if "cupy-cuda13x" in packages else INSTALL_CUPY_FOR_CUDA_12
    is_one = packages in (["cupy-cuda12x"], ["cupy-cuda13x"])
    return install if is_one else f"{UNINSTALL_CUPY} && {install}"


def _release(version: int) -> str:
    return f"CUDA {version // 1000}.{version % 1000 // 10}"
