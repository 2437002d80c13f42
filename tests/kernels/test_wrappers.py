"""The layers inside what other programs wrap models in: DDP, FSDP, peft."""

import copy
import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from birkhoff.codec import lattice, packed
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.hyperlinear_packed import PackedHyperLinear
from tests.patience import PATIENT_SECONDS

CPU = torch.device("cpu")


def models(form: str = "uint16", *, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    """A model with a compressed layer, and the same model with the `nn.Linear` of its decoded weight."""
    weight = torch.randn(24, 40) * 0.02
    weight[1, 3] = 5.0  # an escape
    code = lattice.quantise(weight, 0.002)
    held = torch.randn(24) if bias else None
    layer: nn.Module = (
        HyperLinear.from_lattice(code, held)
        if form == "uint16"
        else PackedHyperLinear.from_packed(packed.pack(code, 12), held)
    )
    linear = nn.Linear(40, 24, bias)
    linear.weight = nn.Parameter(layer.dense_weight(), requires_grad=False)
    linear.bias = None if held is None else nn.Parameter(held.clone())
    head = nn.Linear(24, 3)
    return nn.Sequential(layer, head), nn.Sequential(linear, copy.deepcopy(head))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one over gloo."""
    dist.init_process_group("gloo", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp(module: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel  # brings the compiler into each process that collects

    return FullyShardedDataParallel(module, device_id=CPU, **options)


def fsdp2(module: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    wrapped: nn.Module = fully_shard(module)
    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP1": fsdp,
    "FSDP1 with the original parameters": lambda module: fsdp(module, use_orig_params=True),
    "FSDP1 layer by layer": lambda module: fsdp(nn.Sequential(fsdp(module[0]), module[1])),  # type: ignore[index]
    "FSDP2": fsdp2,
}


@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore:When using ``NO_SHARD``", "ignore::FutureWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("form", ["uint16", "packed12"])
def test_a_wrapped_model_computes_and_trains_as_the_dense_one(group: None, form: str, wrapper: str) -> None:
    if wrapper.startswith("FSDP1"):  # it wants all parameters of a unit to train, or none
        mine, theirs = (model.requires_grad_(True) for model in models(form))
        theirs[0].weight = nn.Parameter(theirs[0].weight.detach())  # type: ignore[index,union-attr,operator]
    else:
        mine, theirs = models(form)
    mine, theirs = (WRAPPERS[wrapper](model) for model in (mine, theirs))
    optimisers = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1) for model in (mine, theirs)]
    x = torch.randn(5, 40)
    for _ in range(2):
        losses = []
        for model, optimiser in zip((mine, theirs), optimisers, strict=True):
            loss = model(x).square().sum()
            loss.backward()
            losses.append(loss.detach())
            if wrapper.startswith("FSDP1"):
                continue  # the dense layer's weight would train along
            optimiser.step()
            optimiser.zero_grad()
        torch.testing.assert_close(*losses)


@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore::FutureWarning")
def test_mixed_precision_of_fsdp_leaves_the_code_alone(group: None) -> None:
    from torch.distributed.fsdp import MixedPrecision

    model, _ = models()
    x, layer = torch.randn(5, 40), model[0]  # type: ignore[index]
    before = copy.deepcopy(layer)
    half = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    wrapped = fsdp(model, mixed_precision=half)
    with torch.no_grad():
        assert wrapped(x).dtype == torch.bfloat16
    for name in ("theta", "step", "escape_index", "escape_value"):
        assert torch.equal(getattr(layer, name), getattr(before, name)), name  # type: ignore[arg-type]


RANKS = """
    import sys, torch, torch.distributed as dist
    from torch import nn
    from birkhoff.codec import lattice
    from birkhoff.kernels.hyperlinear import HyperLinear
    rank, where = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    torch.manual_seed(rank)  # each rank begins with weights of its own
    layer = HyperLinear.from_lattice(lattice.quantise(torch.randn(6, 10), 0.05), torch.randn(6))
    model = nn.parallel.DistributedDataParallel(layer)
    y = model(torch.ones(1, 10)).detach()
    found = [torch.empty_like(y) for _ in range(2)]
    dist.all_gather(found, y)
    print(torch.equal(*found), flush=True)
    dist.destroy_process_group()
"""


def test_every_rank_gets_the_code_of_the_first(tmp_path: Path) -> None:
    where = (tmp_path / "rendezvous").as_uri()
    program = [sys.executable, "-c", textwrap.dedent(RANKS)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*program, str(rank), where], **pipes) for rank in range(2)]
    said = [process.communicate(timeout=PATIENT_SECONDS) for process in ranks]
    # Not by return codes: at the end of a process gloo's threads sometimes abort it.
    assert [output for output, _ in said] == ["True\n", "True\n"], said


def test_state_dicts_from_before_load(tmp_path: Path) -> None:
    """Layers once held theta as uint16, step and escape values as float32, under these names."""
    layer = models()[0][0]  # type: ignore[index]
    assert isinstance(layer, HyperLinear)
    names = ("theta", "step", "escape_index", "escape_value", "bias")
    old = {name: getattr(layer, name).detach() for name in names}
    assert (old["theta"].dtype, old["step"].dtype) == (torch.uint16, torch.float32)
    torch.save(old, tmp_path / "old.pth")
    for assign in (False, True):
        with torch.device("meta" if assign else "cpu"):
            empty = HyperLinear(40, 24)
        empty.load_state_dict(torch.load(tmp_path / "old.pth"), assign=assign)
        x = torch.randn(2, 40)
        assert torch.equal(empty(x), layer(x))
        assert all(name in layer.state_dict() for name in empty.state_dict())


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("form", ["uint16", "packed12"])
def test_lora_of_peft_trains_around_the_layers(form: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    import birkhoff.peft

    mine, theirs = models(form)
    config = LoraConfig(target_modules=["0"], r=4, init_lora_weights=True)
    adapted = [get_peft_model(model, birkhoff.peft.register(copy.deepcopy(config))) for model in (mine, theirs)]
    for model in adapted:
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
    x = torch.randn(5, 40)
    losses = [model(x).square().sum() for model in adapted]
    torch.testing.assert_close(*losses)
    gradients = [
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        for model, loss in zip(adapted, losses, strict=True)
    ]
    torch.testing.assert_close(*gradients)
    with pytest.raises(NotImplementedError, match="compressed"):
        adapted[0].merge_adapter()
    adapted[0].save_pretrained(tmp_path / "adapter")
    fresh = adapted[0].unload()
    assert isinstance(fresh[0], HyperLinear | PackedHyperLinear)
    saved = birkhoff.peft.register(LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter", config=saved)
    torch.testing.assert_close(again(x), adapted[1](x))
