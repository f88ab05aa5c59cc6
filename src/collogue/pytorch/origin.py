"""The files that a model was loaded from: what they hold of a quantized layer, and how their configuration says that it is quantized."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from collogue.errors import ArgumentError
from collogue.pytorch.checkpoints import quantization_of, quantizes_cache_alone

#: What transformers puts on each tensor that it has read from a file. A copy of a model has it no more.
_READ = "_is_hf_initialized"

#: Data types of codes, as files call them.
_CODES = ("F8_E4M3", "F8_E5M2", "U8", "I8")


def dequantized(config: Any) -> str:
    """That a model without codes is of a checkpoint with some, and what that asks, in words; empty where the checkpoint has none.

    transformers deletes what the configuration says when it dequantizes a model on load: then the file is read.
    """
    if quantizes_cache_alone(config):
        return ""
    said = quantization_of(config) or Origin(config).quantization
    inputs = str(said.get("activation_scheme", ""))
    for group in said.get("config_groups", {}).values():
        given = group.get("input_activations") if isinstance(group, dict) else None
        inputs = inputs if given is None else "dynamic" if given.get("dynamic") else "static"
    asked = f"{said.get('quant_method')!r}" + f" with {inputs} scales of inputs" * bool(inputs)
    how = "transformers may have dequantized them on load"
    return f"the checkpoint's quantization method is {asked}, but no layer of the model has codes ({how})" if said else ""


class Origin:
    """The files on this machine that a transformers configuration names. Where there are none, nothing is known of them."""

    def __init__(self, config: Any) -> None:
        self.place, self.revision = getattr(config, "_name_or_path", ""), getattr(config, "_commit_hash", None)

    def _file(self, name: str) -> Path | None:
        from transformers.utils import cached_file

        if not self.place:
            return None
        quiet = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
        options: dict[str, Any] = {f"_raise_exceptions_for_{each}": raises for each, raises in quiet.items()}
        try:
            found = cached_file(self.place, name, local_files_only=True, revision=self.revision, **options)
        except (OSError, ValueError):  # no folder, and no name of a repository
            return None
        return None if found is None else Path(found)

    @property
    def quantization(self) -> dict[str, Any]:
        """How the configuration in the folder says that the model is quantized; empty where it does not."""
        file = self._file("config.json")
        said = {} if file is None else json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
        return said if isinstance(said, dict) else {}

    @cached_property
    def layers(self) -> dict[str, dict[str, str]]:
        """Names and data types of the stored tensors, by their layer's name: the heads of the files are read."""
        index = self._file("model.safetensors.index.json")
        names = {"model.safetensors"} if index is None else set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        found: dict[str, dict[str, str]] = {}
        for file in map(self._file, names):
            for name, tensor in ({} if file is None else _head(file)).items():
                layer, _, last = name.rpartition(".")
                found.setdefault(layer, {})[last] = tensor.get("dtype", "")
        return found

    @property
    def has_codes(self) -> bool:
        """Whether any stored tensor may be codes."""
        return any(dtype in _CODES for tensors in self.layers.values() for dtype in tensors.values())

    def check_read(self, layer: nn.Module, name: str, prefix: str, wanted: Iterable[str]) -> None:
        """Raise :class:`ArgumentError` where the files lack a tensor of a layer: transformers then leaves what lies in memory.

        Copies of a model do not show what was read: then the files are asked, and where there are none either, nothing is known.

        Args:
            prefix: of the base model's names in the whole one, which files may leave out.
            wanted: names of codes and scales, whichever of them the layer has.
        """
        needed = {each: tensor for each in wanted if isinstance(tensor := getattr(layer, each, None), Tensor)}
        missing = [each for each, tensor in needed.items() if not hasattr(tensor, _READ)]
        if len(missing) == len(needed):
            stored = self.layers.get(prefix + name) or self.layers.get(name) or {}
            coded = any(dtype in _CODES for dtype in stored.values())
            missing = [each for each in needed if each not in stored] if coded else []
        if missing:
            raise ArgumentError(
                f"{name}: the checkpoint has no {' and no '.join(missing)}, and transformers has left numbers there that mean nothing",
                hint="copy all of its files, or calibrate the model before it is saved; then load it again",
            )


def _head(file: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file: eight bytes say how long their description is."""
    with file.open("rb") as stream:
        head: dict[str, dict[str, Any]] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    head.pop("__metadata__", None)
    return head
