"""State dictionaries of quantized parallel layers: the names, shapes and dtypes that the checkpoint has, whole, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from collogue.communicator import Communicator
from collogue.contract.quant import NVFP4, FP8PerToken, FP8Static
from collogue.contract.weight import FP8Block, QuantizedWeight
from collogue.errors import ArgumentError, ScaleError
from collogue.pytorch.checkpoints import QuantizedLinear, naming, tensors_of
from collogue.pytorch.cut import Checkpoint, Cut, gathered
from collogue.pytorch.scaled import Linear, check_like, factor_of
from collogue.pytorch.schemes import NAMES, Names, per_channel, weight_of


@dataclass
class Published:
    """The tensors of one whole layer: ``held`` has those of one element, and others without memory (meta).

    ``names``: what they are called; ``block``: of scales, where the layer says so.
    """

    names: Names
    held: dict[str, Tensor]
    block: int | None = None

    @classmethod
    def of(cls, linear: nn.Module, method: str | None, quantized: QuantizedLinear) -> Published:
        """Of a layer of a checkpoint; of one that is quantized on load, as compressed-tensors has it, blocks as fine-grained FP8 does."""
        if method is None:
            names = NAMES["fp8" if isinstance(quantized.weight.format, FP8Block) else "compressed-tensors"]
            tensors = _published(quantized, names)
            if isinstance(bias := getattr(linear, "bias", None), Tensor):
                tensors["bias"] = bias.detach()
        else:
            names, tensors = NAMES[method], tensors_of(linear)
        held = {name: tensor.cpu().clone() if tensor.numel() == 1 else tensor.to("meta") for name, tensor in tensors.items()}
        return cls(names, held, getattr(quantized.weight.format, "size", None))

    @property
    def codes(self) -> str:
        """The name of the codes."""
        return self.names.packed if self.names.packed in self.held else "weight"

    def check(self, given: Mapping[str, Tensor], prefix: str) -> None:
        """Raise where the tensors of a state are not those of this layer, or quantize its input in another way."""
        for name, held in self.held.items():
            if name not in given:
                raise ArgumentError(
                    f"the state has {prefix}{next(iter(given))}, but no {prefix}{name}",
                    hint="give all tensors of a quantized layer, or none",
                )
            found = given[name]
            hint = "load a state of the same quantization scheme; else load it unsharded and parallelize again"
            check_like(prefix + name, found, held, "the unsharded layer's", hint)
            if name in (self.names.input_scale, self.names.input_global) and not torch.equal(found.cpu(), held.cpu()):
                raise ScaleError(
                    f"{prefix}{name} of the state is {float(found)}, the layer's {float(held)}: fused calls have that scale too",
                    hint="load the state into an unsharded model, and parallelize it",
                )

    def keep(self, given: Mapping[str, Tensor]) -> None:
        """Hold the elements of a state that was loaded."""
        self.held |= {name: given[name].detach().cpu().clone() for name, held in self.held.items() if not held.is_meta}

    def read(self, given: Mapping[str, Tensor], *, by_channel: bool) -> QuantizedWeight:
        """The whole weight that these tensors are. ``by_channel``: one scale counts for every output feature."""
        factor = given.get(self.names.weight_global) if self.names.weight_global else None
        weight = weight_of(given[self.codes], given[self.names.weight_scale], factor, self.names, self.block)
        return per_channel(weight) if by_channel else weight

    def write(self, codes: Tensor, scales: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
        """The tensors, of the whole weight on the CPU."""
        found = {}
        for name, held in self.held.items():
            if not held.is_meta:
                found[name] = held.cpu().clone()
                continue
            tensor = codes if name == self.codes else bias if name == "bias" else scales
            assert tensor is not None
            if tensor.dtype != held.dtype:  # scales that were widened: exact both ways
                wide = held.dtype == torch.uint8 and tensor.element_size() > 1
                tensor = tensor.to(torch.float8_e8m0fnu) if wide else tensor
                tensor = tensor.view(held.dtype) if tensor.element_size() == held.element_size() == 1 else tensor.to(held.dtype)
            found[name] = tensor.reshape(held.shape)
        return found


def _published(quantized: QuantizedLinear, names: Names) -> dict[str, Tensor]:
    """The tensors of a layer that was quantized here."""
    weight, activation = quantized.weight, quantized.activation
    tensors = {names.packed if isinstance(weight.format, NVFP4) else "weight": weight.codes}
    if weight.scales is not None:
        powers = weight.scales.dtype == torch.float8_e8m0fnu
        tensors[names.weight_scale] = weight.scales.view(torch.uint8) if powers else weight.scales
    for format, scale, factor in (
        (weight.format, names.weight_scale, names.weight_global),
        (activation, names.input_scale, names.input_global),
    ):
        if isinstance(format, FP8Static):
            tensors[scale] = torch.tensor([format.scale])
        elif isinstance(format, NVFP4):
            tensors[factor] = torch.tensor([format.global_scale])
    return tensors


class QuantizedCheckpoint(Checkpoint):
    """What a quantized part does with state dictionaries. ``cut``: of the weight, and of the bias where ``column``."""

    def __init__(self, module: Linear, comm: Communicator, cut: Cut, column: bool, published: Published, name: str) -> None:
        super().__init__(module, comm, {})
        self.module, self.cut, self.column, self.published, self.name = module, cut, column, published, name
        vars(module)["check_state"] = self.read

    def read(self, state: Mapping[str, Any], prefix: str) -> tuple[dict[str, Tensor], QuantizedWeight | None]:
        """The layer's tensors in a whole state, and the weight that they are; none where the state leaves the layer out."""
        given = {name: state[prefix + name] for name in self.published.held if prefix + name in state}
        if not given:
            return given, None
        self.published.check(given, prefix)
        with naming(prefix.rstrip(".")):
            return given, self.published.read(given, by_channel=isinstance(self.module.format, FP8PerToken))

    def _load(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Put this rank's part in the place of the layer's tensors, where the state has them."""
        given, weight = self.read(state, prefix)
        if weight is None:
            return
        for name in given:
            del state[prefix + name]
        mine, device, rank, size = self.module, self.module.weight.device, self.comm.rank, self.comm.world_size
        part = weight.part(self.cut, rank, size, self.name)
        if mine.format is None:  # decoded once
            state[f"{prefix}weight"] = part.decode().to(mine.weight.dtype)
        else:
            found = {"weight": part.codes, "weight_scale": part.scales, "input_factor": mine.input_factor}
            found["weight_factor"] = factor_of(part.format, device)
            state |= {prefix + name: tensor.to(device) for name, tensor in found.items() if tensor is not None}
        if "bias" in given:
            state[f"{prefix}bias"] = self.cut.part(given["bias"], rank, size) if self.column else given["bias"]
        self.published.keep(given)

    def whole(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The layer's tensors as the checkpoint has them. Collective."""
        weight, bias = self.module.quantized_weight, self.module.bias
        if weight is None:
            raise ArgumentError(
                f"the weight of {self.name} was decoded when the model was cut, and its codes are gone",
                hint="pass keep_packed=True to parallelize, or keep the checkpoint that the model was loaded from",
            )
        of_codes, of_scales = weight.cuts(self.cut, self.name)
        scales = None if weight.scales is None else gathered(self.comm, of_scales, weight.scales)
        if bias is not None:
            bias = gathered(self.comm, self.cut if self.column else None, bias.data)  # type: ignore[assignment]
        return self.published.write(gathered(self.comm, of_codes, weight.codes), scales, bias)
