"""``collogue.parallelize``: a Hugging Face decoder, cut by rank, with every layer boundary in one fused call."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collogue.calls.call import check_no_grad
from collogue.communicator import Communicator
from collogue.contract.calibration import Calibration
from collogue.contract.quant import MXFP4, MXFP8, Quant
from collogue.contract.spec import Output
from collogue.contract.weight import QuantizedWeight
from collogue.errors import ArgumentError, CollogueError
from collogue.group import Group, TorchGroup, as_group
from collogue.planning.topology import Order, Transport
from collogue.pytorch.boundaries import Boundaries, FewerHeads, GatedMLP, WholeNorm, partial_of
from collogue.pytorch.checkpoints import QuantizedLinear, cache_of, is_quantized
from collogue.pytorch.cut import Checkpoint, Cut, OnFirst, check_first, no_checkpoint, save_pretrained
from collogue.pytorch.decoder import Decoder, LinearPlan, TensorPlan, plan
from collogue.pytorch.generation import generate
from collogue.pytorch.nn import ColumnParallelLinear, FusedRMSNorm, RowParallelLinear
from collogue.pytorch.origin import dequantized
from collogue.pytorch.plain import home
from collogue.pytorch.products import has_product
from collogue.pytorch.published import QuantizedCheckpoint
from collogue.pytorch.recipes import Recipe
from collogue.pytorch.scaled import Handover
from collogue.pytorch.schemes import CACHE_HOOKS, CACHE_SCALES
from collogue.pytorch.untouched import REFUSED, Code, Kept, Untouched, check_owner, check_use, refuse

_log = logging.getLogger("collogue")


def parallelize(
    model: Any,
    group: Any,
    *,
    max_tokens: int = 4096,
    device: torch.device | str | None = None,
    timeout: float = 30.0,
    fuse: bool = True,
    quant: str | None = None,
    calibration: Calibration | None = None,
    keep_packed: bool = False,
    wire: Quant | None = None,
    transport: Transport | None = None,
    order: Order = "islands",
) -> Any:
    """Cut a transformers decoder among the ranks of ``group``, and end attention and MLP of every layer in one fused call each.

    ``y = sum of partials + residual; n = norm(y)``, where ``norm`` is the layer's next one, that of the next layer, or the last; where
    a model norms its branches, ``y = branch_norm(sum of partials) + residual``.

    Args:
        model: ``AutoModelForCausalLM`` of type Llama, Mistral, Qwen2, Qwen3, SmolLM (Llama), SmolLM3, Granite, Phi-3, Gemma, Gemma 2,
            Gemma 3 (text), GLM-4, OLMo 2, Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2, DeepSeek-V3 or gpt-oss, its base model, or
            either with peft's LoRA; the same weights on every rank. Changed in place, for inference: no gradients. Every rank has a
            part of every expert, and the whole router.
        group: the tensor-parallel process group. It divides the heads; key-value heads it divides, or is a multiple of (then
            neighboring ranks hold the same ones).
        max_tokens: most tokens (batch times sequence) of one forward pass.
        device: where this rank's part goes; default as for :class:`collogue.Communicator`.
        timeout: of the communicator, in seconds.
        fuse: ``False`` leaves norms and additions as they are and ends row-parallel layers in a functional all-reduce: a baseline,
            or something for :data:`collogue.compile`. Needs a ``torch.distributed`` group.
        quant: quantize the linear layers inside decoder layers: ``"fp8_per_token"``, ``"fp8_block"``, ``"fp8_static"``, ``"mxfp8"`` or
            ``"nvfp4"`` (:class:`collogue.pytorch.recipes.Recipe`). Default: as the model is; a quantized checkpoint (fine-grained FP8,
            compressed-tensors, ModelOpt, gpt-oss's MXFP4) says it itself. Experts and routers stay as they are.
        calibration: the inputs' amax by layer, for ``"fp8_static"`` and ``"nvfp4"``.
        keep_packed: keep quantized weights that the device has no product for, and decode them in every call. Default: they are
            decoded once, here, to the model's dtype and take its memory. Quantized weights of experts always are, and their inputs are
            not quantized; lines of the logger ``collogue`` (INFO) say what either takes.
        wire: as for :class:`collogue.Communicator`: a format in which terms travel.
        transport: as for :class:`collogue.Communicator`: what moves bytes between the ranks.
        order: as for :class:`collogue.Communicator`: of sums over several hosts.
    Returns:
        ``model``; its communicator is ``model.comm``, which stays open as long as the model is used. ``state_dict()`` and
        ``save_pretrained`` raise: :func:`collogue.full_state_dict` gives the whole. ``load_state_dict`` takes a whole checkpoint and
        cuts it, without communication. ``generate`` returns on every rank what rank 0 chooses.
    Order and rounding:
        Sums and norms follow docs/contract.md, so logits differ from the unsharded model's by roundings, and are the same
        on every rank.
    Synchronization:
        Collective; so is every forward pass afterwards.
    Raises:
        ArgumentError: a model of another type; layers that are wrapped (but for LoRA), quantized, patched or hooked; models that
        differ between ranks. ShapeError: features that do not divide. ScaleError: scales that are none. After these, ``model`` is as it
        was, on every rank. Forward passes raise ArgumentError where modules inside a layer were replaced, patched or hooked since, and
        for ``output_attentions``.
    Examples:
        >>> model = collogue.parallelize(model, group, max_tokens=16)  # a LlamaForCausalLM, say
        >>> list(model(torch.tensor([[1, 2, 3]])).logits.shape) == [1, 3, model.config.vocab_size]
        True
    """
    known = as_group(group, device)
    if not fuse and (wire is not None or transport is not None):
        named = f"wire={wire!r}" if wire is not None else f"transport={transport!r}"
        raise ArgumentError(f"fuse=False with {named}: PyTorch's all-reduce makes the sums", hint="leave it out, or use fuse=True")
    decoder = _agree(model, known, fuse, quant, calibration)
    if not fuse and known.size > 1 and not isinstance(known, TorchGroup):
        raise ArgumentError(f"fuse=False with a {type(known).__name__}", hint="pass a torch.distributed process group")
    config, dtype = decoder.base.config, decoder.base.dtype
    asked = {"max_tokens": max_tokens, "hidden_size": config.hidden_size, "dtype": dtype, "device": device, "timeout": timeout}
    comm = Communicator(group, **asked, wire=wire, transport=transport, order=order)
    try:
        with _undone_by_errors(model) as undo:
            _apply(decoder, comm, fuse, keep_packed, undo)
            _say_linears(decoder, comm.device)
            _say_experts(decoder, comm.world_size, quant)
            model.comm = comm
            return model.to(comm.device).requires_grad_(False).eval()
    except BaseException:
        comm.close(collective=False)
        raise


def _agree(model: Any, group: Group, fuse: bool, quant: str | None, calibration: Calibration | None) -> Decoder:
    """The plan for ``model``. An error of one rank is raised on all, before anything is changed. Collective."""
    decoder, problem, told = None, None, None
    try:
        decoder = plan(model, group.size, fuse=fuse, recipe=Recipe.of(quant, calibration))
    except Exception as error:  # the others wait for this rank
        problem = error
        told = (
            (error.message, error.hint) if isinstance(error, CollogueError) else (f"{type(error).__name__}: {error}", "see its own error")
        )
    every = group.all_gather_object((told, decoder and decoder.summary))
    if problem is not None:
        raise problem
    assert decoder is not None
    for rank, (theirs, summary) in enumerate(every):
        if theirs is not None:
            raise ArgumentError(f"rank {rank}: {theirs[0]}", hint=theirs[1])
        first = every[0][1]
        for name in sorted({*first, *summary}, key=str) if summary != first else ():
            if summary.get(name) != first.get(name):
                here, there = (f"{each.get(name, 'missing')}"[:200] for each in (first, summary))
                raise ArgumentError(
                    f"ranks 0 and {rank} have different models: {name} is {here} on rank 0, {there} on rank {rank}",
                    hint="load the same checkpoint on every rank; seed random numbers alike where weights are random",
                )
    return decoder


class _Undo:
    """What was where before it was changed."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, str, Any]] = []
        self.hooks: list[Any] = []
        self.dropped: list[tuple[dict[int, Any], int, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """``owner.name = value``, a module or an instance's own attribute."""
        self.steps.append((owner, name, owner._modules.get(name, vars(owner).get(name))))
        setattr(owner, name, value)

    def drop(self, hooks: dict[int, Any], package: str) -> None:
        """Take out the hooks that this package has put in."""
        for key in [key for key, hook in hooks.items() if home(hook).startswith(package)]:
            self.dropped.append((hooks, key, hooks.pop(key)))

    def run(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for hooks, key, hook in self.dropped:
            hooks[key] = hook
        for owner, name, before in reversed(self.steps):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


@contextmanager
def _undone_by_errors(model: nn.Module) -> Iterator[_Undo]:
    """After any error, of memory or an interrupt too, the caller holds the unsharded model again."""
    undo, training = _Undo(), [module for module in model.modules() if module.training]
    places = [(tensor, tensor.data, tensor.requires_grad) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield undo
    except BaseException:
        undo.run()
        for tensor, data, requires_grad in places:
            tensor.data = data
            tensor.requires_grad_(requires_grad)
        for module in training:
            module.training = True
        vars(model).pop("comm", None)
        raise


def _apply(decoder: Decoder, comm: Communicator, fuse: bool, keep_packed: bool, undo: _Undo) -> None:
    base, form, layers = decoder.base, decoder.form, list(decoder.base.layers)
    code = Code([*layers, base.norm])
    # compressed-tensors decompresses a model in its first forward pass: its layers are not there any more.
    undo.drop(decoder.model._forward_pre_hooks, "compressed_tensors.")
    for held in decoder.tensors:
        _cut_tensors(held, base, comm, undo)
    for layer in layers:
        undo.drop(layer.self_attn._forward_pre_hooks, CACHE_HOOKS)
        _fewer_heads(layer.self_attn, decoder, comm, undo)
    for each in decoder.linears:
        owner, _, name = each.name.rpartition(".")
        # Granite's factor on branches: the layer's own forward pass has it, the fused one leaves it to the matrix product.
        layer = layers[int(each.name.split(".")[1])]
        factor = float(getattr(layer, "residual_multiplier", 1.0)) if fuse and not each.column else 1.0
        summed = not (fuse or each.column or each.name.startswith(tuple(f"{outer}." for outer in decoder.sums)))
        if each.quantized is None:
            _cut(each, base.get_submodule(owner), name, comm, factor, summed, undo)
        else:
            undo.set(base.get_submodule(owner), name, _quantized_part(each, each.quantized, comm, base.dtype, factor, summed, keep_packed))
    for module in dict.fromkeys(base.get_submodule(name) for name in decoder.sums if not fuse):  # layers may share one
        undo.hooks.append(module.register_forward_hook(_summing(comm)))
    if decoder.head is not None:
        _cut_head(decoder, decoder.head, comm, undo)
    if fuse:
        for name, (eps, offset) in decoder.norms.items():
            owner, _, name = name.rpartition(".")
            module = base.get_submodule(owner)
            undo.set(module, name, FusedRMSNorm(getattr(module, name).weight, comm, eps, offset))
        for name, (format, readers) in decoder.inputs.items():
            handover = Handover(format)
            for module in (base.get_submodule(each) for each in (name, *readers)):
                module.handover = handover
        for name, parts in decoder.gated.items():
            mlp = base.get_submodule(name)
            undo.set(mlp, "forward", GatedMLP(mlp, [part.rpartition(".")[2] for part in parts], comm).forward)
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            next_norm = base.norm if following is None else getattr(following, form.attention_in or "", None)
            undo.set(layer, "forward", Boundaries(layer, form, comm, following, next_norm).forward)
    untouched = [
        Untouched(layer, form.called if fuse else layer._modules, _norms_with_codes(decoder, index) if fuse else (), held=fuse)
        for index, layer in enumerate(layers)
    ]
    undo.hooks.append(base.register_load_state_dict_pre_hook(check_first))
    head = [Kept(decoder.model.lm_head, "lm_head")] if decoder.head is not None else []
    heads = None if hasattr(base.config, "kv_lora_rank") else decoder.key_value_heads  # latents are whole on every rank
    check = functools.partial(check_use, [code, *head, *untouched], comm, heads)
    undo.hooks.append(base.register_forward_pre_hook(check, with_kwargs=True))
    if decoder.model is base:
        undo.hooks.append(base.register_forward_pre_hook(check_owner))
    if callable(getattr(decoder.model, "generate", None)):
        undo.set(decoder.model, "generate", functools.partial(generate, decoder.model, comm))
    if callable(getattr(decoder.model, "save_pretrained", None)):
        undo.set(decoder.model, "save_pretrained", functools.partial(save_pretrained, decoder.model))
    for name, (why, instead) in REFUSED.items():
        if hasattr(decoder.model, name) and not (name == "resize_token_embeddings" and decoder.head is None):
            undo.set(decoder.model, name, functools.partial(refuse, name, why, instead))


def _norms_with_codes(decoder: Decoder, index: int) -> list[str]:
    """The norms of one layer that give quantized layers codes."""
    prefix = f"layers.{index}."
    return [name.removeprefix(prefix) for name in decoder.inputs if name.startswith(prefix)]


def _fewer_heads(attention: Any, decoder: Decoder, comm: Communicator, undo: _Undo) -> None:
    """What transformers' attention reads of the number of heads is that of this rank."""
    undo.set(attention, "num_key_value_groups", decoder.heads // decoder.key_value_heads)
    if hasattr(attention, "num_key_value_heads"):  # where q, k and v are one product, its parts are counted by these
        undo.set(attention, "num_key_value_heads", decoder.key_value_heads)
        undo.set(attention, "config", FewerHeads(attention.config, decoder.heads))
    cuts = {each.linear: each.cut for each in decoder.linears}
    for name, of in decoder.form.whole_norms.items() if comm.world_size > 1 else ():
        norm = getattr(attention, name)
        undo.set(norm, "forward", WholeNorm(norm, comm, cuts[getattr(attention, of)]).forward)


def _cut_tensors(each: TensorPlan, base: Any, comm: Communicator, undo: _Undo) -> None:
    """Put a copy of a module that holds parameters itself, with this rank's part of them, in its place."""
    owner, _, name = each.name.rpartition(".")
    if each.around is not None:
        outer, _, last = owner.rpartition(".")
        undo.set(base.get_submodule(outer), last, each.around)
    part: Any = copy.copy(each.module)
    for attribute, value in vars(each.module).items():
        if isinstance(value, dict | set):
            vars(part)[attribute] = value.copy()
        elif attribute in ("intermediate_dim", "intermediate_size"):
            vars(part)[attribute] = value // comm.world_size
    for parameter, cut in each.cuts.items():
        if isinstance(cut, Cut) and parameter in each.quantized:
            whole = each.quantized[parameter]
            mine = whole.decoded_part(cut, comm.rank, comm.world_size, base.dtype, f"{each.name}.{parameter}")
        else:
            mine = cut.part(getattr(part, parameter), comm.rank, comm.world_size)
        setattr(part, parameter, nn.Parameter(mine, False))
    undo.set(
        base.get_submodule(owner),
        name,
        no_checkpoint(part, "quantized experts") if each.quantized else _with_checkpoint(part, comm, each.cuts),
    )


def _has_codes(decoder: Decoder) -> bool:
    return any(is_quantized(each.linear) for each in decoder.linears) or any(each.quantized for each in decoder.tensors)


def _say_linears(decoder: Decoder, device: torch.device) -> None:
    """One line about linear layers whose weights were decoded, and what it costs; one about scales that are not used."""
    plans = [each for each in decoder.linears if each.quantized is not None]
    placed: list[Any] = [decoder.base.get_submodule(each.name) for each in plans]
    taken, packed, labels, dtype = 0.0, 0.0, set(), decoder.base.dtype
    for each, part in zip(plans, placed, strict=True):
        assert each.quantized is not None
        if part.format is None:
            whole = each.quantized.weight
            taken += part.weight.nbytes
            packed += whole.nbytes * part.weight.numel() / (whole.shape[0] * whole.shape[1])
            labels.add(type(whole.format).__name__)
    if labels:
        _log.info(
            f"linear layers of {len(decoder.base.layers)} layers: {', '.join(sorted(labels))} weights are decoded once to {dtype}, "
            f"and take {taken / 2**20:.1f} MiB on this rank in place of {packed / 2**20:.1f} MiB, because {device.type} has no product of "
            "their formats that is used here; keep_packed=True keeps them, and decodes them in every call"
        )
    if not _has_codes(decoder) and (said := dequantized(decoder.base.config)):
        _log.info(f"{said}: weights and inputs are in {dtype}{', but for what quant= quantizes' * bool(plans)}")
    cached = sum(any(hasattr(each.linear, name) for name in CACHE_SCALES) for each in plans)
    if cached:
        _log.info(f"{cached} linear layers have scales for a key-value cache in FP8, which are not used: the cache is not quantized")
    elif cache := cache_of(decoder.base.config):
        _log.info(f"the configuration says that the key-value cache is {cache}, which is not done: the cache is not quantized")


def _say_experts(decoder: Decoder, world_size: int, quant: str | None) -> None:
    """One line about experts in a quantized model: what was done with their weights and inputs, and what it costs."""
    plans = [each for each in decoder.tensors if each.name.endswith("experts")]
    quantized = [whole for each in plans for whole in each.quantized.values()]
    placed = [decoder.base.get_submodule(each.name).parameters(recurse=False) for each in plans]
    mib = sum(parameter.nbytes for parameters in placed for parameter in parameters) / 2**20
    have, dtype = f"experts of {len(plans)} layer{'s' * (len(plans) != 1)}", decoder.base.dtype
    labels = sorted({label for each in plans for label in each.labels})
    if quantized:
        packed = sum(whole.nbytes for whole in quantized) / world_size / 2**20
        given = ", which the checkpoint would quantize to FP8" if any(label.startswith("FP8") for label in labels) else ""
        _log.info(
            f"{have}: {', '.join(labels)} weights are decoded once, with keep_packed=True as well, and take {mib:.1f} MiB on this rank "
            f"in place of {packed:.1f} MiB; they are multiplied with inputs in {dtype}{given}: no grouped product of codes is used here"
        )
    elif plans and _has_codes(decoder):
        _log.info(f"{have} have no codes in the model as it was loaded: weights and inputs are in {dtype}, {mib:.1f} MiB on this rank")
    elif plans and quant is not None:
        _log.info(f"{have}: quant={quant!r} leaves weights and inputs in {dtype}, {mib:.1f} MiB on this rank")


def _cut(each: LinearPlan, owner: nn.Module, name: str, comm: Communicator, factor: float, summed: bool, undo: _Undo) -> None:
    """Put this rank's part in the place of a linear layer, or of the layer and the factors inside peft's LoRA."""
    linear: Any = each.linear
    if not each.lora:
        undo.set(owner, name, _part(linear, each, comm, factor, summed=summed))
        return
    undo.set(linear, "base_layer", _part(linear.base_layer, each, comm, factor, summed=False))
    factors = linear.lora_B if each.column else linear.lora_A
    for adapter, low_rank in list(factors.items()):
        undo.set(factors, adapter, _part(low_rank, each, comm, factor, summed=False))
    if summed:
        undo.hooks.append(linear.register_forward_hook(_summing(comm)))


def _part(linear: nn.Linear, each: LinearPlan, comm: Communicator, factor: float, *, summed: bool) -> nn.Module:
    rank, size, cut = comm.rank, comm.world_size, each.cut
    weight, bias, cuts = cut.part(linear.weight, rank, size), None if linear.bias is None else linear.bias.detach(), {"weight": cut}
    if each.column and bias is not None:
        bias, cuts["bias"] = cut.part(bias, rank, size), cut
    part = ColumnParallelLinear(weight, bias, comm) if each.column else _Row(weight, bias, comm, factor, summed)
    return _with_checkpoint(part, comm, cuts)


def _quantized_part(
    each: LinearPlan, quantized: QuantizedLinear, comm: Communicator, dtype: torch.dtype, factor: float, summed: bool, keep_packed: bool
) -> nn.Module:
    """This rank's part of a quantized layer. Where the device has no product for it, the weight is decoded unless it is to stay packed."""
    rank, size, cut, activation = comm.rank, comm.world_size, each.cut, quantized.activation
    powers = isinstance(quantized.weight.format, MXFP8 | MXFP4)  # scales that hold no factor
    packed = (quantized.weight if powers else quantized.weight.times(factor)).part(cut, rank, size, each.name)
    keep = keep_packed or has_product(activation, packed.format, comm.device)
    later = factor if powers and keep else 1.0  # taken in every call
    weight: Any = packed if keep else (packed.decode() * (factor if powers else 1.0)).to(dtype)
    bias: Any = getattr(each.linear, "bias", None)
    bias = None if bias is None else bias.detach() * (factor / later)
    part: Any = (
        ColumnParallelLinear(weight, None if bias is None else cut.part(bias, rank, size), comm, activation=activation, dtype=dtype)
        if each.column
        else _Row(weight, bias, comm, later, summed, activation=activation, dtype=dtype)
    )
    if factor != later:
        return no_checkpoint(part, f"weights that hold the model's factor {factor}")
    assert each.published is not None
    vars(part)["checkpoint"] = QuantizedCheckpoint(part, comm, cut, each.column, each.published, each.name)
    return part  # type: ignore[no-any-return]


def _cut_head(decoder: Decoder, cut: Cut, comm: Communicator, undo: _Undo) -> None:
    head = decoder.model.lm_head
    bias, cuts = None if head.bias is None else cut.part(head.bias, comm.rank, comm.world_size), {"bias": cut}
    if decoder.tied:
        part: ColumnParallelLinear = _TiedHead(head.weight, bias, comm)
        undo.set(decoder.model, "lm_head", part if bias is None else _with_checkpoint(part, comm, cuts))
        return
    part = ColumnParallelLinear(cut.part(head.weight, comm.rank, comm.world_size), bias, comm, gather=True)
    undo.set(decoder.model, "lm_head", _with_checkpoint(part, comm, {"weight": cut} | ({} if bias is None else cuts)))


class _TiedHead(ColumnParallelLinear):
    """An output layer whose weight is the embedding's, whole on every rank: each multiplies with its own rows of it.

    Another checkpoint, ``tie_weights()`` and changes of the embedding in place are changes of the output layer too.
    """

    def __init__(self, weight: nn.Parameter, bias: Tensor | None, comm: Communicator) -> None:
        super().__init__(weight, bias, comm, gather=True)
        self.weight = weight

    def product(self, x: Tensor | Output, bias: Tensor | None) -> Tensor:
        rows = self.weight.shape[0] // self.comm.world_size
        assert isinstance(x, Tensor)
        return F.linear(x, self.weight.narrow(0, self.comm.rank * rows, rows), bias)


def _with_checkpoint(part: nn.Module, comm: Communicator, cuts: Mapping[str, Cut | OnFirst]) -> nn.Module:
    if comm.world_size > 1:
        vars(part)["checkpoint"] = Checkpoint(part, comm, cuts)
    return part


class _Row(RowParallelLinear):
    """A row-parallel layer inside a model's own code: it returns its partial, which something behind it sums, or the plain sum.

    ``factor``: of the partial, taken where the product is still in float32.
    """

    def __init__(
        self, weight: Tensor | QuantizedWeight, bias: Tensor | None, comm: Communicator, factor: float, summed: bool, **formats: Any
    ) -> None:
        super().__init__(weight, bias, comm, **formats)
        self.factor, self.summed = factor, summed

    def partial(self, x: Tensor | Output) -> Tensor:
        if self.factor == 1.0 or self.format is not None or isinstance(x, Output):
            return super().partial(x)
        rows, bias = x.reshape(-1, x.shape[-1]), self.bias if self.comm.rank == 0 else None
        given, beta = (x.new_zeros(()), 0.0) if bias is None else (bias, self.factor)
        return torch.addmm(given, rows, self.weight.t(), beta=beta, alpha=self.factor).view(*x.shape[:-1], -1)

    def _decode_and_multiply(self, codes: Tensor, scales: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if self.factor == 1.0:
            return super()._decode_and_multiply(codes, scales, bias, dtype)
        return (super()._decode_and_multiply(codes, scales, bias, torch.float32) * self.factor).to(dtype)

    def forward(self, x: Tensor | Output) -> Tensor:  # type: ignore[override]
        partial = self.partial(x)
        return _sum(partial, self.comm) if self.summed else partial


def _summing(comm: Communicator) -> Any:
    """A forward hook that puts the sum in the place of the partial."""

    def hook(module: nn.Module, args: Any, returned: Any) -> Any:
        summed = _sum(partial_of(returned), comm)
        return (summed, *returned[1:]) if isinstance(returned, tuple) else summed

    return hook


def _sum(partial: Tensor, comm: Communicator) -> Tensor:
    from torch.distributed._functional_collectives import all_reduce

    if torch.is_grad_enabled():
        check_no_grad(("the partial", partial))
    group: Any = comm.group_name
    summed: Tensor = all_reduce(partial, "sum", group)
    return summed
