"""Models that live: loaded again, wrapped, compiled, under other names, and refreshed where they cache something."""

import copy
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import birkhoff
from birkhoff.kernels.compressed_linear import CompressedLinear
from birkhoff.kernels.hyperlinear import HyperLinear
from birkhoff.kernels.hyperlinear_int8 import Int8HyperLinear
from birkhoff.kernels.hyperlinear_packed import PackedHyperLinear
from birkhoff.pipeline.errors import IntegrityError, ModelMismatchError
from birkhoff.pipeline.load import decode
from birkhoff.pipeline.registry.documents import blob_key
from birkhoff.pipeline.registry.versions import resolve
from birkhoff.pipeline.store.base import Store
from tests.pipeline.publishing import publish_tensors


@pytest.fixture(autouse=True)
def home(tmp_path: object, monkeypatch: pytest.MonkeyPatch, directory_store: Store) -> Store:
    monkeypatch.setenv("BIRKHOFF_HOME", str(tmp_path) + "/home")
    monkeypatch.setenv("BIRKHOFF_STORE", directory_store.url)
    torch.manual_seed(0)
    return directory_store


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(96, 96), nn.LayerNorm(96), nn.Linear(96, 64))


def agrees(model: nn.Module, reference: str, names: Callable[[str], str] = lambda name: name) -> bool:
    """Whether a model, which holds HyperLinear where it can, computes as the plain one of an artifact's tensors."""
    plain = net()
    plain.load_state_dict({names(name): tensor for name, tensor in birkhoff.load_state_dict(reference).items()})
    x = torch.randn(3, 96)
    return torch.allclose(model(x), plain(x), atol=1e-5)


def versions(store: Store) -> None:
    """Two versions of a net as `net@v1` and `net@v2`."""
    for _ in range(2):
        publish_tensors(store, "net", net().state_dict(), shard_weights=1)


# Names and values of single artifacts


def test_tensors_that_fall_back_are_loaded(home: Store) -> None:
    state = {"a.weight": torch.randn(64, 64), "lora_B.weight": torch.zeros(64, 64)}
    publish_tensors(home, "lora", state)
    run = resolve(home, "lora").manifest.shards
    got = birkhoff.load_state_dict("lora")
    assert list(got) == list(state)
    assert torch.equal(got["lora_B.weight"], state["lora_B.weight"])
    assert len(run) == 1


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.model."])
@pytest.mark.parametrize("strict", [True, False])
def test_prefixes_of_wrappers_are_left_out(home: Store, prefix: str, strict: bool) -> None:
    publish_tensors(home, "net", {prefix + name: tensor for name, tensor in net().state_dict().items()})
    model = net()
    assert birkhoff.load_into(model, "net", strict=strict) == ["0", "2"]
    assert agrees(model, "net", lambda name: name.removeprefix(prefix))


def test_a_prefix_that_is_a_name_of_the_model_stays(home: Store) -> None:
    holder = nn.ModuleDict({"model": net(), "module": nn.Linear(4, 4)})
    publish_tensors(home, "net", holder.state_dict())
    assert birkhoff.load_into(nn.ModuleDict({"model": net(), "module": nn.Linear(4, 4)}), "net") == [
        "model.0",
        "model.2",
    ]


def test_two_tensors_for_one_place_are_refused(home: Store) -> None:
    state = net().state_dict()
    publish_tensors(home, "net", {**state, **{f"module.{name}": tensor for name, tensor in state.items()}})
    with pytest.raises(ModelMismatchError, match=r"are both .* of the model: store one of them"):
        birkhoff.load_into(net(), "net", strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_that_fits_is_refused_with_the_remedy(home: Store, strict: bool) -> None:
    publish_tensors(home, "net", net().state_dict())
    holder = nn.ModuleDict({"encoder": net()})
    before = copy.deepcopy(holder.state_dict())
    with pytest.raises(ModelMismatchError, match=r"5 missing|6 missing") as caught:
        birkhoff.load_into(holder, "net", strict=strict)
    assert "load into model.encoder" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in holder.state_dict().items())
    assert birkhoff.load_into(holder.encoder, "net") == ["0", "2"]
    publish_tensors(home, "held", {f"encoder.{name}": tensor for name, tensor in net().state_dict().items()})
    with pytest.raises(ModelMismatchError) as caught:
        birkhoff.load_into(net(), "held", strict=strict)
    assert 'load into torch.nn.ModuleDict({"encoder": model})' in str(caught.value)
    assert birkhoff.load_into(nn.ModuleDict({"encoder": net()}), "held") == ["encoder.0", "encoder.2"]


# Wrapped models


@pytest.mark.parametrize("times", [1, 2])
def test_a_compiled_model(home: Store, times: int) -> None:
    versions(home)
    torch._dynamo.reset()
    model = torch.compile(net(), backend="eager")
    model(torch.randn(3, 96))
    for version in range(1, times + 1):
        assert birkhoff.load_into(model, f"net@v{version}") == ["0", "2"]  # type: ignore[arg-type]
        with torch.no_grad():
            assert agrees(model, f"net@v{version}")  # type: ignore[arg-type]
        assert agrees(model, f"net@v{version}")  # type: ignore[arg-type]


def test_models_in_other_wrappers(home: Store) -> None:
    versions(home)
    whole = nn.DataParallel(net())
    inner = net()
    inner[0] = torch.compile(inner[0], backend="eager")
    checkpointed = net()
    checkpointed[2] = checkpoint_wrapper(checkpointed[2])
    for model in (whole, inner, checkpointed):
        for version in ("net@v1", "net@v2"):
            assert birkhoff.load_into(model, version) == ["0", "2"]
            assert agrees(model, version)


def test_ddp_is_loaded_before_it_is_wrapped_and_again_after(home: Store, tmp_path: object) -> None:
    import torch.distributed as dist

    versions(home)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises(ModelMismatchError, match="load into the plain model, then wrap it"):
            birkhoff.load_into(nn.parallel.DistributedDataParallel(net()), "net@v1")
        with pytest.raises(ModelMismatchError, match="sharded by FSDP: load into the plain model, then wrap it"):
            birkhoff.load_into(torch.distributed.fsdp.fully_shard(net()), "net@v1")
        model = net()
        birkhoff.load_into(model, "net@v1")
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert birkhoff.load_into(wrapped, "net@v2") == ["0", "2"]
        assert agrees(wrapped, "net@v2")
    finally:
        dist.destroy_process_group()


# Again


@pytest.mark.parametrize("options", [{}, {"memory": "packed12"}, {"compute": "int8"}], ids=str)
def test_a_live_model_takes_the_next_version_in_place(home: Store, options: dict[str, Any]) -> None:
    versions(home)
    model = net().eval()
    birkhoff.load_into(model, "net@v1", **options)
    layers, biases = [model[0], model[2]], [model[0].bias, model[2].bias]
    x = torch.randn(3, 96)
    first = model(x)
    assert birkhoff.load_into(model, "net@v2", **options) == ["0", "2"]
    assert [model[0], model[2]] == layers
    assert [id(model[0].bias), id(model[2].bias)] == [id(bias) for bias in biases]
    fresh = net().eval()
    birkhoff.load_into(fresh, "net@v2", **options)
    assert torch.equal(model(x), fresh(x))
    assert not torch.equal(model(x), first)
    birkhoff.load_into(model, "net@v1", **options)
    assert torch.equal(model(x), first)


def test_layers_change_their_form_and_type_from_load_to_load(home: Store) -> None:
    versions(home)
    state = net().state_dict()
    state["0.weight"] = torch.zeros(96, 96)  # falls back: no code, so no compressed layer
    publish_tensors(home, "net", state)
    model = net()
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("called"))
    kinds = []
    for version, options in (
        ("v1", {}),
        ("v2", {"memory": "packed12"}),
        ("v1", {"memory": "packed10"}),
        ("v1", {"compute": "int8"}),
        ("v3", {"dtype": torch.bfloat16}),
        ("v2", {"dtype": torch.float32}),
    ):
        birkhoff.load_into(model, f"net@{version}", **options)  # type: ignore[arg-type]
        kinds.append(type(model[0]))
        dtype = options.get("dtype", torch.float32)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        model(torch.randn(2, 96, dtype=dtype))
    assert kinds == [HyperLinear, PackedHyperLinear, PackedHyperLinear, Int8HyperLinear, nn.Linear, HyperLinear]
    assert agrees(model, "net@v2")
    assert len(seen) == 7


def test_a_second_load_that_fails_leaves_the_first_weights(home: Store) -> None:
    versions(home)
    model = net()
    birkhoff.load_into(model, "net@v1")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    damaged = resolve(home, "net@v2").manifest.shards[-1]
    body = bytearray(home.get(blob_key(damaged.blob)))
    body[-1] ^= 1
    home.put(blob_key(damaged.blob), bytes(body))
    publish_tensors(home, "narrow", nn.Sequential(nn.Linear(96, 96), nn.LayerNorm(96), nn.Linear(96, 32)).state_dict())
    for reference, error in (("net@v2", IntegrityError), ("narrow", ModelMismatchError)):
        with pytest.raises(error):
            birkhoff.load_into(model, reference)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert agrees(model, "net@v1")


def test_calls_from_other_threads_meet_one_code_or_the_other(home: Store) -> None:
    for _ in range(2):
        publish_tensors(home, "layer", {"0.weight": torch.randn(256, 256)})
    model = nn.Sequential(nn.Linear(256, 256, bias=False)).requires_grad_(False)
    birkhoff.load_into(model, "layer@v1")
    x, expected, wrong, over = torch.randn(2, 256), [], [], threading.Event()
    for version in ("layer@v1", "layer@v2"):
        birkhoff.load_into(model, version)
        expected.append(model(x))

    def serve() -> None:
        while not over.is_set():
            y = model(x)
            wrong.extend([y] if not any(torch.equal(y, each) for each in expected) else [])

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(10):
        birkhoff.load_into(model, f"layer@v{1 + turn % 2}")
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_shared_modules_and_weights_tied_between_kinds(home: Store) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(96, 96)
            self.again = self.first
            self.table = nn.Embedding(40, 96)
            self.head = nn.Linear(96, 40, bias=False)
            self.head.weight = self.table.weight

    publish_tensors(
        home, "shared", {name: t for name, t in Shared().state_dict().items() if name[:5] in ("first", "head.")}
    )
    model = Shared()
    for _ in range(2):
        assert birkhoff.load_into(model, "shared") == ["first"]
        assert isinstance(model.first, HyperLinear)
        assert model.again is model.first
        assert model.head.weight is model.table.weight
        assert torch.equal(model.table.weight, birkhoff.load_state_dict("shared")["head.weight"])


# What modules derive from their parameters


class Cached(nn.Module):
    """Derives at `eval()` what it computes with, as TinyViT's attention does."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.biases = nn.Parameter(torch.randn(3, 3))
        self.linear = nn.Linear(64, 64)
        self.drop = nn.Dropout()
        self.inner = inner or nn.Identity()

    @torch.no_grad()
    def train(self, mode: bool = True) -> "Cached":
        super().train(mode)
        if mode and hasattr(self, "ab"):
            del self.ab
        elif not mode:
            self.ab = self.biases[:, [2, 0, 1]]
            self.folded = self.linear.weight.T.clone()
        return self

    def is_fresh(self) -> bool:
        """Whether what is cached is that of the parameters; in training nothing is."""
        if self.training:
            return not hasattr(self, "ab")
        return torch.equal(self.ab, self.biases[:, [2, 0, 1]]) and torch.equal(self.folded, self.linear.weight.T)


class Evaluating(nn.Module):
    """Overrides `eval` instead."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))

    def eval(self) -> "Evaluating":
        super().eval()
        self.cached = self.scale.detach().exp()
        return self


class Hooked(nn.Module):
    """Refreshes in a hook of `load_state_dict`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())
        self.refresh()

    def refresh(self) -> None:
        self.cached = self.scale.detach().exp()


def caching() -> nn.Module:
    """Nested: one that caches in one that caches, in containers that do not, beside others."""
    blocks = nn.Sequential(Cached(nn.Sequential(Cached())), Cached())
    return nn.ModuleDict({"blocks": blocks, "evaluating": Evaluating(), "hooked": Hooked(), "norm": nn.BatchNorm1d(4)})


MODES: dict[str, Callable[[nn.Module], object]] = {
    "eval": lambda model: model.eval(),
    "train": lambda model: model.train(),
    "an inner one evaluates": lambda model: [model.train(), model.blocks[0].inner[0].eval(), model.norm.eval()],  # type: ignore[operator,union-attr]
    "an inner one trains": lambda model: [model.eval(), model.blocks[0].inner[0].train(), model.blocks[1].drop.train()],  # type: ignore[operator,union-attr]
}


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("times", [1, 2])
def test_what_is_derived_at_eval_is_derived_again(home: Store, modes: str, times: int) -> None:
    for _ in range(2):
        publish_tensors(home, "caching", caching().state_dict())
    model = caching()
    MODES[modes](model)
    model["evaluating"].eval()  # type: ignore[index]
    before = {name: module.training for name, module in model.named_modules()}
    for version in range(1, times + 1):
        layers = birkhoff.load_into(model, f"caching@v{version}")
        assert len(layers) == 3
    after = {name: module.training for name, module in model.named_modules()}
    assert after == before
    for module in model.modules():
        assert not isinstance(module, Cached) or module.is_fresh()
        assert not isinstance(module, Cached) or isinstance(module.linear, CompressedLinear)
        assert not isinstance(module, Evaluating | Hooked) or torch.equal(module.cached, module.scale.detach().exp())


def test_a_module_under_two_parents_keeps_its_mode(home: Store) -> None:
    shared = Cached()
    model = nn.ModuleDict({"a": Cached(shared), "b": Cached(shared)})
    publish_tensors(home, "two", model.state_dict())
    model.eval()
    shared.train()
    birkhoff.load_into(model, "two")
    assert [shared.training, model["a"].training, model["b"].training] == [True, False, False]
    assert all(module.is_fresh() for module in (shared, model["a"], model["b"]))  # type: ignore[operator]


# Threads


def test_concurrent_loads_leave_torchs_threads_alone(home: Store) -> None:
    publish_tensors(home, "net", {f"{i}.weight": torch.randn(96, 96) for i in range(8)}, shard_weights=1)
    before, seen, over = torch.get_num_threads(), set[int](), threading.Event()
    torch.set_num_threads(3)

    def look() -> None:
        while not over.is_set():
            one = threading.Thread(target=lambda: seen.add(torch.get_num_threads()))
            one.start()
            one.join()

    def load() -> None:
        for _ in range(3):
            birkhoff.load_state_dict("net")

    try:
        watcher = threading.Thread(target=look)
        loaders = [threading.Thread(target=load) for _ in range(4)]
        for thread in (watcher, *loaders):
            thread.start()
        for thread in loaders:
            thread.join()
        over.set()
        watcher.join()
        assert torch.get_num_threads() == 3
        assert seen == {3}
        with ThreadPoolExecutor(1, initializer=decode._one_thread_inside) as pool:
            assert pool.submit(torch.get_num_threads).result() == 1  # a thread that decodes has no others
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_child_loads_after_a_fork(home: Store) -> None:
    """Compared without torch, whose threads do not survive the fork."""
    publish_tensors(home, "net", {f"{i}.weight": torch.randn(96, 96) for i in range(8)}, shard_weights=1)

    def load() -> dict[str, bytes]:
        return {name: tensor.numpy().tobytes() for name, tensor in birkhoff.load_state_dict("net").items()}

    expected = load()
    child = os.fork()
    if child == 0:
        code = 2
        try:
            code = int(load() != expected)
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_no_warning_of_a_plain_load(home: Store) -> None:
    versions(home)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        birkhoff.load_into(net(), "net@v1")
