"""Training steps on a GPU that is not there: nothing in a step may wait for the GPU.

    python tests/test_gpu_trace.py 8 --arch mobilenetv3_large    # the operations of a step, counted

A GPU works behind the host: the host launches operations and goes on. Whatever needs a value on the
host (`.item()`, `.cpu()`, `x[mask]`) waits until the GPU has done all before it, and then the GPU
waits for the host. No result shows that, only the clock. So the program's own loop runs here
with its device as a fake: tensors that have a shape, strides, a type and a device, but no values.
What is on the host is real. `Trace` sees every operation, those of the backward pass too.

One process is traced: the only one, or the first of eight, with the real DistributedDataParallel;
the seven others are made up.

Left out, since it needs a driver or values: DistributedDataParallel's check of equal weights at
the start, its clocks, and its new buckets after the first step (here all gradients are reduced at
once, at the end); pinned memory; cuDNN's and NCCL's own ways, and everything else that happens
inside one operation. --compile and fp16 (whose scaler reads a number each step) are not traced.
"""
import contextlib
import itertools
import os
import subprocess
import sys
import warnings
from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import environment    # which also lets Python find the program's files

import data
import pretrain

GPU, META = torch.device("cuda", 0), torch.device("meta")
SETTINGS = ["--dry-run", "--amp", "bf16", "--workers", "0", "--image-size", "96",
            "--batch-size", "64", "--queue-size", "256", "--smoothing", "0.1", "--neighbors", "20",
            "--jitter-p", "0.8", "--gray-p", "0.2", "--blur-p", "0.5"]


# ------------------------------------------------- the tests

@pytest.mark.parametrize("world, arch, bn_splits", [(1, "resnet18", 2),
                                                    (8, "mobilenetv3_small", 8)])
def test_a_step_never_waits_for_the_gpu(world, arch, bn_splits):
    """In a process of its own: what makes the fake possible cannot be undone."""
    settings = ["--arch", arch, "--bn-splits", str(bn_splits)]
    command = [sys.executable, __file__, str(world), *settings]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


def check_that_it_notices(trace):
    """Everything that waits is refused, everything else is not."""
    host = torch.arange(4)
    x = torch.ones(4, device=GPU)
    rows = host.to(GPU, non_blocking=True)
    trace.in_step = True
    waiting = {
        "item": lambda: x.sum().item(),
        "if": lambda: bool(x.sum() > 0),
        "cpu": lambda: x.cpu(),
        "tolist": lambda: x.tolist(),
        "into a host tensor": lambda: torch.zeros(4).copy_(x, non_blocking=True),
        "blocking copy": lambda: host.to(GPU),
        "blocking copy, in place": lambda: x.copy_(host),
        "new tensor from a list": lambda: torch.tensor([1, 2], device=GPU),
        "nonzero": lambda: (x > 0).nonzero(),
        "mask": lambda: x[x > 0],
        "mask, assigned": lambda: x.__setitem__(x > 0, 0.0),
        "rows on the host": lambda: x[host],
    }
    for name, operation in waiting.items():
        with pytest.raises(Waits):
            operation()
            pytest.fail(f"not noticed: {name}")
    assert (host > 0).nonzero().shape == (3, 1) and host.sum().item() == 6       # on the host
    x[rows] = x[rows] * 2 + torch.where(x > 0, x, 1).mean()
    trace.in_step = False


# ------------------------------------------------- the trace

class Waits(AssertionError):
    """An operation for which the host would wait for the GPU."""


READS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal",
         "aten.unique_dim", "aten._unique2", "aten.unique_consecutive", "aten.bincount"}
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}
COPIES = {"aten._to_copy", "aten.copy_"}
WITHOUT_LAUNCH = {"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty",
                  "aten.new_empty_strided", "aten.detach", "aten.alias", "aten._unsafe_view"}


class Trace(TorchDispatchMode):
    """Does what is on the host, fakes what is on the GPU, and refuses what waits in a step.

    log: (name, args, kwargs, launches) of every operation on the GPU since `start_step`. What
    only makes a view or memory launches nothing.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.log = []
        self.in_step = False
        self.hides_gpu = False

    def start_step(self):
        self.log.clear()
        self.in_step = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:             # torch's C++ asks where a tensor is
            return META if self.hides_gpu else args[0].fake_device
        if self.hides_gpu and kwargs.get("device") == META:   # and makes another beside it
            kwargs["device"] = GPU
        if not any(map(on_gpu, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        name = str(func.overloadpacket)
        if self.in_step:
            refuse_to_wait(name, args, kwargs)
            check_layout(name, args, in_backward=self.hides_gpu)
        launches = not (func.is_view or name in WITHOUT_LAUNCH)
        self.log.append((name, args, kwargs, launches))
        if name == "aten._fused_sgd_":                        # torch has no fake of it; in place
            return None
        with self.fake:
            return func(*args, **kwargs)

    @contextlib.contextmanager
    def hidden_gpu(self):
        """The backward pass and DistributedDataParallel, in C++, ask the driver for streams and
        clocks of tensors on a GPU: here they take them for tensors on torch's "meta" device."""
        self.hides_gpu = True
        try:
            yield
        finally:
            self.hides_gpu = False


def on_gpu(leaf):
    if isinstance(leaf, torch.Tensor):
        return isinstance(leaf, FakeTensor) and leaf.fake_device.type == "cuda"
    return isinstance(leaf, torch.device) and leaf.type == "cuda"


def refuse_to_wait(name, args, kwargs):
    """Raise Waits, in the line of the program that is to blame."""
    if name in READS:
        raise Waits(f"{name} needs values of the GPU on the host")
    if name in COPIES:
        source, to_gpu, non_blocking = copy_of(name, args, kwargs)
        if not to_gpu:
            raise Waits(f"{name}: the host waits for a copy of {tuple(source.shape)}")
        if not on_gpu(source) and not non_blocking:
            raise Waits(f"{name} of {tuple(source.shape)} to the GPU without non_blocking")
        return
    if name in INDEXING:
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                raise Waits(f"{name} with a mask: the host waits for the number of rows")
    for leaf in tree_leaves((args, kwargs)):
        # A single number travels with the launch, an array is copied first.
        if isinstance(leaf, torch.Tensor) and not on_gpu(leaf) and leaf.ndim > 0:
            raise Waits(f"{name} with an array {tuple(leaf.shape)} on the host")


def copy_of(name, args, kwargs):
    """-> the source, whether the GPU is the target, and whether the host goes on at once."""
    if name == "aten.copy_":
        target, source, *rest = args
        return source, on_gpu(target), kwargs.get("non_blocking", bool(rest and rest[0]))
    source, target = args[0], kwargs.get("device")
    to_gpu = on_gpu(source) if target is None else on_gpu(target)
    return source, to_gpu, kwargs.get("non_blocking", False)


def check_layout(name, args, in_backward):
    """The networks stay channels_last, and so do the gradients: where one has other strides than
    its parameter, autograd or DistributedDataParallel copies it into them."""
    if name == "aten.convolution" and args[0].dtype == torch.bfloat16:
        assert args[0].is_contiguous(memory_format=torch.channels_last), tuple(args[0].shape)
    if name == "aten.copy_" and in_backward:
        assert strides(args[0]) == strides(args[1]), f"gradient of {tuple(args[0].shape)}"


def strides(tensor):
    """Without dimensions of size 1, whose strides mean nothing."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]


# ------------------------------------------------- the program under the trace

def prepare_torch():
    """Let torch take GPU tensors without a driver, as long as they are fakes."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""         # the same where there is a GPU

    class NoHooks(backend_registration._DummyPrivateUse1Hook):
        def is_available(self):
            return False

    class NoModule(backend_registration._DummyBackendModule):
        def is_available(self):
            return False

    # With another accelerator registered, the backward pass looks for the streams of that one.
    backend_registration._setup_privateuseone_for_python_backend("nowhere", NoModule(), NoHooks())
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)       # torch.tensor(..., device=GPU): a copy
    torch.cuda._lazy_init = lambda: None            # looks for a driver
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch._C._select_conv_backend = partial(select_conv_backend, torch._C._select_conv_backend)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False      # or autocast is off


def select_conv_backend(select, input, weight, **options):
    """torch asks the driver whether cuDNN takes bf16, as on every GPU of the last years; without
    one it would change the layout after each convolution. It need not ask for float16."""
    return select(input.half(), weight.half(), **options)


def trace_steps(argv, world):
    """Run pretrain.pretrain for some steps -> the operations of the last, as in Trace.log."""
    steps = 1 if world > 1 else 2          # a second, in case it does what the first does not
    args = pretrain.read_args(argv)
    trace = Trace()
    dataset = data.draw_shapes(max(512, steps * args.batch_size), seed=0)
    data.load_dataset = lambda *_: dataset
    pretrain.start_processes = lambda: (0, world)
    data.own_device = lambda: GPU
    pretrain.report_dry_run = lambda *_: None               # the speed of nothing

    class FewBatches(pretrain.Batches):
        def __init__(self, loader, device, *_):
            super().__init__(itertools.islice(loader, steps), device)

        def __iter__(self):
            for batch in super().__iter__():
                trace.start_step()
                yield batch

    backward = torch.Tensor.backward

    def hidden_backward(loss):
        with trace.hidden_gpu():
            backward(loss)

    pretrain.Batches = FewBatches
    torch.Tensor.backward = hidden_backward
    if world > 1:
        fake_processes(trace, world)
    register_optimizer_step_pre_hook(check_gradients)
    # The trace sees its own thread only: no thread of their own for a GPU's gradients.
    with trace, torch.autograd.set_multithreading_enabled(False):
        check_that_it_notices(trace)
        pretrain.pretrain(args)
    return trace.log


def fake_processes(trace, world):
    """Process 0 of `world`, in DistributedDataParallel; the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    # What is switched off reads numbers of the GPU: the weights at the start, the order of the
    # buckets after the first step, clocks at some steps.
    pretrain.DistributedDataParallel = partial(pretrain.DistributedDataParallel, init_sync=False)
    torch._C._distributed_c10d.Reducer._rebuild_buckets = lambda _: False
    torch._C._distributed_c10d.Logger.set_runtime_stats_and_log = lambda _: None
    distribute = pretrain.distribute

    def reduce(_, bucket):
        """What the class does itself; but it wants a result, and a fake group gives none."""
        dist.all_reduce(bucket.buffer())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def hidden_distribute(encoder, device):
        with trace.hidden_gpu():
            distributed = distribute(encoder, device)
        distributed.register_comm_hook(None, reduce)
        return distributed

    pretrain.distribute = hidden_distribute


def check_gradients(optimizer, *_):
    """Every parameter has a gradient on the GPU, laid out as the parameter is."""
    for parameter in optimizer.param_groups[0]["params"]:
        assert on_gpu(parameter) and on_gpu(parameter.grad)
        assert parameter.grad.dtype == parameter.dtype
        assert strides(parameter.grad) == strides(parameter), parameter.shape


def main(world, *argv):
    warnings.simplefilter("ignore")        # of a GPU that is missing
    prepare_torch()
    log = trace_steps([*SETTINGS, *argv], int(world))
    names = {name for name, *_ in log}
    assert {"aten.convolution_backward", "aten._fused_sgd_"} <= names       # a step was seen
    assert ("c10d.allreduce_" in names) == (int(world) > 1)
    report(log)


def report(log):
    """Print what a step launches, copies and gathers."""
    launched = Counter(name for name, _, _, launches in log if launches)
    print(f"a step: {len(log)} operations on the GPU, {launched.total()} of them launch something")
    for name, count in launched.most_common(12):
        print(f"{count:7d} {name}")
    copied = [args[0] for name, args, *_ in log if name in COPIES and not on_gpu(args[0])]
    size = sum(source.nbytes for source in copied)
    print(f"{len(copied)} copies to the GPU, {size:,} bytes, besides crops and index; none waits")
    for name, args, *_ in log:
        if name.startswith("c10d"):
            shapes = [tuple(leaf.shape) for leaf in tree_leaves(args) if on_gpu(leaf)]
            print(f"{name} {' from '.join(map(str, shapes))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
