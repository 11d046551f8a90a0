"""The commands that mend an installation. Errors and the doctor print them, and docs/installation.md explains them."""

from __future__ import annotations

_SETUPTOOLS = 'pip install "setuptools>=70.1,<82"'

RUN_DOCTOR = "python -m chainer_accum doctor"
INSTALL_NUMPY = 'pip install "numpy>=1.22"'
REINSTALL_NUMPY = 'pip install --force-reinstall --no-deps "numpy>=1.22"'
INSTALL_CHAINER = f'{_SETUPTOOLS} && pip install --no-build-isolation "chainer>=7.8.1"'
REINSTALL_CHAINER = f'{_SETUPTOOLS} && pip install --no-build-isolation --force-reinstall --no-deps "chainer>=7.8.1"'
RESTORE_NAMES = "unset CHAINER_ACCUM_COMPAT"
INSTALL_CUPY_FOR_CUDA_12 = 'pip install --upgrade "cupy-cuda12x[ctk]"'
INSTALL_CUPY_FOR_CUDA_13 = 'pip install --upgrade "cupy-cuda13x[ctk]"'
UNINSTALL_CUPY = "pip uninstall --yes cupy cupy-cuda11x cupy-cuda12x cupy-cuda13x"
SET_LIBRARY_PATH = (
    "export LD_LIBRARY_PATH=\"$(python -c 'import glob, nvidia; "
    'print(*glob.glob(nvidia.__path__[0] + "/*/lib"), sep=":")\')"'
)
INSTALL_CUDNN = "pip install '.[cuda12-cudnn]'"
SHOW_DRIVER = "nvidia-smi"
INSTALL_MPI = "pip install mpich"
USE_ONE_THREAD = "export OMP_NUM_THREADS=1"
SHOW_TRACEBACK = "python -c 'import chainer_accum'"
