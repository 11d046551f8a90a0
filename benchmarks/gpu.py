"""What does a window cost on a GPU over the bare passes it is made of, and does its memory stay the same for any k?

The floor is k bare forward/backward passes, iterator, converter and copies included, and one ``optimizer.update()``.
Against it run, in turns, an update of AccumulatingUpdater, and accumulation as it is written by hand; and in the same
round, where PyTorch finds the GPU, too, the same network in PyTorch. The device is waited for before and after each.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import itertools
import statistics
import sys
from typing import Any, Callable, Dict, Optional

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
from chainer.backends import cuda
from floor import make_window, set_up
from overhead import BY_HAND, FLOOR, WINDOW, make_contestants
from pairs import measure, ratios
from peers_in_chainer import Job
from workloads import WORKLOADS, Workload, describe_machine

STEPS = (1, 4, 16, 64)
TORCH_FLOOR, TORCH_BY_HAND = "PyTorch's floor", "PyTorch by hand"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="@cupy:0", help="as in --device=@cupy:1; with @numpy, it is a rehearsal")
    parser.add_argument("--rounds", type=int, default=40, help="how often each runs, two or more")
    parser.add_argument("--accumulation-steps", "-k", type=int, default=16)
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", default=(16, 64, 256))
    args = parser.parse_args()
    missing = find_missing(args.device)
    if missing is not None:
        print(f"benchmarks/gpu.py: nothing was measured, {missing}", file=sys.stderr)
        return
    device = chainer.get_device(args.device)
    device.use()
    print(f"# Time and memory of a window on a GPU\n\n{__doc__.strip()}\n")
    print(f"Machine: {describe_machine()}; {describe_device(device)}.")
    print_times(device, args.rounds, args.accumulation_steps, args.micro_batch_sizes)
    if isinstance(device, cuda.GpuDevice):
        print_peaks(device)
    print("\nMade by `make bench-gpu`: `python benchmarks/gpu.py", *sys.argv[1:], end="`.\n")


def find_missing(device: str) -> Optional[str]:
    """Returns what keeps the device from being used, or ``None``."""
    if not device.startswith("@cupy"):
        return None
    if not cuda.available:
        return "as CuPy cannot be imported; install one for your CUDA, such as cupy-cuda12x[ctk]"
    try:
        cuda.cupy.cuda.runtime.getDeviceCount()
    except cuda.cupy.cuda.runtime.CUDARuntimeError as error:
        return f"as CuPy finds no GPU: {error}"
    return None


def describe_device(device: Any) -> str:
    """Returns the name of the card, and the versions of what computes on it."""
    if not isinstance(device, cuda.GpuDevice):
        return f"{device}, not a GPU"
    runtime = cuda.cupy.cuda.runtime
    name = runtime.getDeviceProperties(device.device.id)["name"].decode()
    versions = (f"{v // 1000}.{v % 1000 // 10}" for v in (runtime.driverGetVersion(), runtime.runtimeGetVersion()))
    cudnn = "with cuDNN" if cuda.cudnn_enabled else "without cuDNN"
    text = "{}, driver for CUDA {}, CUDA runtime {}, CuPy {} {}".format(name, *versions, cuda.cupy.__version__, cudnn)
    if torch_device(device) is not None:
        import torch

        text += f", PyTorch {torch.__version__}"
    return text


def print_times(device: Any, rounds: int, k: int, sizes: Any) -> None:
    """Prints the table of times."""
    print(f"\nk = {k}, SGD, medians of {rounds} rounds, the ratios round by round, with quartiles.\n")
    with_torch = torch_device(device) is not None
    heads = ["network", "micro-batch", "floor", f"{WINDOW} / floor", f"{BY_HAND} / floor"]
    if with_torch:
        heads += [TORCH_FLOOR, f"{TORCH_BY_HAND} / its floor", f"{WINDOW} / {TORCH_BY_HAND}"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for workload, size in itertools.product(WORKLOADS, sizes):
        workload = workload._replace(micro_batch_size=size)
        contestants = make_contestants(workload, k, device)
        if with_torch:
            contestants.update(make_torch_contestants(workload, k, rounds, torch_device(device)))
        timed = {name: functools.partial(to_the_end, run, device) for name, run in contestants.items()}
        seconds = measure(timed, rounds)
        pairs = [(WINDOW, FLOOR), (BY_HAND, FLOOR)]
        cells = [workload.name, str(size), in_ms(seconds[FLOOR])]
        cells += [ratios(seconds[a], seconds[b]) for a, b in pairs]
        if with_torch:
            pairs = [(TORCH_BY_HAND, TORCH_FLOOR), (WINDOW, TORCH_BY_HAND)]
            cells += [in_ms(seconds[TORCH_FLOOR]), *(ratios(seconds[a], seconds[b]) for a, b in pairs)]
        print(f"| {' | '.join(cells)} |", flush=True)


def in_ms(seconds: Any) -> str:
    """Returns the median in milliseconds."""
    return f"{statistics.median(seconds) * 1e3:.2f} ms"


def to_the_end(run: Callable[[], None], device: Any) -> None:
    """Runs something, and waits for the device."""
    run()
    if isinstance(device, cuda.GpuDevice):
        device.device.synchronize()  # with PyTorch's work, too, which shares the context of the device


def torch_device(device: Any) -> Optional[str]:
    """Returns PyTorch's name of the device, or ``None`` if PyTorch cannot use it."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not isinstance(device, cuda.GpuDevice):
        return "cpu"
    return f"cuda:{device.device.id}" if torch.cuda.is_available() else None


def make_torch_contestants(workload: Workload, k: int, rounds: int, device: Optional[str]) -> Dict[str, Any]:
    """Returns bare passes and the accumulation that is written by hand, each with a network of its own."""
    import peers_in_torch

    def set_up() -> Any:
        dataset = workload.make_dataset(k * workload.micro_batch_size) * (rounds + 1)  # measure() begins with a warm-up
        network, optimizer, loader = peers_in_torch.set_up(Job(workload, dataset, workload.micro_batch_size, k))
        network.to(device)
        batches = ((x.to(device), t.to(device)) for x, t in loader)
        return network, optimizer, lambda: itertools.islice(batches, k)

    def make_floor() -> Callable[[], None]:
        network, optimizer, micro_batches = set_up()

        def floor() -> None:
            for x, t in micro_batches():
                loss = peers_in_torch.mean_loss(network(x), t)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()

        return floor

    def make_by_hand() -> Callable[[], None]:
        network, optimizer, micro_batches = set_up()

        def by_hand() -> None:
            for x, t in micro_batches():
                loss = peers_in_torch.mean_loss(network(x), t) / k
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return by_hand

    return {TORCH_FLOOR: make_floor(), TORCH_BY_HAND: make_by_hand()}


def print_peaks(device: Any) -> None:
    """Prints the table of peaks."""
    print("\nMiB that CuPy's memory pool has taken after two updates, model included, by k:\n")
    print(f"| network | micro-batch | {' | '.join(f'k = {k}' for k in STEPS)} |\n|{' --- |' * (2 + len(STEPS))}")
    for workload in WORKLOADS:
        peaks = " | ".join(f"{peak(workload, device, k) / 2**20:.1f}" for k in STEPS)
        print(f"| {workload.name} | {workload.micro_batch_size} | {peaks} |", flush=True)


def peak(workload: Workload, device: Any, k: int) -> int:
    """Returns the bytes that the memory pool takes for a model and two updates of it."""
    gc.collect()
    cuda.memory_pool.free_all_blocks()
    before = cuda.memory_pool.total_bytes()
    update = make_window(*set_up(workload, k, device), k, device)
    for _ in range(2):
        update()
    return int(cuda.memory_pool.total_bytes() - before)


if __name__ == "__main__":
    with chainer.Reporter().scope({}):  # as in a Trainer, models report to somebody
        main()
