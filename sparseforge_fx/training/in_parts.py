"""A checkpoint that stays on disk until the processes of a run have cut its model up: each reads one block after the
other, keeps its part of it, and none ever holds the whole."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparseforge_fx.data.opening import is_self
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import has_no_values
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.models.companions import companions, copy_companions
from sparseforge_fx.models.compute_dtype import dtype_of
from sparseforge_fx.models.dense import load_dense
from sparseforge_fx.models.shards import Shards
from sparseforge_fx.models.streamed import StreamedModel
from sparseforge_fx.page.page import COSTS, PAGE, PLAN, QUALITY, REPORT, SPEED
from sparseforge_fx.training.recipe import FILE

#: files of dense weights, whose index may stand beside them (``pytorch_model.bin.index.json``, ``model.onnx_data``)
OTHER_WEIGHTS = re.compile(
    r"\.(bin|pt2?|pth|ckpt|gguf|ggml|h5|keras|msgpack|ot|onnx|tflite|mlmodel|npz|pkl|pdparams)(?![a-z0-9])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class InParts:
    """``model``, and what teaches it: itself, unless ``teacher`` is another checkpoint. ``start``: files of the model's
    names, with the weights that the run begins at."""

    model: StreamedModel
    teacher: StreamedModel | None = None
    start: Shards | None = None

    def stand_in(self, program: Exported) -> None:
        """Give the tensors of a program that was captured without values some: buffers their own, parameters one
        element's memory, until they are cut up."""
        made: dict[int, Tensor] = {}  # ties stay ties
        for tensors in (program.state, program.exported.constants):
            for name, value in tensors.items():
                if isinstance(value, Tensor) and has_no_values(value) and id(value) not in made:
                    made[id(value)] = self._stand_in(name, value)
        self._replace(program, made)

    def take(self, program: Exported, parts: Mapping[str, nn.Parameter]) -> None:
        """Put the parts that are here in the place of the program's parameters, and of the model's."""
        mine = {fqn: nn.Parameter(p.detach(), False) for fqn, p in parts.items() if fqn in program.state}
        self._replace(program, {id(program.state[fqn]): p for fqn, p in mine.items()})

    def _replace(self, program: Exported, made: Mapping[int, Any]) -> None:
        tables: list[dict[str, Any]] = [program.state, program.exported.constants]
        for module in self.model.skeleton.modules():
            tables += [module._parameters, module._buffers]
        for table in tables:
            for name, value in table.items():
                table[name] = made.get(id(value), value)

    def _stand_in(self, name: str, value: Tensor) -> Tensor:
        if not isinstance(value, nn.Parameter):
            return self.model.fetch(name).to(value.device)
        return nn.Parameter(one_element(value), requires_grad=value.requires_grad)

    def weight(self, name: str) -> Tensor:
        """A whole parameter. Raises SparseForgeError if it is not finite."""
        return _sound(self.model, name, self.start)

    def taught(self, name: str) -> Tensor:
        """The teacher's parameter in the place of one of the model."""
        return _sound(self.teacher or self.model, name)

    def weights(self, program: Exported) -> Fetched:
        """The dense model's tensors, by the names that the program has for them."""
        return Fetched(self.model, list(program.state))

    def teachers(self, program: Exported) -> Fetched | None:
        """The parameters of a teacher that was given, likewise."""
        names = [name for name, value in program.state.items() if isinstance(value, nn.Parameter)]
        return None if self.teacher is None else Fetched(self.teacher, names)

    @torch.no_grad()
    def write(self, folder: Path | None) -> None:
        """Copy the checkpoint into ``folder``, with the parts of all processes in the place of the weights that they
        share. All processes call it, those that do not write with None."""
        source, failure, to = self.model, None, None
        try:
            if folder is not None:
                copy_checkpoint(source, folder)
                to = Shards(folder)
        except Exception as error:  # the others wait for this one's parts
            failure = error
        for name, value in source.skeleton.named_parameters():
            if not isinstance(value, DTensor):
                continue  # nothing that the graph reads
            whole = value.full_tensor()
            try:
                if to is not None and failure is None:
                    source.write(name, whole.cpu(), to)
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure


def open_both(
    model: nn.Module | StreamedModel,
    teacher: nn.Module | StreamedModel | str | Path | None,
    data: Any,
    config: MethodConfig,
) -> tuple[InParts | None, nn.Module, nn.Module | None]:
    """Where weights come from that are on disk, if they are; the model; its teacher, if it is in memory."""
    if not isinstance(model, StreamedModel):
        if isinstance(teacher, StreamedModel):
            raise SparseForgeError("a model in memory has no teacher on disk: give its folder's name, or a model")
        return None, model, load_dense(teacher)[0] if isinstance(teacher, str | Path) else teacher
    if not isinstance(config, TrainedConfig):
        raise SparseForgeError("a method that does not train walks through a model on disk: sf.sparsify_on_disk")
    if is_self(data):
        raise SparseForgeError("a model that stays on disk draws no text: give a text as data")
    if not all(map(has_no_values, model.skeleton.parameters())):
        raise SparseForgeError("this StreamedModel has been through a run: make another one of its folder")
    if isinstance(teacher, str | Path):
        teacher = StreamedModel(teacher, model.device)
        teacher.compute_in(dtype_of(model.skeleton))
    if isinstance(teacher, nn.Module):
        raise SparseForgeError("a model on disk has no teacher in memory: give its folder, or a StreamedModel")
    return InParts(model, teacher), model.skeleton, None


class Fetched(Mapping[str, Tensor]):
    """Tensors of a model on disk that are read when they are asked for."""

    def __init__(self, source: StreamedModel, names: Sequence[str]):
        self._source, self._names = source, names

    def __getitem__(self, name: str) -> Tensor:
        return self._source.fetch(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def one_element(like: Tensor) -> Tensor:
    """Zeros in its form that take the memory of one."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)


def copy_checkpoint(
    source: StreamedModel, folder: Path, copy: Callable[[Path, Path], object] = shutil.copyfile
) -> None:
    """All files of a checkpoint but weights in other formats, and what is said there of another run's weights."""
    said = {REPORT, PAGE, FILE, QUALITY, SPEED, COSTS, PLAN}
    for file in source.folder.iterdir():
        other = file.suffix == ".safetensors" or OTHER_WEIGHTS.search(file.name) or file.name in said
        if file.is_file() and (file in source.shards.files or not other):
            copy(file, folder / file.name)
    copy_companions(companions(source.folder), folder)


def _sound(source: StreamedModel, name: str, shards: Shards | None = None) -> Tensor:
    value = source.fetch(name, shards)
    if not bool(torch.isfinite(value).all()):
        raise SparseForgeError(f"{name} in {source.folder} holds NaN or infinite values: repair the checkpoint first")
    return value
