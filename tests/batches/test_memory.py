"""How much memory there is, and how much is in use, is read from Linux and from CuPy's pool."""

from __future__ import annotations

import contextlib
import math
import types

import chainer
import numpy
import pytest
from chainer.backends import cuda
from chainer_accum.batches import make_micro_batch_size, memory
from chainer_accum.batches.memory import HostMemory, PoolMemory, Share, make_share, memory_of
from hypothesis import given
from hypothesis import strategies as st

KIB, MIB, GIB = 2**10, 2**20, 2**30
UNLIMITED = 9223372036854771712  # as version 1 of cgroups writes it


class Linux:
    """The files of Linux that say what memory there is, in a folder."""

    def __init__(self, monkeypatch, folder):
        self.folder = folder
        monkeypatch.setattr(memory, "_PROC", folder / "proc")
        monkeypatch.setattr(memory, "_MACHINE", folder / "meminfo")
        monkeypatch.setattr(memory, "_CGROUPS", folder / "cgroup")
        self.write("meminfo", f"MemTotal: {16 * MIB} kB\nMemFree: 1 kB\nMemAvailable: {10 * MIB} kB\n")
        self.write("proc/status", f"Name:\tpython\nVmHWM:\t  {3 * MIB} kB\nVmRSS:\t  {2 * MIB} kB\nVmData:\t 1 kB\n")

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def write_cgroup(self, folder, limit, used, cache=0, version=2):
        """Writes the files of a cgroup, in bytes."""
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        self.write(f"cgroup/{folder}/{names[0]}", f"{limit}\n")
        self.write(f"cgroup/{folder}/{names[1]}", f"{used}\n")
        self.write(f"cgroup/{folder}/memory.stat", f"cache 5\n{names[2]} {cache}\nactive_file 7\n")


@pytest.fixture
def linux(monkeypatch, tmp_path):
    return Linux(monkeypatch, tmp_path)


def ceiling(**share):
    return HostMemory().ceiling(Share(**share)) / GIB


def test_without_cgroups_the_machine_is_the_limit(linux):
    assert ceiling() == 12  # what is in use, and what is available
    assert ceiling(of_total=0.5) == 8
    assert ceiling(of_available=0.9) == 2 + 9
    assert ceiling(num_bytes=3 * GIB) == 3


def test_a_cgroup_of_version_2_is_the_limit(linux):
    linux.write("proc/cgroup", "0::/user/job\n")
    linux.write_cgroup("user/job", 4 * GIB, 3 * GIB, cache=GIB)
    assert ceiling() == 2 + 2  # the cache of files is available
    assert ceiling(of_total=0.5) == 2


def test_a_cgroup_above_may_be_stricter(linux):
    linux.write("proc/cgroup", "0::/user/job/step\n")
    linux.write_cgroup("user/job/step", "max", GIB)
    linux.write_cgroup("user/job", 8 * GIB, GIB)
    linux.write_cgroup("user", 6 * GIB, 5 * GIB)
    assert ceiling() == 2 + 1
    assert ceiling(of_total=0.5) == 3


@pytest.mark.parametrize("name", ["/docker/1a2b", "/../..", "/"])
def test_in_a_container_only_the_root_is_visible(name, linux):
    linux.write("proc/cgroup", f"0::{name}\n")
    linux.write_cgroup(".", 4 * GIB, GIB)
    assert ceiling(of_total=1.0) == 4


def test_a_cgroup_of_version_1_is_the_limit(linux):
    linux.write("proc/cgroup", "12:cpu,cpuacct:/other\n5:memory:/job\n3:hugetlb:/job\n0::/unrelated\n")
    linux.write_cgroup("memory/job", 4 * GIB, 3 * GIB, cache=GIB, version=1)
    linux.write_cgroup("memory", UNLIMITED, 9 * GIB, version=1)
    assert ceiling() == 2 + 2
    assert ceiling(of_total=0.5) == 2


def test_version_2_may_stand_beside_version_1(linux):
    linux.write("proc/cgroup", "5:pids:/job\n0::/job\n")
    linux.write_cgroup("unified/job", 4 * GIB, GIB)
    assert ceiling(of_total=1.0) == 4


@pytest.mark.parametrize("version, folder", [(1, "memory"), (2, ".")])
def test_a_cgroup_without_a_limit_limits_nothing(version, folder, linux):
    linux.write("proc/cgroup", "5:memory:/\n" if version == 1 else "0::/\n")
    linux.write_cgroup(folder, UNLIMITED if version == 1 else "max", GIB, version=version)
    assert ceiling() == 12


def test_a_cgroup_that_is_full_leaves_what_is_in_use(linux):
    linux.write("proc/cgroup", "0::/\n")
    linux.write_cgroup(".", 4 * GIB, 5 * GIB)
    assert ceiling() == 2


def test_what_is_in_use_is_resident_and_the_peak_is_set_back(linux):
    assert HostMemory().in_use() == 2 * GIB
    assert HostMemory().peak() == 3 * GIB
    assert (linux.folder / "proc/clear_refs").read_text() == "5"


def test_where_the_peak_cannot_be_set_back_the_earlier_one_counts(linux):
    (linux.folder / "proc/clear_refs").mkdir()  # so that it cannot be written
    assert HostMemory().in_use() == 2 * GIB
    assert HostMemory().peak() == 3 * GIB


@pytest.mark.parametrize("status", [None, "Name:\tpython\nVmRSS:\t 7 kB\n"])
def test_without_a_peak_memory_cannot_be_measured(status, linux):
    (linux.folder / "proc/status").unlink()
    if status is not None:
        linux.write("proc/status", status)
    assert memory_of(chainer.get_device("@numpy")) is None


def test_where_linux_says_nothing_there_is_no_limit(linux):
    (linux.folder / "meminfo").unlink()
    assert ceiling() == math.inf
    assert ceiling(num_bytes=GIB) == 1


def test_the_files_of_this_machine_can_be_read():
    host = memory_of(chainer.get_device("@numpy"))
    if host is None:
        pytest.skip("only Linux says what a process has used")
    assert isinstance(host, HostMemory)
    in_use = host.in_use()
    array = numpy.ones(32 * MIB // 8)
    peak = host.peak()
    assert 0 < in_use <= peak - 16 * MIB
    assert in_use < host.ceiling(make_share(None)) <= host.ceiling(make_share("100%")) < math.inf
    assert host.ceiling(make_share(5)) == 5
    assert array.all()


class Pool:
    """CuPy's pool on a device of 8 GiB, of which others use 1 GiB."""

    def __init__(self, limit=0):
        self.held, self.free = 3 * GIB, 2 * GIB  # in blocks that are in use, and in those that are kept for later
        self.limit = limit

    def total_bytes(self):
        return self.held + self.free

    def free_all_blocks(self):
        self.free = 0

    def get_limit(self):
        return self.limit


@pytest.fixture
def make_pool(monkeypatch):
    def make(**kwargs):
        pool = Pool(**kwargs)
        raw_device = types.SimpleNamespace(mem_info=(2 * GIB, 8 * GIB))
        monkeypatch.setattr(cuda, "memory_pool", pool, raising=False)
        monkeypatch.setattr(chainer, "using_device", lambda device: contextlib.nullcontext())
        return pool, PoolMemory(types.SimpleNamespace(device=raw_device))

    return make


def test_cached_blocks_of_a_pool_are_freed_before_they_are_counted(make_pool):
    pool, on_device = make_pool()
    assert on_device.in_use() == 3 * GIB
    pool.held, pool.free = 4 * GIB, GIB
    assert on_device.peak() == 5 * GIB


def test_the_device_is_the_limit_of_a_pool(make_pool):
    _, on_device = make_pool()
    assert on_device.ceiling(Share()) == 7 * GIB
    assert on_device.ceiling(make_share(None)) == pytest.approx((5 + 0.9 * 2) * GIB)
    assert on_device.ceiling(make_share("50%")) == 4 * GIB
    assert on_device.ceiling(make_share(2 * GIB)) == 2 * GIB


def test_the_limit_of_a_pool_holds_as_well(make_pool):
    _, on_device = make_pool(limit=3 * GIB)
    assert on_device.ceiling(Share()) == on_device.ceiling(make_share("80%")) == 3 * GIB


@pytest.mark.parametrize("text, share", [("80%", 0.8), (" 12.5 % ", 0.125), ("100%", 1.0), ("0.1%", 0.001)])
def test_a_share_is_a_percentage(text, share):
    assert make_share(text) == Share(of_total=pytest.approx(share))


def test_by_default_nine_tenths_of_what_is_available_may_be_used():
    assert make_share(None) == Share(of_available=0.9)


@given(st.integers(1, 2**60))
def test_a_number_is_in_bytes(num_bytes):
    assert make_share(num_bytes) == make_share(numpy.int64(num_bytes)) == Share(num_bytes=num_bytes)


@pytest.mark.parametrize("text", ["0%", "101%", "-5%", "80", "%", "80 percent", "8GB", "", "nan%", "1e1%"])
def test_another_text_is_no_share(text):
    with pytest.raises(
        ValueError, match="memory_limit must be between '0%' and '100%', got '.*; give bytes, or a share"
    ):
        make_share(text)


@pytest.mark.parametrize("value, error", [(0.8, TypeError), (True, TypeError), ([1], TypeError), (0, ValueError)])
def test_another_value_is_no_number_of_bytes(value, error):
    with pytest.raises(error, match="memory_limit must be an int of 1 or more, got .*; give bytes, or a share such as"):
        make_share(value)


@pytest.mark.parametrize("micro_batch_size", [None, 4, lambda examples: [examples]])
def test_a_limit_without_a_search_is_refused(micro_batch_size):
    with pytest.raises(
        ValueError, match="memory_limit must be None unless the size .* searched for, got '80%'; set mi"
    ):
        make_micro_batch_size(micro_batch_size, "80%")
