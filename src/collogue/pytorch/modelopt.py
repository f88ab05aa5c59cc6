"""ModelOpt's checkpoints as transformers models: transformers itself skips this quantization method, and the scales with it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from collogue.errors import ArgumentError, ShapeError
from collogue.pytorch.schemes import CACHE_SCALES


def load(folder: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model of a ModelOpt checkpoint, for :func:`collogue.parallelize`: quantized layers hold codes and scales as they are stored.

    Such a layer is a module with the tensors of the checkpoint and no forward pass: the model runs once it is parallelized.

    Args:
        folder: on this machine, with ``config.json`` and ``*.safetensors``; ``hf_quant_config.json`` where ``config.json`` does not
            say how the model is quantized.
        dtype: of what is not quantized, and of the activations.
    Raises:
        ArgumentError: no checkpoint, one of another method, tensors that the model does not have, or has and the checkpoint does not;
            a quantized embedding or norm; two tensors that differ, of names that the model ties to one weight.
        ShapeError: a tensor of another shape than the model's.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise ArgumentError(f"{folder} has no config.json and *.safetensors", hint="pass the folder of a checkpoint on this machine")
    config = AutoConfig.from_pretrained(folder)
    said = _quantization(folder, config)
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # from_config leaves it out where nothing is initialized
    missing = set(dict(model.named_parameters()))  # tied ones have one name
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for file in files:
        for name, tensor in load_file(file).items():
            owner, _, last = name.rpartition(".")
            found[owner][last] = tensor
            missing.discard(name)
    if missing:
        raise ArgumentError(f"the checkpoint has no {', '.join(sorted(missing)[:3])}", hint="copy all of its *.safetensors files")
    filled: dict[int, str] = {}
    for owner, tensors in found.items():
        _fill(model, owner, tensors, dtype, filled)
    model.config.quantization_config = said
    return model.eval().requires_grad_(False)


def _quantization(folder: Path, config: Any) -> dict[str, Any]:
    said = getattr(config, "quantization_config", None)
    beside = folder / "hf_quant_config.json"
    if said is None and beside.is_file():
        said = {"quant_method": "modelopt", **json.loads(beside.read_text(encoding="utf-8")).get("quantization", {})}
    method = said.get("quant_method") if isinstance(said, dict) else said
    if not isinstance(said, dict) or method != "modelopt":
        raise ArgumentError(
            f"the checkpoint's quantization method is {method!r}, not 'modelopt'",
            hint="load others by AutoModelForCausalLM.from_pretrained",
        )
    return said


def _fill(model: nn.Module, owner: str, tensors: dict[str, Tensor], dtype: torch.dtype, filled: dict[int, str]) -> None:
    """Put the tensors of one module in their place: a layer with codes becomes a module that holds them as they are.

    ``filled``: the name in the checkpoint of each weight's tensor, by the weight's ``id``: tied ones have two.
    """
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        raise ArgumentError(
            f"the checkpoint has {owner}.{next(iter(tensors))}, the model has no {owner}",
            hint="known are decoders whose experts are not quantized; load others dequantized",
        ) from None
    if codes := [name for name, tensor in tensors.items() if tensor.element_size() == 1]:
        if not isinstance(module, nn.Linear):
            raise ArgumentError(
                f"{owner}.{codes[0]} is {tensors[codes[0]].dtype} ({type(module).__name__})",
                hint="known are checkpoints whose linear layers alone are quantized; load others dequantized",
            )
        outer, _, last = owner.rpartition(".")
        layer: Any = nn.Module()
        layer.out_features, layer.in_features = module.out_features, module.in_features
        for name, tensor in tensors.items():
            _check_shape(module, owner, name, tensor)
            layer.register_parameter(name, nn.Parameter(tensor.to(dtype) if name == "bias" else tensor, False))
        setattr(model.get_submodule(outer), last, layer)
        return
    for name, tensor in tensors.items():
        if name in CACHE_SCALES:
            continue
        place = getattr(module, name, None)
        if not isinstance(place, Tensor) or place.shape != tensor.shape:
            raise _other_shape(f"{owner}.{name}", tensor, list(place.shape) if isinstance(place, Tensor) else None)
        whole = f"{owner}.{name}"
        if (other := filled.setdefault(id(place), whole)) != whole and not torch.equal(place, tensor.to(place.dtype)):
            raise ArgumentError(
                f"{whole} and {other} differ in the checkpoint, and the model ties them to one weight",
                hint="set tie_word_embeddings to false in config.json, or delete the one that is not meant",
            )
        place.data = tensor.to(place.dtype)


def _check_shape(module: nn.Linear, owner: str, name: str, tensor: Tensor) -> None:
    """Raise where codes or a bias are not of the model's layer. A byte holds two FP4 codes; scales are compared with codes later."""
    expected = {"weight": [module.out_features, module.in_features], "bias": [module.out_features]}.get(name)
    if expected is None:
        return
    if tensor.dtype == torch.uint8 and name == "weight":
        expected[1] //= 2
    if list(tensor.shape) != expected or (name == "bias" and module.bias is None):
        raise _other_shape(f"{owner}.{name}", tensor, None if name == "bias" and module.bias is None else expected)


def _other_shape(name: str, tensor: Tensor, shape: list[int] | None) -> ShapeError:
    return ShapeError(
        f"{name} is {list(tensor.shape)}, the model's {'none' if shape is None else shape}",
        hint="load the checkpoint with its own configuration",
    )
