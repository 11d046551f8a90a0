"""The part of ``pkg_resources`` that Chainer uses, over :mod:`importlib.metadata`.

setuptools 82 dropped ``pkg_resources``, and new environments have no setuptools at all. But ``import chainer`` asks it
which optional packages are installed, and ``chainer.testing`` which versions they have. :mod:`.stand_ins` shows them
this module where they can import no other.
"""

from __future__ import annotations

import importlib.metadata
import re
from typing import List, NamedTuple


class ResolutionError(Exception):
    """A requirement is not met."""


class DistributionNotFound(ResolutionError):
    """No installed package has the required name."""


class VersionConflict(ResolutionError):
    """The installed package has another version than the required one."""


class Distribution(NamedTuple):
    """An installed package."""

    project_name: str
    version: str


def get_distribution(name: str) -> Distribution:
    """Returns the installed package of that name.

    Raises:
        DistributionNotFound: No such package is installed.

    """
    try:
        return Distribution(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError as error:
        raise DistributionNotFound(name) from error


def require(*requirements: str) -> List[Distribution]:
    """Returns the installed packages that meet ``requirements`` such as ``'cupy>=7.7.0,<8.0.0'``.

    A version is compared only where the ``packaging`` library is there to compare it.

    Raises:
        DistributionNotFound: A package is not installed.
        VersionConflict: A package is installed in another version.

    """
    return [_require(requirement) for requirement in requirements]


def _require(requirement: str) -> Distribution:
    name, specifier = re.match(r"\s*([\w.-]*)(.*)", requirement, re.DOTALL).groups()  # type: ignore[union-attr]
    distribution = get_distribution(name)
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return distribution
    if not SpecifierSet(specifier).contains(distribution.version, prereleases=True):
        raise VersionConflict(distribution, requirement)
    return distribution


class WorkingSet:
    """The packages of this environment."""

    def require(self, *requirements: str) -> List[Distribution]:
        """See :func:`require`."""
        return require(*requirements)
